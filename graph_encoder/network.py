"""What a captured network is: operators, the data flow between them, and the channel groups that bind their widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .errors import SecateurError

KINDS = (
    "input",
    "conv",
    "depthwise_conv",
    "linear",
    "matmul",
    "attention",
    "embedding",
    "add",
    "mul",
    "concat",
    "output",
    "group",
    "density",
    "weight_bits",
    "act_bits",
    "bits",
)
"""Kinds of node in the graph; those from ``group`` on are the decision nodes that an observation adds: one for each
channel group, one for each choice inside a layer."""


class TraceError(SecateurError, RuntimeError):
    """The network cannot be captured; the message names the module and the operator."""


class ForwardError(TraceError):
    """The forward pass stopped on its way.

    Attributes:
        modules: qualified names of the modules that were running, each inside the one before it; empty if it was the
            network itself.
        cause: what stopped it.
    """

    def __init__(
        self, modules: Sequence[str], cause: str, shapes: Sequence[tuple[int, ...]], *, on_values: bool = False
    ) -> None:
        """Make the message.

        Args:
            modules: as the attribute.
            cause: as the attribute.
            shapes: of the inputs.
            on_values: whether it stops on tensors with values too, which no reading of values explains.
        """
        self.modules = tuple(modules)
        self.cause = cause
        where = self.modules[-1] if self.modules else "the network itself"
        advice = (
            "The forward pass may not read the values of its activations (`.item()`, `if x.sum() > 0`) and must accept "
            f"inputs of the shapes {list(shapes)}; move what depends on values out of the network"
        )
        if on_values:
            advice = (
                f"The forward pass was given inputs of the shapes {list(shapes)}; their number and shapes must be "
                "those that it takes"
            )
        super().__init__(f"'{where}' cannot be captured: {cause}. {advice}")


@dataclass(frozen=True)
class Operator:
    """A weighted operator or a join, at one call.

    Attributes:
        name: unique; the qualified module name of a weighted operator (``"layer1.0.conv1"``), else the module
            and the kind (``"layer1.0.add"``), with ``#2``, ``#3`` for repeated calls.
        kind: one of `KINDS`.
        in_channels: channels read, of one image.
        out_channels: channels written, of one image.
        kernel: size of the kernel in each dimension of space, ``(1, 1)`` where there is none.
        stride: of the kernel, likewise.
        dilation: of the kernel, likewise.
        groups: convolution groups.
        out_size: size of the output in each dimension of space; tokens and 1 for a sequence, ``(1, 1)`` for a vector.
            An input of shape ``(N, C, L)`` is taken for a sequence.
        macs: multiply-adds for a batch of one.
        params: elements of the weight and the bias.
        weight: qualified name of the weight parameter, empty for a join.
        norm: qualified name of the batch norm that reads this operator's output directly, empty if none.
        layer_type: class name of the torch.nn layer whose ``weight`` this is, and no other layer's; else empty.
        is_called: whether that layer ran, and not a function that was given its weight.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    out_size: tuple[int, ...] = (1, 1)
    macs: int = 0
    params: int = 0
    weight: str = ""
    norm: str = ""
    layer_type: str = ""
    is_called: bool = False

    @property
    def layer(self) -> str:
        """Qualified name of the module that holds the weight, empty for a join and for the network itself."""
        return self.weight.rpartition(".")[0]


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group's units index.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dimension.
        role: ``"out"`` where the units are produced, ``"in"`` where they are read, ``"elementwise"`` where they
            pass through (batch norms, layer scales).
        indices: int64 of shape ``(size, k)``: the positions along ``dim`` that belong to each unit.
    """

    tensor: str
    dim: int
    role: str
    indices: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Units that the same tensors hold in the same way: the unit is what lives or dies, the group is what is decided.

    A unit is mostly one channel with everything that is bound to it: the same channel of the other branches of a
    residual sum, a head, a whole convolution group.

    Attributes:
        name: the layer that first produces it (``#2`` and so on where a layer produces several groups).
        size: number of units.
        members: every tensor dimension that the units index.
        producers: names of the operators that write the units.
        consumers: names of the operators that read them.
        reason: empty if units may be removed, else why the group is left dense.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    reason: str = ""

    @property
    def is_prunable(self) -> bool:
        """Whether units of the group may be removed."""
        return not self.reason


@dataclass(frozen=True)
class LinearDim:
    """The size of one dimension as a function of what is removed: ``full - sum(k * removed units of group g)``."""

    full: int
    per_unit: tuple[tuple[int, int], ...] = ()

    def size(self, removed: Mapping[int, int]) -> int:
        """Size after removing ``removed[g]`` units of the group with index ``g``."""
        return self.full - sum(k * removed.get(g, 0) for g, k in self.per_unit)


@dataclass(frozen=True)
class Term:
    """A product ``factor * dim * dim * ...``: the MACs of an operator, or the elements of a tensor."""

    owner: str
    factor: int
    dims: tuple[LinearDim, ...]

    def value(self, removed: Mapping[int, int]) -> int:
        """The product after removing ``removed[g]`` units of each group with index ``g``."""
        product = self.factor
        for dim in self.dims:
            product *= dim.size(removed)
        return product


@dataclass(frozen=True)
class HeldNumber:
    """A channel count that ``forward`` itself holds, to be rewritten in the symbolic trace of the module.

    Attributes:
        node: name of the node in the symbolic trace.
        argument: which number: a dimension of a view or an expand, an entry of a split or an unflatten, ``(dim, 0 or
            1)`` of a pad, the groups of a convolution.
        group: int64 of shape ``(positions,)``: index of the channel group at each position counted, -1 for none.
        unit: int64 of shape ``(positions,)``: the unit within that group.
        computed_by: the node that ``forward`` takes it from, the width of some tensor, which need not be of the same
            group; empty where it is written down.
        is_scaled: whether what ``forward`` computes follows the batch or the image size and no channels, as in
            ``view(batch * heads, ...)``, so that it is multiplied by the share that is left.
    """

    node: str
    argument: tuple[str, int, int]
    group: Tensor
    unit: Tensor
    computed_by: str = ""
    is_scaled: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether it counts no units, and stays."""
        return bool((self.group < 0).all())

    def value(self, kept: Mapping[int, Tensor]) -> int:
        """The number once only the units ``kept[g]`` (boolean, by group index) are left."""
        total = len(self.group)
        for g, is_kept in kept.items():
            here = self.group == g
            total -= int((~is_kept[self.unit[here]]).sum())
        return total


@dataclass(frozen=True)
class FixedNumber:
    """A number that ``forward`` computes from a width that may shrink, and that stays: ``x.shape[-1] // n_heads``.

    Attributes:
        node: name of the node in the symbolic trace that gives it.
        value: what it is in the dense network.
    """

    node: str
    value: float


@dataclass(frozen=True)
class NetworkGraph:
    """A network as the rest of the project sees it; holds no weights and no reference to the module.

    Attributes:
        operators: weighted operators and joins, in the order in which they ran.
        edges: pairs of operator indices, data flow with everything else contracted.
        groups: all channel groups, in the order in which they are produced.
        mac_terms: one term an operator that multiplies; their sum is the network's MACs for a batch of one.
        param_terms: one term a parameter tensor.
        skipped: layer name to the reason why (part of) its output is left dense; so are the opaque modules.
        rewrites: channel counts held by ``forward``; empty where slicing the module's tensors is enough.
        fixed: numbers that ``forward`` would compute otherwise at smaller widths.
        follows_mode: whether ``forward`` passes its training mode on to functions, where there are ``rewrites``.
        opaque: qualified names of the modules that could not be captured and stay as they are.
        whole: of those whose ``forward`` is called as it is where others are rewritten.
    """

    operators: tuple[Operator, ...]
    edges: tuple[tuple[int, int], ...]
    groups: tuple[ChannelGroup, ...]
    mac_terms: tuple[Term, ...]
    param_terms: tuple[Term, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    rewrites: tuple[HeldNumber, ...] = ()
    fixed: tuple[FixedNumber, ...] = ()
    follows_mode: bool = False
    opaque: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @cached_property
    def group_index(self) -> Mapping[str, int]:
        """Index in `groups` by group name."""
        return {group.name: index for index, group in enumerate(self.groups)}

    def group(self, name: str) -> ChannelGroup:
        """The group called ``name``; `KeyError` if there is none."""
        return self.groups[self.group_index[name]]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups whose units may be removed."""
        return tuple(group for group in self.groups if group.is_prunable)

    @cached_property
    def rewritten_groups(self) -> frozenset[int]:
        """Indices of the groups whose removal changes a number that ``forward`` holds."""
        return frozenset(int(g) for held in self.rewrites for g in torch.unique(held.group) if g >= 0)

    def is_rewritten(self, touched: Collection[int]) -> bool:
        """Whether a number that ``forward`` holds has to be rewritten once the groups of these indices lose units."""
        if not touched:
            return False
        is_computed = bool(self.fixed) or any(held.computed_by for held in self.rewrites)
        return is_computed or not self.rewritten_groups.isdisjoint(touched)

    def is_rewritten_as(self, other: NetworkGraph) -> bool:
        """Whether the same numbers are rewritten as in another graph of the same network."""
        mine, others = (
            {(held.node, held.argument, held.is_scaled) for held in graph.rewrites} for graph in (self, other)
        )
        return mine == others and self.fixed == other.fixed

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the dense network for a batch of one."""
        return sum(term.value({}) for term in self.mac_terms)

    @cached_property
    def params(self) -> int:
        """Elements of the dense network's parameters."""
        return sum(term.value({}) for term in self.param_terms)
