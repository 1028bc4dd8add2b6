"""Where integers and floats meet in a network that has layers of both, as a runtime of integer kernels computes it.

It is the rule of `pruning.integer_flow` on a captured graph, where everything between two operators is contracted: what
stands there is taken to keep values on their grid or to be absorbed by a kernel, but for a mean over positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from graph_encoder.network import LinearDim, NetworkGraph, Operator

_JOINS = ("add", "concat")
_MERGING = (*_JOINS, "mul")


class State(NamedTuple):
    """How an operator is computed.

    Attributes:
        in_integers: by an integer kernel.
        conversions: of what it writes: 1 if that is quantized behind a kernel of floats, and 1 for each kernel of
            floats that reads it where it is in integers.
        transpositions: of what it reads and writes, taken as of what it writes.
    """

    in_integers: bool
    conversions: int
    transpositions: int = 0

    @property
    def passes(self) -> int:
        """Times that memory is read and written for what no kernel computes."""
        return self.conversions + self.transpositions


class IntegerFlow:
    """Which operators of a network run in integers, and what they write is converted, given the layers' bits.

    A tensor is in integers if an integer layer reads or writes it, or if it is the sum or the concatenation of such
    tensors; what only leaves the network is not, and only a linear layer has an integer kernel that writes floats. A
    join runs in integers if all its terms and its result are; so does a layer of floats between two tensors in
    integers, whose weight ONNX Runtime quantizes by itself. A convolution that it quantizes so may be left in another
    layout than the integer layers around it, and what it reads and writes is taken to be transposed.

    Attributes:
        channels: that each operator writes.
        positions: of each channel that it writes.
    """

    def __init__(self, graph: NetworkGraph) -> None:
        """Read the operators and their edges."""
        operators = graph.operators
        readers: list[list[int]] = [[] for _ in operators]
        sources: list[list[int]] = [[] for _ in operators]
        # A mean is a kernel of floats between two operators: what it writes is too small to count.
        means: list[int] = []
        for source, reader in graph.edges:
            if _is_mean_between(operators[source], operators[reader]):
                means.append(source)
                continue
            readers[source].append(reader)
            sources[reader].append(source)
        self._readers = [tuple(each) for each in readers]
        self._sources = [tuple(each) for each in sources]
        self._n_means = [means.count(index) for index in range(len(operators))]
        self._is_layer = [bool(operator.weight) for operator in operators]
        self._is_linear = [operator.kind == "linear" for operator in operators]
        self._is_join = [
            operator.kind in _JOINS and len(each) > 1 for operator, each in zip(operators, sources, strict=True)
        ]
        self._is_read = [
            index in means or any(operators[reader].kind != "output" for reader in each)
            for index, each in enumerate(readers)
        ]
        self.channels = _channels(graph, self._sources)
        self.positions = tuple(math.prod(operator.out_size) for operator in operators)

    def states(self, integer: Sequence[bool]) -> list[State]:
        """The state of each operator.

        Args:
            integer: whether each operator is a layer of 8 bits, in the graph's order.
        """
        held: list[bool] = []
        for index, (sources, readers) in enumerate(zip(self._sources, self._readers, strict=True)):
            held.append(
                self._is_read[index]
                and (
                    integer[index]
                    or any(integer[reader] for reader in readers)
                    or (self._is_join[index] and all(held[source] for source in sources))
                )
            )
        runs = [
            (integer[index] and (held[index] or self._is_linear[index]))
            or (
                held[index]
                and (self._is_join[index] or self._is_layer[index])
                and bool(sources)
                and all(held[source] for source in sources)
            )
            for index, sources in enumerate(self._sources)
        ]
        return [
            State(
                runs[index],
                held[index] * ((not runs[index]) + self._n_means[index] + sum(not runs[reader] for reader in readers)),
                2 * (runs[index] and self._is_layer[index] and not integer[index] and not self._is_linear[index]),
            )
            for index, readers in enumerate(self._readers)
        ]


def _is_mean_between(source: Operator, reader: Operator) -> bool:
    """Whether a linear layer reads one number a channel of what has several positions."""
    is_pooled = math.prod(reader.out_size) < math.prod(source.out_size)
    return reader.kind == "linear" and is_pooled and reader.in_channels == source.out_channels


def _channels(graph: NetworkGraph, sources: Sequence[Sequence[int]]) -> tuple[LinearDim, ...]:
    """Channels that each operator writes; whole where nothing says how they shrink."""
    of_layers = {term.owner: term.dims[0] for term in graph.mac_terms if term.dims}
    found: list[LinearDim] = []
    for operator, read in zip(graph.operators, sources, strict=True):
        dims = [found[source] for source in read]
        known = of_layers.get(operator.name) if operator.weight else None
        if operator.kind == "concat":
            known = _sum(dims)
        elif operator.kind in _MERGING and dims:
            known = max(dims, key=lambda dim: dim.full)
        whole = LinearDim(operator.out_channels)
        found.append(known if known is not None and known.full == whole.full else whole)
    return tuple(found)


def _sum(dims: Sequence[LinearDim]) -> LinearDim:
    per_unit: dict[int, int] = {}
    for dim in dims:
        for group, channels in dim.per_unit:
            per_unit[group] = per_unit.get(group, 0) + channels
    return LinearDim(sum(dim.full for dim in dims), tuple(sorted(per_unit.items())))
