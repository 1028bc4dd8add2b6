"""How a network is run: in which mode and precision, and leaving no trace."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TRIED = (8, 64, 16, 16)
"""Shape of the images that precisions are tried on: a layer of a small network."""
_ROUNDS, _GAIN = 10, 1.1
_CAST = {torch.float32, torch.bfloat16, torch.float16}
"""What autocast casts."""


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what every module of ``model`` holds, at the end.

    A forward may keep what it has made for the next call, a grid of positions for one: made from shapes alone, or in
    inference mode, it is of no use to the next. Tensors are not copied, so values changed in place stay changed.
    """
    before = [(module, _held(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, (attributes, contents) in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                # The same object, for others may hold it: handles of hooks do.
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(content)


def _held(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    attributes = dict(vars(module))
    containers = [value for value in attributes.values() if isinstance(value, dict | list)]
    # Most are empty, those of hooks, and copies of these would take most of the time.
    return attributes, [(each, each.copy() if each else ()) for each in containers]


def lay_channels_last(model: nn.Module) -> None:
    """Bring the tensors of four dimensions into that memory format, in place; PyTorch refuses those of five."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into evaluation mode, and each back into its own mode at the end.

    One flag for the whole model would thaw a batch norm that its owner had frozen inside a training model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def autocast_on_shapes() -> Iterator[None]:
    """Let ``torch.autocast(x.device.type, ...)`` in a forward pass on meta tensors mean the processor.

    It refuses the device ``meta``, which has no types that it could cast to.
    """
    make = torch.autocast.__init__

    def made(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = made  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = make  # type: ignore[method-assign]


@contextmanager
def mixed_precision(device_type: str, asked: bool) -> Iterator[None]:
    """Autocast to bfloat16 where it is asked for and the device has kernels for it, see `has_bfloat16`.

    On a CPU some depthwise convolutions get their gradients from float32: those with a stride, a dilation or a kernel
    over 3x3, for PyTorch computes these in bfloat16 in plain loops. A backward pass may come after the context.
    """
    is_taken = asked and has_bfloat16(device_type)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device_type, torch.bfloat16, is_taken))
        if is_taken and device_type == "cpu" and torch.is_grad_enabled():
            stack.enter_context(_FloatGradients())
        yield


class _FloatGradients(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
            places = _places_of_slow(*args, **kwargs)
            if places is not None:
                return _convolved(places, *args, **kwargs)
        return func(*args, **kwargs)


class _Places(NamedTuple):
    """How a depthwise convolution moves over its input, one number for each dimension, and its groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _places_of_slow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Places | None:
    """Those of a convolution with these arguments, of `torch.conv2d`, if its gradients are slow in bfloat16."""
    is_depthwise = groups > 1 and input.dim() == weight.dim() == 4 and weight.shape[1] == 1
    dtypes = {each.dtype for each in (input, weight, bias) if each is not None}
    if not is_depthwise or input.device.type != "cpu" or not dtypes <= _CAST:
        return None
    strides, dilations = _pair(stride), _pair(dilation)
    if not strides or not dilations or (max(*strides, *dilations) == 1 and max(weight.shape[2:]) <= 3):
        return None
    if padding == "same":
        reach = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
        # Even kernels are padded more on one side, and strides are refused.
        paddings = [] if max(strides) > 1 or any(each % 2 for each in reach) else [each // 2 for each in reach]
    else:
        paddings = _pair(0 if padding == "valid" else padding)
    return _Places(strides, paddings, dilations, groups) if paddings else None


def _pair(value: Any) -> list[int]:
    """Two numbers from what a convolution takes for them; none from what is best left to it."""
    values = [value] if type(value) is int else value
    if (
        not isinstance(values, list | tuple)
        or len(values) not in (1, 2)
        or any(type(each) is not int for each in values)
    ):
        return []
    return [*values, *values][:2]


def _convolved(
    places: _Places, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    # Cast as autocast would: a checkpointed part of a network is run again without the mode, and has to keep the same.
    dtype = torch.get_autocast_dtype("cpu")
    found: Tensor = _Convolution.apply(
        places, *(None if each is None else each.to(dtype) for each in (input, weight, bias))
    )
    return found


class _Convolution(torch.autograd.Function):
    """A convolution in bfloat16 with gradients from float32."""

    @staticmethod
    def forward(places: _Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, weight, bias, *places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.places, *tensors, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.places
        floats = [each.float() for each in (gradient, *ctx.saved_tensors)]
        found = torch.ops.aten.convolution_backward(
            *floats,
            bias_sizes=gradient.shape[1:2],
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=False,
            output_padding=[0, 0],
            groups=groups,
            output_mask=ctx.needs_input_grad[1:],
        )
        return None, *(None if each is None else each.to(gradient.dtype) for each in found)


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Whether PyTorch has kernels for convolutions in bfloat16 there.

    On x86 processors without AVX-512 it has none and takes plain loops: a step of training a ResNet-56 takes twelve
    times as long as in float32.

    Args:
        device_type: as in `torch.device.type`; of another one than ``cpu`` and ``cuda`` it is assumed.
    """
    if device_type == "cpu":
        # What convolutions themselves ask before they choose a kernel; no public function says so.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def bfloat16_pays(device_type: str) -> bool:
    """Whether convolutions in bfloat16 are faster there than in float32.

    On CPUs it is tried out, once a process and in a tenth of a second, since having kernels is not enough: Intel's
    processors with AVX-512 and without AMX multiply bfloat16 at about half the rate of float32. Less than a tenth is
    not taken for a gain, so that the answer does not change with the load.

    Args:
        device_type: as in `torch.device.type`; of others than ``cpu`` `has_bfloat16` is taken for the answer.
    """
    if device_type != "cpu" or not has_bfloat16(device_type):
        return has_bfloat16(device_type)
    best = dict.fromkeys((torch.bfloat16, torch.float32), math.inf)
    # In turn, so that whatever slows the machine down meets both.
    for _ in range(_ROUNDS):
        for dtype in best:
            best[dtype] = min(best[dtype], _seconds_to_convolve(dtype))
    return _GAIN * best[torch.bfloat16] < best[torch.float32]


def _seconds_to_convolve(dtype: torch.dtype) -> float:
    channels = _TRIED[1]
    images = torch.ones(_TRIED, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    torch.conv2d(images, weight, padding=1)
    return time.perf_counter() - started
