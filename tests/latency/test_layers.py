import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from graph_encoder.capture import capture
from latency.layers import (
    LayerKind,
    layer_artifact,
    layer_input,
    layer_module,
    layer_onnx,
    layers_of,
    untimed_convolutions,
)
from latency.runtimes import LatencyError


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    )


def test_layers_are_read_off_the_graph_and_what_no_table_times_is_left_out() -> None:
    layers = layers_of(capture(network(), torch.randn(2, 3, 8, 8)))
    assert [(layer.name, layer.kind, layer.inputs.full, layer.outputs.full) for layer in layers] == [
        ("0", LayerKind("conv", (3, 3), (2, 2), (4, 4)), 3, 8),
        ("2", LayerKind("conv", (3, 3), (1, 1), (4, 4), group_outputs=1), 1, 8),
        ("3", LayerKind("conv", (1, 1), (1, 1), (4, 4), conv_groups=2), 4, 12),
        ("6", LayerKind("linear"), 384, 5),
    ]


class Frames(nn.Module):
    """Three frames an image, folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.reshape(-1, 3, 8, 8)).mean((2, 3))
        out: Tensor = self.head(x.reshape(-1, 3, 8).mean(1))
        return out


def test_convolutions_that_no_table_times_are_named() -> None:
    assert untimed_convolutions(capture(network(), torch.randn(2, 3, 8, 8))) == ("4",)
    assert untimed_convolutions(capture(Frames(), torch.randn(2, 9, 8, 8))) == ("conv",)


def test_a_convolution_keeps_its_groups_where_they_lose_channels_within() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.Conv2d(12, 5, 1))
    _, grouped, _ = layers_of(capture(model, torch.randn(2, 3, 4, 4)))
    assert grouped.kind == LayerKind("conv", (3, 3), (1, 1), (4, 4), conv_groups=2)
    # A unit is one channel of each group.
    assert (grouped.inputs.full, [k for _, k in grouped.inputs.per_unit]) == (4, [1])
    assert (grouped.outputs.full, [k for _, k in grouped.outputs.per_unit]) == (12, [2])


def test_convolutions_of_one_and_three_dimensions_and_dilated_ones_are_layers_too() -> None:
    line = nn.Sequential(nn.Conv1d(3, 8, 5, padding=4, dilation=2), nn.Conv1d(8, 8, 3, stride=2, padding=1, groups=8))
    map_ = nn.Sequential(nn.Conv2d(3, 8, (3, 1), padding=(2, 0), dilation=2), nn.Conv2d(8, 4, 1, dilation=3))
    volume = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)))

    found = [
        [layer.kind for layer in layers_of(capture(model, torch.randn(2, 3, *size)))]
        for model, size in ((line, (20,)), (map_, (8, 6)), (volume, (4, 8, 6)))
    ]

    assert found == [
        [
            LayerKind("conv", (5,), (1,), (20,), dilation=(2,)),
            LayerKind("conv", (3,), (2,), (10,), group_outputs=1),
        ],
        # Of a single position nothing is spread.
        [LayerKind("conv", (3, 1), (1, 1), (8, 6), dilation=(2, 2)), LayerKind("conv", (1, 1), (1, 1), (8, 6))],
        [LayerKind("conv", (1, 3, 3), (1, 2, 2), (4, 4, 3))],
    ]
    assert str(found[0][0]) == "conv 5, stride 1, dilation 2, to 20, 32 bits"


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "shape"),
    [
        (LayerKind("conv", (3, 3), (2, 2), (7, 5)), 3, 10, (1, 10, 7, 5)),
        (LayerKind("conv", (5, 5), (1, 1), (6, 6), group_outputs=1), 1, 9, (1, 9, 6, 6)),
        (LayerKind("conv", (1, 1), (1, 1), (4, 4), group_outputs=2), 3, 8, (1, 8, 4, 4)),
        (LayerKind("conv", (3, 3), (1, 1), (4, 4), conv_groups=2), 3, 10, (1, 10, 4, 4)),
        (LayerKind("conv", (4, 4), (2, 2), (4, 4)), 3, 10, (1, 10, 4, 4)),
        (LayerKind("conv", (2, 16), (1, 16), (5, 1)), 3, 10, (1, 10, 5, 1)),
        (LayerKind("conv", (3, 3), (2, 1), (7, 5), dilation=(4, 2)), 3, 10, (1, 10, 7, 5)),
        (LayerKind("conv", (4, 3), (2, 1), (7, 5), dilation=(3, 1)), 3, 10, (1, 10, 7, 5)),
        (LayerKind("conv", (5,), (1,), (12,), dilation=(2,)), 3, 10, (1, 10, 12)),
        (LayerKind("conv", (3,), (2,), (6,), group_outputs=1), 1, 10, (1, 10, 6)),
        (LayerKind("conv", (1, 3, 4), (1, 2, 2), (4, 3, 2)), 3, 10, (1, 10, 4, 3, 2)),
        (LayerKind("linear", out_size=(7, 1)), 6, 4, (7, 4)),
    ],
)
def test_a_layer_alone_has_the_shape_that_it_has_in_its_network(
    kind: LayerKind, inputs: int, outputs: int, shape: tuple[int, ...]
) -> None:
    x = layer_input(kind, inputs, outputs)
    assert tuple(layer_module(kind, inputs, outputs)(x).shape) == shape
    session = onnxruntime.InferenceSession(layer_onnx(kind, inputs, outputs), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x.numpy()})
    assert out.shape == shape
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("kind", "inputs", "kernel"),
    [
        (LayerKind("conv", (3, 3), (1, 1), (6, 6), bits=8), 5, "QLinearConv"),
        (LayerKind("conv", (3, 3), (2, 2), (4, 4), group_outputs=1, bits=8), 1, "QLinearConv"),
        (LayerKind("conv", (3, 3), (2, 2), (4, 4), conv_groups=2, bits=8), 3, "QLinearConv"),
        (LayerKind("conv", (3, 3), (1, 1), (6, 6), bits=8, dilation=(2, 2)), 5, "QLinearConv"),
        (LayerKind("conv", (3,), (1,), (12,), bits=8), 5, "QLinearConv"),
        (LayerKind("conv", (3, 3, 3), (1, 1, 1), (4, 4, 4), bits=8), 5, "QLinearConv"),
        (LayerKind("linear", out_size=(1, 1), bits=8), 12, "QGemm"),
    ],
)
def test_a_layer_of_bytes_is_one_integer_kernel(kind: LayerKind, inputs: int, kernel: str, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(layer_onnx(kind, inputs, 16), options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": layer_input(kind, inputs, 16).numpy()})

    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators == [kernel]
    assert out.dtype == np.uint8 and out.std() > 1


def test_a_module_is_no_layer_of_bytes() -> None:
    kind = LayerKind("linear", bits=8)
    message = f"{kind}: a runtime of PyTorch modules computes in floats; build the table on one that takes ONNX"
    with pytest.raises(LatencyError, match=f"^{re.escape(message)}$"):
        layer_artifact(kind, 4, 4, "module")
