"""Which tensors of a traced network are quantized, so that integers flow from kernel to kernel in a runtime.

An integer kernel reads and writes integers. Between two of them nothing has to become a float if what stands between
keeps values on their grid (views, crops, max pooling), is absorbed by the kernel (batch norm, ReLU), or has an integer
kernel of its own (sums, concatenations).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_CLIPS: frozenset[Any] = frozenset(
    {nn.ReLU, nn.ReLU6, nn.Hardtanh, F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, torch.clamp, torch.clip}
    | {"relu", "relu_", "clamp", "clip"}
)
_KEEPING: frozenset[Any] = frozenset(
    {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d}
    | {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.dropout, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle}
    | {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze}
    | {torch.chunk, torch.split, "chunk", "split", "flatten", "reshape", "view", "permute", "transpose", "squeeze"}
    | {"unsqueeze", "contiguous", "expand"}
)
"""Operators whose outputs are some of their input's values, so that they leave a grid as it is."""
_PARTS: frozenset[Any] = frozenset({torch.chunk, torch.split, "chunk", "split"})
"""Operators that return several parts of their input."""
_JOINS: frozenset[Any] = frozenset(
    {operator.add, operator.iadd, torch.add, torch.cat, torch.concat, torch.concatenate, "add", "add_"}
)


def tensors_to_quantize(traced: fx.GraphModule, integer: set[str]) -> list[fx.Node]:
    """Nodes whose outputs are to be quantized for all that read them, in the order of the trace.

    These are: what an integer layer writes (after the batch norm and the ReLU that its kernel absorbs), unless it is
    an output of the network; what an integer layer reads; and what a sum or a concatenation of such tensors writes.

    Args:
        traced: symbolic trace with its layers as leaves.
        integer: qualified names of the layers that are to run in integers.
    """
    flow = _Flow(traced, integer)
    return flow.settle()


def source_of(node: fx.Node, modules: Mapping[str, nn.Module], among: Container[fx.Node] = ()) -> fx.Node:
    """The node whose values ``node`` hands on: the first one back that is ``among`` these, or computes new values."""
    while node not in among and keeps_values(node, modules):
        node = node.all_input_nodes[0]
    return node


def keeps_values(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the outputs are some of the input's values, often the same memory."""
    kind = kind_of(node, modules)
    if kind is operator.getitem:
        # An integer may choose from a tuple of anything, an LSTM's for one: only parts of one tensor have its grid.
        source, index = node.args
        assert isinstance(source, fx.Node)
        return not isinstance(index, int) or kind_of(source, modules) in _PARTS
    if kind is F.pad:
        mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", 0)
        return bool(mode != "constant" or not value)
    return kind in _KEEPING and bool(node.all_input_nodes)


def kind_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    """What the node computes: a module's class, a function, or the name of a method."""
    if node.op == "call_module":
        return type(modules[str(node.target)])
    return node.target if node.op in ("call_function", "call_method") else None


def is_join(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node is a sum or a concatenation."""
    return kind_of(node, modules) in _JOINS


class _Flow:
    def __init__(self, traced: fx.GraphModule, integer: set[str]) -> None:
        self._modules = dict(traced.named_modules(remove_duplicate=False))
        self._nodes = list(traced.graph.nodes)
        self._is_layer: Callable[[fx.Node], bool] = lambda node: node.op == "call_module" and node.target in integer
        self._chosen: set[fx.Node] = set()

    def settle(self) -> list[fx.Node]:
        """Add tensors until no rule asks for another one."""
        before = -1
        while before < len(self._chosen):
            before = len(self._chosen)
            for node in self._nodes:
                self._visit(node)
        return [node for node in self._nodes if node in self._chosen]

    def _visit(self, node: fx.Node) -> None:
        if self._is_layer(node):
            source = self._source(node.all_input_nodes[0])
            self._chosen.add(source)
            self._choose_end(node)
        elif is_join(node, self._modules):
            terms = node.all_input_nodes
            if len(terms) > 1 and all(self._source(term) in self._chosen for term in terms):
                self._choose_end(node)

    def _choose_end(self, node: fx.Node) -> None:
        """Choose the last node that one kernel computes, unless it is what the network returns."""
        if self._is_layer(node) and self._sole_reader(node, _BATCH_NORMS) is not None:
            node = next(iter(node.users))
        if (clip := self._sole_reader(node, _CLIPS)) is not None:
            node = clip
        if any(user.op != "output" for user in node.users):
            self._chosen.add(node)

    def _sole_reader(self, node: fx.Node, kinds: frozenset[Any]) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1:
            return None
        kind = kind_of(users[0], self._modules)
        return users[0] if kind in kinds else None

    def _source(self, node: fx.Node) -> fx.Node:
        return source_of(node, self._modules, self._chosen)


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


_BATCH_NORMS: frozenset[Any] = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
