from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_encoder.capture import capture
from latency.sliced import sliced_onnx
from pruning.export import export_marked, export_onnx
from pruning.layer_policy import LayerPolicy
from pruning.policy import CompressionPolicy
from pruning.qdq import count_operators
from pruning.quantize import quantize_layers
from pruning.surgery import apply_policy


class Small(nn.Module):
    """A batch norm that the exporter folds, a depthwise and a grouped convolution, a residual sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        self.wide = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 16, 1, groups=4)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.narrow(self.grouped(F.relu(self.depthwise(self.wide(x)))))
        return self.head(x.mean(dim=(2, 3)))


def within_groups() -> nn.Module:
    """Its grouped convolution keeps its groups, and loses channels in each."""
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    return nn.Sequential(nn.Conv2d(3, 8, 1), grouped, nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(256, 5))


class Upsampling(nn.Module):
    """A transposed convolution whose batch norm the exporter makes a bias of, and one with a group for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.ConvTranspose2d(3, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        self.each, self.last = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.each(F.relu(self.norm(self.first(x)))))


@pytest.mark.slow
def test_a_file_that_does_not_run_is_not_handed_out(tmp_path: Path) -> None:
    model, x = Upsampling().eval(), torch.randn(2, 3, 4, 4)
    graph = capture(model, x)
    (group,) = graph.prunable
    policy = CompressionPolicy({group.name: (0, 2, 5)}, {group.name: 8})
    export_onnx(model, x, tmp_path / "dense.onnx")

    assert sliced_onnx(onnx.load(tmp_path / "dense.onnx"), graph, policy) is None
    assert sliced_onnx(onnx.load(tmp_path / "dense.onnx"), graph, CompressionPolicy({})) is not None


class Padded(nn.Module):
    """Its forward pass holds a number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.first(x), (0, 0, 0, 0, 2, 2)) + self.second(x)


def operators(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    return [(n.op_type, *((a.name, tuple(a.ints) or a.i) for a in n.attribute)) for n in model.graph.node]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "named"), [(Small, {"stem", "wide"}), (within_groups, {"0", "1", "2"})])
def test_what_is_sliced_has_the_operators_and_shapes_of_what_is_exported(
    network: Callable[[], nn.Module], named: set[str], tmp_path: Path
) -> None:
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    graph = capture(model, x)
    cut = {group.name: group.size // 2 for group in graph.prunable}
    policy = CompressionPolicy({name: tuple(range(n)) for name, n in cut.items()}, {n: 2 * k for n, k in cut.items()})
    export_onnx(model, x, tmp_path / "dense.onnx")
    export_onnx(apply_policy(model, graph, policy), x, tmp_path / "small.onnx")
    dense, exported = onnx.load(tmp_path / "dense.onnx"), onnx.load(tmp_path / "small.onnx")

    content = sliced_onnx(dense, graph, policy)

    assert content is not None
    assert cut.keys() == named
    sliced = onnx.load_model_from_string(content)
    assert operators(sliced) == operators(exported)
    shapes = [sorted(tuple(t.dims) for t in m.graph.initializer) for m in (sliced, exported)]
    assert shapes[0] == shapes[1]
    assert dense == onnx.load(tmp_path / "dense.onnx")


def test_a_network_whose_forward_holds_the_width_is_not_sliced() -> None:
    model, x = nn.Sequential(Padded(), nn.Conv2d(8, 5, 1)), torch.randn(2, 3, 4, 4)
    graph = capture(model, x)
    assert graph.rewritten_groups
    name = graph.groups[min(graph.rewritten_groups)].name
    policy = CompressionPolicy({name: (0,)}, {name: graph.group(name).size})
    named = [onnx.numpy_helper.from_array(np.zeros(1), o.weight) for o in graph.operators if o.weight]
    dense = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], named))
    assert sliced_onnx(dense, graph, policy) is None


@pytest.mark.slow
def test_sliced_integers_run_in_the_kernels_of_the_exported_network(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = capture(model, x)
    cut = {group.name: group.size // 2 for group in graph.prunable}
    policy = CompressionPolicy({name: tuple(range(n)) for name, n in cut.items()}, {n: 2 * k for n, k in cut.items()})
    marked = export_marked(model, x)
    assert marked is not None
    for layers in (["stem", "wide", "depthwise", "grouped", "narrow", "head"], ["wide", "narrow"]):
        bits = {layer: LayerPolicy(weight_bits=8, act_bits=8) for layer in layers}
        quantized = quantize_layers(apply_policy(model, graph, policy), bits, [x])
        export_onnx(quantized, x, tmp_path / "small.onnx", images=x)

        content = sliced_onnx(marked.proto, graph, policy, partial(marked.with_integers, layers=layers))

        assert content is not None
        assert count_operators(content) == count_operators((tmp_path / "small.onnx").read_bytes())
