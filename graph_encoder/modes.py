"""How a network is run: in which mode and precision, and leaving no trace."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TRIED = (8, 64, 16, 16)
"""Shape of the images that precisions are tried on: a layer of a small network."""
_ROUNDS, _GAIN = 10, 1.1


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


def mixed_precision(device_type: str, asked: bool) -> torch.autocast:
    """Autocast to bfloat16 where it is asked for and the device has kernels for it, see `has_bfloat16`."""
    return torch.autocast(device_type, torch.bfloat16, asked and has_bfloat16(device_type))


class FloatGradients(TorchFunctionMode):
    """While it is entered, some depthwise convolutions under autocast on a CPU get their gradients from float32.

    Those are the ones with a stride or a kernel over 3x3: PyTorch computes their gradients in bfloat16 in plain loops.
    Where no gradients are asked for nothing changes.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``."""
        is_cast = func is torch.conv2d and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        return (_convolve if is_cast else func)(*args, **kwargs or {})


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d` under autocast."""
    is_depthwise = groups > 1 and weight.shape[1] == 1
    is_slow = (
        input.device.type == "cpu"
        and input.dim() == 4
        and is_depthwise
        and (max(_pair(stride)) > 1 or max(weight.shape[2:]) > 3)
    )
    reach = [step * (size - 1) for step, size in zip(_pair(dilation), weight.shape[2:], strict=True)]
    # Even kernels are padded more on one side.
    if not is_slow or (padding == "same" and any(each % 2 for each in reach)):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if isinstance(padding, str):
        padding = [each // 2 for each in reach] if padding == "same" else 0
    places = _pair(stride), _pair(padding), _pair(dilation), groups
    # Cast as autocast would: a checkpointed part of a network is run again without this mode, and has to keep the same.
    dtype = torch.get_autocast_dtype("cpu")
    cast = [None if each is None else each.to(dtype) for each in (input, weight, bias)]
    found: Tensor = _ConvolutionOfFloatGradients.apply(places, *cast)
    return found


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value, *value][:2]


class _ConvolutionOfFloatGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, bias, *places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *places, groups = ctx.places
        _, *needed = ctx.needs_input_grad
        floats = [each.float() for each in (gradient, *ctx.saved_tensors)]
        found = torch.ops.aten.convolution_backward(
            *floats, gradient.shape[1:2], *places, transposed=False, output_padding=[0, 0], groups=groups,
            output_mask=needed,
        )  # fmt: skip
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
