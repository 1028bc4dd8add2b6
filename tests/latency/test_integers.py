import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graph_encoder.capture import capture
from graph_encoder.network import LinearDim
from latency.integers import IntegerFlow
from pruning.export import export_marked, export_onnx
from pruning.layer_policy import LayerPolicy
from pruning.qdq import count_operators
from pruning.quantize import quantize_layers


class Joined(nn.Module):
    """A residual sum behind the stem, a layer behind it, a concatenation, a mean over positions and a linear layer."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = functional.relu) -> None:
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = self.activation(x + self.outer(self.activation(self.inner(x))))
        x = torch.cat([self.activation(self.left(x)), self.activation(self.right(x))], dim=1)
        return self.head(x.mean(dim=(2, 3)))


LAYERS = ("stem", "inner", "outer", "left", "right", "head")
MODEL = Joined().eval()
EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
GRAPH = capture(MODEL, EXAMPLE)
FLOW = IntegerFlow(GRAPH)


def states(*layers: str) -> tuple[set[str], dict[str, int]]:
    """What runs in integers, and conversions of what each operator writes, where there are any."""
    found = FLOW.states([operator.layer in layers for operator in GRAPH.operators])
    pairs = list(zip(GRAPH.operators, found, strict=True))
    return {o.name for o, state in pairs if state.in_integers}, {
        o.name: s.conversions for o, s in pairs if s.conversions
    }


@pytest.mark.parametrize(
    ("layers", "running", "conversions"),
    [
        ((), set(), {}),
        # The input is quantized, and the mean reads floats.
        (LAYERS, {*LAYERS, "add", "concat"}, {"input": 1, "concat": 1}),
        # One layer among floats: what it reads and what it writes.
        (("inner",), {"inner"}, {"stem": 2, "inner": 1}),
        # Each kernel of floats that reads it has a conversion of its own.
        (("stem",), {"stem"}, {"input": 1, "stem": 2}),
        # The sum has a term in integers and one in floats.
        (("outer",), {"outer"}, {"inner": 1, "outer": 1}),
        # Both terms are in integers, and so is the sum, which two layers read as floats.
        (("stem", "inner", "outer"), {"stem", "inner", "outer", "add"}, {"input": 1, "add": 2}),
        # The layer between is made one of integers by the runtime.
        (("stem", "outer"), {"stem", "inner", "outer", "add"}, {"input": 1, "add": 2}),
        # Quantized for the one that reads it in integers, and read as floats by the other.
        (("left",), {"left"}, {"add": 2, "left": 1}),
        # Behind a mean a linear layer reads another tensor.
        (("head",), {"head"}, {}),
    ],
)
def test_what_runs_in_integers_and_what_is_converted_by_hand(
    layers: tuple[str, ...], running: set[str], conversions: dict[str, int]
) -> None:
    assert states(*layers) == (running, conversions)


def test_a_convolution_that_the_runtime_would_quantize_is_taken_to_be_transposed_around() -> None:
    def transposed(*layers: str) -> dict[str, int]:
        found = FLOW.states([operator.layer in layers for operator in GRAPH.operators])
        return {o.name: s.transpositions for o, s in zip(GRAPH.operators, found, strict=True) if s.transpositions}

    assert transposed("stem", "outer") == {"inner": 2}
    assert transposed(*LAYERS) == transposed("inner") == {}


def test_channels_of_joins_shrink_with_their_terms() -> None:
    channels = {o.name: dim for o, dim in zip(GRAPH.operators, FLOW.channels, strict=True)}
    group = {group.name: index for index, group in enumerate(GRAPH.groups)}
    assert channels["input"] == LinearDim(3)
    assert channels["add"] == LinearDim(8, ((group["stem"], 1),))
    assert channels["concat"] == LinearDim(12, ((group["left"], 1), (group["right"], 1)))
    assert FLOW.positions[GRAPH.operators.index(next(o for o in GRAPH.operators if o.name == "concat"))] == 36


@pytest.mark.parametrize("activation", [functional.relu, functional.relu6])
def test_kernels_and_conversions_are_those_of_the_runtime(activation: Callable[[Tensor], Tensor]) -> None:
    marked = export_marked(Joined(activation).eval(), EXAMPLE)
    assert marked is not None
    generator = np.random.default_rng(0)
    for _ in range(20):
        layers = [layer for layer in LAYERS if generator.random() < 0.6]
        kernels = count_operators(marked.with_integers(marked.proto, layers).SerializeToString())
        running, conversions = states(*layers)
        assert kernels["QLinearConv"] + kernels["QGemm"] == len(running & set(LAYERS)), layers
        assert (kernels["QLinearAdd"], kernels["QLinearConcat"]) == ("add" in running, "concat" in running), layers
        # What the mean writes is quantized for the linear layer.
        found = kernels["QuantizeLinear"] + kernels["DequantizeLinear"] - ("head" in layers)
        # A transposition that the runtime moves past a term of a sum of both kinds leaves one pair more.
        is_mixed_sum = "add" not in running and "add" in conversions and bool({"stem", "outer"} & running)
        assert found - sum(conversions.values()) == 2 * is_mixed_sum, layers


class Tokens(nn.Module):
    """A perceptron with a sum around it, over tokens: the exporter turns its weights for products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 4)
        # As blocks that are copies of one are at first.
        self.again = copy.deepcopy(self.narrow)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.wide(x))
        out: Tensor = self.head((self.narrow(x) + self.again(functional.relu(x - 1))).mean(1))
        return out


@pytest.mark.parametrize("layers", [("wide", "narrow", "again", "head"), ("wide",), ("again", "head")])
def test_linear_layers_over_tokens_are_timed_with_the_kernels_that_they_are_deployed_with(
    tmp_path: Path, layers: tuple[str, ...]
) -> None:
    model, example = Tokens().eval(), torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    marked = export_marked(model, example)
    assert marked is not None
    eight = LayerPolicy(weight_bits=8, act_bits=8)
    deployed = quantize_layers(model, dict.fromkeys(layers, eight), [example])
    export_onnx(deployed, example, tmp_path / "model.onnx", images=example)

    timed = count_operators(marked.with_integers(marked.proto, layers).SerializeToString())

    assert timed == count_operators((tmp_path / "model.onnx").read_bytes())
    assert sum(n for kind, n in timed.items() if kind.startswith(("QLinear", "QGemm", "MatMulInteger"))) >= len(layers)
