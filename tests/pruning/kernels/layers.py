"""Random sparse layers for the tests, and the error they are allowed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pruning.kernels.native import INSTRUCTION_SETS, library

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without the library the operators are tested on the fallback
    is_compiled = library() is not None
compiled = pytest.mark.skipif(not is_compiled, reason="the sparse kernels are not compiled")


def available_sets() -> list[str]:
    """Instruction sets that this processor and this build have."""
    native = library()
    found = []
    for name in INSTRUCTION_SETS if native else ():
        try:
            with native.using(name):
                found.append(name)
        except ValueError:
            continue
    return found


def sparse(shape: tuple[int, ...], block: int, density: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A dense weight that holds zeros, and its mask; ``block`` output channels share them."""
    kept = torch.rand(shape[0] // block, 1, *shape[1:], generator=generator) < density
    mask = kept.expand(-1, block, *[-1] * (len(shape) - 1)).reshape(shape)
    return torch.randn(shape, generator=generator) * mask, mask


@dataclass(frozen=True)
class Geometry:
    """One convolution."""

    x: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    out_channels: int = 32


GEOMETRIES = {
    "same": Geometry((1, 37, 14, 13)),
    "batch": Geometry((3, 5, 7, 7)),
    "strided": Geometry((2, 9, 15, 11), stride=(2, 2)),
    "strides differ": Geometry((1, 6, 17, 9), (3, 5), (3, 2), (2, 0), (1, 2)),
    "dilated": Geometry((1, 7, 12, 19), (5, 3), (1, 1), (2, 2), (2, 3)),
    "wide padding": Geometry((2, 3, 5, 6), (2, 2), (1, 1), (3, 2)),
    "1x1": Geometry((2, 70, 5, 7), (1, 1), padding=(0, 0)),
    "1x1, whole vectors": Geometry((1, 33, 8, 8), (1, 1), padding=(0, 0)),
    "1x1, several chunks": Geometry((1, 300, 6, 6), (1, 1), padding=(0, 0)),
    "1x1, strided": Geometry((1, 12, 9, 9), (1, 1), (2, 2), (0, 0)),
    "1x1, one pixel": Geometry((3, 20, 1, 1), (1, 1), padding=(0, 0)),
    "1x1, one pixel beside the windows": Geometry((3, 20, 1, 1), (1, 1), (3, 3)),
    "several strips": Geometry((1, 96, 40, 40), out_channels=16),
}


def assert_as_exact_as_torch(found: Tensor, dense: Tensor, exact: Tensor) -> None:
    """The largest error may be four times that of PyTorch's own float32, and a few roundings of the largest value."""
    assert found.shape == exact.shape
    rounding = 2.0**-23 * float(exact.abs().max()) if exact.numel() else 0.0
    allowed = 4 * max(float((dense.double() - exact).abs().max()), rounding)
    assert float((found.double() - exact).abs().max()) <= allowed
