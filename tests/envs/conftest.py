"""Small networks, random graphs and evaluate functions whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from envs.evaluator import CandidateEvaluator
from envs.space import SearchSpace
from graph_encoder.capture import capture
from graph_encoder.network import ChannelGroup, LinearDim, NetworkGraph, Operator, Term
from latency.budget import Budget


class SmallNetwork(nn.Module):
    """A stem, one residual block with its own width, and two further layers."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.inner_bn = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.outer_bn = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 3 * width, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(3 * width)
        self.last = nn.Conv2d(3 * width, 2 * width, 1, bias=False)
        self.last_bn = nn.BatchNorm2d(2 * width)
        self.classify = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.outer_bn(self.outer(torch.relu(self.inner_bn(self.inner(x))))))
        x = torch.relu(self.down_bn(self.down(x)))
        x = torch.relu(self.last_bn(self.last(x)))
        return self.classify(x.mean((2, 3)))


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def l1_importance(model: nn.Module, graph: NetworkGraph) -> dict[str, np.ndarray]:
    tensors = dict(model.named_parameters())
    result = {}
    for group in graph.prunable:
        member = next(m for m in group.members if m.role == "out" and tensors[m.tensor].dim() > 1)
        norms = tensors[member.tensor].detach().abs().transpose(0, member.dim).flatten(1).sum(1)
        result[group.name] = norms[member.indices].sum(1).double().numpy()
    return result


def remaining_share(dense: nn.Module) -> Callable[[nn.Module], float]:
    """An evaluate function with a known answer: the share of the dense network's parameters that are left."""
    total = sum(parameter.numel() for parameter in dense.parameters())
    return lambda model: sum(parameter.numel() for parameter in model.parameters()) / total


def make_space(model: nn.Module, budget: Budget | None = None, **options: object) -> SearchSpace:
    graph = capture(model, images())
    return SearchSpace.build(graph, l1_importance(model, graph), budget, **options)  # type: ignore[arg-type]


def make_evaluator(model: nn.Module, space: SearchSpace, **options: object) -> CandidateEvaluator:
    options.setdefault("cost", space.cost_of)
    options.setdefault("evaluate", remaining_share(model))
    return CandidateEvaluator(model, space.graph, calibration=[images(8)], **options)  # type: ignore[arg-type]


def random_graph(rng: np.random.Generator, n_groups: int) -> NetworkGraph:
    """A chain of layers whose widths are bound at random: a layer writes any group, and reads one or two."""
    sizes = rng.integers(1, 300, n_groups)
    groups = tuple(ChannelGroup(f"g{i}", int(size), (), (f"layer{i}",), ()) for i, size in enumerate(sizes))
    operators, terms = [Operator("stem", "conv", 3, 8, weight="stem.weight")], [Term("stem", 27, (LinearDim(8),))]
    for index in range(2 * n_groups):
        out = index if index < n_groups else int(rng.integers(n_groups))
        read = rng.choice(n_groups, size=min(int(rng.integers(1, 3)), n_groups), replace=False)
        bundles = [(int(g), int(rng.integers(1, 4))) for g in read]
        constant = int(rng.integers(0, 5))
        reads = LinearDim(constant + sum(k * int(sizes[g]) for g, k in bundles), tuple(bundles))
        writes = LinearDim(int(sizes[out]), ((out, 1),))
        # Some layers are depthwise (one dimension), some keep their output dense.
        dims = [(writes, reads), (writes,), (LinearDim(10), reads)][int(rng.integers(3))]
        operators.append(Operator(f"layer{index}", "conv", 8, 8, weight=f"layer{index}.weight"))
        terms.append(Term(f"layer{index}", int(rng.integers(1, 5000)), dims))
    return NetworkGraph(tuple(operators), (), groups, tuple(terms), tuple(terms))


@pytest.fixture
def model() -> SmallNetwork:
    return SmallNetwork().eval()


@pytest.fixture
def space(model: SmallNetwork) -> SearchSpace:
    return make_space(model, Budget(share=0.5))
