"""A sparse convolution with everything but its activations settled: checks, offsets and structures are made once."""

from __future__ import annotations

from torch import Tensor

from .checks import check_epilogue, conv2d_size
from .formats import SparseWeight
from .native import Epilogue, Library, Shape, pointer
from .patterns import pattern_of
from .reference import ACTIVATIONS


class PreparedConv2d:
    """One layer for one input size, run by one native call into memory that the caller owns.

    Attributes:
        out_size: of the output, ``(batch, out, out_height, out_width)``.
    """

    def __init__(
        self,
        native: Library,
        weight: SparseWeight,
        bias: Tensor | None,
        x: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        activation: str = "none",
    ) -> None:
        """Prepare the layer.

        Args:
            native: the compiled library.
            weight: what `pack` made of the dense weight.
            bias: contiguous, of shape ``(out,)``.
            x: an input of the size that every later one has.
            stride: of rows and columns.
            padding: zeros on either side, by rows and columns.
            dilation: of rows and columns.
            activation: one of `ACTIVATIONS`.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        op, out_channels, kernel_size = "sparse_conv2d", weight.shape[0], weight.shape[2:]
        self.out_size = conv2d_size(op, x, out_channels, kernel_size, stride, padding, dilation)
        check_epilogue(op, bias, None, out_channels, self.out_size, activation)
        pattern = pattern_of(op, weight.columns, weight.counts, (out_channels, x.shape[1], *kernel_size), weight.block)
        self._native, self._activation = native, ACTIVATIONS.index(activation)
        self._shape = Shape(*x.shape, *self.out_size[1:], *kernel_size, *stride, *padding, *dilation)
        offsets = pattern.offsets(native, self._shape)
        self._weight = pattern.native(weight.values, offsets)
        self._bias = bias
        self._alive = (weight, pattern, offsets)  # the structures hold their addresses

    def run(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """Compute ``out`` from ``x``; all contiguous float32 of the prepared sizes, which is not checked again."""
        epilogue = Epilogue(pointer(self._bias), pointer(residual), self._activation)
        self._native.conv2d(self._shape, self._weight, epilogue, x, out)
