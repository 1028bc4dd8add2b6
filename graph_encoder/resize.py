"""Smaller widths: which positions go, what torch.nn layers note of their sizes, and a trial on shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .network import FixedNumber, ForwardError, HeldNumber, NetworkGraph, TraceError
from .opaque import Opaque
from .symbolic import ComputedNumbers, Place, TracedRun, rewrite
from .trace import LabelPass, Record

_LEAST = 2
"""Units that a trial leaves: one alone would pass for something that is broadcast, or be squeezed."""


@dataclass(frozen=True)
class Failure:
    """Where and why a network does not run at smaller widths."""

    module: str
    message: str


def removed_positions(graph: NetworkGraph, kept: Mapping[int, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Positions that go, by tensor and dimension.

    Args:
        graph: the captured network.
        kept: boolean of shape ``(size,)`` by group index; groups left out stay whole.

    Returns:
        int64 indices of the positions to remove, by tensor name and dimension.
    """
    removed: dict[str, dict[int, list[Tensor]]] = {}
    for index, is_kept in kept.items():
        for member in graph.groups[index].members:
            positions = member.indices[~is_kept].reshape(-1)
            if len(positions):
                removed.setdefault(member.tensor, {}).setdefault(member.dim, []).append(positions)
    return {tensor: {dim: torch.cat(parts) for dim, parts in dims.items()} for tensor, dims in removed.items()}


def slice_tensor(tensor: Tensor, removed: Mapping[int, Tensor]) -> Tensor:
    """A copy of ``tensor`` without the positions ``removed[dim]`` of each dimension."""
    for dim, positions in removed.items():
        is_kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
        is_kept[positions] = False
        tensor = tensor.index_select(dim, is_kept.nonzero()[:, 0].to(tensor.device))
    return tensor


def resize_attributes(module: nn.Module, old: Mapping[str, torch.Size]) -> dict[str, int]:
    """The sizes that a torch.nn layer notes beside its tensors, for the tensors it holds now.

    Args:
        module: a layer whose parameters and buffers have their new shapes.
        old: the shapes they had before, by name within the layer.

    Returns:
        New values by attribute name; empty for layers that note no size.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or "weight" not in old:
        return {}
    now, before = weight.shape, old["weight"]
    if isinstance(module, _ConvTransposeNd):
        groups = now[0] if module.groups == before[0] and before[1] == 1 else module.groups
        return {"in_channels": now[0], "out_channels": now[1] * groups, "groups": groups}
    if isinstance(module, _ConvNd):
        groups = module.groups
        # Input channels a group as before: whole convolution groups went, unless the layer is an ordinary one.
        if groups > 1 and now[1] == before[1] and groups >= before[1]:
            groups = now[0] * groups // before[0]
        return {"in_channels": now[1] * groups, "out_channels": now[0], "groups": groups}
    if isinstance(module, nn.Linear):
        return {"in_features": now[1], "out_features": now[0]}
    if isinstance(module, _NormBase):
        return {"num_features": now[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": now[0], "num_groups": now[0] * module.num_groups // before[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": now[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": now[0]}
    return {}


@dataclass(frozen=True)
class DenseRun:
    """The run on shapes that smaller widths are compared with.

    Attributes:
        inputs: meta tensors, batch first.
        opaque: the modules that stay as they are.
        record: what it left behind, with labels if it was made with them.
    """

    inputs: tuple[Tensor, ...]
    opaque: Opaque
    record: Record


def holds_smaller_widths(
    model: nn.Module, graph: NetworkGraph, dense: DenseRun, only: frozenset[int] | None = None
) -> Failure | None:
    """Try the forward pass, on shapes, with units of every offered group gone: of each another share, then all but two.

    Equal shares would let pass what binds two groups unseen, ``torch.split(y, y.shape[1] // 2, 1)`` for one, and other
    numbers what happens at equal ones alone, ``if x.shape == y.shape``, or below some width.

    Args:
        model: the captured module.
        graph: its graph.
        dense: the run of the network as it stands.
        only: indices of the groups to shrink; all offered ones by default.

    Returns:
        None if the same operators run, the outputs keep their shapes, every operator costs what the graph predicts, and
        channels are folded into several dimensions as they were; else the failure.
    """
    offered = {i: g.size for i, g in enumerate(graph.groups) if g.is_prunable and (only is None or i in only)}
    for counts in _trials(offered):
        kept = {index: torch.arange(offered[index]) >= count for index, count in counts.items()}
        if (failure := _try(model, graph, dense, kept)) is not None:
            return failure
    return None


def follow_computed_numbers(
    model: nn.Module,
    graph: NetworkGraph,
    dense: DenseRun,
    computed: ComputedPlaces,
    elsewhere: Callable[[], set[Place]],
) -> NetworkGraph:
    """The graph with as few numbers in place of those that ``forward`` computes as smaller widths need.

    A number holds for one batch and one image size: ``y.view(n * c, h * w)``. What is right at smaller widths, too,
    stays as it is; what follows no width is scaled; what follows a wrong one gets a number, unless it follows the batch
    or the image size, too.

    Args:
        model: the captured module.
        graph: its graph, all of whose held numbers are to be rewritten.
        dense: the run of the network as it stands.
        computed: what ``forward`` computes.
        elsewhere: gives those of them that are others for other inputs, `ComputedPlaces.following`.
    """
    sizes, numbers = computed.sizes, computed.numbers
    found: dict[Place, set[float]] = {}
    units = {index: group.size for index, group in enumerate(graph.groups) if group.is_prunable}
    for counts in _trials(units) if sizes or numbers else ():
        kept = {index: torch.arange(units[index]) >= count for index, count in counts.items()}
        traced = rewrite(model, replace(graph, rewrites=computed.others), kept)
        with _resized(traced, _shrunk_by(graph, counts)):
            wrong = computed.wrong(model, traced, dense, dense.inputs, kept)
        for place, value in wrong.items():
            found.setdefault(place, set()).add(value)
    follows_none = {
        place for place, each in found.items() if isinstance(place, tuple) and each == {sizes[place].value({})}
    }
    if found.keys() - follows_none:
        found = {place: each for place, each in found.items() if place in follows_none or place not in elsewhere()}
    needed = [replace(sizes[at], is_scaled=at in follows_none) for at in found if isinstance(at, tuple)]
    fixed = [FixedNumber(at, numbers[at]) for at in found if isinstance(at, str)]
    return replace(graph, rewrites=(*computed.others, *needed), fixed=tuple(fixed))


@dataclass(frozen=True)
class ComputedPlaces:
    """The numbers that ``forward`` computes, and that smaller widths may make wrong.

    Attributes:
        sizes: of views, by node and dimension.
        numbers: that have to stay, by the node that gives them.
        others: held numbers that are rewritten in any case.
    """

    sizes: Mapping[tuple[str, int], HeldNumber]
    numbers: Mapping[str, float]
    others: tuple[HeldNumber, ...]

    @classmethod
    def of(cls, rewrites: Sequence[HeldNumber], factors: Mapping[str, float]) -> ComputedPlaces:
        """Sort held numbers, and ``factors`` that have to stay, by the node of the trace that gives them."""
        sizes = {(held.node, held.argument[1]): held for held in rewrites if _is_computed_size(held)}
        # A number that stays is set where it comes from: ``d = width // heads`` is a size here, and a scale there.
        shrinking = {held.computed_by for held in rewrites if not held.is_fixed}
        # The first part of a split: the last may be what is left.
        fixed = [held for held in reversed(rewrites) if held.computed_by and held.is_fixed]
        stays = {held.computed_by: held.value({}) for held in fixed}
        numbers = {node: value for node, value in {**stays, **factors}.items() if node not in shrinking}
        return cls(
            {place: held for place, held in sizes.items() if held.computed_by not in numbers},
            numbers,
            tuple(held for held in rewrites if not _is_computed_size(held)),
        )

    def wrong(
        self,
        model: nn.Module,
        traced: fx.GraphModule,
        dense: DenseRun,
        inputs: tuple[Tensor, ...],
        kept: Mapping[int, Tensor],
    ) -> dict[Place, float]:
        """What a trace with what is ``kept`` computes in place of what should be, as far as it runs."""
        labels = LabelPass(model, dense.opaque, with_labels=False)
        sizes = {place: held.value(kept) for place, held in self.sizes.items()}
        run = ComputedNumbers(traced, labels, sizes, self.numbers, sets_right=bool(kept))
        # What stops it is found when the graph is tried.
        with suppress(TraceError):
            labels.run(run.run, inputs)
        return run.wrong

    def following(self, model: nn.Module, traced: fx.GraphModule, dense: DenseRun) -> set[Place]:
        """Those that are others for other batches and image sizes, as far as the network takes these."""
        return set().union(*(self.wrong(model, traced, dense, inputs, {}) for inputs in _other_inputs(dense.inputs)))


def _is_computed_size(held: HeldNumber) -> bool:
    return bool(held.computed_by) and held.argument[0] == "size"


def _other_inputs(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of a longer batch, and of twice the size in each dimension and in all of space; not all need be taken."""
    yield tuple(x.new_empty((x.shape[0] + 1, *x.shape[1:])) if x.dim() else x for x in inputs)
    last = max(x.dim() for x in inputs)
    every = set(range(len(inputs)))
    changes = [*((every, {dim}) for dim in range(last)), (every, set(range(2, last)))]
    if len(inputs) > 1:
        changes += [({index}, {dim}) for index in every for dim in range(1, inputs[index].dim())]
    for changed, dims in changes:
        yield tuple(
            x.new_empty([2 * size if index in changed and dim in dims else size for dim, size in enumerate(x.shape)])
            for index, x in enumerate(inputs)
        )


def _trials(sizes: Mapping[int, int]) -> list[dict[int, int]]:
    """Units that go of each group, by its index: a fifth to seven tenths, and of groups of one size as many others.

    Where there are more groups of a size than such numbers, a second trial tells apart those that have the same. The
    last trial leaves as many units of each group.
    """
    alike: dict[int, list[int]] = {}
    for index, size in sizes.items():
        alike.setdefault(size, []).append(index)
    trials: list[dict[int, int]] = [{}, {}]
    for rank, (size, indices) in enumerate(alike.items()):
        least = min(max(round(0.2 * size), 1), size - 1)
        numbers = range(least, max(round(0.7 * size), least + 1))
        # Of other sizes from the other end: two shares alike would hide that one follows from the other.
        numbers = numbers[::-1] if rank % 2 else numbers
        # Spread, so that neighbours are far from each other.
        step = max(len(numbers) // min(len(indices), len(numbers)), 1)
        for place, index in enumerate(indices):
            trials[0][index] = numbers[place * step % len(numbers)]
            trials[1][index] = numbers[place * step // len(numbers) % len(numbers)]
    is_told_apart = all(len({trials[0][index] for index in indices}) in (len(indices), 1) for indices in alike.values())
    equal = {index: max(size - _LEAST, 0) for index, size in sizes.items()}
    return [*(trials[:1] if is_told_apart else trials), equal]


def _try(model: nn.Module, graph: NetworkGraph, dense: DenseRun, kept: Mapping[int, Tensor]) -> Failure | None:
    """The forward pass, on shapes, with what is ``kept`` of the groups of these indices."""
    counts = {g: int((~is_kept).sum()) for g, is_kept in kept.items()}
    try:
        traced = rewrite(model, graph, kept) if graph.is_rewritten(kept.keys()) else None
        with _resized(model if traced is None else traced, _shrunk_by(graph, counts)):
            # Names come from the model, whose modules a rewritten copy shares.
            run = LabelPass(model, dense.opaque, with_labels=False)
            run.run(model if traced is None else TracedRun(traced, run).run, dense.inputs)
    except ForwardError as error:
        return Failure(error.modules[-1] if error.modules else "", error.cause)
    except TraceError as error:
        return Failure("", str(error))
    if (changed := another_way(dense.record, run.record)) is not None:
        return changed
    if (changed := _other_factor(model, dense, run.record)) is not None:
        return changed
    found = run.record.output_shapes
    if found != dense.record.output_shapes:
        message = f"with fewer channels its outputs have shapes {found} instead of {dense.record.output_shapes}"
        return Failure("", message)
    macs = {operator.name: operator.macs for operator in run.record.operators}
    for term in graph.mac_terms:
        if macs.get(term.owner) != term.value(counts):
            message = f"with fewer channels it costs {macs.get(term.owner)} MACs instead of {term.value(counts)}"
            return Failure(term.owner.partition("#")[0], message)
    if not dense.record.folds:
        return None
    return _folded_otherwise(dense.record, run.record, removed_positions(graph, kept))


def another_way(dense: Record, small: Record) -> Failure | None:
    """The first operator that is another one than in the dense network, or reads others.

    ``if x.shape == y.shape`` takes another way where widths that were different are equal.
    """
    for expected, found in zip_longest(_steps(dense), _steps(small)):
        if expected != found:
            name, kind, _ = found or expected or ("", "", ())
            message = f"with fewer channels it computes something else (first at '{name}', {kind}): it asks for a width"
            return Failure(name.partition("#")[0], message)
    return None


def _other_factor(model: nn.Module, dense: DenseRun, small: Record) -> Failure | None:
    """The first number that activations meet and that is another one than in the dense network."""
    pairs = zip(dense.record.factors, small.factors, strict=False)
    changed = [place for place, (expected, found) in enumerate(pairs) if str(expected) != str(found)]
    if not changed:
        return None
    # What is drawn is another one each time.
    again = LabelPass(model, dense.opaque, with_labels=False)
    again.run(model, dense.inputs)
    for place in changed:
        expected, found = dense.record.factors[place], small.factors[place]
        if str(expected) == str(again.record.factors[place]):
            numbers = [", ".join(f"{number:g}" for number in each.numbers) for each in (found, expected)]
            message = f"with fewer channels it computes {numbers[0]} in place of {numbers[1]} (for {found.operator})"
            return Failure(expected.module, message)
    return None


def _steps(record: Record) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name and kind of each operator, and the places of those that it reads."""
    sources: list[list[int]] = [[] for _ in record.operators]
    for source, target in record.edges:
        sources[target].append(source)
    steps = zip(record.operators, sources, strict=True)
    return [(operator.name, operator.kind, tuple(sorted(read))) for operator, read in steps]


def _shrunk_by(graph: NetworkGraph, counts: Mapping[int, int]) -> dict[str, dict[int, int]]:
    """By how many positions each dimension of each tensor shrinks where so many units of these groups go."""
    shrunk: dict[str, dict[int, int]] = {}
    for index, count in counts.items():
        for member in graph.groups[index].members if count else ():
            dims = shrunk.setdefault(member.tensor, {})
            dims[member.dim] = dims.get(member.dim, 0) + count * member.indices.shape[1]
    return shrunk


def _folded_otherwise(dense: Record, small: Record, removed: Mapping[str, Mapping[int, Tensor]]) -> Failure | None:
    """The first view that folds channels into several dimensions of other sizes than those of what is left.

    The network runs and costs the same all the same: ``x.view(n, 4, -1, h, w)`` holds at any width, and gives fewer
    channels to each of four heads where two of the heads are gone.
    """
    gone = np.concatenate(
        [np.zeros(0, dtype=np.int64)]
        + [
            dense.classes.find(dense.axes[tensor, dim].labels.reshape(-1)[positions].numpy())
            for tensor, dims in removed.items()
            for dim, positions in dims.items()
        ]
    )
    for fold in dense.folds:
        labels = fold.labels.numpy()
        is_left = ~np.isin(dense.classes.find(labels.reshape(-1)), gone).reshape(labels.shape)
        dims = [dim for dim, size in enumerate(labels.shape) if size > 1]
        left = [int(is_left.any(axis=tuple(d for d in range(is_left.ndim) if d != dim)).sum()) for dim in dims]
        found = small.views[fold.view] if fold.view < len(small.views) else ()
        if len(found) != labels.ndim or [found[dim] for dim in dims] != left:
            message = f"with fewer channels it views them as {found}, where {left} are left of {list(labels.shape)}"
            return Failure(fold.module, message)
    return None


@contextmanager
def _resized(module: nn.Module, shrunk_by: Mapping[str, Mapping[int, int]]) -> Iterator[None]:
    """Put meta tensors of the new shapes in place of the touched parameters and buffers, and put the old ones back."""
    layers = list(module.named_modules())
    shrunk: dict[int, Tensor] = {}
    for prefix, layer in layers:
        for own, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is None or id(tensor) in shrunk:
                continue
            dims = shrunk_by.get(f"{prefix}.{own}" if prefix else own)
            if dims is not None:
                shape = list(tensor.shape)
                for dim, count in dims.items():
                    shape[dim] -= count
                meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                shrunk[id(tensor)] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for _, layer in layers:
            old = {}
            stores: list[dict[str, Any]] = [layer._parameters, layer._buffers]
            for store in stores:
                for name, tensor in store.items():
                    if id(tensor) in shrunk:
                        old[name] = tensor.shape
                        undo.append((store, name, tensor))
                        store[name] = shrunk[id(tensor)]
            for attribute, value in (resize_attributes(layer, old) if old else {}).items():
                undo.append((layer.__dict__, attribute, layer.__dict__[attribute]))
                layer.__dict__[attribute] = value
        yield
    finally:
        for store, name, original in reversed(undo):
            store[name] = original
