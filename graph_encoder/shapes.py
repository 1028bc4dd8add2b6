"""Shapes of common operators' results.

PyTorch can run any operator on meta tensors, but for many it does so through Python decompositions that take longer
than everything else a capture does. These few cover what networks are mostly made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PER_CHANNEL = ("batch_norm", "instance_norm", "group_norm")
_SHAPE_KEEPING = (*_PER_CHANNEL, "layer_norm", "rms_norm", "softmax", "log_softmax", "dropout")
_COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "logical_and",
    "logical_or",
)


_UNTAGGED_POINTWISE = ("hardswish",)
"""Element-wise operators that PyTorch does not tag as such."""


def is_pointwise(func: Any, name: str) -> bool:
    """Whether the operator called ``name`` works element by element."""
    return torch.Tag.pointwise in func.tags or name in _UNTAGGED_POINTWISE


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors among the arguments or results of an operator, in order; they nest in lists and tuples only."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def quick_result(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """The meta result of a common operator, or None if PyTorch has to be asked.

    Args:
        func: the operator.
        name: its name, without namespace and trailing underscore.
        args: positional arguments; the first is a meta tensor of floats, or None is returned.
        kwargs: keyword arguments.
        tensors: all tensors among the arguments.

    Raises:
        RuntimeError: if the shapes do not fit each other.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.device.type != "meta":
        return None
    # Element-wise results lie in memory as their operands do, which a view may need.
    if is_pointwise(func, name):
        return _pointwise(func, name, x, tensors) if all(t.is_contiguous() for t in tensors) else None
    if name in _SHAPE_KEEPING and x.is_contiguous():
        _check_norm(name, x, args, tensors)
        return x.new_empty(x.shape)
    if name == "conv2d":
        return _conv2d(x, *args[1:], **kwargs)
    if name == "adaptive_avg_pool2d" and x.dim() == 4:
        size = args[1]
        height, width = (size, size) if isinstance(size, int) else size
        return x.new_empty((x.shape[0], x.shape[1], height, width))
    return None


def _pointwise(func: Any, name: str, x: Tensor, tensors: list[Tensor]) -> Tensor | None:
    if name in _COMPARISONS or any(t.dtype != x.dtype for t in tensors):
        return None
    shape = x.shape
    if any(t.shape != shape for t in tensors):
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    if not func._schema.name.endswith("_"):
        return x.new_empty(shape)
    if shape != x.shape:
        msg = f"a result of shape {tuple(shape)} cannot be written into a tensor of shape {tuple(x.shape)}"
        raise RuntimeError(msg)
    return x


def _check_norm(name: str, x: Tensor, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    channels = x.shape[1] if x.dim() > 1 else 1
    if name in _PER_CHANNEL and any(t.numel() != channels for t in tensors[1:]):
        msg = f"an input with {channels} channels meets a {name} for {tensors[1].numel()}"
        raise RuntimeError(msg)
    if name == "group_norm" and channels % args[1]:
        msg = f"an input with {channels} channels cannot be divided into {args[1]} groups"
        raise RuntimeError(msg)
    if name in ("layer_norm", "rms_norm") and tuple(x.shape[-len(args[1]) :]) != tuple(args[1]):
        msg = f"an input of shape {tuple(x.shape)} meets a {name} for {tuple(args[1])}"
        raise RuntimeError(msg)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1), padding: Any = (0, 0),
    dilation: Any = (1, 1), groups: int = 1,
) -> Tensor | None:  # fmt: skip
    settings = (stride, padding, dilation)
    if x.dim() != 4 or not all(isinstance(setting, list | tuple) and len(setting) == 2 for setting in settings):
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        msg = f"an input with {x.shape[1]} channels meets a convolution for {weight.shape[1] * groups}"
        raise RuntimeError(msg)
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if min(size) < 1:
        msg = f"an image of {x.shape[2]} x {x.shape[3]} is smaller than a kernel of {tuple(weight.shape[2:])}"
        raise RuntimeError(msg)
    return x.new_empty((x.shape[0], weight.shape[0], *size))
