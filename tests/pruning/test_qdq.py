from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import export
from pruning.export import ExportError, export_onnx
from pruning.half_precision import InHalfPrecision, has_half_precision
from pruning.layer_policy import LayerPolicy
from pruning.qdq import IntegerReport, count_operators, integer_report, saturates
from pruning.quantize import ActQuantizer, LinearWeightQuantizer, quantize_layers, quantized_layers

INT8 = LayerPolicy(weight_bits=8, act_bits=8)
HALF = LayerPolicy(weight_bits=16, act_bits=16)
EXAMPLE = torch.zeros(1, 3, 8, 8)
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """What meets in networks: batch norms of either sign, a sum, a concatenation, pooling, and a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.after = nn.Conv2d(16, 8, 3)
        self.inner = nn.Linear(8, 12, bias=False)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.stem(x))))
        out = F.relu(x + self.bn2(self.conv2(F.relu6(self.conv1(x)))))
        out = self.after(torch.cat([out, x], dim=1)).relu().mean((2, 3))
        logits: Tensor = self.linear(self.inner(out).relu())
        return logits


class Clip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


LAYERS = ("stem", "conv1", "conv2", "after", "inner", "linear")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        for norm in (model.bn, model.bn2):
            norm.weight.copy_(torch.linspace(-1, 1, 8))
            norm.bias.copy_(torch.linspace(1, -0.5, 8))
            norm.running_mean.copy_(torch.linspace(-0.5, 0.5, 8))
            norm.running_var.copy_(torch.linspace(0.5, 2, 8))
    return model


def run(path: Path, x: Tensor, level: onnxruntime.GraphOptimizationLevel | None = None) -> Tensor:
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))


Exported = tuple[nn.Module, IntegerReport, Path]


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("integers") / "model.onnx"
    quantized = quantize_layers(network(), dict.fromkeys(LAYERS, INT8), [IMAGES])
    report = export_onnx(quantized, EXAMPLE, path, images=IMAGES)
    assert report is not None
    return quantized, report, path


@pytest.mark.slow
def test_every_layer_and_the_sum_run_in_integer_kernels(integers: Exported) -> None:
    _, report, path = integers

    assert (report.layers, report.unfused, report.others) == (6, (), 0)
    assert report.kernels == {"QLinearConv": 4, "QLinearAdd": 1, "QLinearConcat": 1, "QGemm": 2}
    # The image in; what is averaged; the average in.
    assert report.conversions == 3
    assert count_operators(path.read_bytes())["BatchNormalization"] == 0


@pytest.mark.slow
def test_integers_are_those_of_the_simulation_up_to_ties(integers: Exported) -> None:
    quantized, report, path = integers
    with torch.no_grad():
        expected = quantized(IMAGES)

    assert report.error < 0.01
    assert report.error < report.rounding / 3
    # Most outputs are equal but for the order of additions: a tie that rounds the other way moves some by a step.
    for level in (None, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL):
        difference = (run(path, IMAGES, level) - expected).abs().amax(1)
        assert float(difference.median()) < 0.01 * float(expected.abs().max())


@pytest.mark.slow
def test_file_has_the_scales_of_the_network(integers: Exported) -> None:
    quantized, _, path = integers
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    for name in ("after", "inner", "linear"):  # no batch norm to fold
        step = quantized_layers(quantized)[name].weight_quantizer.step
        assert np.array_equal(stored[f"{name}.integer_weight_scale"], step.detach().abs().flatten().numpy())
    norm, step = quantized.bn, quantized.stem.weight_quantizer.step.detach().flatten()
    folded = step * (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
    np.testing.assert_allclose(stored["stem.integer_weight_scale"], folded.detach().numpy(), rtol=1e-5)
    steps = sorted(float(q.step.detach()) for q in quantized.modules() if isinstance(q, ActQuantizer))
    written = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert sorted({float(stored[name]) for name in written}) == pytest.approx(steps)


@pytest.mark.slow
def test_batch_of_any_size_runs(integers: Exported) -> None:
    _, _, path = integers
    torch.testing.assert_close(run(path, IMAGES[:1]), run(path, IMAGES[:5])[:1])


@pytest.mark.slow
def test_layers_in_full_precision_stay_so_beside_integer_ones(tmp_path: Path) -> None:
    quantized = quantize_layers(network(), dict.fromkeys(("stem", "conv1"), INT8), [IMAGES])
    report = export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=IMAGES)

    assert report is not None
    assert (report.layers, report.unfused, report.others) == (2, (), 0)
    assert report.kernels["QLinearConv"] == 2
    assert report.error < 0.01


def test_float_layer_that_the_runtime_quantized_does_not_stand_in_for_one_that_stayed_in_floats(tmp_path: Path) -> None:
    # The last layer writes outputs, which stay floats, so that it cannot fuse; the middle one lies between integers.
    convolutions = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
    quantized = quantize_layers(model, {"0": INT8, "4": INT8}, [IMAGES])
    report = export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=IMAGES)

    assert report is not None
    assert (report.layers, report.fused_layers, report.unfused, report.others) == (2, 1, ("4",), 1)


@pytest.mark.slow
def test_trained_step_sizes_are_those_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    quantized = quantize_layers(model, {"0": INT8, "3": INT8}, [IMAGES])
    with torch.no_grad():
        for module in quantized.modules():
            if isinstance(module, ActQuantizer | LinearWeightQuantizer):
                module.step.mul_(-3)  # training may do worse
    report = export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=IMAGES)

    assert report is not None
    assert report.error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("clip", [nn.ReLU6(), Clip()])
def test_learned_steps_that_reach_beyond_a_relu6_leave_its_layer_an_integer_kernel(
    clip: nn.Module, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), clip, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    quantized = quantize_layers(model, dict.fromkeys(("0", "2", "5"), INT8), [IMAGES])
    quantizers = [module for module in quantized.modules() if isinstance(module, ActQuantizer)]
    for quantizer in quantizers:
        quantizer.step.data.fill_(0.05)
    report = export_onnx(quantized.eval(), EXAMPLE, tmp_path / "model.onnx", images=20 * IMAGES)

    assert report is not None
    assert report.unfused == ()
    assert report.error < 0.01
    # What is learned is held by the step itself, which can sink again.
    (clipped,) = (quantizer for quantizer in quantizers if quantizer.scale < 0.05)
    assert clipped.scale.item() == pytest.approx(6 / 255)
    clipped.scale.backward()  # type: ignore[no-untyped-call]
    assert clipped.step.grad == 1


@pytest.mark.slow
def test_network_that_cannot_be_traced_keeps_the_meaning_of_its_bits(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 3:
                raise ValueError
            out: Tensor = self.two(x + self.one(x).relu()).mean((2, 3))
            return out

    quantized = quantize_layers(Sized().eval(), {"one": INT8, "two": INT8}, [IMAGES])
    assert type(quantized) is Sized
    report = export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=IMAGES)

    assert report is not None
    assert report.error < 0.01


@pytest.mark.slow
def test_layer_that_runs_twice_with_two_batch_norms_keeps_its_meaning(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(self.conv(x)).relu()
            logits: Tensor = self.linear(self.two(self.conv(x)).relu().mean((2, 3)))
            return logits

    torch.manual_seed(0)
    model = Twice().eval()
    with torch.no_grad():
        model.two.weight.copy_(torch.tensor([-1.0, 2.0, 3.0]))
    quantized = quantize_layers(model, {"conv": INT8, "linear": INT8}, [IMAGES])
    report = export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=IMAGES)

    assert report is not None
    assert report.error < 0.01
    # Neither batch norm can be folded into a weight that both share, so what the layer writes is no tensor of integers.
    assert (report.unfused, report.kernels) == (("conv",), {"QGemm": 1})


def refused(layers: dict[str, LayerPolicy], tmp_path: Path, images: Tensor | None = IMAGES) -> str:
    quantized = quantize_layers(network(), layers, [IMAGES])
    with pytest.raises(ExportError) as caught:
        export_onnx(quantized, EXAMPLE, tmp_path / "model.onnx", images=images)
    assert not list(tmp_path.iterdir())
    return str(caught.value)


ALLOWED = "ONNX files hold layers with 8 and 8 bits, 32 and 32, and where the runtime has it 16 and 16"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerPolicy(weight_bits=4, act_bits=8),
            "layer 'after' has 4-bit weights and 8-bit activations, which are simulated: no runtime has kernels for "
            f"them; {ALLOWED}. Give it 8 bits, or save it with save_compressed",
        ),
        (
            LayerPolicy(weight_bits=8),
            "layer 'after' has 8-bit weights and 32-bit activations, and a kernel needs the same of both; " + ALLOWED,
        ),
        (
            LayerPolicy(act_bits=8),
            "layer 'after' has 32-bit weights and 8-bit activations, and a kernel needs the same of both; " + ALLOWED,
        ),
        (
            LayerPolicy(weight_bits=8, act_bits=8, quantizer="kmeans"),
            "layer 'after' has weights that share values (kmeans), which is simulated: no runtime has kernels for "
            f"them; {ALLOWED}. Give it the quantizer 'linear', or save it with save_compressed",
        ),
    ],
)
def test_bits_without_a_kernel_are_refused(layer: LayerPolicy, message: str, tmp_path: Path) -> None:
    assert refused({"stem": INT8, "after": layer}, tmp_path) == message


@pytest.mark.skipif(has_half_precision(), reason="the runtime has half precision for this processor")
def test_half_precision_without_a_kernel_is_refused(tmp_path: Path) -> None:
    assert refused({"after": HALF}, tmp_path) == (
        f"layer 'after' has 16-bit weights and 16-bit activations, and ONNX Runtime {onnxruntime.__version__} has no "
        "half-precision convolution for this processor: it would cast to single precision and be slower. Give it 8 or "
        "32 bits"
    )


def test_kernels_are_looked_for_and_not_assumed() -> None:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [image], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)

    assert count_operators(model.SerializeToString()) == {"Relu": 1}
    assert has_half_precision(TensorProto.FLOAT)


def test_layer_in_half_precision_computes_what_its_simulation_does() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    quantized = quantize_layers(model, {"0": HALF}, [])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = quantized(x)

    torch.testing.assert_close(InHalfPrecision(quantized[0])(x), expected, atol=2e-3, rtol=2e-3)


def test_sums_of_the_largest_products_are_right_in_half_the_range_and_told_where_not(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        for layer in (plain[0], plain[2]):
            layer.weight.fill_(0.5)[::2].neg_()
    images = 1 + torch.rand(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    saturated = {}
    for reduce_range in (False, True):
        policy = LayerPolicy(weight_bits=8, act_bits=8, reduce_range=reduce_range)
        quantized = quantize_layers(plain.eval(), dict.fromkeys("02", policy), [images])
        layers = quantized_layers(quantized).values()
        levels = [layer.quantized_weight() / layer.weight_quantizer.scale for layer in layers]
        report = export_onnx(quantized, images[:1], tmp_path / "model.onnx", images=images)

        assert report is not None and report.fused_layers == 2
        assert {level.detach().abs().max().round().item() for level in levels} == {63 if reduce_range else 127}
        assert report.error < 0.02
        saturated[reduce_range] = report.saturated - report.error

    assert saturated[True] == pytest.approx(0, abs=0.01)
    assert (saturated[False] > 0.1) == saturates()


def test_float_layer_between_layers_of_half_the_range_does_not_saturate(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        for layer in plain[::2]:
            layer.weight.fill_(0.5)[::2].neg_()
    images = 1 + torch.rand(8, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    policy = LayerPolicy(weight_bits=8, act_bits=8, reduce_range=True)
    quantized = quantize_layers(plain.eval(), dict.fromkeys("04", policy), [images])

    report = export_onnx(quantized, images[:1], tmp_path / "model.onnx", images=images)

    assert report is not None and report.others == 1
    assert report.saturated < 0.02


def test_integers_are_not_exported_without_images_to_compare_on(tmp_path: Path) -> None:
    assert refused({"stem": INT8}, tmp_path, images=None) == (
        "Mixed has 8-bit layers, and no images were given to compare the integers with PyTorch on; pass a batch "
        "of real inputs as `images`"
    )


@pytest.mark.slow
def test_integers_that_differ_from_the_simulation_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another_network(content: bytes, model: nn.Module, images: tuple[Tensor, ...]) -> IntegerReport:
        with torch.no_grad():
            model.linear.bias.add_(1)
        return integer_report(content, model, images)

    monkeypatch.setattr(export, "integer_report", of_another_network)

    monkeypatch.setattr(export, "saturates", lambda: True)

    whole, half = (refused({"stem": replace(INT8, reduce_range=is_on)}, tmp_path) for is_on in (False, True))

    words = " of the outputs (root mean square over 32 images), allowed 1.00e-01; nothing was written"
    assert half.startswith("the integer ONNX of Mixed differs from PyTorch's simulation by ") and half.endswith(words)
    hint = "This processor adds pairs of 8-bit products in 16 bits, which reduce_range of a layer allows for"
    assert whole.endswith(f"{words}. {hint}")


@pytest.mark.slow
def test_operator_without_a_counterpart_is_named_with_its_layer(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.block = nn.Sequential(nn.ReLU(), Bessel())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(self.linear(x))
            return out

    with pytest.raises(ExportError) as caught:
        export_onnx(Network(), torch.zeros(1, 4), tmp_path / "model.onnx")
    assert str(caught.value) == (
        "Network cannot be exported to ONNX: layer 'block.1' calls 'bessel_j0', which has no counterpart in ONNX; "
        "replace that operator"
    )
