"""Least-squares reconstruction: what is left of a layer's inputs is fitted to what the layer used to put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from graph_encoder.modes import evaluation_mode
from graph_encoder.network import NetworkGraph
from graph_encoder.resize import removed_positions

from .policy import CompressionPolicy


@dataclass(frozen=True)
class _Target:
    """Sampled outputs of one dense layer: which positions, and the values there, ``(samples, channels)``."""

    image: Tensor
    row: Tensor
    column: Tensor
    values: Tensor


def reconstruct(
    dense: nn.Module,
    candidate: nn.Module,
    graph: NetworkGraph,
    policy: CompressionPolicy,
    images: Tensor,
    *,
    generator: torch.Generator,
    n_positions: int = 8,
    ridge: float = 1e-3,
) -> None:
    """Refit, in place, the weights of every layer of ``candidate`` that lost input channels.

    Layers are refitted in one forward pass, each on inputs that come through the layers refitted before it, with
    batch norms using the statistics of the batch. The target is the dense layer's output on the same images. Estimate
    the batch norms again afterwards. Ordinary `nn.Conv2d` and `nn.Linear` layers that
    run once are refitted, others are not.

    Args:
        dense: the captured network; not changed.
        candidate: the network that `apply_policy` made of it.
        graph: the graph of ``dense``.
        policy: the policy that was applied.
        images: training images of shape ``(batch, channels, height, width)``; a few hundred do.
        generator: draws the sampled positions.
        n_positions: output positions sampled an image and layer.
        ridge: weight of the pull towards the weights before, as a share of the inputs' mean variance.

    Source: Channel pruning (He, Zhang and Sun 2017, section 3.1) as used by AMC (He et al. 2018). Departures:
    no rescaling of channels beforehand, and the ridge term.
    """
    removed = removed_positions(graph, policy.masks(graph))
    uses = Counter(operator.weight for operator in graph.operators)
    layers = [
        operator.weight.removesuffix(".weight")
        for operator in graph.operators
        # A weight used twice has two outputs to fit, which one solution does not serve.
        if operator.kind in ("conv", "linear") and 1 in removed.get(operator.weight, {}) and uses[operator.weight] == 1
    ]
    layers = [name for name in layers if _is_refittable(dense.get_submodule(name))]
    normed = {operator.weight for operator in graph.operators if operator.norm}
    targets = _sample_outputs(dense, layers, images, n_positions, generator)
    handles = []
    for name in layers:
        target = targets[name]
        gone = removed.get(f"{name}.weight", {}).get(0)
        if gone is not None:
            is_kept = torch.ones(target.values.shape[1], dtype=torch.bool)
            is_kept[gone] = False
            target = _Target(target.image, target.row, target.column, target.values[:, is_kept])
        layer = candidate.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(_refit_with(target, ridge, f"{name}.weight" in normed)))
    try:
        with torch.no_grad(), _batch_statistics(candidate):
            candidate(images)
    finally:
        for handle in handles:
            handle.remove()


def _is_refittable(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _sample_outputs(
    dense: nn.Module, layers: list[str], images: Tensor, n_positions: int, generator: torch.Generator
) -> dict[str, _Target]:
    targets: dict[str, _Target] = {}

    def sample(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if name in targets:
                return
            grid = _as_grid(output)
            height, width = grid.shape[2:]
            n = min(n_positions, height * width)
            image = torch.arange(grid.shape[0]).repeat_interleave(n)
            row = torch.randint(height, (len(image),), generator=generator)
            column = torch.randint(width, (len(image),), generator=generator)
            targets[name] = _Target(image, row, column, grid[image, :, row, column].float())

        return hook

    handles = [dense.get_submodule(name).register_forward_hook(sample(name)) for name in layers]
    try:
        with evaluation_mode(dense), torch.no_grad():
            dense(images)
    finally:
        for handle in handles:
            handle.remove()
    return targets


def _as_grid(values: Tensor) -> Tensor:
    """Outputs or inputs of a layer as ``(images, channels, height, width)``."""
    if values.dim() == 4:
        return values
    if values.dim() == 2:
        return values[:, :, None, None]
    return values.flatten(1, -2).transpose(1, 2).unsqueeze(-1)


def _refit_with(target: _Target, ridge: float, is_normed: bool) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        patches = _patches(layer, inputs[0], target)
        assert isinstance(layer.weight, Tensor)
        before = layer.weight.flatten(1).t().float()
        x, y = patches, target.values
        # A bias, or a batch norm after the layer, makes up for the means; nothing else does.
        if isinstance(layer.bias, Tensor) or is_normed:
            x, y = x - x.mean(0), y - y.mean(0)
        gram = x.t() @ x
        pull = ridge * gram.diagonal().mean() + 1e-8
        gram.diagonal().add_(pull)
        fitted = torch.linalg.solve(gram, x.t() @ y + pull * before)
        layer.weight.data = fitted.t().reshape(layer.weight.shape).to(layer.weight.dtype)
        if isinstance(layer.bias, Tensor):
            layer.bias.data = (target.values.mean(0) - patches.mean(0) @ fitted).to(layer.bias.dtype)

    return hook


def _patches(layer: nn.Module, inputs: Tensor, target: _Target) -> Tensor:
    """Inputs that each sampled output saw, of shape ``(samples, channels * kernel height * kernel width)``."""
    grid = _as_grid(inputs)
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
    with evaluation_mode(model):
        for norm in norms:
            norm.train()
        yield
    for norm, buffers in zip(norms, saved, strict=True):
        for name, buffer in buffers.items():
            norm.get_buffer(name).copy_(buffer)
