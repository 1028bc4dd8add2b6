"""The layers of a captured network as a latency table knows them, and networks of one such layer to time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graph_encoder.network import LinearDim, NetworkGraph, Operator, Term

from .runtimes import Artifact, LatencyError

FLOAT_BITS = 32
_OPSET, _IR_VERSION = 17, 10


@dataclass(frozen=True, order=True)
class LayerKind:
    """Everything that a layer's time depends on besides its channels.

    Attributes:
        kind: ``"conv"`` or ``"linear"``.
        kernel: height and width of the kernel.
        stride: height and width of the stride.
        out_size: height and width of the output; rows and 1 for a linear layer.
        group_outputs: output channels of one convolution group (1 in a depthwise convolution), 0 without groups.
        bits: of weights and activations.
    """

    kind: str
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    group_outputs: int = 0
    bits: int = FLOAT_BITS

    def __str__(self) -> str:
        sizes = (self.kernel, self.stride, self.out_size)
        kernel, stride, out = ("x".join(map(str, size)) for size in sizes)
        groups = f", groups of {self.group_outputs}" if self.group_outputs else ""
        shape = f" {kernel}, stride {stride}{groups}" if self.kind == "conv" else ""
        return f"{self.kind}{shape}, to {out}, {self.bits} bits"

    def groups(self, outputs: int) -> int:
        """Convolution groups of a layer with so many outputs."""
        return outputs // self.group_outputs if self.group_outputs else 1


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


def layers_of(graph: NetworkGraph, bits: Mapping[str, int] | None = None) -> tuple[Layer, ...]:
    """The convolutions and linear layers of ``graph``, in network order.

    Joins, attention and transposed or three-dimensional convolutions are not among them: a table takes what they
    cost from whole networks (`latency.table.Calibration`).

    Args:
        graph: captured network.
        bits: bits of weights and activations by layer name; `FLOAT_BITS` where a layer is not named.

    Raises:
        LatencyError: if ``bits`` names no layer of the network.
    """
    operators = {operator.name: operator for operator in graph.operators}
    found = []
    for term in graph.mac_terms:
        kind = _kind(operators[term.owner], term, (bits or {}).get(term.owner, FLOAT_BITS))
        if kind is not None:
            found.append(Layer(term.owner, kind, inputs=term.dims[1], outputs=term.dims[0]))
    if unknown := sorted(set(bits or {}) - {layer.name for layer in found}):
        msg = f"bits name no convolution or linear layer of this network: {unknown}"
        raise LatencyError(msg)
    return tuple(found)


def _kind(operator: Operator, term: Term, bits: int) -> LayerKind | None:
    if len(term.dims) != 2:
        return None
    if operator.kind == "linear":
        return LayerKind("linear", out_size=(term.factor, 1), bits=bits)
    if operator.kind not in ("conv", "depthwise_conv") or term.factor != math.prod(operator.kernel + operator.out_size):
        return None
    group_outputs = operator.out_channels // operator.groups if operator.groups > 1 else 0
    return LayerKind("conv", operator.kernel, operator.stride, operator.out_size, group_outputs, bits)


def layer_input(kind: LayerKind, inputs: int, outputs: int) -> Tensor:
    """An input of a layer, batch of one: shape ``(1, channels, height, width)``, or ``(rows, channels)``."""
    generator = torch.Generator().manual_seed(0)
    if kind.kind == "linear":
        return torch.randn(kind.out_size[0], inputs, generator=generator)
    height, width = (size * stride for size, stride in zip(kind.out_size, kind.stride, strict=True))
    return torch.randn(1, inputs * kind.groups(outputs), height, width, generator=generator)


def layer_module(kind: LayerKind, inputs: int, outputs: int) -> nn.Module:
    """A layer with a bias, and a ReLU after a convolution, as PyTorch runs it."""
    if kind.kind == "linear":
        return nn.Linear(inputs, outputs).eval()
    groups = kind.groups(outputs)
    padding = tuple(size // 2 for size in kind.kernel)
    conv = nn.Conv2d(inputs * groups, outputs, kind.kernel, kind.stride, padding=padding, groups=groups)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.ReLU()).eval()


def layer_onnx(kind: LayerKind, inputs: int, outputs: int) -> bytes:
    """A layer with a bias, and a ReLU after a convolution, as a network of its own, batch of one."""
    x = layer_input(kind, inputs, outputs)
    weight_shape = (outputs, inputs) if kind.kind == "linear" else (outputs, inputs, *kind.kernel)
    # Equal weights would be as good: time does not depend on values, but for denormal ones.
    weight = np.random.default_rng(0).standard_normal(weight_shape, dtype=np.float32)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(outputs, np.float32), "b")]
    if kind.kind == "linear":
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
        out_shape = [kind.out_size[0], outputs]
    else:
        pads = [size // 2 for size in kind.kernel]
        conv: dict[str, Any] = {"kernel_shape": kind.kernel, "strides": kind.stride, "pads": pads + pads}
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], group=kind.groups(outputs), **conv),
            helper.make_node("Relu", ["c"], ["y"]),
        ]
        out_shape = [1, outputs, *_conv_size(kind)]
    return _onnx_network(nodes, tensors, list(x.shape), out_shape)


def _conv_size(kind: LayerKind) -> list[int]:
    """Size that a convolution padded by half its kernel writes: one more where the kernel is even."""
    return [
        (size * stride + 2 * (kernel // 2) - kernel) // stride + 1
        for size, stride, kernel in zip(kind.out_size, kind.stride, kind.kernel, strict=True)
    ]


def _onnx_network(nodes: list[Any], tensors: list[Any], in_shape: Sequence[int], out_shape: Sequence[int]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
        tensors,
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


def layer_artifact(kind: LayerKind, inputs: int, outputs: int, takes: str) -> Artifact:
    """A network of one layer as a runtime takes it, ``"module"`` or ``"onnx"``."""
    return (layer_module if takes == "module" else layer_onnx)(kind, inputs, outputs)


def empty_artifact(takes: str) -> Artifact:
    """A network that does next to nothing: its time is what one call of any network costs."""
    if takes == "module":
        return nn.ReLU()
    return _onnx_network([helper.make_node("Relu", ["x"], ["y"])], [], [1, 1], [1, 1])
