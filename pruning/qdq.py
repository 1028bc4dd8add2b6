"""A network with 8-bit layers as an ONNX file of integers, with the scales that it was calibrated or trained with.

The network is exported with marks in place of its quantizers. What a mark stood on is then known by its name in the
file, and ONNX Runtime's own quantizer puts QuantizeLinear and DequantizeLinear there with the network's scales.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail as RuntimeFailure
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX
from torch import Tensor, fx, nn

from graph_encoder.batches import tensors_of
from graph_encoder.copies import copied
from graph_encoder.symbolic import name_within, symbolic_trace

from .integer_flow import tensors_to_quantize
from .quantize import (
    ActQuantizer,
    LinearWeightQuantizer,
    is_integer,
    quantizable_layers,
    quantized_layers,
    without_quantizers,
)

_DOMAIN = "secateur"
_VALUE_KEEPING = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Pad"}
    | {"DepthToSpace", "SpaceToDepth", "Expand"}
)
"""Operators whose outputs are some of their first input's values, so that they lie on its grid."""
_LAYERS = ("Conv", "Gemm")
_TURNED = ".weight.turned"
"""How the name of a weight ends that was transposed for a product of matrices."""
_WEIGHT_INPUT = {
    **dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul"), 3),
    **dict.fromkeys(("MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"), 1),
}
"""Integer kernels of layers, and which of their inputs is the weight."""
_NORMAL_EPSILON = 1e-5
_SCALE_OF_MARKS = 2**-10
"""So small that the largest byte lies below any clip, as it does where ranges were calibrated behind a ReLU6: ONNX
Runtime drops the clip, and only then fuses the layer before it into an integer kernel."""
EXACT_SUMS = {"session.x64quantprecision": "1"}
"""Setting of an ONNX Runtime session on x86 without VNNI: no sum of products saturates, and layers take longer."""


@dataclass(frozen=True)
class IntegerReport:
    """How an integer network came out in the runtime.

    Attributes:
        layers: layers that were to run in integers.
        unfused: names of those for which the runtime has no integer kernel in its optimised graph: they compute in
            floats.
        others: float layers that have one all the same: ONNX Runtime quantizes the weight of a layer that stands
            between two integer tensors.
        kernels: integer kernels in that graph, by operator (``QLinearAdd`` and so on too).
        conversions: QuantizeLinear and DequantizeLinear that are left in it.
        error: root mean square of the difference to PyTorch's simulation on the given images, relative to that of the
            simulation's outputs, with sums of products that do not saturate where the runtime can (`EXACT_SUMS`).
        saturated: the same as the runtime computes here by default: ``error`` where nothing saturates.
        rounding: the same for the difference between the simulation and the network in full precision.
        agreement: share of these images with the same largest output, by default here.
        images: how many there were.
    """

    layers: int
    unfused: tuple[str, ...]
    others: int
    kernels: Mapping[str, int]
    conversions: int
    error: float
    saturated: float
    rounding: float
    agreement: float
    images: int

    @property
    def fused_layers(self) -> int:
        """How many of ``layers`` the runtime computes in integers."""
        return self.layers - len(self.unfused)


@dataclass(frozen=True)
class _Scale:
    """Scale and zero point of a tensor; for a weight, a scale for each output channel along ``axis``."""

    scale: NDArray[np.float32]
    zero_point: int = 0


@dataclass
class _Marks:
    """Scales by the name of the mark, which replaces the quantizer in the exported network."""

    values: dict[str, _Scale] = field(default_factory=dict)
    weights: dict[str, _Scale] = field(default_factory=dict)


class _Mark(nn.Module):
    """An operator that no optimizer knows, so that what it stands on is found again."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Mark", [x], {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1
        )
        return marked


def integer_model(model: nn.Module, export: Callable[[nn.Module], onnx.ModelProto]) -> onnx.ModelProto:
    """The network with 8-bit layers as a model whose integers a runtime can fuse into integer kernels.

    Args:
        model: what `pruning.quantize.quantize_layers` made, all its quantized layers with 8-bit weights and
            activations; untouched.
        export: makes an ONNX model of a module.
    """
    marked = copied(model)
    marks = _put_marks(marked)
    proto = export(marked)
    found = _Reader(proto, marks)
    found.take_marks_off()
    found.fold_batch_norms()
    found.carry_scales_on()
    return _quantize(proto, found)


@dataclass(frozen=True)
class MarkedNetwork:
    """A network exported once, of which any layers can be made integers in a moment, for the stopwatch only.

    Every tensor that could be quantized has a mark behind it. All have one scale: beside the range that a clip leaves,
    time does not depend on it.

    Attributes:
        proto: the exported network.
        traced: the symbolic trace, which says what is quantized with which layers in integers.
    """

    proto: onnx.ModelProto
    traced: fx.GraphModule

    def with_integers(self, proto: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
        """Let layers run in integers, and take all marks off.

        Args:
            proto: `proto`, or what was sliced out of it; untouched.
            layers: qualified names of the layers of 8 bits.
        """
        own = onnx.ModelProto()
        own.CopyFrom(proto)
        chosen = {node.name for node in tensors_to_quantize(self.traced, set(layers))}
        found = _Reader(own, _Marks({name: _Scale(np.array(_SCALE_OF_MARKS, np.float32)) for name in chosen}))
        found.take_marks_off()
        found.choose_layers(layers)
        if not found.layers:
            return own
        found.carry_scales_on()
        return _quantize(own, found)


def marked_network(model: nn.Module, export: Callable[[nn.Module], onnx.ModelProto]) -> MarkedNetwork | None:
    """Export a network of floats with marks on all that could be quantized; None where it cannot be traced.

    Args:
        model: network in full precision; untouched.
        export: makes an ONNX model of a module.
    """
    traced = symbolic_trace(copied(model))
    if traced is None:
        return None
    marked = symbolic_trace(copied(model))
    assert marked is not None
    for node in tensors_to_quantize(marked, set(quantizable_layers(model))):
        readers = list(node.users)
        place = f"marks.{name_within(nn.Module, node.name)}"
        marked.add_submodule(place, _Mark(node.name))
        with marked.graph.inserting_after(node):
            mark = marked.graph.call_module(place, (node,))
        for reader in readers:
            reader.replace_input_with(node, mark)
    marked.recompile()
    generator = torch.Generator().manual_seed(0)
    for layer in marked.modules():
        if isinstance(layer, nn.Linear):
            # Time does not depend on the values, and of equal weights the exporter would make one.
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
    proto = export(marked)
    _name_turned_weights(proto, marked)
    return MarkedNetwork(proto, traced)


def _name_turned_weights(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Name weights that the exporter turned, for a product of matrices, by their layers: it calls them by a number."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    turned = {name: layer.weight.detach().float().cpu().numpy().T for name, layer in layers.items()}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for number in {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"} & tensors.keys():
        array = numpy_helper.to_array(tensors[number])
        if name := next((name for name, weight in turned.items() if np.array_equal(array, weight)), ""):
            tensors[number].name = f"{name}{_TURNED}"
            for node in proto.graph.node:
                _replace(node.input, number, f"{name}{_TURNED}")


def _put_marks(model: nn.Module) -> _Marks:
    marks = _Marks()
    for name, layer in quantized_layers(model).items():
        if not is_integer(layer.policy):
            continue
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, LinearWeightQuantizer)
        with torch.no_grad():
            scale = quantizer.scale.flatten().float().numpy().copy()
            layer.weight = nn.Parameter(quantizer(layer.weight), requires_grad=False)
        marks.weights[name] = _Scale(scale)
        layer.weight_quantizer = _Mark(name)
    places: dict[int, _Mark] = {}
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if isinstance(child, ActQuantizer):
                mark = places.setdefault(id(child), _Mark(f"values/{len(places)}"))
                scale = np.array(child.scale.detach().float().numpy())
                marks.values[mark.name] = _Scale(scale, int(child.zero_point))
                parent._modules[child_name] = mark
    return marks


class _Reader:
    """The exported graph: marks come off, and what they stood on is kept in ``values`` and ``weights``.

    Attributes:
        values: scales of activations by the name of the tensor.
        weights: scales of weights by the name of the initializer.
        layers: names of the nodes that compute the marked layers.
        axes: dimension of each weight that holds its output channels.
    """

    def __init__(self, proto: onnx.ModelProto, marks: _Marks) -> None:
        self._graph = proto.graph
        self._marks = marks
        self.values: dict[str, _Scale] = {}
        self.weights: dict[str, _Scale] = {}
        self.layers: list[str] = []
        self.axes: dict[str, int] = {}
        for imported in list(proto.opset_import):
            if imported.domain == _DOMAIN:
                proto.opset_import.remove(imported)
        # Shapes and types are inferred again once the marks are off.
        del self._graph.value_info[:]

    def take_marks_off(self) -> None:
        """Remove every mark, and note what it stood on."""
        for node in [node for node in self._graph.node if node.domain == _DOMAIN]:
            name = next(a.s.decode() for a in node.attribute if a.name == "name")
            if name in self._marks.weights:
                self._take_off_weight(node, name)
            elif name in self._marks.values:
                self._take_off_value(node, self._marks.values[name])
            else:
                self._bypass(node)

    def _take_off_weight(self, mark: onnx.NodeProto, name: str) -> None:
        weight = self._array(mark.input[0])
        assert weight is not None
        axis, readers = 0, self._readers(mark.output[0])
        if [reader.op_type for reader in readers] == ["Transpose"]:
            (transpose,) = readers
            weight, axis = np.ascontiguousarray(weight.T), 1
            self._graph.node.remove(transpose)
            output = transpose.output[0]
        else:
            output = mark.output[0]
        self._graph.node.remove(mark)
        # A tensor of its own: the exporter makes one of two that are equal, and their scales may differ.
        own = _integer_weight(name)
        if own not in self.weights:  # a layer that runs twice has two marks
            self._graph.initializer.append(numpy_helper.from_array(weight, own))
        for reader in self._readers(output):
            _replace(reader.input, output, own)
            self.layers.append(reader.name)
        self.weights[own], self.axes[own] = self._marks.weights[name], axis

    def _take_off_value(self, mark: onnx.NodeProto, scale: _Scale) -> None:
        source, target = mark.input[0], mark.output[0]
        others = [node for node in self._readers(source) if node is not mark]
        if others or source in {output.name for output in self._graph.output}:
            # What also has readers in full precision keeps them: only the copy is quantized.
            mark.CopyFrom(helper.make_node("Identity", [source], [target], mark.name))
            self.values[target] = scale
            return
        self._bypass(mark)
        self.values[source] = scale

    def _bypass(self, mark: onnx.NodeProto) -> None:
        source, target = mark.input[0], mark.output[0]
        self._graph.node.remove(mark)
        for reader in self._readers(target):
            _replace(reader.input, target, source)
        for output in self._graph.output:
            assert output.name != target

    def choose_layers(self, layers: Collection[str]) -> None:
        """Take layers whose weights have no mark, with scales of 1."""
        axes = {f"{layer}.weight": 0 for layer in layers} | {f"{layer}{_TURNED}": 1 for layer in layers}
        for node in self._graph.node:
            if node.op_type in (*_LAYERS, "MatMul") and (weight := node.input[1]) in axes:
                self.layers.append(node.name)
                n_outputs = self._known(weight).shape[axes[weight]]
                self.weights[weight], self.axes[weight] = _Scale(np.ones(n_outputs, np.float32)), axes[weight]

    def fold_batch_norms(self) -> None:
        """Fold every batch norm that alone reads a marked layer into that layer's weight, scale and bias.

        A layer that runs twice keeps its weight, for each run may have a batch norm of its own.
        """
        returned = {output.name for output in self._graph.output}
        for layer in [node for node in self._graph.node if node.name in set(self.layers)]:
            if layer.op_type not in _LAYERS or layer.output[0] in self.values or layer.output[0] in returned:
                continue
            readers = self._readers(layer.output[0])
            if len(self._readers(layer.input[1])) > 1:
                continue
            if len(readers) == 1 and readers[0].op_type == "BatchNormalization":
                self._fold(layer, readers[0])

    def _fold(self, layer: onnx.NodeProto, norm: onnx.NodeProto) -> None:
        gamma, beta, mean, variance = (self._known(name) for name in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _NORMAL_EPSILON)
        factor = gamma / np.sqrt(variance + epsilon)
        weight, own = self._known(layer.input[1]), layer.input[1]
        shape = (-1, *[1] * (weight.ndim - 1))
        self._set(own, weight * factor.reshape(shape))
        # A channel that its batch norm switches off has no weights left, and any scale will do.
        scale = np.abs(factor) * self.weights[own].scale
        self.weights[own] = _Scale(np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32))
        bias = self._known(layer.input[2]) if len(layer.input) > 2 else np.zeros_like(mean)
        bias_name = f"{own}.bias"
        self._set(bias_name, (bias - mean) * factor + beta)
        del layer.input[2:]
        layer.input.append(bias_name)
        layer.output[0] = norm.output[0]
        self._graph.node.remove(norm)

    def carry_scales_on(self) -> None:
        """Let outputs that hold only values of a marked tensor have its scale."""
        outputs = {output.name for output in self._graph.output}
        for node in self._graph.node:
            scale = self.values.get(node.input[0]) if node.input else None
            if scale is None or node.op_type not in _VALUE_KEEPING or not self._pads_zero(node):
                continue
            for name in node.output:
                if name not in outputs:
                    self.values.setdefault(name, scale)

    def _pads_zero(self, node: onnx.NodeProto) -> bool:
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        if node.op_type != "Pad" or mode != b"constant" or len(node.input) < 3 or not node.input[2]:
            return True
        value = self._array(node.input[2])
        return value is not None and not value.any()

    def _readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if tensor in node.input]

    def _array(self, name: str) -> NDArray[Any] | None:
        found = next((tensor for tensor in self._graph.initializer if tensor.name == name), None)
        return None if found is None else np.asarray(numpy_helper.to_array(found))

    def _known(self, name: str) -> NDArray[np.float64]:
        array = self._array(name)
        assert array is not None
        return array.astype(np.float64)

    def _set(self, name: str, array: NDArray[np.float64]) -> None:
        for tensor in [tensor for tensor in self._graph.initializer if tensor.name == name]:
            self._graph.initializer.remove(tensor)
        self._graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))


def _integer_weight(layer: str) -> str:
    return f"{layer}.integer_weight"


def _replace(names: Any, old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


def _quantize(proto: onnx.ModelProto, found: _Reader) -> onnx.ModelProto:
    overrides: dict[str, list[dict[str, Any]]] = {}
    for name, value in found.values.items():
        overrides[name] = [{"scale": value.scale, "zero_point": np.array(value.zero_point, np.uint8)}]
    for name, weight in found.weights.items():
        zero = np.array(0, np.int8)
        overrides[name] = [{"axis": found.axes[name], "scale": scale, "zero_point": zero} for scale in weight.scale]
    one = np.array(1, np.float32)
    kinds = ["Conv", "Gemm", "MatMul"]
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        # The quantizer asks for a range of every tensor; the scales of `overrides` go before it.
        tensors_range={name: TensorData(lowest=-one, highest=one) for name in found.values},
        nodes_to_quantize=found.layers,
        nodes_to_exclude=[],
        op_types_to_quantize=kinds,
        extra_options={"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": kinds},
    )
    for name in found.values:
        quantizer.quantize_activation_tensor(name)
    quantized: onnx.ModelProto = quantizer.quantize_model()
    return quantized


def count_operators(content: bytes) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a model, by type, at its highest optimisation level."""
    return Counter(node.op_type for node in _optimised(content).node)


def _optimised(content: bytes) -> onnx.GraphProto:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3  # it warns that such a file is for this machine only
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def integer_report(content: bytes, model: nn.Module, images: tuple[Tensor, ...]) -> IntegerReport:
    """Compare an integer model with PyTorch's simulation on real inputs, and count what the runtime fused.

    Args:
        content: the ONNX model.
        model: the network it was made of, in evaluation mode.
        images: inputs, batch first.
    """
    as_computed = _outputs_of_file(content, images, {})
    found = _exact_outputs_of_file(content, images) if saturates() else as_computed
    expected, plain = _outputs(model, images), _outputs(without_quantizers(model), images)
    same = [_largest(one) == _largest(other) for one, other in zip(expected, as_computed, strict=True)]
    optimised = _optimised(content)
    counts = Counter(node.op_type for node in optimised.node)
    kernels = {kind: n for kind, n in counts.items() if kind.startswith(("QLinear", "QGemm")) or "Integer" in kind}
    layers = [name for name, layer in quantized_layers(model).items() if is_integer(layer.policy)]
    # An integer kernel reads the weight under the name that it has in the file.
    asked, fused = _runs(onnx.load_from_string(content).graph), _integer_runs(optimised)
    weights = {name: f"{_integer_weight(name)}{TENSOR_NAME_QUANT_SUFFIX}" for name in layers}
    return IntegerReport(
        layers=len(layers),
        unfused=tuple(name for name, weight in weights.items() if fused[weight] < asked[weight]),
        others=fused.total() - sum(fused[weight] for weight in weights.values()),
        kernels=kernels,
        conversions=counts["QuantizeLinear"] + counts["DequantizeLinear"],
        error=_relative_difference(found, expected),
        saturated=_relative_difference(as_computed, expected),
        rounding=_relative_difference(plain, expected),
        agreement=float(np.mean(np.concatenate(same))),
        images=len(images[0]),
    )


def _runs(graph: onnx.GraphProto) -> Counter[str]:
    """How many operators read each quantized tensor through its DequantizeLinear; a layer may run more than once."""
    readers = Counter(name for node in graph.node for name in node.input)
    runs: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            runs[node.input[0]] += readers[node.output[0]]
    return runs


def _integer_runs(graph: onnx.GraphProto) -> Counter[str]:
    """How many integer kernels of layers read each weight."""
    return Counter(node.input[_WEIGHT_INPUT[node.op_type]] for node in graph.node if node.op_type in _WEIGHT_INPUT)


def _exact_outputs_of_file(content: bytes, images: tuple[Tensor, ...]) -> list[NDArray[np.float32]]:
    try:
        return _outputs_of_file(content, images, EXACT_SUMS)
    except RuntimeFailure:  # signed weights are stored as unsigned, which fails where two layers share one
        return _outputs_of_file(content, images, {})


def _outputs_of_file(
    content: bytes, images: tuple[Tensor, ...], settings: Mapping[str, str]
) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), images, strict=True)}
    # One number for the whole batch tells nothing of an image.
    arrays = (np.asarray(output, dtype=np.float32) for output in session.run(None, feed))
    return [array for array in arrays if array.ndim]


def _outputs(model: nn.Module, images: tuple[Tensor, ...]) -> list[NDArray[np.float32]]:
    with torch.inference_mode():
        return [output.float().numpy() for output in tensors_of(model(*images)) if output.dim()]


def _relative_difference(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> float:
    square = sum(float(((one - other) ** 2).sum()) for one, other in zip(found, expected, strict=True))
    whole = sum(float((one**2).sum()) for one in expected)
    return float((square / max(whole, 1e-30)) ** 0.5)


def _largest(outputs: NDArray[np.float32]) -> NDArray[np.int64]:
    position: NDArray[np.int64] = outputs.reshape(len(outputs), -1).argmax(axis=1)
    return position


@functools.cache
def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, where large ones are cut off.

    AVX2 and AVX-512 without VNNI do so for unsigned activations and signed weights, as these files have them, unless
    the weights take half of their levels (`LayerPolicy.reduce_range`) or the session has `EXACT_SUMS`.
    """
    depth = 64
    values = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, depth])
    sums = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])
    weight = numpy_helper.from_array(np.full((depth, 16), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "probe", [values], [sums], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, depth), 255, np.uint8)})
    return bool((np.asarray(found) != depth * 127 * 255).any())
