"""What each operator does to labels: one rule for a family of operators.

A rule is given the pass and the call and returns labels for each output (None where nothing is known, which later
operators read as constant) and the operators that the outputs come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .labels import compact, tighten, varying_dims
from .shapes import tensors_in

if TYPE_CHECKING:
    from .trace import LabelPass


@dataclass
class Call:
    """One operator call as a rule sees it."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    sources: frozenset[int]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


Result = tuple[list[Tensor | None], frozenset[int]]
Rule = Callable[["LabelPass", Call], Result]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _window(call: Call, weight: Tensor, stride: Any, dilation: Any) -> dict[str, tuple[int, ...]]:
    """What a convolution does in space, and what comes out there; one number may stand for all dimensions."""
    kernel = tuple(map(int, weight.shape[2:]))
    stride, dilation = (
        (value,) * len(kernel) if isinstance(value, int) else tuple(map(int, value)) * (len(kernel) // len(value))
        for value in (stride, dilation)
    )
    out_size = tuple(call.outputs[0].shape[-len(kernel) :])
    return {"kernel": kernel, "stride": stride, "dilation": dilation, "out_size": out_size}


# -------------------------------------------------------------------- weighted operators


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(run: LabelPass, call: Call) -> Result:
    x, weight, bias = call.args[0], call.args[1], call.get(2, "bias")
    if call.name == "convolution":
        stride, dilation, transposed, groups = call.args[3], call.args[5], call.args[6], int(call.args[8])
        if transposed:
            return _transposed(run, call, x, weight, bias, stride, dilation, groups)
    else:
        stride, dilation = call.get(3, "stride", 1), call.get(5, "dilation", 1)
        groups = int(call.get(6, "groups", 1))
    out_width, in_width = int(weight.shape[0]), int(weight.shape[1])
    kernel = math.prod(weight.shape[2:])
    positions = run.per_image(call, call.outputs[0].numel() // out_width)
    name = run.name_of(weight)
    read = _channels_read(run, x, weight.dim() - 1) if run.with_labels else None
    out_dim: Tensor | int = out_width
    in_dim: Tensor | int = in_width
    labels = None
    if name is None:
        run.note_computed(weight)
    if read is not None and name is None:
        run.freeze(read, "is read by a convolution whose weight is computed")
    elif read is not None and name is not None:
        out = run.out_axis(name, 0, out_width)
        if groups == 1:
            in_dim = run.axis(name, 1, "in", read)
        elif groups >= in_width:
            # The convolution group is the unit: its inputs and outputs live or die together.
            run.record.classes.merge_along(out.reshape(groups, -1), 1)
            run.record.classes.merge_along(read.reshape(groups, -1), 1)
            run.record.classes.union(out.reshape(groups, -1)[:, 0], read.reshape(groups, -1)[:, 0])
        else:
            # Wide groups: the unit is one position in every group, so that counts stay equal.
            run.record.classes.merge_along(out.reshape(groups, -1), 0)
            run.record.classes.merge_along(read.reshape(groups, -1), 0)
            in_dim = run.axis(name, 1, "in", read[:in_width])
        out_dim = out
        if (bias_name := run.name_of(bias)) is not None:
            run.axis(bias_name, 0, "elementwise", out)
        labels = out.reshape(-1, *(1,) * (weight.dim() - 2))
    channels = in_width * groups
    kind = "depthwise_conv" if groups == channels and groups > 1 else "conv"
    sources = run.add_weighted(
        call, weight, bias, kind, positions * kernel, (out_dim, in_dim), in_channels=channels, out_channels=out_width,
        groups=groups, **_window(call, weight, stride, dilation),
    )  # fmt: skip
    return [labels], sources


def _channels_read(run: LabelPass, x: Tensor, n_dims: int) -> Tensor:
    """Labels of the channels of ``x``, the first of its last ``n_dims`` dimensions: a batch may stand before them."""
    return run.record.classes.along(run.labels_or_constant(x), x.dim() - n_dims)


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(run: LabelPass, call: Call) -> Result:
    x, weight, bias = call.args[0], call.args[1], call.get(2, "bias")
    stride, groups, dilation = call.get(3, "stride", 1), int(call.get(6, "groups", 1)), call.get(7, "dilation", 1)
    return _transposed(run, call, x, weight, bias, stride, dilation, groups)


def _transposed(
    run: LabelPass, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, dilation: Any, groups: int
) -> Result:
    in_width, out_width = int(weight.shape[0]), int(weight.shape[1])
    kernel = math.prod(weight.shape[2:])
    positions = run.per_image(call, x.numel() // in_width)
    name = run.name_of(weight)
    in_dim: Tensor | int = in_width
    out_dim: Tensor | int = out_width
    labels = None
    if run.with_labels:
        read = _channels_read(run, x, weight.dim() - 1)
        if name is None:
            run.note_computed(weight)
            run.freeze(read, "is read by a convolution whose weight is computed")
        elif groups == in_width and out_width == 1:
            # Depthwise: the channel is read and written by one slice.
            out = run.out_axis(name, 0, groups)
            run.record.classes.union(out, read)
            out_dim, in_dim = out, 1
            if (bias_name := run.name_of(bias)) is not None:
                run.axis(bias_name, 0, "elementwise", out)
            labels = out.reshape(-1, *(1,) * (weight.dim() - 2))
        elif groups == 1:
            in_dim = run.axis(name, 0, "in", read)
            out_dim = out = run.out_axis(name, 1, out_width)
            if (bias_name := run.name_of(bias)) is not None:
                run.axis(bias_name, 0, "elementwise", out)
            labels = out.reshape(-1, *(1,) * (weight.dim() - 2))
        else:
            run.freeze(read, "is read by a grouped transposed convolution")
    kind = "depthwise_conv" if groups == in_width > 1 == out_width else "conv"
    sources = run.add_weighted(
        call, weight, bias, kind, positions * kernel, (out_dim, in_dim), in_channels=in_width,
        out_channels=out_width * groups, groups=groups, **_window(call, weight, stride, dilation),
    )  # fmt: skip
    return [labels], sources


@_rule("linear")
def _linear(run: LabelPass, call: Call) -> Result:
    return _affine(run, call, call.args[0], call.args[1], call.get(2, "bias"), dims=(0, 1))


def _affine(
    run: LabelPass, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, dims: tuple[int, int]
) -> Result:
    """A linear layer; ``dims`` are those of its outputs and of its inputs in the weight."""
    out_width, in_width = (int(weight.shape[dim]) for dim in dims)
    positions = run.per_image(call, call.outputs[0].numel() // max(1, out_width))
    name = run.name_of(weight)
    out_dim: Tensor | int = out_width
    in_dim: Tensor | int = in_width
    labels = None
    if run.with_labels:
        read = _channels_read(run, x, 1)
        if name is None:
            run.note_computed(weight)
            run.freeze(read, "is read by a linear layer whose weight is computed")
        else:
            in_dim = run.axis(name, dims[1], "in", read)
            out_dim = labels = run.out_axis(name, dims[0], out_width)
            if (bias_name := run.name_of(bias)) is not None:
                run.axis(bias_name, 0, "elementwise", labels)
    # Positions lie between the batch and the channels, where the batch comes first.
    between = tuple(call.outputs[0].shape[1:-1]) + (1, 1)[: max(0, 4 - call.outputs[0].dim())]
    sources = run.add_weighted(
        call, weight, bias, "linear", positions, (out_dim, in_dim), in_channels=in_width, out_channels=out_width,
        out_size=between if math.prod(between) == positions else (positions, 1),
    )  # fmt: skip
    return [labels], sources


@_rule("embedding")
def _embedding(run: LabelPass, call: Call) -> Result:
    weight = call.args[0]
    name = run.name_of(weight)
    labels = run.out_axis(name, 1, int(weight.shape[1])) if run.with_labels and name is not None else None
    sources = run.add_weighted(
        call, weight, None, "embedding", 0, (), in_channels=int(weight.shape[0]), out_channels=int(weight.shape[1])
    )
    return [labels], sources


@_rule("scaled_dot_product_attention")
def _attention(run: LabelPass, call: Call) -> Result:
    query, key, value = call.args[:3]
    rows, columns = int(query.shape[-2]), int(key.shape[-2])
    batch = math.prod(call.outputs[0].shape[:-2])
    n_shared = 1
    out: Tensor | None = None
    read: list[Tensor] = []
    if run.with_labels:
        classes = run.record.classes
        for tensor in (query, key, value):
            labels = run.labels_or_constant(tensor)
            classes.merge_along(labels, labels.dim() - 2)
            # The default scale is a function of the head's width, so that heads go whole.
            classes.merge_along(labels, labels.dim() - 1)
            read.append(compact(labels))
        heads = [labels[..., :1, :1] for labels in read]
        # Several heads of queries may share one of keys and values; then they go with it.
        n_shared = heads[0].numel() // heads[1].numel() if call.kwargs.get("enable_gqa") else 1
        if heads[0].numel() == n_shared * heads[1].numel() == n_shared * heads[2].numel():
            queries = heads[0].reshape(-1, n_shared)
            classes.merge_along(queries, 1)
            classes.union(queries[:, 0], heads[1].flatten())
            classes.union(queries[:, 0], heads[2].flatten())
            if isinstance(mask := call.get(3, "attn_mask"), Tensor):
                _bind_mask(run, mask, heads[0])
            out = run.labels_or_constant(value).narrow(-2, 0, 1)
            if n_shared > 1:
                out = compact(out).repeat_interleave(n_shared, -3)
        else:
            for labels in read:
                run.freeze(labels, "takes part in attention with unequal numbers of heads")
    width = int(query.shape[-1]) + int(value.shape[-1])
    macs = run.per_image(call, batch * rows * columns * width)
    counted = None
    if out is not None and all(labels.numel() > 1 for labels in read):
        counted = read[0].flatten() if n_shared > 1 else torch.cat([read[0].flatten(), read[2].flatten()])
    return [out], run.add_product(call, "attention", *_per_label(run, macs, counted))


def _bind_mask(run: LabelPass, mask: Tensor, heads: Tensor) -> None:
    """Bind what is added to each head's products to the heads."""
    if not run.is_labelled(mask):
        return
    labels = run.labels_or_constant(mask)
    varying, of_heads = set(varying_dims(labels)), labels.dim() - 3
    if of_heads in varying and labels.shape[of_heads] == heads.numel() and min(varying) == of_heads:
        run.record.classes.union(run.record.classes.along(labels, of_heads), heads.reshape(-1))
    elif varying & {labels.dim() - 1, labels.dim() - 2}:
        run.freeze(labels, "is added to attention position by position")
    elif varying:
        run.freeze(compact(labels), "is added to attention with another number of heads")


@_rule("matmul", "bmm", "mm")
def _matmul(run: LabelPass, call: Call) -> Result:
    first, second = call.args[:2]
    depth = int(first.shape[-1])
    macs = run.per_image(call, call.outputs[0].numel() * depth)
    reason = ""
    if first.dim() < 2 or second.dim() < 2:
        reason = "takes part in a product with a vector"
    elif run.is_parameter(first) or run.is_parameter(second):
        reason = "is multiplied by a bare parameter"
    elif not (first.numel() and second.numel()):
        reason = "takes part in a product of nothing"
    if not run.with_labels or reason:
        if run.with_labels:
            for tensor in (first, second):
                run.freeze(run.labels_or_constant(tensor), reason)
        return [None], run.add_product(call, "matmul", macs, ())
    classes = run.record.classes
    a, b = tighten(run.labels_or_constant(first)), tighten(run.labels_or_constant(second))
    # Contraction: position k of the first dies with position k of the second.
    left = a.narrow(-2, 0, 1) if a.shape[-2] > 1 else a
    right = b.narrow(-1, 0, 1) if b.shape[-1] > 1 else b
    if a.dim() - 2 in varying_dims(a) and a.dim() - 1 in varying_dims(a):
        classes.merge_along(a, a.dim() - 2)
    if b.dim() - 1 in varying_dims(b) and b.dim() - 2 in varying_dims(b):
        classes.merge_along(b, b.dim() - 1)
    left, right = compact(left.transpose(-1, -2)), compact(right)
    # Where neither varies, the sum is over positions, and its single labels are those of channels that stand elsewhere.
    if left.numel() > 1 or right.numel() > 1:
        classes.union(left, right)
    batched = any(d < a.dim() - 2 for d in varying_dims(a)) or any(d < b.dim() - 2 for d in varying_dims(b))
    counted: Tensor | None = None
    for labels, inner in ((a, -1), (b, -2)):
        if labels.dim() + inner in varying_dims(labels):
            counted = compact(labels).flatten()
            if batched:
                classes.merge_along(labels, labels.dim() + inner)
    # Where only what is summed over changes the label, the result is no channel's.
    row = compact(torch.zeros_like(a.narrow(-1, 0, 1)) if varying_dims(a) == [a.dim() - 1] else a.narrow(-1, 0, 1))
    column = compact(torch.zeros_like(b.narrow(-2, 0, 1)) if varying_dims(b) == [b.dim() - 2] else b.narrow(-2, 0, 1))
    if (row > 0).any() and (column > 0).any():
        out = run.meet(row, column)
    else:
        out = torch.where(*_broadcast_pair(row, column))
    out = out.expand(call.outputs[0].shape)
    if counted is None and len(varying_dims(out)) > 0:
        counted = compact(out).flatten()
    return [out], run.add_product(call, "matmul", *_per_label(run, macs, counted))


@_rule("addmm", "baddbmm", "addbmm", "addmv")
def _added_product(run: LabelPass, call: Call) -> Result:
    bias, first, second = call.args[:3]
    is_layer = run.name_of(second) is not None and run.name_of(bias) is not None and bias.shape == second.shape[1:]
    if call.name == "addmm" and is_layer:
        return _affine(run, call, first, second, bias, dims=(1, 0))
    columns = int(second.shape[-1]) if second.dim() > 1 else 1
    return _dense_product(run, call, first.numel() * columns // run.batch)


@_rule("bilinear")
def _bilinear(run: LabelPass, call: Call) -> Result:
    weight = call.args[2]
    return _dense_product(run, call, call.outputs[0].numel() // (run.batch * int(weight.shape[-3])) * weight.numel())


def _dense_product(run: LabelPass, call: Call, macs: int) -> Result:
    """A product that counts, and whose operands stay as they are."""
    if run.with_labels:
        for tensor in call.args:
            if isinstance(tensor, Tensor):
                run.freeze(run.labels_or_constant(tensor), f"takes part in a product ({call.name})")
    return [None], run.add_product(call, "matmul", macs, ())


def _per_label(run: LabelPass, macs: int, counted: Tensor | None) -> tuple[int, tuple[Tensor, ...]]:
    """MACs of a product as a factor times the number of labels left, each counted once."""
    if counted is None:
        return macs, ()
    labels, counts = counted.unique(return_counts=True)
    if macs % len(labels) or bool((counts != counts[0]).any()):
        run.freeze(counted, "takes part in a product that does not cost the same for every channel")
        return macs, ()
    return macs // len(labels), (labels,)


def _broadcast_pair(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.broadcast_tensors(row, column)
    return a > 0, a, b


# -------------------------------------------------------------------- normalisation and reductions


@_rule("batch_norm", "instance_norm")
def _batch_norm(run: LabelPass, call: Call) -> Result:
    x = call.args[0]
    tensors = [t for t in call.args[1:5] if isinstance(t, Tensor)]
    run.note_norm(call, x, call.get(1, "weight"))
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(x)
    read = run.record.classes.along(labels, 1)
    for tensor in tensors:
        if (name := run.name_of(tensor)) is not None:
            run.axis(name, 0, "elementwise", read)
        else:
            run.freeze(read, "is normalised with computed statistics")
    return [labels], call.sources


@_rule("group_norm")
def _group_norm(run: LabelPass, call: Call) -> Result:
    x, n_groups = call.args[0], int(call.args[1])
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(x)
    read = run.record.classes.along(labels, 1)
    if n_groups == 1:
        run.freeze(read, "shares statistics over all channels")
    module = run.running_module()
    # Whole groups go, so that their number has to shrink as well: only a layer that notes it can be told.
    if not (isinstance(module, nn.GroupNorm) and module.num_groups == n_groups and module.weight is not None):
        run.freeze(read, f"is normalised in {n_groups} groups, a number that no nn.GroupNorm with a weight holds,")
    run.record.classes.merge_along(read.reshape(n_groups, -1), 1)
    for tensor in (call.get(2, "weight"), call.get(3, "bias")):
        if (name := run.name_of(tensor)) is not None:
            run.axis(name, 0, "elementwise", read)
    return [labels], call.sources


@_rule("layer_norm", "rms_norm")
def _layer_norm(run: LabelPass, call: Call) -> Result:
    x, normalized = call.args[0], call.args[1]
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(x)
    _combine(run, labels, range(labels.dim() - len(normalized), labels.dim()), "shares layer-norm statistics")
    return [labels], call.sources


def _combine(run: LabelPass, labels: Tensor, dims: Collection[int], reason: str) -> None:
    """Values along ``dims`` are computed from each other.

    Where other dimensions tell channels apart, such as those of heads or of stacked branches, what is combined goes
    together; else no channel can go.
    """
    varying = set(varying_dims(labels))
    combined = varying & set(dims)
    if combined and varying == combined:
        run.freeze(labels, reason)
        return
    for dim in combined:
        run.record.classes.merge_along(labels, dim)


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "glu", "logcumsumexp")
def _along_channels(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(call.args[0])
    dim = int(call.get(1, "dim", -1)) % max(1, labels.dim())
    if call.name == "glu":
        if dim not in varying_dims(labels):
            return [labels.narrow(dim, 0, labels.shape[dim] // 2)], call.sources
        first, second = labels.chunk(2, dim)
        run.record.classes.union(compact(first), compact(second))
        return [first], call.sources
    _combine(run, labels, [dim], f"is normalised over channels ({call.name})")
    return [labels], call.sources


@_rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "linalg_vector_norm", "prod", "logsumexp")
def _reduction(run: LabelPass, call: Call) -> Result:
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return run.elementwise(call)
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(call.args[0])
    if not labels.numel():
        return [run.constant(out) for out in call.outputs], call.sources
    position = 2 if call.name in ("norm", "linalg_vector_norm") else 1
    given = call.get(position, "dim")
    if isinstance(given, bool):  # `x.std(False)` is over everything
        given = None
    dims = sorted(_numbered(given, labels.dim()), reverse=True)
    _combine(run, labels, dims, f"is reduced over channels ({call.name})")
    keep = call.outputs[0].dim() == labels.dim()
    for dim in dims:
        labels = labels.narrow(dim, 0, 1) if keep else labels.select(dim, 0)
    return [labels for _ in call.outputs], call.sources


def _numbered(given: int | Collection[int] | None, n_dims: int) -> set[int]:
    """Dimensions counted from the first: all where none is given, none where a number stands alone."""
    if given is None or given == [] or not n_dims:
        return set(range(n_dims))
    return {int(dim) % n_dims for dim in ([given] if isinstance(given, int) else given)}


@_rule("stft", "istft", "take_along_dim")
def _taken_whole(run: LabelPass, call: Call) -> Result:
    # Decomposed, they would meet a window or indices on the processor beside shapes.
    return run.unknown(call)


@_rule("log_sigmoid_forward")
def _log_sigmoid(run: LabelPass, call: Call) -> Result:
    labels, sources = run.elementwise(call)
    return [*labels, None], sources


@_rule("repeat")
def _repeat(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    counts = [int(count) for count in call.args[1]]
    labels = run.labels_or_constant(call.args[0])
    labels = labels.reshape((1,) * (len(counts) - labels.dim()) + tuple(labels.shape))
    varying = varying_dims(labels)
    return [compact(labels).repeat([n if dim in varying else 1 for dim, n in enumerate(counts)])], call.sources


# -------------------------------------------------------------------- spatial operators

_SPATIAL = [
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "_pad_circular",
]  # fmt: skip


_SPATIAL_DIMS = re.compile(r"(\d)d")


@_rule(*_SPATIAL)
def _spatial(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None for _ in call.outputs], call.sources
    labels = run.labels_or_constant(call.args[0])
    if not labels.numel():
        return [run.constant(out) for out in call.outputs], call.sources
    # Without a batch, the dimension of channels is the first of those that the operator takes for space.
    n_spatial = len(call.args[1]) // 2 if call.name == "_pad_circular" else int(_SPATIAL_DIMS.findall(call.name)[0])
    for dim in range(labels.dim() - n_spatial, labels.dim()):
        if dim in varying_dims(labels):
            run.record.classes.merge_along(labels, dim)
        labels = labels.narrow(dim, 0, 1)
    return [labels for _ in call.outputs], call.sources


@_rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    run.freeze(run.labels_or_constant(call.args[1]), "says where a map is sampled")
    labels = run.labels_or_constant(call.args[0])
    return [run.record.classes.along(labels, 1).reshape(1, -1, *(1,) * (labels.dim() - 2))], call.sources


@_rule("im2col")
def _im2col(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    read = _channels_read(run, call.args[0], 3)
    return [read.repeat_interleave(math.prod(call.args[1])).reshape(-1, 1)], call.sources


@_rule("constant_pad_nd")
def _constant_pad(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(call.args[0])
    if not labels.numel():
        return [run.constant(call.outputs[0])], call.sources
    pads = list(call.args[1])
    varying = varying_dims(labels)
    for position in range(len(pads) // 2):
        dim = labels.dim() - 1 - position
        before, after = int(pads[2 * position]), int(pads[2 * position + 1])
        if not before and not after:
            continue
        if dim not in varying or before < 0 or after < 0:
            if dim in varying:
                run.freeze(labels, "is cropped by a negative pad")
            shape = list(labels.shape)
            shape[dim] += before + after
            labels = compact(labels).narrow(dim, 0, 1).expand(shape)
            continue
        # A padded channel is produced here: it gets a label of its own, which the sum behind it binds to a layer's.
        inner = compact(labels)
        edges = []
        for count in (before, after):
            shape = list(inner.shape)
            shape[dim] = count
            own = run.record.classes.fresh(count).reshape([count if d == dim else 1 for d in range(inner.dim())])
            edges.append(own.expand(shape))
        widened = torch.cat([edges[0], inner, edges[1]], dim)
        shape = list(labels.shape)
        shape[dim] = widened.shape[dim]
        labels = widened.expand(shape)
    return [labels], call.sources


# -------------------------------------------------------------------- constants


@_rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _constant_like(run: LabelPass, call: Call) -> Result:
    """A constant that takes its width from an activation: its channel goes when that activation's channel goes."""
    if not run.with_labels:
        return [None], call.sources
    labels, out = run.labels_or_constant(call.args[0]), call.outputs[0]
    # For a shape that is given this is a guess, which the trial at smaller widths refutes where it is wrong.
    if tuple(out.shape) == tuple(labels.shape):
        return [labels], call.sources
    return [run.constant(out)], call.sources


# -------------------------------------------------------------------- data movement


@_rule("contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "alpha_dropout", "_to_copy", "to",
       "lift_fresh", "native_dropout", "type_as", "relu6", "hardswish", "prelu", "resolve_conj",
       "resolve_neg", "rrelu")  # fmt: skip
def _identity(run: LabelPass, call: Call) -> Result:
    if call.name == "prelu" and run.with_labels:
        x, weight = call.args[:2]
        labels = run.labels_or_constant(x)
        if weight.numel() > 1:
            if (name := run.name_of(weight)) is not None:
                run.axis(name, 0, "elementwise", run.record.classes.along(labels, 1))
            else:
                run.freeze(labels, "is read by a PReLU whose weight is computed")
        return [labels], call.sources
    labels_or_none = run.labels_or_constant(call.args[0]) if run.with_labels else None
    return [labels_or_none], call.sources


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as")
def _view(run: LabelPass, call: Call) -> Result:
    run.record.views.append(tuple(call.outputs[0].shape))
    if not run.with_labels:
        return [None], call.sources
    labels = tighten(run.labels_or_constant(call.args[0]).reshape(call.outputs[0].shape))
    if len(varying_dims(labels)) > 1:
        run.fold(labels)
    return [labels], call.sources


@_rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "movedim", "swapaxes", "swapdims", "numpy_T",
       "matrix_H", "adjoint", "mT", "moveaxis", "expand_as", "broadcast_to")  # fmt: skip
def _rearrange(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    labels = run.labels_or_constant(call.args[0])
    if call.name in ("expand", "expand_as", "broadcast_to"):
        return [labels.expand(call.outputs[0].shape)], call.sources
    # As a tensor of its own: in place, the operator would change the shape of what others hold too.
    return [call.func(labels.view(labels.shape), *call.args[1:], **call.kwargs)], call.sources


@_rule("select", "slice", "narrow", "unbind", "roll", "flip")
def _pick(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None for _ in call.outputs], call.sources
    labels = run.labels_or_constant(call.args[0])
    if call.name in ("roll", "flip"):
        given = call.get(2 if call.name == "roll" else 1, "dims")
        dims = _numbered(given, labels.dim())
        if not dims & set(varying_dims(labels)):
            return [labels], call.sources
    else:
        dims = _numbered(call.get(1, "dim", 0), labels.dim())
        if call.name == "slice" and call.outputs[0].shape == labels.shape:
            return [labels], call.sources
    for dim in dims:
        # The forward pass names positions: they may not shift.
        if dim in varying_dims(labels):
            run.record.classes.merge_along(labels, dim)
    moved = call.func(labels, *call.args[1:], **call.kwargs)
    return [moved] if isinstance(moved, Tensor) else list(moved), call.sources


@_rule("chunk", "split", "split_with_sizes", "tensor_split")
def _split(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None for _ in call.outputs], call.sources
    labels = run.labels_or_constant(call.args[0])
    dim = int(call.get(2, "dim", 0)) % labels.dim()
    sizes = [int(out.shape[dim]) for out in call.outputs]
    # Of `tensor_split` they may overlap.
    pieces = list(call.func(labels, *call.args[1:]) if call.name == "tensor_split" else labels.split(sizes, dim))
    if dim in varying_dims(labels) and call.name in ("chunk", "tensor_split"):
        if len(set(sizes)) > 1:
            run.freeze(labels, "is cut into unequal chunks")
        else:
            for piece in pieces[1:]:
                run.record.classes.union(compact(pieces[0]), compact(piece))
    return list(pieces), call.sources


@_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _concatenate(run: LabelPass, call: Call) -> Result:
    tensors = list(call.args[0]) if call.name not in ("hstack", "vstack") else []
    if not tensors:
        return run.unknown(call)
    sources = run.join(call, "concat", tensors)
    if not run.with_labels:
        return [None], sources
    dim = int(call.get(1, "dim", 0))
    parts = [run.labels_or_constant(t) for t in tensors if t.numel()]
    if not parts:
        return [run.constant(call.outputs[0])], sources
    if call.name == "stack":
        parts = [part.unsqueeze(dim) for part in parts]
    dim %= parts[0].dim()
    parts = [compact(p).expand(*compact(p).shape[:dim], p.shape[dim], *compact(p).shape[dim + 1 :]) for p in parts]
    shape = list(torch.broadcast_shapes(*[(*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in parts]))
    if any(size > 1 for size in shape):
        # Every part must keep the same box across the other dimensions.
        for part in parts:
            run.record.classes.union(compact(part).narrow(dim, 0, 1), compact(parts[0]).narrow(dim, 0, 1))
            if dim in varying_dims(part):
                run.record.classes.merge_along(part, dim)
    parts = [p.expand(*shape[:dim], p.shape[dim], *shape[dim + 1 :]) for p in parts]
    return [tighten(torch.cat(parts, dim).expand(call.outputs[0].shape))], sources


@_rule("pixel_shuffle")
def _pixel_shuffle(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    factor = int(call.args[1])
    read = _channels_read(run, call.args[0], 3)
    blocks = read.reshape(-1, factor * factor)
    run.record.classes.merge_along(blocks, 1)
    return [blocks[:, 0].reshape(-1, 1, 1)], call.sources


@_rule("pixel_unshuffle")
def _pixel_unshuffle(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    factor = int(call.args[1])
    read = _channels_read(run, call.args[0], 3)
    return [read.repeat_interleave(factor * factor).reshape(-1, 1, 1)], call.sources


@_rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    n_groups = int(call.args[1])
    read = run.record.classes.along(run.labels_or_constant(call.args[0]), 1)
    grid = read.reshape(n_groups, -1)
    run.record.classes.merge_along(grid, 0)
    return [grid.t().reshape(1, -1, *(1,) * (call.args[0].dim() - 2))], call.sources


@_rule("index", "index_select", "gather")
def _index(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    x = call.args[0]
    indices = list(tensors_in(call.args[1:]))
    labels = run.labels_or_constant(x)
    if call.name == "index" and not any(map(run.is_unknown, indices)):
        indexed = [dim for dim, index in enumerate(call.args[1]) if index is not None]
        if run.is_activation(x):
            for dim in set(indexed) & set(varying_dims(labels)):
                run.record.classes.merge_along(labels, dim)
        # Labels are on the CPU, wherever the network is.
        args, kwargs = tree_map_only(Tensor, lambda index: index.to(labels.device), (call.args[1:], call.kwargs))
        return [call.func(labels, *args, **kwargs)], call.sources
    if not labels.numel():
        return [run.constant(call.outputs[0])], call.sources
    if not varying_dims(labels):
        return [labels.flatten()[:1].reshape((1,) * call.outputs[0].dim())], call.sources
    return run.unknown(call)


@_rule("copy", "fill", "index_put", "scatter", "zero")
def _overwrite(run: LabelPass, call: Call) -> Result:
    if not run.with_labels:
        return [None], call.sources
    for leaf in (*tensors_in(call.args), *tensors_in(call.kwargs)):
        if run.is_labelled(leaf):
            run.freeze(run.labels_or_constant(leaf), f"is written in place ({call.name})")
    return [run.constant(call.outputs[0])], call.sources
