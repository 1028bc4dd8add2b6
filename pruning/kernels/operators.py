"""What a network consists of once it is written down as a list: operators that read and write named values.

Each operator can compute itself with PyTorch, which is the truth that the native plan is compared with and what runs
where the compiled library is missing. The native plan knows all of them but `Foreign`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reference import activate

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        name: qualified name of the layer it came from, or of the graph node where it came from no layer.
        inputs: names of the values it reads.
        output: name of the value it writes.
        size: of the output, batch first.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    size: tuple[int, ...]

    def compute(self, *inputs: Any) -> Any:
        """The output by PyTorch's dense operators."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Weighted(Operator):
    """A layer with a weight, and what happens to its sums: ``activation(sum + bias + residual)``.

    Attributes:
        weight: dense, of shape ``(out, in, ...)``; it may hold zeros.
        bias: of shape ``(out,)``.
        activation: one of `ACTIVATIONS`.

    The residual is the second of ``inputs``, if there is one; it is shaped like the output.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str

    def _finish(self, out: Tensor, residual: tuple[Tensor, ...]) -> Tensor:
        return activate(out + residual[0] if residual else out, self.activation)


@dataclass(frozen=True, eq=False)
class Convolution(Weighted):
    """A convolution in two dimensions; depthwise if ``groups`` is the number of its channels, and 1 otherwise."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads the one input channel of the same number."""
        return self.groups > 1

    def compute(self, x: Tensor, *residual: Tensor) -> Tensor:
        """See `Operator.compute`."""
        out = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self._finish(out, residual)


@dataclass(frozen=True, eq=False)
class Linear(Weighted):
    """A linear layer on rows of shape ``(batch, in)``, or on any shape ``(..., in)`` outside of a plan."""

    def compute(self, x: Tensor, *residual: Tensor) -> Tensor:
        """See `Operator.compute`."""
        return self._finish(functional.linear(x, self.weight, self.bias), residual)


@dataclass(frozen=True, eq=False)
class Pool(Operator):
    """Pooling over windows.

    Attributes:
        kind: ``"max_pool"``, ``"average_pool"`` (over the pixels of a window), ``"padded_average_pool"`` (over all its
            places) or ``"adaptive_pool"`` (averages; the windows follow from the sizes alone).
        kernel_size: of the window.
        stride: of rows and columns.
        padding: on either side, by rows and columns.
        dilation: of rows and columns, for ``"max_pool"``.
        is_ceiled: whether a window may begin in the last rows that do not fill it, for ``"max_pool"``.
    """

    kind: str
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    is_ceiled: bool = False

    def compute(self, x: Tensor) -> Tensor:
        """See `Operator.compute`."""
        if self.kind == "max_pool":
            window = (self.kernel_size, self.stride, self.padding, self.dilation, self.is_ceiled)
            return functional.max_pool2d(x, *window).reshape(self.size)
        if self.kind == "adaptive_pool":
            height, width = (*self.size, 1, 1)[2:4]
            return functional.adaptive_avg_pool2d(x, (height, width)).reshape(self.size)
        includes_padding = self.kind == "padded_average_pool"
        return functional.avg_pool2d(x, self.kernel_size, self.stride, self.padding, False, includes_padding)


@dataclass(frozen=True, eq=False)
class Add(Operator):
    """``activation(a + b)``, or ``activation(a)`` where there is one input."""

    activation: str

    def compute(self, x: Tensor, *residual: Tensor) -> Tensor:
        """See `Operator.compute`."""
        return activate(x + residual[0] if residual else x, self.activation)


@dataclass(frozen=True, eq=False)
class Scale(Operator):
    """``x`` of shape ``(batch, channels, height, width)`` times a factor for each image and channel."""

    def compute(self, x: Tensor, factor: Tensor) -> Tensor:
        """See `Operator.compute`."""
        return x * factor


@dataclass(frozen=True, eq=False)
class Slice(Operator):
    """Every ``step``-th row and column of the input.

    Attributes:
        start: first row and column.
        step: of rows and columns.
    """

    start: Pair
    step: Pair

    def compute(self, x: Tensor) -> Tensor:
        """See `Operator.compute`."""
        rows, columns = (slice(start, None, step) for start, step in zip(self.start, self.step, strict=True))
        return x[:, :, rows, columns][:, :, : self.size[2], : self.size[3]]


@dataclass(frozen=True, eq=False)
class Pad(Operator):
    """The input between zeros.

    Attributes:
        before: zeros before the channels, rows and columns.
    """

    before: tuple[int, int, int]

    def compute(self, x: Tensor) -> Tensor:
        """See `Operator.compute`."""
        after = [n - m - b for n, m, b in zip(self.size[1:], x.shape[1:], self.before, strict=True)]
        sides = [side for pair in zip(self.before[::-1], after[::-1], strict=True) for side in pair]
        return functional.pad(x, sides)


@dataclass(frozen=True, eq=False)
class Concat(Operator):
    """The inputs' channels one after the other."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """See `Operator.compute`."""
        return torch.cat(inputs, 1)


@dataclass(frozen=True, eq=False)
class Reshape(Operator):
    """From ``(batch, channels, height, width)`` to rows or back, in the same order."""

    def compute(self, x: Tensor) -> Tensor:
        """See `Operator.compute`."""
        return x.reshape(self.size)


@dataclass(frozen=True, eq=False)
class Foreign(Operator):
    """What only PyTorch runs.

    Attributes:
        call: takes the values of ``inputs``; what it returns need not be a tensor.
        kind: name of the PyTorch operator.
    """

    call: Callable[..., Any]
    kind: str

    def compute(self, *inputs: Any) -> Any:
        """See `Operator.compute`."""
        return self.call(*inputs)
