"""Graph neural network that turns an observation into embeddings, one a node and one for the network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

with warnings.catch_warnings():
    # PyTorch Geometric scripts a class while it is imported, which PyTorch calls deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    from torch_geometric.nn import GINEConv

Observation = Mapping[str, Tensor]


class Encoding(NamedTuple):
    """Embeddings of a batch of observations: ``nodes`` ``(batch, N, hidden)``, ``network`` ``(batch, hidden)``."""

    nodes: Tensor
    network: Tensor


class TypedMessagePassing(nn.Module):
    r"""Residual graph convolutions whose messages depend on the type of the edge.

    Each layer computes

    .. math::
        x_i \leftarrow x_i + \mathrm{MLP}\Big(\hat x_i + \frac{1}{|N(i)|} \sum_{j \in N(i)}
        \mathrm{ReLU}(\hat x_j + e_{t(j, i)})\Big), \qquad \hat x = \mathrm{LayerNorm}(x),

    which is the GINE operator of Hu et al. 2020 (arXiv:1905.12265) with a mean in place of the sum, so that a
    concatenation of twenty branches does not outweigh a chain.

    Shapes:
        - **input:** nodes ``(batch, N, hidden)``, edges ``(batch, 2, E)``, edge types ``(batch, E)``,
          edge mask ``(batch, E)``
        - **output:** nodes ``(batch, N, hidden)``
    """

    def __init__(self, hidden: int, n_layers: int, n_edge_types: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(n_layers))
        self.edge_types = nn.ModuleList(nn.Embedding(n_edge_types, hidden) for _ in range(n_layers))
        self.convolutions = nn.ModuleList(
            GINEConv(nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)), aggr="mean")
            for _ in range(n_layers)
        )

    def forward(self, nodes: Tensor, edges: Tensor, edge_types: Tensor, edge_mask: Tensor) -> Tensor:
        """Pass messages along the real edges of every graph of the batch."""
        batch, n_nodes, hidden = nodes.shape
        edge_index, types = disjoint_union(edges, edge_types, edge_mask, n_nodes)
        x = nodes.reshape(batch * n_nodes, hidden)
        for norm, embed, convolution in zip(self.norms, self.edge_types, self.convolutions, strict=True):
            x = x + convolution(norm(x), edge_index, embed(types))
        return x.reshape(batch, n_nodes, hidden)


def disjoint_union(edges: Tensor, edge_types: Tensor, edge_mask: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Put the graphs of a batch side by side as one graph.

    Args:
        edges: node indices ``(batch, 2, E)``, of any number type.
        edge_types: index into the edge types, ``(batch, E)``.
        edge_mask: 1 for a real edge, 0 for padding, ``(batch, E)``.
        n_nodes: padded nodes a graph; node ``i`` of graph ``b`` becomes ``b * n_nodes + i``.

    Returns:
        ``edge_index`` ``(2, edges)`` and its types ``(edges,)``, int64, without the padding.
    """
    offset = n_nodes * torch.arange(edges.shape[0], device=edges.device).view(-1, 1)
    real = edge_mask > 0
    source, target = (edges.long() + offset.unsqueeze(1)).unbind(1)
    return torch.stack([source[real], target[real]]), edge_types.long()[real]


class GraphEncoder(nn.Module):
    """Embed the nodes of a network's graph and the network itself.

    No parameter has a shape that depends on the network, so the weights of one encoder serve any other whose
    observations have the same features, kinds and edge types.

    Shapes:
        - **input:** dict of batched observations (``nodes``, ``kinds``, ``edges``, ``edge_types``, ``node_mask``,
          ``edge_mask``, ``globals``), see ``observation_space``
        - **output:** :class:`Encoding`

    Args:
        observation_space: holds the number of features and globals, and, as the upper bounds of ``kinds`` and
            ``edge_types``, the sizes of the two vocabularies.
        hidden: width of every embedding.
        n_layers: rounds of message passing.
        n_frequencies: sines of the node's place among the nodes of its kind, at wavelengths of 2, 4, 8, ... places.
            They tell apart layers whose features are alike, which is what learning a plan for one network needs; 0
            leaves them out, which suits an agent that is meant for other networks.
    """

    def __init__(self, observation_space: spaces.Dict, *, hidden: int, n_layers: int, n_frequencies: int) -> None:
        super().__init__()
        n_features = _box(observation_space, "nodes").shape[-1]
        n_globals = _box(observation_space, "globals").shape[-1]
        self.hidden = hidden
        self.n_frequencies = n_frequencies
        self.kinds = nn.Embedding(vocabulary_size(observation_space, "kinds"), hidden)
        self.features = nn.Linear(n_features + n_globals + 2 * n_frequencies, hidden)
        self.messages = TypedMessagePassing(hidden, n_layers, vocabulary_size(observation_space, "edge_types"))
        self.norm = nn.LayerNorm(hidden)
        self.pool = nn.Linear(2 * hidden + n_globals, hidden)

    def forward(self, observation: Observation) -> Encoding:
        """Encode a batch; a batch of copies of one observation is encoded once and expanded."""
        batch = observation["nodes"].shape[0]
        distinct = one_if_all_equal(observation)
        nodes, network = self._encode(distinct)
        return Encoding(nodes.expand(batch, -1, -1), network.expand(batch, -1))

    def _encode(self, observation: Observation) -> Encoding:
        globals_ = observation["globals"]
        kinds = observation["kinds"].long()
        n_nodes = kinds.shape[1]
        parts = [observation["nodes"], globals_.unsqueeze(1).expand(-1, n_nodes, -1)]
        if self.n_frequencies:
            parts.append(place_code(kinds, observation["node_mask"], self.n_frequencies))
        x = self.features(torch.cat(parts, dim=-1)) + self.kinds(kinds)
        x = self.messages(x, observation["edges"], observation["edge_types"], observation["edge_mask"])
        x = self.norm(x)
        pooled = torch.cat([*mean_and_max(x, observation["node_mask"]), globals_], dim=-1)
        return Encoding(x, torch.nn.functional.silu(self.pool(pooled)))


def one_if_all_equal(observation: Observation) -> Observation:
    """Return the first row of the batch if every row equals it, else the batch.

    In a search over plans for a whole network every observation of a rollout is the same graph: encoding it once
    instead of ``batch`` times is most of the cost of an update.
    """
    first = {name: value[:1] for name, value in observation.items()}
    if all(torch.equal(value, first[name].expand_as(value)) for name, value in observation.items()):
        return first
    return observation


def place_code(kinds: Tensor, node_mask: Tensor, n_frequencies: int) -> Tensor:
    """Sines and cosines of each node's place among the nodes of its own kind.

    Args:
        kinds: operator kinds ``(batch, N)``, int64.
        node_mask: 1 for a real node, ``(batch, N)``.
        n_frequencies: wavelengths 2, 4, 8, ... counted in places, shifted so that a wavelength of 2 is not blind.

    Returns:
        Code of shape ``(batch, N, 2 * n_frequencies)`` in ``[-1, 1]``.
    """
    same_kind = (kinds.unsqueeze(2) == kinds.unsqueeze(1)) & (node_mask > 0).unsqueeze(1)
    place = same_kind.tril().sum(dim=2).to(node_mask.dtype)
    wavelengths = 2.0 ** torch.arange(1, n_frequencies + 1, device=kinds.device)
    angle = 2 * torch.pi * (place.unsqueeze(-1) + 0.25) / wavelengths
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def mean_and_max(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pool ``values`` ``(batch, N, hidden)`` over the positions where ``mask`` ``(batch, N)`` is 1."""
    real = (mask > 0).unsqueeze(-1)
    mean = (values * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return mean, values.masked_fill(~real, torch.finfo(values.dtype).min).amax(dim=1)


def vocabulary_size(observation_space: spaces.Dict, name: str) -> int:
    """Number of values the index array ``name`` can take, read from its upper bound."""
    return int(_box(observation_space, name).high.max()) + 1


def _box(observation_space: spaces.Dict, name: str) -> spaces.Box:
    box = observation_space[name]
    if not isinstance(box, spaces.Box):
        msg = f"observation '{name}' is a {type(box).__name__}; the encoder reads Boxes, so declare it as one"
        raise TypeError(msg)
    return box
