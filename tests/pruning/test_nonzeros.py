import pytest

from graph_encoder.capture import capture
from pruning.layer_policy import LayerPolicy
from pruning.nonzeros import LayerCount, count_nonzeros, nonzero_macs
from pruning.policy import CompressionPolicy
from pruning.sparsity import kept_weights
from pruning.surgery import apply_policy
from tests.graph_encoder.networks import EXAMPLE, NETWORKS, build

LAYERS = {"conv1": LayerPolicy("unstructured", 0.1), "conv2": LayerPolicy("block4", 0.5), "head": LayerPolicy("2:4")}


def test_multiply_adds_on_non_zeros_by_hand() -> None:
    model = build("Residual")
    sparse = apply_policy(
        model, capture(model, EXAMPLE), CompressionPolicy({"conv1": (0, 1, 2, 3)}, {"conv1": 6}, LAYERS)
    )
    counts = count_nonzeros(sparse, capture(sparse, EXAMPLE))

    # Maps of 8x8: conv1 is 8 to 4, conv2 4 to 8, both 3x3; the head reads 8 channels and has 5 outputs.
    assert counts["stem"] == LayerCount(216, 216, 216 * 64, 216 * 64)
    assert counts["conv1"] == LayerCount(288, 28, 288 * 64, 28 * 64)
    assert counts["conv2"] == LayerCount(288, 144, 288 * 64, 144 * 64)
    assert counts["head"] == LayerCount(40, 20, 40, 20)
    assert counts["conv2"].density == 0.5
    assert nonzero_macs(sparse, capture(sparse, EXAMPLE)) == (216 + 28 + 144) * 64 + 20


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_network_has_the_multiply_adds_of_its_graph(name: str) -> None:
    model = build(name)
    graph = capture(model, EXAMPLE)
    assert nonzero_macs(model, graph) == graph.macs


def test_a_graph_of_the_wider_network_is_refused() -> None:
    model = build("Residual")
    graph = capture(model, EXAMPLE)
    sparse = apply_policy(model, graph, CompressionPolicy({"conv1": (0, 1)}, {"conv1": 6}))
    with pytest.raises(ValueError) as caught:
        nonzero_macs(sparse, graph)
    assert str(caught.value) == (
        "the graph has 432 elements for 'conv1.weight' and the network 144; capture the compressed network itself"
    )


def test_number_kept_is_known_from_the_policy() -> None:
    model = build("Residual")
    sparse = apply_policy(model, capture(model, EXAMPLE), CompressionPolicy(layers=LAYERS))
    for name, layer in LAYERS.items():
        weight = sparse.get_submodule(name).weight
        assert kept_weights(weight.shape, layer) == int(weight.count_nonzero())
