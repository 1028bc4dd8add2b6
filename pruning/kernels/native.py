"""The compiled library: found, told about PyTorch's threads, and called with plain pointers."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_NAME = "_native.so"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
INSTRUCTION_SET_VARIABLE = "SECATEUR_INSTRUCTION_SET"
"""Environment variable that names the instruction set to use; the best one if not set."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class Shape(ctypes.Structure):
    """``SecateurShape`` of ``csrc/layer.h``."""

    _fields_ = [
        *((name, _Int) for name in ("batch", "in_channels", "height", "width")),
        *((name, _Int) for name in ("out_channels", "out_height", "out_width")),
        *((name, _Int) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, _Int) for name in ("padding_h", "padding_w", "dilation_h", "dilation_w")),
    ]


class Weight(ctypes.Structure):
    """``SecateurWeight`` of ``csrc/layer.h``."""

    _fields_ = [
        *((name, _Int) for name in ("block", "groups", "chunks")),
        *((name, _Pointer) for name in ("column_start", "value_start", "counts", "offsets", "values")),
    ]


class Epilogue(ctypes.Structure):
    """``SecateurEpilogue`` of ``csrc/layer.h``."""

    _fields_ = [("bias", _Pointer), ("residual", _Pointer), ("activation", _Int)]


class Library:
    """The functions of ``csrc/dispatch.cpp``.

    Attributes:
        instruction_set: name of the one in use.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.secateur_choose.restype = ctypes.c_char_p
        self._library.secateur_input_floats.restype = _Int
        self._library.secateur_use_threads.argtypes = [_Pointer]
        self._library.secateur_use_threads(_torch_parallel_for())
        self.instruction_set = ""
        self.choose(os.environ.get(INSTRUCTION_SET_VARIABLE, ""))

    def choose(self, name: str) -> None:
        """Use the instruction set of that name, or the best one for an empty name.

        Raises:
            ValueError: if this processor or this build does not have it.
        """
        chosen = self._library.secateur_choose(name.encode())
        if chosen is None:
            available = [known for known in INSTRUCTION_SETS if self._library.secateur_choose(known.encode())]
            self._library.secateur_choose(self.instruction_set.encode())
            msg = (
                f"the instruction set '{name}' is not available here; "
                f"set {INSTRUCTION_SET_VARIABLE} to one of: {', '.join(available)}"
            )
            raise ValueError(msg)
        self.instruction_set = chosen.decode()

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Use another instruction set for a while."""
        before = self.instruction_set
        self.choose(name)
        try:
            yield
        finally:
            self.choose(before)

    def offsets(self, shape: Shape, columns: Tensor) -> Tensor:
        """Where each column lies in the packed input; int32 like ``columns``.

        Raises:
            ValueError: if one image has so many values that offsets do not fit 32 bits.
        """
        floats = self._library.secateur_input_floats(ctypes.byref(shape))
        if floats >= 2**31:
            msg = f"the packed input of one image has {floats} values; sparse kernels take fewer than 2**31"
            raise ValueError(msg)
        offsets = torch.empty_like(columns)
        self._library.secateur_offsets(ctypes.byref(shape), _Int(len(columns)), pointer(columns), pointer(offsets))
        return offsets

    def conv2d(self, shape: Shape, weight: Weight, epilogue: Epilogue, x: Tensor, out: Tensor) -> None:
        """Run one convolution into ``out``."""
        status = self._library.secateur_conv2d(
            ctypes.byref(shape), ctypes.byref(weight), ctypes.byref(epilogue), pointer(x), pointer(out), _threads()
        )
        _check(status)

    def values_grad(self, shape: Shape, weight: Weight, x: Tensor, grad: Tensor, grad_values: Tensor) -> None:
        """Write the gradient of the values into ``grad_values``."""
        status = self._library.secateur_values_grad(
            ctypes.byref(shape), ctypes.byref(weight), pointer(x), pointer(grad), pointer(grad_values), _threads()
        )
        _check(status)

    def linear_rows(self, weight: Weight, epilogue: Epilogue, x: Tensor, out: Tensor) -> None:
        """Run one linear layer on a few rows into ``out``."""
        sizes = (_Int(x.shape[0]), _Int(x.shape[1]), _Int(out.shape[1]))
        status = self._library.secateur_linear_rows(
            *sizes, ctypes.byref(weight), ctypes.byref(epilogue), pointer(x), pointer(out), _threads()
        )
        _check(status)

    def mask_fake_quantize(
        self, weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int, out: Tensor, is_inside: Tensor
    ) -> None:
        """Write the masked and fake-quantized weight into ``out``, and where its gradient passes into ``is_inside``."""
        rows = weight.shape[0]
        levels = (ctypes.c_float(lowest), ctypes.c_float(highest))
        tensors = (pointer(weight), pointer(mask), pointer(scale))
        status = self._library.secateur_mask_fake_quantize(
            _Int(rows), _Int(weight.numel() // rows), *tensors, *levels, pointer(out), pointer(is_inside), _threads()
        )
        _check(status)


@functools.cache
def library() -> Library | None:
    """The compiled library, or None, with one warning, where it was not built or does not load."""
    path = Path(__file__).with_name(LIBRARY_NAME)
    try:
        return Library(path)
    except OSError as error:
        msg = (
            f"the sparse kernels are not compiled ({error}); sparse layers run as dense PyTorch operators, at dense "
            f"speed. To build them: python setup.py build_ext --inplace (needs g++ or clang++)"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
        return None


def pointer(tensor: Tensor | None) -> _Pointer:
    """Address of the first element, null for None."""
    return _Pointer(None if tensor is None else tensor.data_ptr())


def _threads() -> _Int:
    return _Int(torch.get_num_threads())


def _check(status: int) -> None:
    if status:
        msg = "a sparse kernel could not get the memory it works in"
        raise MemoryError(msg)


def _torch_parallel_for() -> _Pointer:
    """Address of the C function behind `at::parallel_for`; null where this PyTorch has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return ctypes.cast(function, _Pointer) if function else _Pointer(None)
    return _Pointer(None)
