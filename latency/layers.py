"""The layers of a captured network as a latency table knows them, and networks of one such layer to time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graph_encoder.network import LinearDim, NetworkGraph, Operator, Term
from pruning.layer_policy import FULL_BITS, INTEGER_BITS

from .runtimes import Artifact, Fed, LatencyError

_OPSET, _IR_VERSION = 17, 10
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, order=True)
class LayerKind:
    """Everything that a layer's time depends on besides its channels.

    Attributes:
        kind: ``"conv"`` or ``"linear"``.
        kernel: size of the kernel in each dimension of space, one to three of them.
        stride: of the kernel, likewise.
        out_size: size of the output, likewise; rows and 1 for a linear layer.
        group_outputs: output channels of one convolution group (1 in a depthwise convolution), where groups are removed
            whole; 0 elsewhere.
        conv_groups: convolution groups, where they all stay and lose channels within; 0 elsewhere.
        bits: of weights and activations.
        dilation: of the kernel, as its size; empty where there is none.
    """

    kind: str
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    out_size: tuple[int, ...] = (1, 1)
    group_outputs: int = 0
    conv_groups: int = 0
    bits: int = FULL_BITS
    dilation: tuple[int, ...] = ()

    def __str__(self) -> str:
        sizes = (self.kernel, self.stride, self.out_size)
        kernel, stride, out = ("x".join(map(str, size)) for size in sizes)
        groups = f", groups of {self.group_outputs}" if self.group_outputs else ""
        groups += f", {self.conv_groups} groups" if self.conv_groups else ""
        dilation = f", dilation {'x'.join(map(str, self.dilation))}" if self.dilation else ""
        shape = f" {kernel}, stride {stride}{dilation}{groups}" if self.kind == "conv" else ""
        return f"{self.kind}{shape}, to {out}, {self.bits} bits"

    def groups(self, outputs: int) -> int:
        """Convolution groups of a layer with so many outputs."""
        return outputs // self.group_outputs if self.group_outputs else self.conv_groups or 1

    @property
    def padding(self) -> tuple[int, ...]:
        """Half of what the kernel spans beside its middle, rounded down where that is uneven."""
        return tuple(reach // 2 for reach in self._reach)

    @property
    def in_size(self) -> tuple[int, ...]:
        """Size that a convolution with that padding reads to write `out_size`."""
        sizes = zip(self.out_size, self.stride, self._reach, strict=True)
        return tuple((out - 1) * stride + 2 if reach % 2 else out * stride for out, stride, reach in sizes)

    @property
    def _reach(self) -> tuple[int, ...]:
        dilation = self.dilation or (1,) * len(self.kernel)
        return tuple(step * (size - 1) for size, step in zip(self.kernel, dilation, strict=True))

    def is_possible(self, outputs: int) -> bool:
        """Whether so many outputs fill whole convolution groups, or all groups alike."""
        return outputs % (self.group_outputs or self.conv_groups or 1) == 0


@dataclass(frozen=True)
class Layer:
    """A layer of a network: its kind, and its channels as functions of what is removed.

    Attributes:
        name: of the operator.
        kind: what its time depends on besides channels.
        inputs: channels read, by one convolution group.
        outputs: channels written.
    """

    name: str
    kind: LayerKind
    inputs: LinearDim
    outputs: LinearDim


def layers_of(graph: NetworkGraph) -> tuple[Layer, ...]:
    """The convolutions and linear layers of ``graph``, in full precision and network order.

    Joins, attention and transposed convolutions with a stride are not among them: a table takes what they cost from
    whole networks (`latency.table.Calibration`).
    """
    operators = {operator.name: operator for operator in graph.operators}
    found = []
    for term in graph.mac_terms:
        kind = _kind(operators[term.owner], term, graph)
        if kind is not None:
            found.append(Layer(term.owner, kind, inputs=term.dims[1], outputs=term.dims[0]))
    return tuple(found)


def untimed_convolutions(graph: NetworkGraph) -> tuple[str, ...]:
    """The convolutions that are not among `layers_of`, in network order: what they take does not shrink in a table.

    They are transposed with a stride, or compute several maps of one image, as where frames are folded into the batch.
    """
    timed = {layer.name for layer in layers_of(graph)}
    kinds = ("conv", "depthwise_conv")
    return tuple(each.name for each in graph.operators if each.kind in kinds and each.name not in timed)


def _kind(operator: Operator, term: Term, graph: NetworkGraph) -> LayerKind | None:
    if len(term.dims) != 2:
        return None
    if operator.kind == "linear":
        return LayerKind("linear", out_size=(term.factor, 1))
    if operator.kind not in ("conv", "depthwise_conv") or term.factor != math.prod(operator.kernel + operator.out_size):
        return None
    is_dilated = any(step > 1 for size, step in zip(operator.kernel, operator.dilation, strict=True) if size > 1)
    dilation = operator.dilation if is_dilated else ()
    kind = LayerKind("conv", operator.kernel, operator.stride, operator.out_size, dilation=dilation)
    if operator.groups == 1:
        return kind
    group_outputs = operator.out_channels // operator.groups
    if _loses_within_groups(operator, group_outputs, graph):
        return replace(kind, conv_groups=operator.groups)
    return replace(kind, group_outputs=group_outputs)


def _loses_within_groups(operator: Operator, group_outputs: int, graph: NetworkGraph) -> bool:
    """Whether a unit takes channels out of convolution groups that stay."""
    for group in graph.prunable:
        for member in group.members:
            if member.tensor != operator.weight:
                continue
            unit = member.indices[0]
            # Along the other dimension of the weight lie the inputs of each group.
            if member.dim == 1 or len(torch.unique(unit // group_outputs)) * group_outputs != len(unit):
                return True
    return False


def layer_input(kind: LayerKind, inputs: int, outputs: int) -> Tensor:
    """An input of a layer, batch of one: shape ``(1, channels, *space)``, or ``(rows, channels)``.

    Floats, or bytes for a layer of `INTEGER_BITS`: inside a network of integers it reads what another one wrote. There
    the channels come last, ``(1, *space, channels)``.
    """
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (kind.out_size[0], inputs)
    if kind.kind == "conv":
        channels = inputs * kind.groups(outputs)
        is_last = kind.bits == INTEGER_BITS
        shape = (1, *kind.in_size, channels) if is_last else (1, channels, *kind.in_size)
    if kind.bits == INTEGER_BITS:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def layer_module(kind: LayerKind, inputs: int, outputs: int) -> nn.Module:
    """A layer with a bias, and a ReLU after a convolution, as PyTorch runs it."""
    if kind.kind == "linear":
        return nn.Linear(inputs, outputs).eval()
    groups = kind.groups(outputs)
    window = {"stride": kind.stride, "padding": kind.padding, "dilation": kind.dilation or 1}
    conv = _CONVOLUTIONS[len(kind.kernel)](inputs * groups, outputs, kind.kernel, groups=groups, **window)
    return nn.Sequential(conv, nn.ReLU()).eval()


def layer_onnx(kind: LayerKind, inputs: int, outputs: int) -> bytes:
    """A layer with a bias, and a ReLU after a convolution, as a network of its own, batch of one.

    A layer of `INTEGER_BITS` reads and writes bytes, with a scale for each output channel of its weight: the runtime
    fuses all of it into one integer kernel. Such kernels want the channels last; written between two transpositions,
    which the runtime cancels against its own, the layer is timed without what happens only at a network's ends.
    """
    x = layer_input(kind, inputs, outputs)
    weight_shape = (outputs, inputs) if kind.kind == "linear" else (outputs, inputs, *kind.kernel)
    # Equal weights would be as good: time does not depend on values, but for denormal ones.
    weight = np.random.default_rng(0).standard_normal(weight_shape, dtype=np.float32)
    out_shape = [kind.out_size[0], outputs] if kind.kind == "linear" else [1, outputs, *kind.out_size]
    if kind.bits == INTEGER_BITS:
        tensors = _integer_tensors(weight, outputs)
        reads, writes = ("x", "y") if kind.kind == "linear" else ("x_first", "y_first")
        nodes = [
            helper.make_node("DequantizeLinear", [reads, "x_scale", "x_zero"], ["x_float"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["b_float"], axis=0),
            *_layer_nodes(kind, outputs, ["x_float", "w_float", "b_float"], "y_float"),
            helper.make_node("QuantizeLinear", ["y_float", "y_scale", "y_zero"], [writes]),
        ]
        if kind.kind == "conv":
            space = range(1, len(kind.kernel) + 1)
            nodes.insert(0, helper.make_node("Transpose", ["x"], ["x_first"], perm=(0, len(space) + 1, *space)))
            nodes.append(helper.make_node("Transpose", ["y_first"], ["y"], perm=(0, *(i + 1 for i in space), 1)))
            out_shape = [1, *out_shape[2:], outputs]
        return _onnx_network(nodes, tensors, list(x.shape), out_shape, TensorProto.UINT8)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(outputs, np.float32), "b")]
    return _onnx_network(_layer_nodes(kind, outputs, ["x", "w", "b"], "y"), tensors, list(x.shape), out_shape)


def _layer_nodes(kind: LayerKind, outputs: int, reads: list[str], writes: str) -> list[Any]:
    if kind.kind == "linear":
        return [helper.make_node("Gemm", reads, [writes], transB=1)]
    conv: dict[str, Any] = {"kernel_shape": kind.kernel, "strides": kind.stride, "pads": kind.padding * 2}
    if kind.dilation:
        conv["dilations"] = kind.dilation
    return [
        helper.make_node("Conv", reads, ["c"], group=kind.groups(outputs), **conv),
        helper.make_node("Relu", ["c"], [writes]),
    ]


def _integer_tensors(weight: NDArray[np.float32], outputs: int) -> list[Any]:
    x_scale = np.float32(1 / 64)
    scale = (np.abs(weight).reshape(outputs, -1).max(axis=1) / 127).astype(np.float32)
    values = {
        "x_scale": x_scale,
        "x_zero": np.uint8(128),
        "w": np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8),
        "w_scale": scale,
        "w_zero": np.zeros(outputs, np.int8),
        "b": np.zeros(outputs, np.int32),
        "b_scale": x_scale * scale,
        "b_zero": np.zeros(outputs, np.int32),
        "y_scale": np.float32(1 / 16),
        "y_zero": np.uint8(0),
    }
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _onnx_network(
    nodes: list[Any],
    tensors: list[Any],
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    element_type: int = TensorProto.FLOAT,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element_type, in_shape)],
        [helper.make_tensor_value_info("y", element_type, out_shape)],
        tensors,
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


def layer_artifact(kind: LayerKind, inputs: int, outputs: int, takes: str) -> Artifact:
    """A network of one layer as a runtime takes it, ``"module"`` or ``"onnx"``.

    Raises:
        LatencyError: if the layer has fewer bits than a module computes with.
    """
    if takes == "module" and kind.bits != FULL_BITS:
        msg = f"{kind}: a runtime of PyTorch modules computes in floats; build the table on one that takes ONNX"
        raise LatencyError(msg)
    return (layer_module if takes == "module" else layer_onnx)(kind, inputs, outputs)


def reference_layer(takes: str) -> Fed:
    """The layer whose time is the unit of tables, with its input: 3x3, 64 to 64 channels, 16x16."""
    shape = (LayerKind("conv", (3, 3), (1, 1), (16, 16)), 64, 64)
    return layer_artifact(*shape, takes), (layer_input(*shape),)


def empty_artifact(takes: str) -> Artifact:
    """A network that does next to nothing: its time is what one call of any network costs."""
    if takes == "module":
        return nn.ReLU()
    return _onnx_network([helper.make_node("Relu", ["x"], ["y"])], [], [1, 1], [1, 1])
