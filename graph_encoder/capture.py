"""model -> graph: run the network once with labels, then read operators, data flow and channel groups off the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .batches import inputs_of
from .groups import assemble
from .modes import attributes_kept, evaluation_mode
from .network import ForwardError, NetworkGraph, Operator, TraceError
from .opaque import Opaque
from .real_run import record_calls
from .resize import ComputedPlaces, DenseRun, Failure, another_way, follow_computed_numbers, holds_smaller_widths
from .symbolic import Place, SymbolicRun, follows_mode, trace_around
from .trace import LabelPass, batch_of_two


def capture(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> NetworkGraph:
    """Capture ``model`` as a graph of operators and channel groups.

    The module runs once on meta tensors: nothing is computed, and the module is left as it was. A group is offered
    for pruning only if the forward pass holds at smaller widths, which is tried out, on shapes, before it is said.

    A sub-module that cannot run without values stays as it is, and so do the channels that it reads and writes: the
    innermost that fails, or the one around it where that does not help. What it returns and costs is taken from two
    runs of a copy of the network on random inputs; `NetworkGraph.opaque` names it and `NetworkGraph.skipped` says why.

    Args:
        model: the network; any `nn.Module`.
        example_inputs: the positional inputs of ``forward``, batch first. Only shapes and dtypes are read, and values
            of integers where a sub-module needs values; a batch of one is taken as two, because a dimension of size
            one hides what is broadcast.

    Returns:
        The graph; `NetworkGraph.groups` holds every channel group, offered or not, each with its reason.

    Raises:
        TraceError: if the example inputs are no tensors; if a module was compiled by `torch.jit`, or a lazy layer has
            no size yet, naming it; or if the network's own forward pass cannot run without values, or not at all,
            naming the module that failed first and what stopped it.
    """
    inputs = example_tensors(example_inputs)
    _check_not_scripted(model)
    _check_initialized(model)
    with attributes_kept(model), evaluation_mode(model):
        return _capture(model, inputs)


def _check_not_scripted(model: nn.Module) -> None:
    """Refuse what `torch.jit` compiled: its modules cannot be copied with smaller tensors."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            msg = (
                f"'{name or 'the network'}' was compiled by torch.jit (it is a {type(module).__name__}), so that its "
                "layers cannot be made smaller; pass the nn.Module that was scripted or traced, with its weights loaded"
            )
            raise TraceError(msg)


def _check_initialized(model: nn.Module) -> None:
    """Refuse lazy layers that have no size yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            msg = f"'{name}' has no size before a first call; call the network once on an example, then pass it"
            raise TraceError(msg)


def example_tensors(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The positional inputs of ``forward`` that are given as examples.

    Raises:
        TraceError: if there are none, or something else than tensors is among them.
    """
    todo = "pass a tensor, or a tuple of the tensors that forward takes, batch first"
    if not isinstance(example_inputs, Tensor | Sequence):
        msg = f"the example inputs are an object of class '{type(example_inputs).__name__}'; {todo}"
        raise TraceError(msg)
    inputs = inputs_of(example_inputs)
    for position, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            msg = f"example input {position} is an object of class '{type(value).__name__}'; {todo}"
            raise TraceError(msg)
    if not inputs:
        msg = f"no example input was given; {todo}"
        raise TraceError(msg)
    return inputs


def _capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> NetworkGraph:
    run, dense = _run(model, inputs, with_labels=True)
    graph = assemble(run.record, model, dense.opaque)
    if holds_smaller_widths(model, graph, dense) is None:
        return graph
    found = trace_around(model, graph.opaque)
    if found is not None:
        rewritten = _with_rewrites(*found, model, dense)
        if rewritten is not None:
            return rewritten
    return _freeze_what_does_not_hold(model, graph, dense, lambda graph: graph)


def _run(model: nn.Module, inputs: tuple[Tensor, ...], *, with_labels: bool) -> tuple[LabelPass, DenseRun]:
    """Run ``model`` on shapes, with those of its modules left out that cannot run on shapes."""
    metas = tuple(batch_of_two(x) for x in inputs)
    run = LabelPass(model, with_labels=with_labels)
    try:
        run.run(model, metas)
        opaque = Opaque()
    except ForwardError as error:
        run, opaque = _run_around(model, inputs, metas, error, with_labels=with_labels)
    return run, DenseRun(metas, opaque, run.record)


def _run_around(
    model: nn.Module, inputs: tuple[Tensor, ...], metas: tuple[Tensor, ...], first: ForwardError, *, with_labels: bool
) -> tuple[LabelPass, Opaque]:
    """Make one module after the other opaque until ``model`` runs on shapes; raises ``first`` where it never does."""
    try:
        opaque = Opaque(calls=record_calls(model, inputs))
    except ForwardError:
        shapes = [tuple(each.shape) for each in inputs]
        raise ForwardError(first.modules, first.cause, shapes, on_values=True) from None
    except Exception:  # a network that does not run on values either has another fault, which its first failure tells
        raise first from None
    failure = first
    while True:
        module = next((name for name in reversed(failure.modules) if name not in opaque.causes), None)
        if module is None:
            raise first
        is_inside = failure.modules[-1] != module
        opaque = opaque.around(module, f"'{failure.modules[-1]}': {failure.cause}" if is_inside else failure.cause)
        run = LabelPass(model, opaque, with_labels=with_labels)
        try:
            run.run(model, metas)
        except ForwardError as error:
            failure = error
        else:
            return run, opaque


def _with_rewrites(
    traced: fx.GraphModule, whole: tuple[str, ...], model: nn.Module, dense: DenseRun
) -> NetworkGraph | None:
    """The graph of the symbolic trace, whose held numbers can be rewritten; None if it does not run as the model."""
    # The trace holds the model's own tensors in another order; names come from the model, or tied ones get two.
    run = LabelPass(model, dense.opaque)
    nodes = SymbolicRun(traced, run)
    try:
        run.run(nodes.run, dense.inputs)
    except TraceError:
        return None
    run.record.held = nodes.held_numbers()
    is_alike = run.record.output_shapes == dense.record.output_shapes and not another_way(dense.record, run.record)
    if not (run.record.held or nodes.factors) or not is_alike:
        return None
    graph = assemble(run.record, model, dense.opaque)
    graph = replace(graph, whole=whole, follows_mode=follows_mode(traced))
    dense = replace(dense, record=run.record)

    computed = ComputedPlaces.of(graph.rewrites, nodes.factors)

    # They depend on the network, and not on the groups that are kept dense in the meantime.
    @cache
    def elsewhere() -> set[Place]:
        return computed.following(model, traced, dense)

    def followed(graph: NetworkGraph) -> NetworkGraph:
        return follow_computed_numbers(model, graph, dense, computed, elsewhere)

    return _freeze_what_does_not_hold(model, graph, dense, followed)


def _freeze_what_does_not_hold(
    model: nn.Module, graph: NetworkGraph, dense: DenseRun, followed: Callable[[NetworkGraph], NetworkGraph]
) -> NetworkGraph:
    """Keep dense, by name, the groups without which the rest of the network holds at smaller widths.

    Args:
        model: the captured module.
        graph: its graph.
        dense: the run of the network as it stands.
        followed: gives a graph the numbers that ``forward`` computes wrongly without, as far as a run at smaller widths
            comes.
    """
    tried = rewritten = followed(graph)

    # Once each: it makes no difference which of the others are kept dense in the meantime.
    @cache
    def failure_of(groups: frozenset[int]) -> Failure | None:
        return holds_smaller_widths(model, tried, dense, groups)

    while (failure := holds_smaller_widths(model, rewritten, dense)) is not None:
        culprits = _culprits(model, graph, failure, failure_of)
        if not culprits:
            msg = (
                f"'{failure.module or 'the network'}' does not run the same way twice ({failure.message}); "
                f"a network is captured by its operators, so make forward deterministic in evaluation mode"
            )
            raise TraceError(msg)
        groups = [
            replace(group, reason=_held_count(culprits[index])) if index in culprits else group
            for index, group in enumerate(graph.groups)
        ]
        skipped = {name: groups[index].reason for index in culprits for name in groups[index].producers}
        graph = replace(graph, groups=tuple(groups), skipped={**graph.skipped, **skipped})
        rewritten = followed(graph)
        if not rewritten.is_rewritten_as(tried):
            tried = rewritten
            failure_of.cache_clear()
    return rewritten


def _held_count(failure: Failure) -> str:
    return f"forward of '{failure.module or 'the network'}' holds a channel count: {failure.message}"


def _culprits(
    model: nn.Module, graph: NetworkGraph, failure: Failure, failure_of: Callable[[frozenset[int]], Failure | None]
) -> dict[int, Failure]:
    """Groups to blame for a failure, each with its own: how the network fails where that group alone is smaller.

    They are the groups bound in the module that failed, or the nearest around it, that fail alone, and what other
    modules of its class produce at the same places and fails alone too; where there are none, the first that fails.
    """

    def alone(indices: Iterable[int]) -> dict[int, Failure]:
        return {index: own for index in indices if (own := failure_of(frozenset({index}))) is not None}

    module = failure.module
    offered = [index for index, group in enumerate(graph.groups) if group.is_prunable]
    while module:
        guilty = alone(i for i in offered if any(m.tensor.startswith(f"{module}.") for m in graph.groups[i].members))
        if guilty:
            return guilty | alone(_alike(model, graph, module, guilty))
        module = module.rpartition(".")[0]
    # The last of the fewest first groups that fail: it takes part in the failure, though others may be needed for it.
    n_holding, n_failing = 0, len(offered)
    while n_failing - n_holding > 1:
        middle = (n_holding + n_failing) // 2
        if failure_of(frozenset(offered[:middle])) is not None:
            n_failing = middle
        else:
            n_holding = middle
    first, last = frozenset(offered[:n_failing]), offered[n_failing - 1 : n_failing]
    return {index: failure_of(frozenset({index})) or failure_of(first) or failure for index in last}


def _alike(model: nn.Module, graph: NetworkGraph, module: str, culprits: Collection[int]) -> set[int]:
    """Offered groups that other modules of the same class produce at the same place: they may hold a number as well.

    Layers of torch.nn hold none: they fail at what they are given.
    """
    kind = type(model.get_submodule(module))
    if kind.__module__.startswith("torch.nn."):
        return set()
    others = [name for name, other in model.named_modules() if type(other) is kind and name != module]
    places = {
        member.tensor.removeprefix(module)
        for index in culprits
        for member in graph.groups[index].members
        if member.role == "out" and member.tensor.startswith(f"{module}.")
    }
    blamed = {name + place for name in others for place in places}
    return {
        index
        for index, group in enumerate(graph.groups)
        if group.is_prunable and any(m.role == "out" and m.tensor in blamed for m in group.members)
    }


def trace_operators(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> list[Operator]:
    """Operators of ``model`` as it stands, with their MACs for a batch of one, without labels or groups.

    Args:
        model: the network.
        example_inputs: as for `capture`.

    Raises:
        TraceError: if the forward pass cannot run without values.
    """
    with attributes_kept(model), evaluation_mode(model):
        run, _ = _run(model, example_tensors(example_inputs), with_labels=False)
    return run.record.operators
