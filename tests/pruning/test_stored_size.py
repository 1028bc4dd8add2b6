import torch
from torch import Tensor, nn

from graph_encoder.capture import capture
from pruning.policy import CompressionPolicy, LayerPolicy
from pruning.stored_size import parameter_bytes


class Pair(nn.Module):
    """Two convolutions on 6x6 images, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


GRAPH = capture(Pair(), torch.zeros(1, 3, 6, 6))


def test_network_without_bits_has_four_bytes_a_parameter() -> None:
    assert sum(parameter_bytes(GRAPH, CompressionPolicy()).values()) == 4 * sum(p.numel() for p in Pair().parameters())


def test_bytes_of_a_weight_include_its_scales() -> None:
    layers = {"first": LayerPolicy(weight_bits=3, act_bits=4), "second": LayerPolicy(weight_bits=2, quantizer="kmeans")}
    sizes = parameter_bytes(GRAPH, CompressionPolicy(layers=layers))

    # 216 weights of 3 bits, 8 scales, scale and zero point of what is read; 40 weights of 2 bits and 4 shared values.
    assert sizes == {"first.weight": 81 + 32 + 5, "second.weight": 10 + 16, "second.bias": 20}


def test_sparse_weight_is_stored_by_its_values_and_places_where_that_is_less() -> None:
    def bytes_of(**layer: object) -> int:
        policy = CompressionPolicy(layers={"first": LayerPolicy(**layer)})  # type: ignore[arg-type]
        return parameter_bytes(GRAPH, policy)["first.weight"]

    assert bytes_of(sparsity="unstructured", density=0.25) == 54 * 4 + 216 // 8
    assert bytes_of(sparsity="block8", density=0.5) == 108 * 4 + 27 // 8 + 1
    assert bytes_of(sparsity="2:4") == 108 * 4 + 108 * 2 // 8
    # Three indices of two bits would be more than a bit for each of the four.
    assert bytes_of(sparsity="3:4") == 162 * 4 + 216 // 8
    # Half of the weights in one bit each and a bit for each place are as much as all weights: they stay as they are.
    assert bytes_of(sparsity="unstructured", density=0.5, weight_bits=1) == 27 + 32
