from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from graph_encoder.encoders import (
    GraphEncoder,
    TypedMessagePassing,
    disjoint_union,
    mean_and_max,
    one_if_all_equal,
    place_code,
    vocabulary_size,
)
from tests.agent.synthetic import N_FEATURES, chain_observation, chain_space

SMALL = {"hidden": 8, "n_layers": 3, "n_frequencies": 6}


def batch_of(*observations: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.stack([o[name] for o in observations])) for name in observations[0]}


def features(n_decisions: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_decisions, N_FEATURES))


def encoder(n_decisions: int = 4, **options: int) -> GraphEncoder:
    torch.manual_seed(0)
    return GraphEncoder(chain_space(n_decisions), **SMALL | options)


def test_union_shifts_each_graph_by_its_nodes_and_drops_padding() -> None:
    edges = torch.tensor([[[0.0, 1.0], [1.0, 2.0]], [[2.0, 0.0], [0.0, 0.0]]])
    types = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])

    edge_index, edge_types = disjoint_union(edges, types, mask, n_nodes=10)

    assert edge_index.tolist() == [[0, 1, 12], [1, 2, 10]]
    assert edge_types.tolist() == [3, 4, 5]


def test_a_layer_adds_what_it_makes_of_the_mean_message() -> None:
    layer = TypedMessagePassing(hidden=2, n_layers=1, n_edge_types=2)
    layer.norms[0] = torch.nn.Identity()
    layer.convolutions[0].nn = torch.nn.Identity()
    layer.edge_types[0].weight.data = torch.tensor([[0.0, 0.0], [10.0, -10.0]])
    nodes = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [0.0, 0.0]]])
    edges = torch.tensor([[[0.0, 1.0], [2.0, 2.0]]])

    out = layer(nodes, edges, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2))

    # Node 2 hears relu([1, 2]) and relu([3 + 10, 5 - 10]); the others hear nothing and add themselves.
    assert out[0].tolist() == [[2.0, 4.0], [6.0, 10.0], [7.0, 1.0]]


def test_a_message_depends_on_the_type_of_its_edge() -> None:
    observation = chain_observation(features(4, 0))
    other = {**observation, "edge_types": observation["edge_types"][::-1].copy()}

    nodes, _ = encoder()(batch_of(observation, other))

    assert not torch.allclose(nodes[0], nodes[1])


def test_pooling_ignores_masked_positions() -> None:
    values = torch.tensor([[[1.0], [-3.0], [100.0]]])

    mean, largest = mean_and_max(values, torch.tensor([[1.0, 1.0, 0.0]]))

    assert mean.item() == -1.0
    assert largest.item() == 1.0


@pytest.mark.parametrize("garbage", [0.0, 3.0, 7.0])
def test_padding_changes_neither_embeddings_nor_gradients(garbage: float) -> None:
    plain = encoder()
    padded = GraphEncoder(chain_space(4, padding=5), **SMALL)
    padded.load_state_dict(plain.state_dict())
    rows = features(4, 1)

    def grow(model: GraphEncoder, observation: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        nodes, network = model(batch_of(observation, observation))
        (nodes[:, :8].square().sum() + network.square().sum()).backward()
        return nodes[:, :8], network

    expected, found = grow(plain, chain_observation(rows)), grow(padded, chain_observation(rows, 5, garbage))

    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    for one, other in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_weights_of_one_network_serve_another() -> None:
    shapes = [[p.shape for p in encoder(n).parameters()] for n in (2, 9)]

    assert shapes[0] == shapes[1]


def test_relabelling_the_nodes_of_a_graph_relabels_the_embeddings() -> None:
    observation = chain_observation(features(4, 2))
    order = np.random.default_rng(0).permutation(8)
    position = np.argsort(order)
    shuffled = {
        **observation,
        "nodes": observation["nodes"][order],
        "kinds": observation["kinds"][order],
        "edges": position[observation["edges"].astype(int)].astype(np.float32),
    }

    nodes, network = encoder(n_frequencies=0)(batch_of(observation, shuffled))

    torch.testing.assert_close(nodes[1], nodes[0][torch.as_tensor(order)])
    torch.testing.assert_close(network[1], network[0])


def test_copies_are_encoded_once_with_the_embeddings_and_gradients_of_encoding_each() -> None:
    model, observation = encoder(), chain_observation(features(4, 3))
    other = chain_observation(features(4, 4))

    def gradients(batch: dict[str, Tensor], rows: int) -> list[Tensor]:
        model.zero_grad()
        nodes, network = model(batch)
        (nodes[:rows].square().sum() + network[:rows].square().sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    copies = gradients(batch_of(observation, observation), rows=2)
    each = gradients(batch_of(observation, observation, other), rows=2)

    for one, two in zip(copies, each, strict=True):
        torch.testing.assert_close(one, two)
    assert one_if_all_equal(batch_of(observation, observation))["nodes"].shape[0] == 1
    assert one_if_all_equal(batch_of(observation, other))["nodes"].shape[0] == 2


def test_places_are_counted_among_nodes_of_one_kind() -> None:
    kinds = torch.tensor([[1, 2, 1, 1, 1]])
    code = place_code(kinds, torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]]), n_frequencies=3)

    assert torch.equal(code[0, 0], code[0, 1])  # each the first of its kind
    torch.testing.assert_close(code[0, 0, 0], code[0, 3, 0])  # places 1 and 3, wavelength 2
    assert not torch.allclose(code[0, 0], code[0, 3])


def test_vocabularies_are_read_from_the_upper_bounds() -> None:
    assert vocabulary_size(chain_space(3), "kinds") == 4
    assert vocabulary_size(chain_space(3), "edge_types") == 6


def test_an_observation_that_is_no_box_is_refused_by_name() -> None:
    space = spaces.Dict({**chain_space(3).spaces, "globals": spaces.Discrete(3)})

    with pytest.raises(
        TypeError, match=r"^observation 'globals' is a Discrete; the encoder reads Boxes, so declare it as one$"
    ):
        GraphEncoder(space, **SMALL)
