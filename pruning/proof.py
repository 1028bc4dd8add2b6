"""The proof of a channel group: removing its units computes what silencing them computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graph_encoder.batches import inputs_of, tensors_of
from graph_encoder.copies import copied
from graph_encoder.errors import first_line
from graph_encoder.modes import attributes_kept, evaluation_mode
from graph_encoder.network import NetworkGraph, TraceError
from graph_encoder.randomness import kept_randomness

from .batch_norm import batch_norms, reestimate_batch_norm
from .policy import CompressionPolicy
from .surgery import apply_policy, mask_policy

TOLERANCE = 1e-4
"""Largest difference of outputs allowed, as a share of the output's scale."""
RESPONSE = 1e-2
"""Least difference, on the same scale, that other inputs must make to the outputs for a comparison to mean anything."""
_NOTHING = 1e-6
"""Share of the largest output's scale that the others' are taken to have at least."""
_ASLEEP, _AWAKE = 1e-3, 0.1
"""A parameter with no value above the one lets nothing through; the values that it gets instead go up to the other."""
_FAILURES = (RuntimeError, ValueError, IndexError)
"""What a forward pass raises where shapes do not fit."""


@dataclass(frozen=True)
class Proof:
    """Result for one group, or for all groups at once.

    Attributes:
        subject: group name, or ``"all groups"``.
        removed: units removed.
        error: largest difference between removed and masked, divided by the largest value of that output; infinite if
            the smaller network does not run or has other outputs, NaN if there was nothing to compare.
        message: why no comparison was possible, empty otherwise.
    """

    subject: str
    removed: int
    error: float
    message: str = ""

    @property
    def holds(self) -> bool:
        """Whether removing equals masking within `TOLERANCE`."""
        return not self.message and self.error <= TOLERANCE

    @property
    def is_refuted(self) -> bool:
        """Whether removing was seen to be something else than masking."""
        return self.error > TOLERANCE


def random_policy(
    graph: NetworkGraph, generator: torch.Generator, groups: Sequence[str] | None = None
) -> CompressionPolicy:
    """Remove random units of each of ``groups`` (all offered ones by default), up to a quarter or two of them."""
    kept, sizes = {}, {}
    for group in graph.prunable if groups is None else [graph.group(name) for name in groups]:
        most = max(group.size // 4, min(2, group.size // 2), 1)
        n_removed = 1 + int(torch.randint(most, (1,), generator=generator))
        order = torch.randperm(group.size, generator=generator)[n_removed:]
        kept[group.name], sizes[group.name] = tuple(sorted(order.tolist())), group.size
    return CompressionPolicy(kept, sizes)


def prove(
    model: nn.Module,
    graph: NetworkGraph,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    generator: torch.Generator,
    each_group: bool = True,
) -> list[Proof]:
    """Compare removing with masking, on random units of all offered groups together and of each alone.

    What is to be shown holds for any weights. The comparison is made on two copies, whose batch norms have the
    statistics of these inputs: with the weights that there are, and with others with which no signal dies out on the
    way, see `_rouse`, or whatever is removed would make no difference, as in many networks before they are trained. It
    is made on the inputs beside others, for floats half of their negatives, and of each output on a scale of its own.

    Args:
        model: the captured network; untouched.
        graph: its graph.
        example_inputs: real inputs, batch first, on the model's device.
        generator: draws the units.
        each_group: also prove every group alone.

    Returns:
        One result for all groups, then one a group.

    Raises:
        TraceError: if a copy of the network computes with the tensors of the network itself.
    """
    # Half, since the spectrum of the negatives is that of the inputs. Of integers nothing is known but that those of
    # another row are inputs too.
    inputs = tuple(
        torch.cat([x, -x / 2 if x.is_floating_point() else x.roll(1, 0)]) if x.dim() else x
        for x in inputs_of(example_inputs)
    )
    _check_independent(model, graph, inputs)
    plain, roused = copied(model), copied(model)
    with attributes_kept(plain):
        reestimate_batch_norm(plain, [inputs])
    _rouse(roused, inputs)
    subjects: list[tuple[str, list[str] | None]] = [("all groups", None)]
    if each_group:
        subjects += [(group.name, [group.name]) for group in graph.prunable]
    proofs = []
    for subject, names in subjects:
        policy = random_policy(graph, generator, names)
        found = [_prove_twice(network, graph, inputs, subject, policy) for network in (plain, roused)]
        # What says nothing says nothing against the other.
        proofs.append(max(found, key=lambda proof: -1.0 if math.isnan(proof.error) else proof.error))
    return proofs


class _Readers(TorchFunctionMode):
    """Notes whether anything that runs within reads one of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._tensors = {id(tensor): tensor for tensor in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or any(id(leaf) in self._tensors for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _check_independent(model: nn.Module, graph: NetworkGraph, inputs: tuple[Tensor, ...]) -> None:
    """Refuse a network whose copies read what can be removed in the original: nothing done to them would be seen."""
    removable = {member.tensor for group in graph.prunable for member in group.members}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = [tensor for name, tensor in tensors if name in removable]
    with evaluation_mode(model), attributes_kept(model), torch.no_grad(), kept_randomness():
        copy = copied(model)
        # What stops it stops the smaller network, too, and is told of that.
        with _Readers(held) as readers, suppress(Exception):
            copy(*inputs)
    if readers.found:
        msg = (
            f"a copy of {type(model).__name__} computes with weights of the original: a forward or a hook in it is a "
            "function that holds the network or a layer, as a lambda or a closure does, so that a smaller copy would "
            "go on running what it was copied from. Make it a method of the module's class"
        )
        raise TraceError(msg)


def leave_refuted_dense(
    model: nn.Module, graph: NetworkGraph, example_inputs: Tensor | Sequence[Tensor], *, seed: int = 0
) -> NetworkGraph:
    """The graph without the groups whose proof fails: what capture could not see, numbers may.

    ``forward`` may compute with a width (a scale of ``x.shape[1] ** -0.5``), which leaves every shape as it should be.

    Args:
        model: the captured network; untouched.
        graph: its graph.
        example_inputs: inputs of the network, batch first. The first two of the batch are used, moved to the model's
            device, with noise on those of floats.
        seed: of noise and units.

    Returns:
        The graph; groups that were offered and fail have a reason now.

    Raises:
        TraceError: if removing from several groups at once fails where no group fails alone.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple((_with_noise(x[:2], generator) if x.dim() else x).to(device) for x in inputs_of(example_inputs))
    while graph.prunable:
        together = prove(model, graph, inputs, generator=generator, each_group=False)[0]
        if together.holds:
            break
        # Where there was nothing to compare, one group may be to blame for it, and hide what others do.
        alone = prove(model, graph, inputs, generator=generator)[1:]
        refuted = {proof.subject: proof for proof in alone if proof.is_refuted}
        if not refuted and not together.is_refuted:
            break
        if not refuted:
            msg = (
                f"removing channels of several groups at once is not what silencing them is ({_why(together)}), though "
                "it is for each group alone: forward computes with a number that follows from more than one width, and "
                "the network cannot be pruned safely until that is mended"
            )
            raise TraceError(msg)
        groups = [
            replace(group, reason=f"removing is not what silencing is: {_why(refuted[group.name])}")
            if group.name in refuted
            else group
            for group in graph.groups
        ]
        skipped = {name: group.reason for group in groups if group.name in refuted for name in group.producers}
        graph = replace(graph, groups=tuple(groups), skipped={**graph.skipped, **skipped})
    return graph


def _with_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    return x + torch.randn(x.shape, generator=generator).to(x)


def _why(proof: Proof) -> str:
    return proof.message or f"outputs differ by {proof.error:.1e} of their scale"


def _rouse(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Have every layer of ``model`` make a difference to what comes out, in place.

    Parameters of all but zeros, with which residual branches and heads begin, get random values. Convolutions and
    linear layers are scaled, or what they say would be lost beside their biases and the epsilon of norms, and batch
    norms get the statistics of these inputs.
    """
    generator = torch.Generator().manual_seed(0)
    # What forward keeps for its next call was made of what is roused.
    with attributes_kept(model), torch.no_grad(), kept_randomness(), _scaled_layers(model):
        for parameter in model.parameters():
            # Of floats of one byte there is no maximum.
            has_values = parameter.is_floating_point() and parameter.numel() and not parameter.is_meta
            if has_values and parameter.dtype.itemsize > 1 and parameter.abs().max() < _ASLEEP:
                parameter.copy_(_AWAKE * torch.rand(parameter.shape, generator=generator))
        if batch_norms(model):
            reestimate_batch_norm(model, [inputs])
        else:
            # What stops it stops the smaller network, too, and is told of that.
            with evaluation_mode(model), suppress(*_FAILURES):
                model(*inputs)


@contextmanager
def _scaled_layers(model: nn.Module) -> Iterator[None]:
    """Scale each convolution and linear layer when it first runs: what it adds to its bias has a mean square of one."""
    scaled: set[Tensor] = set()

    def scale(layer: Any, args: Any, kwargs: Any) -> None:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or not weight.is_floating_point() or weight in scaled:
            return
        scaled.add(weight)
        if bias is not None:
            kept = bias.clone()
            bias.zero_()
        size = float(layer.forward(*args, **kwargs).float().square().mean().sqrt())
        if bias is not None:
            bias.copy_(kept)
        if 0 < size < math.inf:
            weight.div_(size)

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    hooks = [layer.register_forward_pre_hook(scale, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _prove_twice(
    model: nn.Module, graph: NetworkGraph, inputs: tuple[Tensor, ...], subject: str, policy: CompressionPolicy
) -> Proof:
    """The proof, in double precision where single refutes it and the network runs in double: deep networks round."""
    proof = _prove(model, graph, inputs, subject, policy)
    if not proof.is_refuted:
        return proof
    doubled = copied(model).double()
    try:
        again = _prove(
            doubled, graph, tuple(x.double() if x.is_floating_point() else x for x in inputs), subject, policy
        )
    except _FAILURES:
        return proof
    return proof if again.message else again


def _prove(
    model: nn.Module, graph: NetworkGraph, inputs: tuple[Tensor, ...], subject: str, policy: CompressionPolicy
) -> Proof:
    n_removed = sum(policy.sizes[name] - len(kept) for name, kept in policy.kept.items())
    with torch.inference_mode():
        try:
            small = _outputs(apply_policy(model, graph, policy).eval(), inputs)
        except _FAILURES as error:
            return Proof(subject, n_removed, math.inf, first_line(error))
        wide = _outputs(mask_policy(model, graph, policy).eval(), inputs)
    if [t.shape for t in small] != [t.shape for t in wide]:
        return Proof(subject, n_removed, math.inf, "the outputs changed their shapes")
    if not all(t.isfinite().all() for t in [*small, *wide]):
        return Proof(subject, n_removed, math.nan, "the outputs hold NaN or infinity")
    scales = [float(t.abs().max()) for t in wide]
    # What is all but nothing beside another output is the rounding of larger numbers.
    scales = [max(scale, _NOTHING * max(scales), 1e-30) for scale in scales]
    compared = [
        float((one - other).abs().max()) / scale
        for one, other, scale in zip(small, wide, scales, strict=True)
        if _response(other) >= RESPONSE * scale
    ]
    if not compared:
        return Proof(subject, n_removed, math.nan, "the outputs hardly depend on the inputs: nothing to compare")
    return Proof(subject, n_removed, max(compared))


def _response(output: Tensor) -> float:
    """Largest difference between what the inputs and what the others give."""
    half = output.shape[0] // 2
    return float((output[:half] - output[half:]).abs().max())


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What is returned of each image; what forward draws at random is the same in the networks that are compared."""
    with torch.random.fork_rng([x.device for x in inputs if x.device.type == "cuda"][:1]):
        torch.manual_seed(0)
        return [output.double() for output in tensors_of(model(*inputs)) if output.dim()]
