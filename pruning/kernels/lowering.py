"""From a module to the list of operators that a plan runs.

The module is exported, constants are computed, and each node of the graph becomes an operator: one of our own where a
reader in `_READERS` understands the node, and `Foreign` otherwise. Then batch norms are folded into the layer before
them, and activations and residual additions become part of the layer whose output they alone read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import TreeSpec

from graph_encoder.copies import copied
from graph_encoder.errors import why_not_exported

from .operators import Add, Concat, Convolution, Foreign, Linear, Operator, Pad, Pool, Reshape, Scale, Slice, Weighted
from .reference import ACTIVATIONS


class LoweringError(ValueError):
    """A network that cannot be written down as a list of operators."""


@dataclass(frozen=True)
class Lowered:
    """A network as a list of operators.

    Attributes:
        operators: each behind those whose values it reads.
        inputs: names of the network's inputs.
        outputs: names of the values it returns.
        constants: values that do not depend on the inputs but are outputs.
        structure: how the outputs are arranged in what the network returns.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    structure: TreeSpec


def lower(model: nn.Module, inputs: Sequence[Tensor]) -> Lowered:
    """Write a network down as operators.

    Args:
        model: network in evaluation mode; untouched.
        inputs: positional inputs of the sizes that every later one has.

    Raises:
        LoweringError: if PyTorch cannot export the network.
    """
    try:
        # A graph for inference without anything that works in place; composite operators stay whole.
        with torch.autocast("cpu", enabled=False):
            program = torch.export.export(copied(model), tuple(inputs)).run_decompositions({})
    except Exception as error:  # the exporter raises whatever the step at fault raises
        what = why_not_exported(error, model)
        msg = f"{type(model).__name__} cannot be exported, so it cannot run as one plan: {what}"
        raise LoweringError(msg) from error
    signature = program.graph_signature
    tensors = {**program.state_dict, **program.constants}
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held |= signature.inputs_to_lifted_tensor_constants
    reader = _Reader({name: tensors[key].detach() for name, key in held.items()})
    kinds = [output.kind for output in signature.output_specs]
    if OutputKind.BUFFER_MUTATION in kinds:
        msg = f"{type(model).__name__} changes a buffer at every call, which a plan does not"
        raise LoweringError(msg)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # An input that forward changes in place is left as it is.
        returned = zip(reader.read(program.graph), kinds, strict=True)
        outputs = tuple(name for name, kind in returned if kind == OutputKind.USER_OUTPUT)
    constants = {name: value for name, value in reader.constants.items() if name in outputs}
    operators = _fuse(reader.operators, outputs)
    structure = program.call_spec.out_spec
    assert structure is not None
    return Lowered(tuple(operators), tuple(reader.inputs), outputs, constants, structure)


class _Reader:
    """Reads a graph node by node."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants
        self.operators: list[Operator] = []
        self.inputs: list[str] = []
        self._same: dict[str, str] = {}  # nodes that only pass a value on, and the value
        self._own: set[str] = set()  # values that operators of ours write

    def read(self, graph: fx.Graph) -> tuple[str, ...]:
        """Read all nodes; the names of the outputs."""
        for node in graph.nodes:
            if node.op == "placeholder" and node.name not in self.constants:
                self.inputs.append(node.name)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                if plain := [value for value in node.args[0] if not isinstance(value, fx.Node)]:
                    msg = f"the network returns {plain[0]!r} beside its tensors; return tensors alone"
                    raise LoweringError(msg)
                return tuple(self.name(value) for value in node.args[0])
        msg = "the exported graph has no output"
        raise LoweringError(msg)

    def name(self, node: Any) -> str:
        """Name of the value that a node stands for."""
        name: str = node.name
        return self._same.get(name, name)

    def value(self, node: Any) -> Any:
        """A constant, or None for what the inputs decide."""
        if isinstance(node, fx.Node):
            return self.constants.get(self.name(node))
        return node

    def are_constant(self, *nodes: Any) -> bool:
        """Whether the inputs decide none of them; what is not there is constant too."""
        return all(not isinstance(node, fx.Node) or self.name(node) in self.constants for node in nodes)

    def _call(self, node: fx.Node) -> None:
        if self.are_constant(*node.all_input_nodes) and not _is_random(node):
            arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda source: self.constants[self.name(source)])
            self.constants[node.name] = node.target(*arguments, **keywords)  # type: ignore[operator]
            return
        if _is_pass_through(node) or self._is_normalized(node):
            self._same[node.name] = self.name(node.args[0])
            return
        read = _READERS.get(str(node.target))
        own = read(self, node) if read and _is_plain(node) else None
        if own:
            self._own.add(node.name)
        self.operators.append(own or self._foreign(node))

    def _is_normalized(self, node: fx.Node) -> bool:
        """Whether the node takes the output of a batch norm of ours; PyTorch's own gives it in a tuple."""
        return node.target is operator.getitem and self.name(node.args[0]) in self._own and bool(node.args[1] == 0)

    def _foreign(self, node: fx.Node) -> Foreign:
        sources = [source for source in node.all_input_nodes if self.name(source) not in self.constants]
        target = _OF_ANY_STRIDES.get(str(node.target), node.target)
        assert callable(target)

        def call(*values: Any) -> Any:
            by_node = dict(zip(sources, values, strict=True))
            fill = lambda source: by_node[source] if source in by_node else self.constants[self.name(source)]  # noqa: E731
            arguments, keywords = fx.map_arg((node.args, node.kwargs), fill)
            return target(*arguments, **keywords)

        names = tuple(self.name(source) for source in sources)
        kind = str(node.target).removesuffix(".default")
        return Foreign(layer_name(node), names, node.name, _size(node), call, kind)


_OF_ANY_STRIDES = {f"aten.{name}.default": torch.ops.aten.reshape.default for name in ("view", "_unsafe_view")}
"""In place of operators that take only the strides that their input had when the network was exported."""


def layer_name(node: fx.Node) -> str:
    """Qualified name of the module that a node came from, or the node's own."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or node.name


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _size(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_plain(node: fx.Node) -> bool:
    """Whether everything around the node is float32 on the CPU."""
    values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
    tensors = [value[0] if isinstance(value, (tuple, list)) else value for value in values]
    return all(isinstance(t, Tensor) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _is_pass_through(node: fx.Node) -> bool:
    """Whether the node gives its first argument back in evaluation mode."""
    target = str(node.target)
    if target in ("aten.clone.default", "aten.contiguous.default"):
        return bool(node.args[0].meta["val"].is_contiguous())  # type: ignore[union-attr]
    if target in ("aten.alias.default", "aten.detach.default"):
        return True
    if target in ("aten.dropout.default", "aten.feature_dropout.default"):
        return node.args[2] is False
    if target in ("aten.view.default", "aten.reshape.default", "aten._to_copy.default", "aten.expand.default"):
        before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        return (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
    return False


# -------------------------------------------------------------------------------------------------------- readers

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """All positional arguments, the missing ones from ``defaults``, which are those of the last arguments."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    found = [*node.args, *defaults[len(defaults) - (len(schema) - len(node.args)) :]]
    for position, name in enumerate(schema):
        if name in node.kwargs:
            found[position] = node.kwargs[name]
    return found


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values[0], values[-1]


def _read_convolution(reader: _Reader, node: fx.Node) -> Operator | None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, None, (1, 1), (0, 0), (1, 1), 1)
    if not reader.are_constant(weight, bias) or x.meta["val"].dim() != 4:
        return None
    weight, bias = reader.value(weight), reader.value(bias)
    if groups != 1 and not (groups == weight.shape[0] == x.meta["val"].shape[1]):
        return None
    dilation = _pair(dilation)
    if isinstance(padding, str):
        both = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(side % 2 for side in both):
            return None
        padding = [side // 2 for side in both]
    window = (_pair(stride), _pair(padding), dilation, int(groups))
    names = (layer_name(node), (reader.name(x),), node.name, _size(node))
    return Convolution(*names, weight, bias, "none", *window)


def _read_linear(reader: _Reader, node: fx.Node) -> Operator | None:
    x, weight, bias = _arguments(node, None)
    if not reader.are_constant(weight, bias):
        return None
    weight, bias = reader.value(weight), reader.value(bias)
    if weight.dim() != 2:
        return None
    return Linear(layer_name(node), (reader.name(x),), node.name, _size(node), weight, bias, "none")


def _read_batch_norm(reader: _Reader, node: fx.Node) -> Operator | None:
    """A depthwise convolution of one pixel; `_fuse` folds it into the layer before, if it can."""
    x, *parts, _, epsilon = node.args
    size = x.meta["val"].shape  # type: ignore[union-attr]
    if len(size) != 4 or not reader.are_constant(*parts):
        return None
    gamma, beta, mean, variance = (reader.value(part) for part in parts)
    factor = torch.rsqrt(variance.double() + epsilon) * (1.0 if gamma is None else gamma.double())
    bias = (0.0 if beta is None else beta.double()) - mean.double() * factor
    names = (layer_name(node), (reader.name(x),), node.name, tuple(size))
    weight = factor.float().reshape(-1, 1, 1, 1)
    return Convolution(*names, weight, bias.float(), "none", (1, 1), (0, 0), (1, 1), int(size[1]))


def _read_activation(name: str) -> Callable[[_Reader, fx.Node], Operator | None]:
    def read(reader: _Reader, node: fx.Node) -> Operator | None:
        x, *rest = node.args
        if name == "hardtanh":
            lowest, highest = [*rest, -1, 1][:2] if not rest else [*rest, 1][:2]
            if (lowest, highest) != (0, 6):
                return None
            activation = "relu6"
        elif name == "clamp":
            if _arguments(node, None, None)[1:] not in ([0, 6], [0.0, 6.0]):
                return None
            activation = "relu6"
        elif name == "gelu" and node.kwargs.get("approximate", "none") != "none":
            return None
        else:
            activation = name
        if len(_size(node)) not in (2, 4):
            return None
        return Add(layer_name(node), (reader.name(x),), node.name, _size(node), activation)

    return read


def _read_add(reader: _Reader, node: fx.Node) -> Operator | None:
    a, b, alpha = [*node.args[:2], node.kwargs.get("alpha", 1)]
    values = [reader.value(side) for side in (a, b)]
    if alpha != 1 or any(value is not None for value in values) or len(_size(node)) not in (2, 4):
        return None
    if not _size(a) == _size(b) == _size(node):
        return None
    return Add(layer_name(node), (reader.name(a), reader.name(b)), node.name, _size(node), "none")


def _read_multiply(reader: _Reader, node: fx.Node) -> Operator | None:
    a, b = node.args
    if not all(isinstance(side, fx.Node) and reader.value(side) is None for side in (a, b)):
        return None
    size = _size(node)
    maps = [side for side in (a, b) if _size(side) == size]
    factors = [side for side in (a, b) if _size(side) == (*size[:2], 1, 1)]
    if len(size) != 4 or size[2:] == (1, 1) or not maps or not factors:
        return None
    return Scale(layer_name(node), (reader.name(maps[0]), reader.name(factors[0])), node.name, size)


def _read_max_pool(reader: _Reader, node: fx.Node) -> Operator | None:
    x, kernel_size, stride, padding, dilation, is_ceiled = _arguments(node, [], 0, 1, False)
    if len(_size(node)) != 4:
        return None
    window = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation), bool(is_ceiled))
    return Pool(layer_name(node), (reader.name(x),), node.name, _size(node), "max_pool", *window)


def _read_average_pool(reader: _Reader, node: fx.Node) -> Operator | None:
    x, kernel_size, stride, padding, is_ceiled, counts_padding, divisor = _arguments(node, [], 0, False, True, None)
    if is_ceiled or divisor is not None or len(_size(node)) != 4:
        return None
    kind = "padded_average_pool" if counts_padding else "average_pool"
    window = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))
    return Pool(layer_name(node), (reader.name(x),), node.name, _size(node), kind, *window)


def _read_adaptive_pool(reader: _Reader, node: fx.Node) -> Operator | None:
    if len(_size(node)) != 4:
        return None
    return Pool(layer_name(node), (reader.name(node.args[0]),), node.name, _size(node), "adaptive_pool")


def _read_mean(reader: _Reader, node: fx.Node) -> Operator | None:
    x, dims, *_ = node.args
    if len(_size(x)) != 4 or dims is None or sorted(dim % 4 for dim in dims) != [2, 3]:  # type: ignore[union-attr, operator]
        return None
    return Pool(layer_name(node), (reader.name(x),), node.name, _size(node), "adaptive_pool")


def _read_slice(reader: _Reader, node: fx.Node) -> Operator | None:
    x, dim, start, end, step = _arguments(node, 0, None, None, 1)
    size = _size(x)
    if len(size) != 4 or dim % 4 < 2:
        return None
    starts, steps = [0, 0], [1, 1]
    starts[dim % 4 - 2] = range(size[dim % 4])[slice(start, end, step)].start
    steps[dim % 4 - 2] = step
    names = (layer_name(node), (reader.name(x),), node.name, _size(node))
    return Slice(*names, (starts[0], starts[1]), (steps[0], steps[1]))


def _read_pad(reader: _Reader, node: fx.Node) -> Operator | None:
    x, sides, *rest = node.args
    mode = next((value for value in rest if isinstance(value, str)), node.kwargs.get("mode", "constant"))
    fill = next((value for value in rest if not isinstance(value, str)), node.kwargs.get("value"))
    if mode != "constant" or fill not in (None, 0) or len(_size(x)) != 4:
        return None
    padded = [*sides, *[0] * (8 - len(sides))]  # type: ignore[misc, arg-type]
    if min(padded) < 0 or padded[6] or padded[7]:
        return None
    before = (padded[4], padded[2], padded[0])
    return Pad(layer_name(node), (reader.name(x),), node.name, _size(node), before)


def _read_concat(reader: _Reader, node: fx.Node) -> Operator | None:
    parts, dim = _arguments(node, 0)
    if len(_size(node)) != 4 or dim % 4 != 1 or any(reader.value(part) is not None for part in parts):
        return None
    return Concat(layer_name(node), tuple(reader.name(part) for part in parts), node.name, _size(node))


def _read_reshape(reader: _Reader, node: fx.Node) -> Operator | None:
    before, after = _size(node.args[0]), _size(node)
    is_flatten = len(before) == 4 and len(after) == 2 and before[0] == after[0]
    is_unflatten = len(before) == 2 and after == (*before, 1, 1)
    if not is_flatten and not is_unflatten:
        return None
    return Reshape(layer_name(node), (reader.name(node.args[0]),), node.name, after)


_READERS: dict[str, Callable[[_Reader, fx.Node], Operator | None]] = {
    "aten.conv2d.default": _read_convolution,
    "aten.conv2d.padding": _read_convolution,
    "aten.linear.default": _read_linear,
    _BATCH_NORM: _read_batch_norm,
    **{f"aten.{name}.default": _read_activation(name) for name in ACTIVATIONS[1:]},
    "aten.hardtanh.default": _read_activation("hardtanh"),
    "aten.clamp.default": _read_activation("clamp"),
    "aten.add.Tensor": _read_add,
    "aten.mul.Tensor": _read_multiply,
    "aten.max_pool2d.default": _read_max_pool,
    "aten.avg_pool2d.default": _read_average_pool,
    "aten.adaptive_avg_pool2d.default": _read_adaptive_pool,
    "aten.mean.dim": _read_mean,
    "aten.slice.Tensor": _read_slice,
    "aten.pad.default": _read_pad,
    "aten.constant_pad_nd.default": _read_pad,
    "aten.cat.default": _read_concat,
    **{f"aten.{name}": _read_reshape for name in ("view.default", "reshape.default", "flatten.using_ints")},
    **{f"aten.{name}": _read_reshape for name in ("squeeze.dims", "unsqueeze.default")},
}
"""What is known of each PyTorch operator; a reader returns None for a case that stays foreign."""


# ----------------------------------------------------------------------------------------------------------- fusion


def _fuse(operators: list[Operator], outputs: tuple[str, ...]) -> list[Operator]:
    """Fold batch norms into the layer before them, then activations and additions.

    A layer is joined with what alone reads its output, and takes its place in the order: everything that is read there
    has been computed.
    """
    for join in (_join_batch_norm, _join_activation, _join_addition, _join_activation):
        readers: dict[str, int] = {name: 1 for name in outputs}
        for one in operators:
            for name in one.inputs:
                readers[name] = readers.get(name, 0) + 1
        fused: dict[str, Operator] = {}
        for one in operators:
            joined = one
            for name in one.inputs:
                before = fused.get(name)
                if before is not None and readers[name] == 1 and (both := join(before, one)) is not None:
                    del fused[name]
                    joined = both
                    break
            fused[joined.output] = joined
        operators = list(fused.values())
    return operators


def _join_batch_norm(layer: Operator, norm: Operator) -> Operator | None:
    if not isinstance(layer, Convolution) or not isinstance(norm, Convolution) or len(layer.inputs) > 1:
        return None
    if not norm.is_depthwise or norm.weight[0].numel() != 1 or norm.stride != (1, 1) or norm.padding != (0, 0):
        return None
    if layer.activation != "none":
        return None
    factor = norm.weight.double().reshape(-1)
    weight = (layer.weight.double() * factor.reshape(-1, 1, 1, 1)).float()
    bias = torch.zeros_like(factor) if norm.bias is None else norm.bias.double()
    if layer.bias is not None:
        bias = bias + layer.bias.double() * factor
    return replace(layer, output=norm.output, weight=weight, bias=bias.float(), activation=norm.activation)


def _join_activation(layer: Operator, activation: Operator) -> Operator | None:
    if not isinstance(layer, (Weighted, Add)) or not isinstance(activation, Add) or len(activation.inputs) > 1:
        return None
    if layer.activation != "none":
        return None
    return replace(layer, output=activation.output, activation=activation.activation)


def _join_addition(layer: Operator, addition: Operator) -> Operator | None:
    if not isinstance(layer, Weighted) or not isinstance(addition, Add) or len(addition.inputs) != 2:
        return None
    is_depthwise = isinstance(layer, Convolution) and layer.is_depthwise
    if layer.activation != "none" or len(layer.inputs) > 1 or is_depthwise:
        return None
    residual = addition.inputs[1] if addition.inputs[0] == layer.output else addition.inputs[0]
    if residual == layer.output:
        return None
    inputs = (layer.inputs[0], residual)
    return replace(layer, inputs=inputs, output=addition.output, activation=addition.activation)
