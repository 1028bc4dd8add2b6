"""Least-squares reconstruction: what is left of a layer's inputs is fitted to what the layer used to put out."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graph_encoder.batches import Batch, count_images, first_images, inputs_of
from graph_encoder.modes import evaluation_mode
from graph_encoder.network import NetworkGraph
from graph_encoder.resize import removed_positions

from .policy import CompressionPolicy

MOST_BYTES = 1_000_000_000
"""Most that one output of a network may take on all images that it is refitted on; two or three are held at a time."""

_SUMS_IN_PLACE = {"add_", "__iadd__"}
_SUMS = {"add", "__add__", "__radd__"} | _SUMS_IN_PLACE
_LEAST_GAIN = 0.05
"""Least factor of a batch norm, over its largest, that a residual is divided by."""


@dataclass(frozen=True)
class _Target:
    """Sampled outputs of one dense layer: which positions, and the values there, ``(samples, channels)``.

    Attributes:
        image: index of the image of each sample.
        row: its row.
        column: its column.
        values: what the layer put out there.
        addend: what the dense network added to it there, directly or after its batch norm; None where nothing was.
        gain: factor of that batch norm for each channel, 1 without one.
        is_linear: whether channels come last, as those of a linear layer do.
        is_normed: whether its batch norm reads that output itself, maybe in another shape, and not what an activation
            or pooling makes of it.
    """

    image: Tensor
    row: Tensor
    column: Tensor
    values: Tensor
    addend: Tensor | None = None
    gain: Tensor | None = None
    is_linear: bool = False
    is_normed: bool = False

    def at(self, values: Tensor) -> Tensor:
        """The sampled positions of another tensor, ``(samples, channels)``."""
        return _as_grid(values, self.is_linear)[self.image, :, self.row, self.column].float()

    def without(self, gone: Tensor | None) -> _Target:
        """The target of a layer that has lost the output channels ``gone``."""
        if gone is None:
            return self
        kept = torch.ones(self.values.shape[1], dtype=torch.bool)
        kept[gone] = False
        addend = None if self.addend is None else self.addend[:, kept]
        gain = None if self.gain is None else self.gain[kept]
        return replace(self, values=self.values[:, kept], addend=addend, gain=gain)

    def beside(self, addend: Tensor) -> _Target:
        """The target where the sum is what counts: what ``addend`` lacks of the dense one, the layer makes up for."""
        assert self.addend is not None
        lacking = self.addend - self.at(addend)
        return replace(self, values=self.values + (lacking if self.gain is None else lacking / self.gain))


class _Sums(TorchFunctionMode):
    """Tells where the marked output of a layer is added to another tensor of its shape.

    An output that anything else reads before is not told of: what it is added to may have been computed from it.

    Args:
        at_sum: given the mark and the other tensor; what it returns, if anything, takes the output's place.
    """

    def __init__(self, at_sum: Callable[[str, Tensor], Tensor | None]) -> None:
        super().__init__()
        self._at_sum = at_sum
        self._marked: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._viewed: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def mark(self, name: str, output: Tensor) -> None:
        """Wait for ``output``, unless it is changed in place before."""
        self._marked[id(output)] = weakref.ref(output), output._version, name

    def take(self, output: Tensor) -> str | None:
        """The mark of a tensor, which loses it; None if it has none, or was changed in place."""
        if (mark := self._marked.pop(id(output), None)) is None:
            return None
        reference, version, name = mark
        return name if reference() is output and version == output._version else None

    def viewed(self, view: Tensor) -> str | None:
        """The mark that the tensor had of which this is all in another shape; None if there was none."""
        reference, name = self._viewed.get(id(view), (None, None))
        return name if reference is not None and reference() is view else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in _SUMS and len(args) == 2 and not kwargs and _are_alike(*args):
            one, other = args
            # Both may be outputs to fit: the second is then fitted beside what the first has become.
            better = self._instead_of(one, beside=other)
            if func.__name__ in _SUMS_IN_PLACE and better is not one:
                better = one.copy_(better)
            args = better, self._instead_of(other, beside=better)
            return func(*args)
        result = func(*args, **(kwargs or {}))
        # What returns no tensor, as a look at the shape does, or the same one, as dropout does here, has not read it.
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves((args, kwargs)) if results and self._marked else ():
            if all(leaf is not each for each in results) and (name := self.take(leaf)) is not None:
                views = [each for each in results if _is_all_of(leaf, each)]
                self._viewed |= {id(each): (weakref.ref(each), name) for each in views}
        return result

    def _instead_of(self, output: Tensor, *, beside: Tensor) -> Tensor:
        name = self.take(output)
        better = self._at_sum(name, beside) if name is not None else None
        return output if better is None else better


def _is_all_of(tensor: Tensor, view: Tensor) -> bool:
    return view.numel() == tensor.numel() and view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _are_alike(one: object, other: object) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def most_images(graph: NetworkGraph) -> int:
    """Images that a network is refitted on at most: so many that its largest output takes `MOST_BYTES` in float32."""
    largest = max(operator.out_channels * math.prod(operator.out_size) for operator in graph.operators)
    return max(1, MOST_BYTES // (4 * largest))


def reconstruct(
    dense: nn.Module,
    candidate: nn.Module,
    graph: NetworkGraph,
    policy: CompressionPolicy,
    batches: Sequence[Batch],
    *,
    generator: torch.Generator,
    n_positions: int = 8,
    ridge: float = 1e-3,
) -> None:
    """Refit, in place, the weights of every layer of ``candidate`` that lost input channels.

    Layers are refitted in one forward pass, each on inputs that come through the layers refitted before it, with
    batch norms using the statistics of the batch. The target is the dense layer's output on the same images; where it
    is added to another branch, directly or after its batch norm, the target is the dense sum less what the other
    branch has become, so that errors do not pile up along a residual stream. Estimate the batch norms again
    afterwards. All images go through the networks at once, and so no more than `most_images` are taken; positions make
    up for those that are not. Ordinary `nn.Conv2d` and `nn.Linear` layers that run once are refitted, others are not.

    Args:
        dense: the captured network; not changed.
        candidate: the network that `apply_policy` made of it.
        graph: the graph of ``dense``.
        policy: the policy that was applied.
        batches: training images of shape ``(batch, channels, height, width)``, tuples where forward takes several
            inputs; a few hundred in all do.
        generator: draws the sampled positions.
        n_positions: output positions sampled an image and layer, where all images are taken.
        ridge: weight of the pull towards the weights before, as a share of the inputs' mean variance.

    Source: Channel pruning (He, Zhang and Sun 2017, section 3.1, and 3.2 for the sums) as used by AMC (He et al.
    2018). Departures: no rescaling of channels beforehand, and the ridge term.
    """
    removed = removed_positions(graph, policy.masks(graph))
    uses = Counter(operator.weight for operator in graph.operators)
    layers = {
        operator.weight.removesuffix(".weight"): operator.norm
        for operator in graph.operators
        # A weight used twice has two outputs to fit, which one solution does not serve.
        if operator.layer_type and 1 in removed.get(operator.weight, {}) and uses[operator.weight] == 1
    }
    layers = {name: norm for name, norm in layers.items() if _is_refittable(dense.get_submodule(name))}
    taken = first_images(batches, most_images(graph))
    # Numbers that hold for a whole batch cannot be joined: those of the first hold for all.
    columns = zip(*map(inputs_of, taken), strict=True)
    inputs = tuple(torch.cat(parts) if parts[0].dim() else parts[0] for parts in columns)
    n_positions = math.ceil(n_positions * count_images(batches) / count_images(taken))
    targets = _sample_outputs(dense, layers, inputs, n_positions, generator)
    # Of a layer that is not called, only its weight is taken, there is no output to fit.
    layers = {name: layers[name] if targets[name].is_normed else "" for name in layers if name in targets}
    targets = {name: target.without(removed.get(f"{name}.weight", {}).get(0)) for name, target in targets.items()}
    _Refit(candidate, layers, targets, ridge).run(inputs)


class _Refit:
    """The forward pass of a candidate in which its layers are fitted to their targets."""

    def __init__(self, candidate: nn.Module, layers: dict[str, str], targets: dict[str, _Target], ridge: float) -> None:
        self._candidate, self._layers, self._targets, self._ridge = candidate, layers, targets, ridge
        self._inputs: dict[str, Tensor] = {}

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        sums = _Sums(self._fit_to_sum)
        handles = []
        for name, norm in self._layers.items():
            layer = self._candidate.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(lambda _, inputs, name=name: self._fit(name, inputs[0])))
            if self._targets[name].addend is not None:
                last = self._candidate.get_submodule(norm or name)
                handles.append(last.register_forward_hook(lambda _, __, output, name=name: sums.mark(name, output)))
        try:
            with torch.no_grad(), _batch_statistics(self._candidate), sums:
                self._candidate(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _fit(self, name: str, inputs: Tensor) -> None:
        if self._targets[name].addend is not None:
            self._inputs[name] = inputs
        # A bias, or a batch norm after the layer, makes up for the means; nothing else does.
        layer, is_normed = self._candidate.get_submodule(name), bool(self._layers[name])
        _fit_layer(layer, inputs, self._targets[name], self._ridge, is_normed=is_normed)

    def _fit_to_sum(self, name: str, addend: Tensor) -> Tensor:
        inputs, norm = self._inputs.pop(name), self._layers[name]
        layer = self._candidate.get_submodule(name)
        _fit_layer(layer, inputs, self._targets[name].beside(addend), self._ridge, is_normed=bool(norm))
        # Not called as modules, whose hooks are done.
        output: Tensor = layer.forward(inputs)
        return self._candidate.get_submodule(norm).forward(output) if norm else output


def _is_refittable(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _sample_outputs(
    dense: nn.Module, layers: dict[str, str], inputs: tuple[Tensor, ...], n_positions: int, generator: torch.Generator
) -> dict[str, _Target]:
    targets: dict[str, _Target] = {}

    def sample(name: str, output: Tensor) -> None:
        if name in targets:
            return
        is_linear = isinstance(dense.get_submodule(name), nn.Linear)
        grid = _as_grid(output, is_linear)
        height, width = grid.shape[2:]
        n = min(n_positions, height * width)
        image = torch.arange(grid.shape[0]).repeat_interleave(n)
        row = torch.randint(height, (len(image),), generator=generator)
        column = torch.randint(width, (len(image),), generator=generator)
        values = grid[image, :, row, column].float()
        targets[name] = _Target(image, row, column, values, is_linear=is_linear)

    def keep_addend(name: str, addend: Tensor) -> None:
        gain = _gain(dense.get_submodule(layers[name]) if targets[name].is_normed else None)
        # A norm that silences the layer leaves nothing of it in the sum: it is fitted alone.
        if gain is None or gain.any():
            targets[name] = replace(targets[name], addend=targets[name].at(addend), gain=gain)

    sums = _Sums(keep_addend)

    direct = set()

    def enter_norm(name: str, inputs: tuple[Tensor, ...]) -> None:
        found = sums.take(inputs[0]) if inputs else None
        if found == name:
            direct.add(name)
        if name in (found, sums.viewed(inputs[0]) if inputs else None):
            targets[name] = replace(targets[name], is_normed=True)

    def leave_norm(name: str, output: Tensor) -> None:
        # Of another shape, it is not at the positions that were sampled.
        if name in direct:
            sums.mark(name, output)

    handles = []
    for name, norm in layers.items():
        layer = dense.get_submodule(name)
        handles.append(layer.register_forward_hook(lambda _, __, output, name=name: sample(name, output)))
        handles.append(layer.register_forward_hook(lambda _, __, output, name=name: sums.mark(name, output)))
        if norm:
            after = dense.get_submodule(norm)
            handles.append(after.register_forward_pre_hook(lambda _, xs, name=name: enter_norm(name, xs)))
            handles.append(after.register_forward_hook(lambda _, __, output, name=name: leave_norm(name, output)))
    try:
        with evaluation_mode(dense), torch.no_grad(), sums:
            dense(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return targets


def _gain(norm: nn.Module | None) -> Tensor | None:
    """What a batch norm multiplies each channel by, held away from zero."""
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return None
    gain = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    least = _LEAST_GAIN * gain.abs().max()
    return torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp(min=least)


def _as_grid(values: Tensor, is_linear: bool) -> Tensor:
    """Outputs or inputs of a layer as ``(images, channels, height, width)``; a linear layer has its channels last."""
    if values.dim() == 4 and not is_linear:
        return values
    if values.dim() == 2:
        return values[:, :, None, None]
    return values.flatten(1, -2).transpose(1, 2).unsqueeze(-1)


def _fit_layer(layer: nn.Module, inputs: Tensor, target: _Target, ridge: float, *, is_normed: bool) -> None:
    patches = _patches(layer, inputs, target)
    assert isinstance(layer.weight, Tensor)
    before = layer.weight.flatten(1).t().float()
    x, y = patches, target.values
    if isinstance(layer.bias, Tensor) or is_normed:
        x, y = x - x.mean(0), y - y.mean(0)
    gram = x.t() @ x
    pull = ridge * gram.diagonal().mean() + 1e-8
    gram.diagonal().add_(pull)
    fitted = torch.linalg.solve(gram, x.t() @ y + pull * before)
    layer.weight.data = fitted.t().reshape(layer.weight.shape).to(layer.weight.dtype)
    if isinstance(layer.bias, Tensor):
        layer.bias.data = (target.values.mean(0) - patches.mean(0) @ fitted).to(layer.bias.dtype)


def _patches(layer: nn.Module, inputs: Tensor, target: _Target) -> Tensor:
    """Inputs that each sampled output saw, of shape ``(samples, channels * kernel height * kernel width)``."""
    grid = _as_grid(inputs, target.is_linear)
    if not isinstance(layer, nn.Conv2d):
        return grid[target.image, :, target.row, target.column].float()
    pad_y, pad_x = (int(p) for p in layer.padding)
    grid = functional.pad(grid, (pad_x, pad_x, pad_y, pad_y))
    (height, width), (stride_y, stride_x), (step_y, step_x) = layer.kernel_size, layer.stride, layer.dilation
    rows = target.row[:, None] * stride_y + torch.arange(height) * step_y
    columns = target.column[:, None] * stride_x + torch.arange(width) * step_x
    channels = torch.arange(grid.shape[1])
    patches = grid[
        target.image[:, None, None, None],
        channels[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    return patches.flatten(1).float()


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, except that batch norms use the batch; running statistics and modes are put back."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    saved = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        with evaluation_mode(model):
            for norm in norms:
                norm.train()
            yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
