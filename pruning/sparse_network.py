"""A network whose weights hold zeros, prepared to run as one native call that skips them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from graph_encoder.batches import inputs_of
from graph_encoder.errors import SecateurError

from .kernels.functional import sparse_linear
from .kernels.lowering import Lowered, lower
from .kernels.native import Library, library
from .kernels.operators import Convolution, Foreign, Linear, Operator, Weighted
from .kernels.plan import DENSE, FORMATS, FORMS, UNSTRUCTURED, WINOGRAD, Plan, pack_as, takes_winograd

Measure = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]
"""Seconds of a call of each candidate; candidates are to be called in turn, so that noise falls on all of them."""

MOST_STORED = 0.75
"""A form that stores a larger share of the weights is not timed: dense kernels do more a second."""
SWEEPS = 3
"""Times that all layers are timed, one after the other: what disturbs one layer's rounds is mostly over by the next."""
LEAST_GAIN = 0.97
"""Another form is taken where it needs at most this share of the dense time: below that is noise."""


class SparseNetworkError(SecateurError, ValueError):
    """A network that cannot be prepared, or inputs that a prepared network does not take."""


@dataclass(frozen=True)
class LayerChoice:
    """In what form one layer runs.

    Attributes:
        layer: qualified name; a layer that is called several times has ``"(2)"`` behind its name the second time.
        form: ``"dense"``, ``"winograd"`` (dense too, with fewer multiplications, for 3x3 convolutions of stride 1),
            ``"unstructured"`` or ``"block 4"``, ``"block 8"``, ``"block 16"``.
        density: share of the weights that are not zero, in [0, 1].
        stored: share of the weights that the form holds, zeros among them, in [0, 1]; all of them if dense.
        seconds: of a call of the layer in each form that was timed.
        reason: why this form, in words.
    """

    layer: str
    form: str
    density: float
    stored: float
    seconds: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class SparseReport:
    """How a network was prepared.

    Attributes:
        layers: one choice for each linear layer and each convolution whose channels are not grouped; depthwise ones
            are always dense, and other grouped ones are ``foreign``.
        foreign: name and PyTorch operator of everything that PyTorch runs.
        native_calls: of a forward pass; 1 if the plan runs all of the network, 0 without the compiled library.
        instruction_set: of the kernels; None without the compiled library.
        threads: of PyTorch while layers were timed.
        arena_bytes: memory of the activations.
        weight_bytes: memory of the packed weights, with the places of their non-zeros.
    """

    layers: tuple[LayerChoice, ...]
    foreign: tuple[tuple[str, str], ...]
    native_calls: int
    instruction_set: str | None
    threads: int
    arena_bytes: int
    weight_bytes: int

    @property
    def choices(self) -> dict[str, str]:
        """The form of each layer by name, for `sparsify` to take the same ones again."""
        return {layer.layer: layer.form for layer in self.layers}


def measure_in_turn(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 4) -> dict[str, float]:
    """Seconds of the fastest call of each candidate; each round starts one candidate later.

    The fastest call and not the median: what else the machine does only ever adds time, more to slow candidates than to
    fast ones, and on two threads many times their own.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-3, rounds):
        for turn in range(len(names)):
            name = names[(round_index + turn) % len(names)]
            start = time.perf_counter()
            candidates[name]()
            if round_index >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}


def sparsify(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    measure: Measure = measure_in_turn,
    choices: Mapping[str, str] | None = None,
) -> SparseNetwork:
    """Prepare a network whose weights hold zeros to run fast on the CPU.

    Batch norms are folded, activations and residual additions fused into the layers before them. Each layer runs in the
    form that is fastest: dense, by direct sums or by Winograd's filtering, or in one of the sparse forms that its zeros
    fit, which is found from the zeros themselves. What the native plan cannot run, PyTorch runs in between, and the
    report names it. Without the compiled library PyTorch runs everything, at dense speed.

    Args:
        model: network in evaluation mode, in float32 on the CPU; untouched, and not referred to afterwards.
        example_inputs: positional inputs; every later call takes inputs of the same sizes, batch included.
        measure: times the forms of a layer, `SWEEPS` times with other layers in between; the least times count. The
            choice holds for the number of threads that PyTorch has now.
        choices: form of each layer by name, as in `SparseReport.choices`: those layers are not timed, and preparation
            is deterministic.

    Raises:
        SparseNetworkError: if the model is in training mode, not in float32, or not on the CPU, or if ``choices`` does
            not fit it.
        LoweringError: if PyTorch cannot export it.
    """
    inputs = inputs_of(example_inputs)
    _check_model(model, inputs)
    lowered = lower(model, inputs)
    operators = tuple(_with_own_names(lowered.operators))
    native = library()
    layers = [one for one in operators if isinstance(one, Weighted) and not _is_depthwise(one)]
    _check_choices(choices or {}, layers)
    sizes = dict(zip(lowered.inputs, (tuple(x.shape) for x in inputs), strict=True))
    sizes |= {one.output: one.size for one in operators}
    made = _choose_all(native, layers, sizes, measure, choices or {})
    forms = {one.output: choice.form for one, choice in zip(layers, made, strict=True)}
    parts = _parts(native, operators, lowered, sizes, forms)
    plans = [part.plan for part in parts if isinstance(part, _NativePart)]
    report = SparseReport(
        layers=made,
        foreign=tuple((one.name, one.kind) for one in operators if isinstance(one, Foreign)),
        native_calls=len(plans),
        instruction_set=native.instruction_set if native else None,
        threads=torch.get_num_threads(),
        arena_bytes=sum(plan.arena_bytes for plan in plans),
        weight_bytes=sum(plan.weight_bytes for plan in plans),
    )
    return SparseNetwork(parts, lowered, inputs, report)


class SparseNetwork(nn.Module):
    """A prepared network, for inference only; `sparsify` makes it.

    It computes what the model computed when it was prepared, in float32 under autocast too, without gradients, on as
    many threads as PyTorch has at the call. An input that the model changes in place is left as it is. Calls from
    several Python threads are allowed and take turns. It holds no parameters: save the model, and prepare it again with
    ``report.choices``.

    Attributes:
        report: how it was prepared.
    """

    def __init__(
        self, parts: Sequence[_Part], lowered: Lowered, inputs: Sequence[Tensor], report: SparseReport
    ) -> None:
        super().__init__()
        self.report = report
        self._parts, self._lowered = tuple(parts), lowered
        self._sizes = tuple((tuple(x.shape), x.dtype) for x in inputs)
        self.train(False)

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns for ``inputs``.

        Raises:
            SparseNetworkError: if number, size, dtype or device of the inputs are not those of the example inputs.
        """
        self._check(inputs)
        values: dict[str, Any] = dict(zip(self._lowered.inputs, inputs, strict=True)) | self._lowered.constants
        # Entering a block of autocast takes as long as a small layer.
        in_float32 = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
        with torch.no_grad(), in_float32:
            for part in self._parts:
                part.run(values)
        # The caller may write into what it gets.
        kept = self._lowered.constants
        outputs = [values[name].clone() if name in kept else values[name] for name in self._lowered.outputs]
        return tree_unflatten(outputs, self._lowered.structure)

    def train(self, mode: bool = True) -> SparseNetwork:
        """Stay in evaluation mode.

        Raises:
            SparseNetworkError: if ``mode`` is set.
        """
        if mode:
            msg = "a sparse network is for inference only; train the model that it was prepared from, and prepare again"
            raise SparseNetworkError(msg)
        return super().train(False)

    def __reduce__(self) -> NoReturn:
        msg = (
            "a sparse network cannot be copied or pickled, since it holds addresses; save the model it was prepared "
            "from, and call sparsify(model, example_inputs, choices=network.report.choices)"
        )
        raise TypeError(msg)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._sizes):
            msg = f"the sparse network was prepared for {len(self._sizes)} input(s), got {len(inputs)}"
            raise SparseNetworkError(msg)
        for index, (x, (size, dtype)) in enumerate(zip(inputs, self._sizes, strict=True)):
            if tuple(x.shape) != size or x.dtype != dtype or x.device.type != "cpu":
                msg = (
                    f"input {index} is {x.dtype} of shape {tuple(x.shape)} on '{x.device}'; the sparse network was "
                    f"prepared for {dtype} of shape {size} on 'cpu', so prepare another one for such inputs"
                )
                raise SparseNetworkError(msg)


# ---------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, eq=False)
class _NativePart:
    """Operators in one native call."""

    plan: Plan
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Any]) -> None:
        found = self.plan.run(*(values[name].contiguous() for name in self.inputs))
        values.update(zip(self.outputs, found, strict=True))


@dataclass(frozen=True, eq=False)
class _TorchPart:
    """One operator run by PyTorch."""

    operator: Operator
    compute: Callable[..., Any]

    def run(self, values: dict[str, Any]) -> None:
        values[self.operator.output] = self.compute(*(values[name] for name in self.operator.inputs))


_Part = _NativePart | _TorchPart


def _parts(
    native: Library | None,
    operators: Sequence[Operator],
    lowered: Lowered,
    sizes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, str],
) -> list[_Part]:
    """The operators in runs of native ones, as long as their order allows."""
    if native is None:
        return [_TorchPart(one, one.compute) for one in operators]
    left, known = list(operators), {*lowered.inputs, *lowered.constants}
    parts: list[_Part] = []
    while left:
        run: list[Operator] = []
        for one in list(left):
            if _is_native(one, sizes) and known.issuperset(one.inputs):
                run.append(one)
                known.add(one.output)
                left.remove(one)
        if run:
            parts.append(_native_part(native, run, {name for o in left for name in o.inputs}, lowered, sizes, forms))
        while left and not any(_is_native(one, sizes) and known.issuperset(one.inputs) for one in left):
            one = next(one for one in left if known.issuperset(one.inputs))
            parts.append(_TorchPart(one, _torch_call(one, forms)))
            known.add(one.output)
            left.remove(one)
    return parts


def _native_part(
    native: Library,
    run: Sequence[Operator],
    read_later: Iterable[str],
    lowered: Lowered,
    sizes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, str],
) -> _NativePart:
    made = [one.output for one in run]
    inputs = tuple(dict.fromkeys(name for one in run for name in one.inputs if name not in made))
    wanted = {*read_later, *lowered.outputs}
    outputs = tuple(name for name in made if name in wanted)
    return _NativePart(Plan(native, run, {name: sizes[name] for name in inputs}, outputs, forms), inputs, outputs)


def _is_native(one: Operator, sizes: Mapping[str, tuple[int, ...]]) -> bool:
    shapes = [one.size, *(sizes[name] for name in one.inputs)]
    if isinstance(one, Linear) and len(one.size) != 2:  # a plan takes the second of four dimensions for the channels
        return False
    return not isinstance(one, Foreign) and all(len(shape) in (2, 4) and 0 not in shape for shape in shapes)


def _torch_call(one: Operator, forms: Mapping[str, str]) -> Callable[..., Any]:
    form = forms.get(one.output, DENSE)
    if not isinstance(one, Linear) or form == DENSE:
        return one.compute
    weight, bias, activation, features = pack_as(one.weight, form), one.bias, one.activation, one.weight.shape[0]
    if weight.shape[0] != features and bias is not None:
        bias = torch.cat([bias, bias.new_zeros(weight.shape[0] - features)])

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if weight.shape[0] == features:
            return sparse_linear(x, weight, bias, residual, activation=activation)
        return one._finish(sparse_linear(x, weight, bias)[..., :features], () if residual is None else (residual,))

    return call


# -------------------------------------------------------------------------------------------------------------- choices


def _choose_all(
    native: Library | None,
    layers: Sequence[Weighted],
    sizes: Mapping[str, tuple[int, ...]],
    measure: Measure,
    wanted: Mapping[str, str],
) -> tuple[LayerChoice, ...]:
    stored = [
        {form: _stored(one.weight, block) for form, block in FORMATS.items() if form != DENSE}
        | {DENSE: 1.0, WINOGRAD: 1.0}
        for one in layers
    ]
    timed: list[dict[str, float]] = [{} for _ in layers]
    for _ in range(SWEEPS):
        for one, shares, seconds in zip(layers, stored, timed, strict=True):
            candidates = _worth_timing(shares)
            if takes_winograd(one) and _is_native(one, sizes):
                candidates = [WINOGRAD, *candidates]
            if native is None or one.name in wanted or not candidates:
                continue
            found = measure({form: _probe(native, one, sizes, form) for form in (DENSE, *candidates)})
            seconds.update({form: min(time, seconds.get(form, time)) for form, time in found.items()})
    return tuple(
        _choose(native, one, shares, seconds, wanted.get(one.name))
        for one, shares, seconds in zip(layers, stored, timed, strict=True)
    )


def _choose(
    native: Library | None, one: Weighted, stored: Mapping[str, float], seconds: Mapping[str, float], wanted: str | None
) -> LayerChoice:
    density = stored[UNSTRUCTURED]
    if native is None:
        return LayerChoice(one.name, DENSE, density, 1.0, {}, "the kernels are not compiled")
    if wanted is not None:
        return LayerChoice(one.name, wanted, density, stored[wanted], {}, "chosen by the caller")
    if not seconds:
        reason = f"{density:.0%} of the weights are not zero, and no sparse form stores fewer than {MOST_STORED:.0%}"
        return LayerChoice(one.name, DENSE, density, 1.0, {}, reason)
    fastest = min((form for form in seconds if form != DENSE), key=lambda form: seconds[form])
    ratio = seconds[DENSE] / seconds[fastest]
    if seconds[fastest] > LEAST_GAIN * seconds[DENSE]:
        reason = f"the fastest other form, {fastest}, runs at {ratio:.2f} times the dense speed"
        return LayerChoice(one.name, DENSE, density, 1.0, seconds, reason)
    reason = f"{ratio:.2f} times the dense speed"
    return LayerChoice(one.name, fastest, density, stored[fastest], seconds, reason)


def _stored(weight: Tensor, block: int) -> float:
    """Share of the weights that blocks of this size store, those added to fill the last block left out."""
    kept = weight != 0
    missing = -len(kept) % block
    if missing:
        kept = torch.cat([kept, kept.new_zeros(missing, *kept.shape[1:])])
    return float(kept.reshape(-1, block, *kept.shape[1:]).any(1).float().mean())


def _worth_timing(stored: Mapping[str, float]) -> list[str]:
    """Sparse forms, the largest block first: a smaller one has to store less to have a chance."""
    worth: list[str] = []
    for form in sorted((form for form in FORMATS if form != DENSE), key=lambda form: -FORMATS[form]):
        if stored[form] <= MOST_STORED and all(stored[form] < 0.95 * stored[larger] for larger in worth):
            worth.append(form)
    return worth


def _probe(native: Library, one: Weighted, sizes: Mapping[str, tuple[int, ...]], form: str) -> Callable[[], object]:
    inputs = {name: sizes[name] for name in one.inputs}
    if _is_native(one, sizes):
        return Plan(native, [one], inputs, (), {one.output: form}, holds_inputs=True).run
    call = _torch_call(one, {one.output: form})
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") for size in inputs.values()]
    return lambda: call(*tensors)


def _is_depthwise(one: Operator) -> bool:
    return isinstance(one, Convolution) and one.is_depthwise


def _with_own_names(operators: Sequence[Operator]) -> Iterable[Operator]:
    seen: dict[str, int] = {}
    for one in operators:
        seen[one.name] = seen.get(one.name, 0) + 1
        yield one if seen[one.name] == 1 else replace(one, name=f"{one.name} ({seen[one.name]})")


# --------------------------------------------------------------------------------------------------------------- checks


def _check_model(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    if model.training:
        msg = f"{type(model).__name__} is in training mode; call model.eval() before preparing it for inference"
        raise SparseNetworkError(msg)
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in [*named, *((f"input {index}", x) for index, x in enumerate(inputs))]:
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            msg = (
                f"'{name}' is {tensor.dtype} on '{tensor.device}'; sparse networks run in torch.float32 on 'cpu', "
                f"so convert the network and its inputs first"
            )
            raise SparseNetworkError(msg)


def _check_choices(choices: Mapping[str, str], layers: Sequence[Weighted]) -> None:
    by_name = {layer.name: layer for layer in layers}
    for name, form in choices.items():
        if name not in by_name:
            known = ", ".join(f"'{layer}'" for layer in by_name)
            msg = f"choices names the layer '{name}'; layers that have a choice are {known}: leave out the others"
            raise SparseNetworkError(msg)
        allowed = FORMS if takes_winograd(by_name[name]) else tuple(FORMATS)
        if form not in allowed:
            msg = (
                f"choices asks for the form '{form}' of '{name}'; allowed there are {', '.join(allowed)} "
                f"({WINOGRAD} for 3x3 convolutions of stride 1 only). Leave the layer out to have its forms timed"
            )
            raise SparseNetworkError(msg)
