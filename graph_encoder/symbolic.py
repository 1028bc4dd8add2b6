"""Numbers that ``forward`` itself holds (a pad, a view, a split): found in the symbolic trace, and rewritten there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .labels import compact, varying_dims
from .modes import evaluation_mode
from .network import HeldNumber, NetworkGraph, TraceError
from .trace import Held, LabelPass

_VIEWS = ("view", "reshape", "expand")


def symbolic_trace(model: nn.Module) -> fx.GraphModule | None:
    """The symbolic trace of ``model`` with torch.nn layers as leaves, sharing its tensors.

    Returns:
        None if the forward pass cannot be traced, or does different things in training and in evaluation: a trace
        freezes one of them.
    """
    try:
        with evaluation_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = fx.symbolic_trace(model)
            model.train()
            training = fx.symbolic_trace(model)
    except Exception:  # a Python forward can fail on proxies in any way; the caller falls back
        return None
    return traced if str(training.graph) == str(traced.graph) else None


class SymbolicRun(fx.Interpreter):
    """Runs the trace under a label pass and keeps the labels of every node that may hold a channel count."""

    def __init__(self, traced: fx.GraphModule, labels: LabelPass) -> None:
        super().__init__(traced)
        self._labels = labels
        self._seen: list[Held] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it may hold."""
        result = super().run_node(n)
        holder = _holder(n)
        outputs = result if isinstance(result, tuple | list) else [result]
        if holder is not None:
            for position, output in enumerate(outputs):
                labels = self._labels.labels_of(output) if isinstance(output, Tensor) else None
                if labels is not None:
                    self._seen.extend(_numbers(n, holder, labels, position, len(outputs)))
        return result

    def held_numbers(self) -> list[Held]:
        """Labels counted by each number, in the order of the trace."""
        return self._seen


def _holder(node: fx.Node) -> str | None:
    if node.op == "call_method" and node.target in _VIEWS:
        return "size"
    if node.op == "call_function" and node.target is torch.reshape:
        return "size"
    if node.op == "call_function" and node.target in (functional.pad, torch.nn.functional.pad):
        return "pad"
    if (node.op == "call_method" and node.target == "split") or node.target is torch.split:
        return "split"
    return None


def _numbers(node: fx.Node, holder: str, labels: Tensor, position: int, n_outputs: int) -> list[Held]:
    compacted = compact(labels)
    if holder == "size":
        return [Held(node.name, ("size", dim, labels.dim()), compacted.movedim(dim, 0)) for dim in varying_dims(labels)]
    if holder == "split":
        dim = int(node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)) % labels.dim()  # type: ignore
        return [Held(node.name, ("split", position, n_outputs), compacted.movedim(dim, 0))]
    pads = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
    held = []
    for index, count in enumerate(pads):  # type: ignore[arg-type]
        dim = labels.dim() - 1 - index // 2
        if isinstance(count, int) and count > 0 and dim in varying_dims(labels):
            rows = compacted.movedim(dim, 0)
            held.append(Held(node.name, ("pad", index, 0), rows[:count] if index % 2 == 0 else rows[-count:]))
    return held


def rewrite(model: nn.Module, graph: NetworkGraph, kept: Mapping[int, Tensor]) -> fx.GraphModule:
    """The symbolic trace of ``model`` with its held numbers set to what is left.

    Args:
        model: the captured module; the trace shares its tensors.
        graph: its graph.
        kept: boolean of shape ``(size,)`` by group index.

    Raises:
        TraceError: if the module can no longer be traced as it was when it was captured.
    """
    traced = symbolic_trace(model)
    if traced is None:
        msg = "the network could be traced when it was captured and cannot be traced now; pass the network as captured"
        raise TraceError(msg)
    nodes = {node.name: node for node in traced.graph.nodes}
    for held in graph.rewrites:
        if held.node not in nodes:
            msg = f"the trace of the network has no node '{held.node}'; capture the network again"
            raise TraceError(msg)
        _set_number(nodes[held.node], held, held.value(kept))
    traced.recompile()
    return traced


def _set_number(node: fx.Node, held: HeldNumber, value: int) -> None:
    what, index, count = held.argument
    if what == "pad":
        pads = list(node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ()))  # type: ignore[arg-type]
        pads[index] = value
        _set_argument(node, 1, "pad", tuple(pads))
    elif what == "split":
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("split_size_or_sections")
        sizes = list(given) if isinstance(given, tuple | list) else [0] * count  # type: ignore[arg-type]
        sizes[index] = value
        _set_argument(node, 1, "split_size_or_sections", sizes)
    else:
        nested = len(node.args) == 2 and isinstance(node.args[1], tuple | list)
        sizes = list(node.args[1]) if nested else list(node.args[1:])  # type: ignore[arg-type]
        if sizes[index] != -1:
            sizes[index] = value
        node.args = (node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)


def _set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    if len(node.args) > position:
        args = list(node.args)
        args[position] = value
        node.args = tuple(args)
    else:
        node.kwargs = {**node.kwargs, name: value}
