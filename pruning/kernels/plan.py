"""A list of operators as one native call: steps, and the memory that their activations lie in.

Activations are channel-first with contiguous pixels, which every kernel wants, and all maps of one height and width are
laid out alike: rows `border` zeros apart and as many rows of zeros above and below as the widest padding needs. So a
convolution of stride 1 reads its input where it lies, writes its output where the next one reads it, and adds a
residual at the same places; nothing is converted between layers.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import SparseWeight, pack
from .native import PROGRESS_VALUES, STEP_KINDS, Epilogue, Library, Shape, Step, View, Weight, pointer
from .operators import Add, Concat, Convolution, Operator, Pad, Pool, Reshape, Scale, Slice, Weighted
from .patterns import pattern_of
from .reference import ACTIVATIONS
from .winograd import transform

LANES = 16
"""Floats of the widest vector: what may be read and written behind a map."""
DENSE = "dense"
UNSTRUCTURED = "unstructured"
WINOGRAD = "winograd"
FORMATS: dict[str, int] = {DENSE: 8, UNSTRUCTURED: 1, "block 4": 4, "block 8": 8, "block 16": 16}
"""The forms in which a plan packs a weight, and their blocks. A dense weight is blocks without a zero."""
FORMS = (*FORMATS, WINOGRAD)
"""All forms in which a plan holds a weight: Winograd's holds it dense and transformed, see `takes_winograd`."""
DENSE_FORMS = (DENSE, WINOGRAD)


def takes_winograd(one: Operator) -> bool:
    """Whether Winograd's filtering computes an operator: a 3x3 convolution of stride 1, neither dilated nor grouped."""
    if not isinstance(one, Convolution) or one.is_depthwise:
        return False
    return tuple(one.weight.shape[2:]) == (3, 3) and one.stride == (1, 1) and one.dilation == (1, 1)


def pack_as(weight: Tensor, form: str) -> SparseWeight:
    """Pack a weight of shape ``(out, in)`` or ``(out, in, kernel_h, kernel_w)`` in one of `FORMATS`.

    Blocks store the zeros that they hold beside non-zeros. Where a block does not divide the output channels, rows of
    zeros are added.
    """
    block = FORMATS[form]
    missing = -weight.shape[0] % block
    padded = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])]) if missing else weight
    if form == DENSE:
        mask = torch.ones_like(padded, dtype=torch.bool)
    else:
        by_block = (padded != 0).reshape(-1, block, *padded.shape[1:]).any(1, keepdim=True)
        mask = by_block.expand(-1, block, *padded.shape[1:]).reshape(padded.shape)
    return pack(padded.contiguous(), block, mask)


@dataclass(frozen=True)
class _Layout:
    """Where the value of one size lies in memory of its own; distances in floats."""

    size: tuple[int, int, int, int]
    border: tuple[int, int]

    @property
    def row(self) -> int:
        return self.size[3] + self.border[1]

    @property
    def head(self) -> int:
        """Zeros before the first pixel."""
        return self.border[0] * self.row + self.border[1]

    @property
    def is_vector(self) -> bool:
        """Maps of one pixel lie side by side, as the rows of a linear layer do."""
        return self.size[2:] == (1, 1)

    @property
    def channel(self) -> int:
        if self.is_vector:
            return 1
        pixels = (self.size[2] - 1) * self.row + self.size[3]
        distance = _round_up(self.head + max(pixels + self.head, _round_up(pixels, LANES)), LANES)
        # Channels an even number of cache lines apart would share sets of the first-level cache; small ones fill all.
        return distance + LANES if distance >= 8 * LANES and distance % (2 * LANES) == 0 else distance

    @property
    def image(self) -> int:
        return _round_up(self.size[1] * self.channel, LANES)

    @property
    def first(self) -> int:
        """Of the first pixel; the first of every channel begins a cache line."""
        return _round_up(self.head, LANES)

    @property
    def floats(self) -> int:
        return self.first + self.size[0] * self.image


class Plan:
    """Operators prepared to run as one native call, for inputs of fixed sizes.

    Calls take turns: they share the memory of the activations.

    Attributes:
        arena_bytes: memory of all activations together.
        weight_bytes: memory of all packed weights, with the places of their non-zeros.
    """

    def __init__(
        self,
        native: Library,
        operators: Sequence[Operator],
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Sequence[str],
        forms: Mapping[str, str],
        *,
        holds_inputs: bool = False,
    ) -> None:
        """Prepare the plan.

        Args:
            native: the compiled library.
            operators: none of them `Foreign`.
            inputs: sizes of the values that come from outside.
            outputs: values to give back.
            forms: of the weight of each layer, one of `FORMS`, by output; dense where it is missing.
            holds_inputs: whether the inputs are the plan's own memory, holding noise, and `run` takes none: to time one
                layer as it runs inside of a network.
        """
        self._native, self._instruction_set = native, native.instruction_set
        self._alive: list[object] = []  # steps hold addresses
        self._sizes = dict(inputs) | {one.output: one.size for one in operators}
        self._layouts = {name: _Layout(_four(size), (0, 0)) for name, size in self._sizes.items()}
        self._set_borders(operators)
        self._same: dict[str, str] = {}
        self._lanes: dict[tuple[int, int], Tensor] = {}
        self._inputs, self._outputs = ([] if holds_inputs else list(inputs)), list(outputs)
        held = [] if not holds_inputs else list(inputs)
        self.weight_bytes = 0
        offsets, floats = self._allocate(operators, held)
        # As the kernels read them, whatever PyTorch's defaults are now.
        self._arena = torch.zeros(floats, dtype=torch.float32, device="cpu")
        if holds_inputs:
            self._arena.normal_(generator=torch.Generator().manual_seed(0))
        self.arena_bytes = floats * 4
        base = self._arena.data_ptr()
        self._views = {name: self._view(self._layouts[name], base + 4 * at) for name, at in offsets.items()}
        # Steps are made for memory that stands in for the tensors of a call, and told of those before each run.
        outside = [self._empty(name) for name in (*self._inputs, *outputs)]
        for name, tensor in zip(self._inputs, outside, strict=False):
            self._views[name] = _contiguous(self._layouts[name].size, tensor.data_ptr())
        steps = [step for one in operators for step in self._steps(one, forms)]
        for name, tensor in zip(outputs, outside[len(self._inputs) :], strict=True):
            size = self._layouts[name].size
            steps.append(_copy(self._views[self._root(name)], _contiguous(size, tensor.data_ptr()), size))
        self._steps_array = (Step * len(steps))(*steps)
        self._fields = [_fields_within(self._steps_array, tensor) for tensor in outside]
        self._progress = torch.zeros(len(steps) * PROGRESS_VALUES, dtype=torch.int64, device="cpu")
        self._lock = threading.Lock()

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for ``inputs``, which are contiguous and of the prepared sizes: that is not checked again.

        Raises:
            RuntimeError: if the library has changed to another instruction set since.
            TypeError: if an input is not float32 on the CPU.
        """
        if self._native.instruction_set != self._instruction_set:
            # Their vectors are of different lengths, and so are the distances in memory.
            msg = (
                f"the plan was prepared for the instruction set '{self._instruction_set}', and "
                f"'{self._native.instruction_set}' is in use now; prepare it again"
            )
            raise RuntimeError(msg)
        for name, x in zip(self._inputs, inputs, strict=True):
            if x.dtype != torch.float32 or x.device.type != "cpu":
                msg = f"'{name}' is {x.dtype} on '{x.device}'; a plan reads torch.float32 on 'cpu', so convert it first"
                raise TypeError(msg)
        outputs = [self._empty(name) for name in self._outputs]
        with self._lock:
            for tensor, fields in zip((*inputs, *outputs), self._fields, strict=True):
                for view, shift in fields:
                    view.data = tensor.data_ptr() + shift
            self._native.run_plan(self._steps_array, self._progress)
        return outputs

    # ------------------------------------------------------------------------------------------------------- memory

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self._sizes[name], dtype=torch.float32, device="cpu")

    def _set_borders(self, operators: Sequence[Operator]) -> None:
        borders: dict[tuple[int, int], tuple[int, int]] = {}
        for one in operators:
            if not isinstance(one, Convolution) or one.stride != (1, 1):
                continue
            height, width = _four(self._sizes[one.inputs[0]])[2:]
            if (height, width) != (1, 1):
                known = borders.get((height, width), (0, 0))
                borders[height, width] = (max(known[0], one.padding[0]), max(known[1], one.padding[1]))
        for name, layout in self._layouts.items():
            self._layouts[name] = _Layout(layout.size, borders.get(layout.size[2:], (0, 0)))

    def _allocate(self, operators: Sequence[Operator], held: Sequence[str]) -> tuple[dict[str, int], int]:
        """First float of the first pixel of each value, and floats in all; values that are not needed make room."""
        begin = {name: -1 for name in held}
        for index, one in enumerate(operators):
            if self._is_alias(one):
                self._same[one.output] = self._root(one.inputs[0])
            else:
                begin[one.output] = index
        end = dict(begin)
        for index, one in enumerate(operators):
            for name in one.inputs:
                if self._root(name) in end:
                    end[self._root(name)] = index
        for name in [*self._outputs, *held]:
            if self._root(name) in end:
                end[self._root(name)] = len(operators)
        placed: list[tuple[int, int, str]] = []
        for name in sorted(begin, key=lambda name: -self._layouts[name].floats):
            busy = sorted(
                (at, upto) for at, upto, other in placed if begin[other] <= end[name] and begin[name] <= end[other]
            )
            floats, start = self._layouts[name].floats, 0
            for at, upto in busy:
                if start + floats <= at:
                    break
                start = max(start, upto)
            placed.append((start, start + floats, name))
        # A tile may read a little beyond the last map.
        total = max((upto for _, upto, _ in placed), default=0) + 64 * LANES
        return {name: at + self._layouts[name].first for at, _, name in placed}, total

    def _is_alias(self, one: Operator) -> bool:
        """Whether the output lies in memory as the input does."""
        return isinstance(one, Reshape) and self._layouts[one.inputs[0]].is_vector and one.inputs[0] not in self._inputs

    def _root(self, name: str) -> str:
        return self._same.get(name, name)

    def _view(self, layout: _Layout, address: int) -> View:
        lanes = self._lane_table(layout) if layout.border[1] else None
        distances = (layout.image, layout.channel, layout.row, 1, *layout.border, not layout.is_vector)
        return View(address, *distances, pointer(lanes))

    def _lane_table(self, layout: _Layout) -> Tensor:
        key = layout.size[2:]
        if key not in self._lanes:
            places = torch.arange(_round_up(layout.size[2] * layout.row, LANES) + 8 * LANES, device="cpu")
            is_pixel = (places % layout.row < layout.size[3]) & (places < layout.size[2] * layout.row)
            self._lanes[key] = -is_pixel.to(torch.int32)
        return self._lanes[key]

    # -------------------------------------------------------------------------------------------------------- steps

    def _steps(self, one: Operator, forms: Mapping[str, str]) -> list[Step]:
        views = [self._views[self._root(name)] for name in one.inputs]
        out = self._views.get(one.output)
        if out is None:  # an alias
            return []
        if isinstance(one, Weighted):
            return [self._weighted(one, views, out, forms.get(one.output, DENSE))]
        if isinstance(one, Concat):
            parts = zip(one.inputs, views, self._channels_before(one), strict=True)
            return [_copy(view, _shifted(out, at * out.channel), self._layouts[name].size) for name, view, at in parts]
        if isinstance(one, Slice):
            source = _shifted(views[0], one.start[0] * views[0].row + one.start[1])
            source.row, source.column = source.row * one.step[0], one.step[1]
            return [_copy(source, out, self._layouts[one.output].size)]
        if isinstance(one, Pad):
            step = Step(
                STEP_KINDS.index("copy"), _shape(self._layouts[one.inputs[0]].size, self._layouts[one.output].size)
            )
            step.x, step.out = views[0], out
            step.first_channel, step.shape.padding_h, step.shape.padding_w = one.before
            return [step]
        if isinstance(one, Reshape):
            before = self._layouts[one.inputs[0]].size
            flat = View(out.data, out.image, before[2] * before[3], before[3], 1, 0, 0, 0, None)
            return [_copy(views[0], flat, before)]
        shape = _shape(self._layouts[one.inputs[0]].size, self._layouts[one.output].size)
        kinds = {Add: "add", Scale: "scale"}
        step = Step(STEP_KINDS.index(one.kind if isinstance(one, Pool) else kinds[type(one)]), shape)
        step.x, step.out = views[0], out
        if isinstance(one, Pool):
            _set_window(step.shape, one.kernel_size, one.stride, one.padding, one.dilation)
        if len(views) > 1:
            step.residual = views[1]
        if isinstance(one, Add):
            step.epilogue.activation = ACTIVATIONS.index(one.activation)
            _flatten(step)
        return [step]

    def _weighted(self, one: Weighted, views: list[View], out: View, form: str) -> Step:
        shape = _shape(self._layouts[one.inputs[0]].size, self._layouts[one.output].size)
        step = Step(STEP_KINDS.index("convolution"), shape)
        step.x, step.out = views[0], out
        if len(views) > 1:
            step.residual = views[1]
        bias = None if one.bias is None else one.bias.float().contiguous()
        step.epilogue = Epilogue(pointer(bias), None, ACTIVATIONS.index(one.activation))
        self._alive.append(bias)
        if isinstance(one, Convolution):
            _set_window(step.shape, one.weight.shape[2:], one.stride, one.padding, one.dilation)
            if one.is_depthwise:
                self._set_depthwise(step, one)
                return step
        is_row = self._layouts[one.inputs[0]].is_vector and self._layouts[one.output].is_vector
        is_padded = isinstance(one, Convolution) and one.padding != (0, 0)
        if is_row and one.weight[0, 0].numel() == 1 and not is_padded:
            step.kind = STEP_KINDS.index("linear")
        if form == WINOGRAD:
            self._set_winograd(step, one.weight)
            return step
        weight = pack_as(one.weight, form)
        shape4 = (weight.shape[0], *weight.shape[1:])
        pattern = pattern_of("plan", weight.columns, weight.counts, shape4, weight.block)
        step.weight = pattern.native(weight.values, weight.columns)  # a convolution's offsets follow from the step
        if STEP_KINDS[step.kind] == "convolution":
            offsets = self._native.step_offsets(step, weight.columns)
            step.weight.offsets = pointer(offsets)
            self._alive.append(offsets)
        self._alive += [weight, pattern]
        self.weight_bytes += 4 * (weight.values.numel() + weight.columns.numel())
        return step

    def _set_winograd(self, step: Step, weight: Tensor) -> None:
        step.kind = STEP_KINDS.index("winograd")
        values = transform(weight)
        step.weight = Weight(block=values.shape[3], groups=values.shape[1], chunks=1, values=pointer(values))
        offsets = self._native.step_offsets(step, torch.arange(values.shape[2], dtype=torch.int32, device="cpu"))
        step.weight.offsets = pointer(offsets)
        self._alive += [offsets, values]
        self.weight_bytes += 4 * (values.numel() + offsets.numel())

    def _set_depthwise(self, step: Step, one: Convolution) -> None:
        step.kind = STEP_KINDS.index("depthwise")
        positions = torch.arange(one.weight[0].numel(), dtype=torch.int32, device="cpu")
        offsets, values = self._native.step_offsets(step, positions), one.weight.contiguous()
        step.weight = Weight(offsets=pointer(offsets), values=pointer(values))
        self._alive += [offsets, values]
        self.weight_bytes += 4 * values.numel()

    def _channels_before(self, one: Concat) -> list[int]:
        widths = [self._sizes[name][1] for name in one.inputs]
        return [0, *itertools.accumulate(widths)][:-1]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _four(size: tuple[int, ...]) -> tuple[int, int, int, int]:
    padded = (*size, 1, 1, 1, 1)
    return padded[0], padded[1], padded[2], padded[3]


def _contiguous(size: tuple[int, int, int, int], address: int) -> View:
    _, channels, height, width = size
    return View(address, channels * height * width, height * width, width, 1, 0, 0, 0, None)


def _shifted(view: View, floats: int) -> View:
    shifted = View.from_buffer_copy(view)
    shifted.data += 4 * floats
    return shifted


def _copy(source: View, out: View, size: tuple[int, int, int, int]) -> Step:
    step = Step(STEP_KINDS.index("copy"), _shape(size, size))
    step.x, step.out = source, out
    _flatten(step)
    return step


def _fields_within(steps: ctypes.Array[Step], tensor: Tensor) -> list[tuple[View, int]]:
    """The views whose address lies within a tensor, and how far from its beginning."""
    base = tensor.data_ptr()
    views = [view for step in steps for view in (step.x, step.residual, step.out)]
    return [(view, view.data - base) for view in views if view.data and 0 <= view.data - base < tensor.nbytes]


def _shape(before: tuple[int, int, int, int], after: tuple[int, int, int, int]) -> Shape:
    return Shape(*before, *after[1:], 1, 1, 1, 1, 0, 0, 1, 1, 0)


def _set_window(
    shape: Shape, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    names = ("kernel", "stride", "padding", "dilation")
    for name, (rows, columns) in zip(names, (kernel, stride, padding, dilation), strict=True):
        setattr(shape, f"{name}_h", rows)
        setattr(shape, f"{name}_w", columns)


def _flatten(step: Step) -> None:
    """Maps of one pixel, which lie side by side, as one map of one row: a map costs more than a pixel."""
    shape, views = step.shape, (step.x, step.residual, step.out)
    if (shape.height, shape.width, shape.out_height, shape.out_width) != (1, 1, 1, 1):
        return
    if any(view.data and (view.channel, view.column) != (1, 1) for view in views):  # a slice has columns apart
        return
    shape.width, shape.out_width = shape.in_channels, shape.out_channels
    shape.in_channels = shape.out_channels = 1
