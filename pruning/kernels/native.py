"""The compiled library: found, told about PyTorch's threads, and called with plain pointers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY_NAME = "_native.so"
SOURCES = Path(__file__).with_name("csrc")
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
        ("channels_last", _Int),
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


class View(ctypes.Structure):
    """``SecateurView`` of ``csrc/layer.h``."""

    _fields_ = [
        ("data", _Pointer),
        *((name, _Int) for name in ("image", "channel", "row", "column", "border_h", "border_w", "has_slack")),
        ("lanes", _Pointer),
    ]


class Step(ctypes.Structure):
    """``SecateurStep`` of ``csrc/layer.h``."""

    _fields_ = [
        ("kind", _Int),
        ("shape", Shape),
        ("weight", Weight),
        ("epilogue", Epilogue),
        *((name, View) for name in ("x", "residual", "out")),
        ("first_channel", _Int),
    ]


STEP_KINDS = (
    *("convolution", "linear", "depthwise", "max_pool", "average_pool", "padded_average_pool", "adaptive_pool"),
    *("add", "scale", "copy", "winograd"),
)
"""Names by their number in ``csrc/layer.h``."""
PROGRESS_VALUES = 8
"""Int64 values of a ``SecateurProgress``."""

_Layer = [ctypes.POINTER(Shape), ctypes.POINTER(Weight)]
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "use_threads": (None, [_Pointer]),
    "choose": (ctypes.c_char_p, [ctypes.c_char_p]),
    "input_floats": (_Int, [ctypes.POINTER(Shape)]),
    "offsets": (None, [ctypes.POINTER(Shape), _Int, _Pointer, _Pointer]),
    "gradient_offsets": (None, [ctypes.POINTER(Shape), _Int, _Pointer, _Pointer]),
    "step_floats": (_Int, [ctypes.POINTER(Step)]),
    "step_offsets": (None, [ctypes.POINTER(Step), _Int, _Pointer, _Pointer]),
    "run_plan": (ctypes.c_int, [ctypes.POINTER(Step), _Int, _Pointer, _Int]),
    "conv2d": (ctypes.c_int, [*_Layer, ctypes.POINTER(Epilogue), _Pointer, _Pointer, _Int]),
    "values_grad": (ctypes.c_int, [*_Layer, _Pointer, _Pointer, _Pointer, _Int]),
    "linear_rows": (ctypes.c_int, [_Int, _Int, _Int, _Layer[1], ctypes.POINTER(Epilogue), _Pointer, _Pointer, _Int]),
    "multiply_add": (ctypes.c_float, [_Int]),
    "mask_fake_quantize": (
        ctypes.c_int,
        [_Int, _Int, _Pointer, _Pointer, _Pointer, ctypes.c_float, ctypes.c_float, _Pointer, _Pointer, _Int],
    ),
}


class Library:
    """The functions of ``csrc/dispatch.cpp``.

    Attributes:
        instruction_set: name of the one in use.
    """

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: if it is not there, does not load, or was built from other sources than those beside it.
        """
        self._library = ctypes.CDLL(str(path))
        self._check_sources(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, f"secateur_{name}")
            function.restype, function.argtypes = result, arguments
        self._library.secateur_use_threads(_torch_parallel_for())
        self.instruction_set = ""
        self.choose(os.environ.get(INSTRUCTION_SET_VARIABLE, ""))

    def _check_sources(self, path: Path) -> None:
        sources = getattr(self._library, "secateur_sources", None)
        if sources is not None:
            sources.restype = ctypes.c_char_p
            if not SOURCES.is_dir() or sources().decode() == digest_of(SOURCES):
                return
        msg = f"{path} was built from other sources than those in {SOURCES}"
        raise OSError(msg)

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
        _check_floats(self._library.secateur_input_floats(shape))
        offsets = torch.empty_like(columns)
        self._library.secateur_offsets(shape, len(columns), pointer(columns), pointer(offsets))
        return offsets

    def gradient_offsets(self, shape: Shape, columns: Tensor) -> Tensor:
        """The same in the input as `values_grad` packs it."""
        _check_floats(self._library.secateur_input_floats(shape))
        offsets = torch.empty_like(columns)
        self._library.secateur_gradient_offsets(shape, len(columns), pointer(columns), pointer(offsets))
        return offsets

    def step_offsets(self, step: Step, columns: Tensor) -> Tensor:
        """The same for a convolution of a plan."""
        _check_floats(self._library.secateur_step_floats(step))
        offsets = torch.empty_like(columns)
        self._library.secateur_step_offsets(step, len(columns), pointer(columns), pointer(offsets))
        return offsets

    def run_plan(self, steps: ctypes.Array[Step], progress: Tensor) -> None:
        """Run the steps one after the other; ``progress`` is memory of `PROGRESS_VALUES` a step."""
        _check(self._library.secateur_run_plan(steps, len(steps), pointer(progress), torch.get_num_threads()))

    def conv2d(self, shape: Shape, weight: Weight, epilogue: Epilogue, x: Tensor, out: Tensor) -> None:
        """Run one convolution into ``out``."""
        status = self._library.secateur_conv2d(
            shape, weight, epilogue, pointer(x), pointer(out), torch.get_num_threads()
        )
        _check(status)

    def values_grad(self, shape: Shape, weight: Weight, x: Tensor, grad: Tensor, grad_values: Tensor) -> None:
        """Write the gradient of the values into ``grad_values``."""
        status = self._library.secateur_values_grad(
            shape, weight, pointer(x), pointer(grad), pointer(grad_values), torch.get_num_threads()
        )
        _check(status)

    def linear_rows(self, weight: Weight, epilogue: Epilogue, x: Tensor, out: Tensor) -> None:
        """Run one linear layer on a few rows into ``out``."""
        sizes = (x.shape[0], x.shape[1], out.shape[1])
        status = self._library.secateur_linear_rows(
            *sizes, weight, epilogue, pointer(x), pointer(out), torch.get_num_threads()
        )
        _check(status)

    def mask_fake_quantize(
        self, weight: Tensor, mask: Tensor, scale: Tensor, lowest: int, highest: int, out: Tensor, is_inside: Tensor
    ) -> None:
        """Write the masked and fake-quantized weight into ``out``, and where its gradient passes into ``is_inside``."""
        sizes = (weight.shape[0], weight.numel() // weight.shape[0])
        inputs, outputs = map(pointer, (weight, mask, scale)), map(pointer, (out, is_inside))
        status = self._library.secateur_mask_fake_quantize(
            *sizes, *inputs, lowest, highest, *outputs, torch.get_num_threads()
        )
        _check(status)

    def peak_flops(self) -> float:
        """Floating-point operations a second of one thread in the chosen instruction set, best of several loops."""
        rounds, lanes = 100_000, {"avx512": 16, "avx2": 8, "portable": 4}[self.instruction_set]
        times = []
        for _ in range(20):
            start = time.perf_counter()
            self._library.secateur_multiply_add(rounds)
            times.append(time.perf_counter() - start)
        return 2 * rounds * 12 * lanes / min(times)


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


def digest_of(sources: Path) -> str:
    """SHA-256 of the C++ files in a folder, in the order of their names."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]*")))).hexdigest()


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element, null for None."""
    return None if tensor is None else tensor.data_ptr()


def _check_floats(floats: int) -> None:
    if floats >= 2**31:
        msg = f"the packed input of one image has {floats} values; sparse kernels take fewer than 2**31"
        raise ValueError(msg)


def _check(status: int) -> None:
    if status:
        msg = "a sparse kernel could not get the memory it works in"
        raise MemoryError(msg)


def _torch_parallel_for() -> int | None:
    """Address of the C function behind `at::parallel_for`; null where this PyTorch has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return ctypes.cast(function, _Pointer).value if function else None
    return None
