"""A network with random weights and random plans of it, for tables of latency."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from envs.action import nearest
from envs.space import SearchSpace
from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.decision import LayerDecision, layer_decisions, layer_policies
from latency.predict import LatencyModel
from latency.table import LatencyTable
from pruning.export import export_marked, export_onnx
from pruning.layer_policy import FULL_BITS, INTEGER_BITS
from pruning.policy import CompressionPolicy
from pruning.qdq import MarkedNetwork

from .models import build_model, input_sizes

_PLAN_SEED = 1
_MIXING_SEED = 2


@dataclass(frozen=True)
class TimedNetwork:
    """A network whose plans are timed: its weights are random, for time does not depend on them."""

    name: str
    model: nn.Module
    example: Tensor
    graph: NetworkGraph
    space: SearchSpace

    @classmethod
    def build(cls, name: str, shape: str | None, n_classes: int, rounding: int | None) -> TimedNetwork:
        """Build and capture the network called ``name``; every prunable group may lose units.

        Raises:
            ModelError: if there is no such network, or the shape is not understood.
            TraceError: if the network cannot be captured.
        """
        sizes = input_sizes(name, shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _with_random_statistics(build_model(name, n_classes, sizes[0]).eval())
        example = torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))
        graph = capture(model, example)
        importance = {group.name: np.arange(group.size, 0, -1) for group in graph.prunable}
        return cls(name, model, example, graph, SearchSpace.build(
            graph, importance, None, rounding=rounding, protect_first=False
        ))  # fmt: skip

    @property
    def steps(self) -> dict[str, int]:
        """Units that each group keeps a multiple of, unless it keeps everything."""
        ladders = zip(self.space.names, self.space.ladders, strict=True)
        return {
            name: int(np.gcd.reduce(ladder[:-1])) if len(ladder) > 1 else int(ladder[-1]) for name, ladder in ladders
        }

    def plans(self, n: int, seed: int) -> list[dict[str, int]]:
        """Random plans: a keep ratio for the network, and each group's within 0.3 of it."""
        generator = np.random.default_rng([_PLAN_SEED, seed])
        plans = []
        for _ in range(n):
            middle = generator.uniform(0.1, 0.9)
            counts = nearest(middle + generator.uniform(-0.3, 0.3, self.space.n), self.space)
            plans.append(dict(zip(self.space.names, counts.tolist(), strict=True)))
        return plans

    @cached_property
    def bits(self) -> tuple[LayerDecision, ...]:
        """The layers that a search can give 8 bits."""
        return layer_decisions(self.graph, ["bits"])

    def mixed(self, plan: Mapping[str, int], n: int, seed: int) -> list[dict[str, int]]:
        """A plan with bits for its layers, ``n`` times: all 8, runs of layers of one kind, and each layer by itself."""
        generator = np.random.default_rng([_MIXING_SEED, seed])
        mixes = []
        for index in range(n):
            # How often integers and floats follow each other, from never to as by chance.
            changes = (0.0, generator.uniform(0.05, 0.3), 0.5)[index % 3]
            is_changed = generator.random(len(self.bits)) < changes
            is_integer = (np.cumsum(is_changed) + (generator.integers(2) if changes else 0)) % 2 == 0
            if not is_integer.any():
                is_integer = ~is_integer  # without integers it would be no mix, and one is asked for
            levels = np.where(is_integer, INTEGER_BITS, FULL_BITS).tolist()
            mixes.append({**plan, **{one.name: level for one, level in zip(self.bits, levels, strict=True)}})
        return mixes

    def cost(self, table: LatencyTable, *, integers: bool) -> LatencyModel:
        """What the table predicts of plans, with bits or without."""
        return LatencyModel(self.graph, table, self.space.names, self.bits if integers else ())

    def policy(self, plan: Mapping[str, int]) -> CompressionPolicy:
        """The policy that keeps the first units of each group, and gives layers their bits."""
        channels = self.space.policy(np.array([plan[name] for name in self.space.names], dtype=np.int64))
        return replace(channels, layers=layer_policies(self.bits, plan, self.space.sparsity))

    def check_exports(self, *, integers: bool) -> None:
        """Export the dense network as it will be timed, so that one that cannot be is refused before its layers are.

        Raises:
            ExportError: if it cannot be exported.
        """
        _ = self.dense_onnx, self.dense_marked if integers else None

    @cached_property
    def dense_onnx(self) -> onnx.ModelProto:
        """The dense network, exported."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.onnx"
            export_onnx(self.model, self.example, path)
            return onnx.load(path)

    @cached_property
    def dense_marked(self) -> MarkedNetwork | None:
        """The dense network, exported so that layers of it can be made integers; None where it cannot be traced."""
        return export_marked(self.model, self.example)


def _with_random_statistics(model: nn.Module) -> nn.Module:
    """As training leaves them.

    A fresh batch norm shifts nothing, and the exporter would leave out the bias that a trained one has; of small
    tensors with the same values it would make one, which cannot have two lengths.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.01 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
    return model
