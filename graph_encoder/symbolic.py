"""Numbers that ``forward`` itself holds (a pad, a view, a split): found in the symbolic trace, and rewritten there."""

from __future__ import annotations

import builtins
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .copies import FORWARD_HOOKS
from .labels import CONSTANT, compact, varying_dims
from .modes import attributes_kept, evaluation_mode
from .network import HeldNumber, NetworkGraph, TraceError
from .randomness import have_drawn, random_states
from .trace import Held, LabelPass, is_number

Place = tuple[str, int] | str
"""Of a number in a trace: a dimension of a view, by its node, or the node that gives the number."""

_MODE = "training"
_VIEWS = ("view", "reshape", "expand")
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_GROUPS_AT = 6
"""Place of the groups among the arguments of a convolution."""


class _Untraceable(Exception):
    """A forward pass that cannot be traced, or that a trace would freeze, in ``module``, or in the network's own."""

    def __init__(self, module: str = "") -> None:
        super().__init__(module)
        self.module = module


class _Proxy(fx.Proxy):
    """A proxy whose attributes are nodes at once, not only where they are used.

    The device by whose name a table is kept in evaluation would be read in one mode only, and the traces differ.
    """

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        attribute = super().__getattr__(k)
        if not callable(getattr(Tensor, k, None)):
            _ = attribute.node
        return attribute


class _Tracer(fx.Tracer):
    """A tracer that has more leaves than the layers of torch.nn, and names the module where a trace fails."""

    # What is computed from a buffer, an index of positions, is a step as well, and not a tensor that forward made.
    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str] = (), *, takes_defaults: bool = False) -> None:
        super().__init__()
        self._leaf_names = leaves
        self._takes_defaults = takes_defaults

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module, or note its call."""
        before = _versions(m.buffers(recurse=False))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:  # a Python forward can fail on proxies in any way
            raise _Untraceable(self.path_of_module(m)) from error
        if _versions(m.buffers(recurse=False)) != before:
            raise _Untraceable(self.path_of_module(m))
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note a step; one without gradients is refused, for the trace would compute them."""
        if not torch.is_grad_enabled():
            msg = "forward computes without gradients"
            raise TraceError(msg)
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """The argument of a node; a tensor that forward made is refused, for the trace would keep it for ever."""
        n_known = len(self.tensor_attrs)
        argument = super().create_arg(a)
        if len(self.tensor_attrs) > n_known:
            msg = "forward makes a tensor"
            raise TraceError(msg)
        return argument

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the trace holds a call of the module, and not what it does, which may hold a number."""
        is_layer = super().is_leaf_module(m, module_qualified_name) and type(m) is not nn.Unflatten
        return is_layer or module_qualified_name in self._leaf_names

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of what is chunked or split, one after the other, as in ``map(f, x.chunk(3, -1))``."""
        count = _n_parts(obj.node)
        if count is None:
            msg = f"forward goes through '{obj.node.target}', whose length a trace does not know"
            raise TraceError(msg)
        return (obj[part] for part in range(count))  # type: ignore[index]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the value of a node."""
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """What forward is called with: switches, such as ``mask=None``, as they are by default if so asked for."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self._takes_defaults:
            arguments = [_default_of(each.node) if _is_switch(each) else each for each in arguments]
        return function, arguments


def _n_parts(node: fx.Node) -> int | None:
    """How many tensors a step gives, None where its arguments do not say."""
    if node.target in ("chunk", torch.chunk):
        count = _argument(node, 1, "chunks")
        # Of a batch there may be fewer parts.
        return count if isinstance(count, int) and _argument(node, 2, "dim") not in (None, 0) else None
    if node.target in ("split", torch.split, "split_with_sizes", torch.split_with_sizes):
        sizes = _argument(node, 1, _split_name(node))
        return len(sizes) if isinstance(sizes, tuple | list) else None
    return None


def _split_name(node: fx.Node) -> str:
    """What a split calls the sizes of its parts, which differs between functions and methods."""
    names = ("split_size_or_sections", "split_size", "split_sizes", "sizes")
    return next((name for name in names if name in node.kwargs), names[0])


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was changed in place."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _is_switch(argument: Any) -> bool:
    return isinstance(argument, fx.Proxy) and _default_of(argument.node) is not argument.node


def _default_of(node: fx.Node) -> Any:
    """The default of an argument of the root that is None, a truth value or a word; else the node itself."""
    if node.op == "placeholder" and node.args:
        (default,) = node.args
        if default is None or isinstance(default, bool | str):
            return default
    return node


def symbolic_trace(model: nn.Module) -> fx.GraphModule | None:
    """The symbolic trace of ``model`` with torch.nn layers as leaves, sharing its tensors.

    Returns:
        None if the forward pass cannot be traced, or does different things in training and in evaluation, or with and
        without an argument that may be left out (``mask=None``): a trace freezes one of them. What it only passes on,
        as in ``F.dropout(x, training=self.training)``, follows the mode of the trace, and the argument.
    """
    try:
        return _trace_of_any_call(model, ())
    except _Untraceable:
        return None


def name_within(container: type[nn.Module], name: str) -> str:
    """``name``, longer by underscores where a ``container`` has an attribute of that name, as it has ``to``."""
    while hasattr(container, name):
        name += "_"
    return name


def trace_around(model: nn.Module, leaves: Collection[str] = ()) -> tuple[fx.GraphModule, tuple[str, ...]] | None:
    """The symbolic trace of ``model`` that leaves modules whole which cannot be traced, and their qualified names.

    Args:
        model: the network.
        leaves: qualified names of modules to be leaves anyway; not among those returned.

    Returns:
        None if the network's own forward cannot be traced, see `symbolic_trace`.
    """
    whole: set[str] = set()
    while True:
        try:
            return _trace_of_any_call(model, {*leaves, *whole}), tuple(sorted(whole))
        except _Untraceable as failure:
            more = _of_its_class(model, failure.module) - whole
            if not more:
                return None
            whole |= more


def _of_its_class(model: nn.Module, name: str) -> set[str]:
    """The module and, where its class is a user's, all others of it, which would fail alike; none for the network."""
    if not name:
        return set()
    kind = type(model.get_submodule(name))
    if kind.__module__.startswith("torch.nn."):
        return {name}
    return {other for other, module in model.named_modules() if other and type(module) is kind}


def _trace_of_any_call(model: nn.Module, leaves: Collection[str]) -> fx.GraphModule:
    traced = _trace_of_either_mode(model, leaves)
    if _steps(_trace_of_either_mode(model, leaves, takes_defaults=True)) != _steps(traced):
        raise _Untraceable
    return traced


def _steps(traced: fx.GraphModule) -> list[str]:
    """What a trace does where the arguments that may be left out are left out."""
    return [
        f"{node.op} {node.name} {node.target} {fx.map_arg((node.args, dict(node.kwargs)), _default_of)}"
        for node in traced.graph.nodes
    ]


def _trace_of_either_mode(model: nn.Module, leaves: Collection[str], *, takes_defaults: bool = False) -> fx.GraphModule:
    traced = _trace(model, leaves, takes_defaults=takes_defaults)
    training = _trace(model, leaves, takes_defaults=takes_defaults, training=True)
    pairs = []
    for one, other in zip_longest(traced.graph.nodes, training.graph.nodes):
        if one is None or other is None or not _is_same_step(one, other):
            innermost = max(map(_modules_of, filter(None, (one, other))), key=len)
            raise _Untraceable(next(reversed(innermost), ""))
        pairs.append((one, other))
    switched = [pair for pair in pairs if str(pair[0].format_node()) != str(pair[1].format_node())]
    if switched:
        for one, other in switched:
            # The mode of the module that passes it on, which may be frozen where the others are not.
            with traced.graph.inserting_before(one):
                mode = traced.graph.create_node("get_attr", f"{_module_of(one)}.{_MODE}".lstrip("."))
                one.args, one.kwargs = _switched((one.args, dict(one.kwargs)), (other.args, dict(other.kwargs)), mode)
        _give_everything(model, traced)
        traced.recompile()
    return traced


def follows_mode(traced: fx.GraphModule) -> bool:
    """Whether a trace asks for its own mode, as that of `symbolic_trace` may."""
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    return any(target.rpartition(".")[2] == _MODE for target in targets)


def _module_of(node: fx.Node) -> str:
    """Qualified name of the module whose forward a node of a trace is a step of; empty for the network."""
    return next(reversed(_modules_of(node)), "")


def _modules_of(node: fx.Node) -> list[str]:
    """The same with those around it, the outermost first, without the network."""
    stack = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[:-1] if node.op == "call_module" else stack


def _is_same_step(one: fx.Node, other: fx.Node) -> bool:
    """Whether a step in evaluation and one in training differ by the mode that they are told alone."""
    return (
        (one.op, one.name) == (other.op, other.name)
        and str(one.target) == str(other.target)
        and _are_alike((one.args, one.kwargs), (other.args, other.kwargs))
    )


def _are_alike(evaluating: Any, training: Any) -> bool:
    """Whether arguments are the same but for truth values that are those of the mode, and rates that are 0 without."""
    if isinstance(evaluating, fx.Node):
        return isinstance(training, fx.Node) and evaluating.name == training.name
    if isinstance(evaluating, tuple | list):
        is_as_long = isinstance(training, tuple | list) and len(evaluating) == len(training)
        return is_as_long and all(map(_are_alike, evaluating, training))
    if isinstance(evaluating, Mapping):
        is_as_long = isinstance(training, Mapping) and evaluating.keys() == training.keys()
        return is_as_long and all(_are_alike(value, training[key]) for key, value in evaluating.items())
    is_switched = _is_switched(evaluating, training) or _is_rate_of_training(evaluating, training)
    return is_switched or repr(evaluating) == repr(training)


def _is_switched(evaluating: Any, training: Any) -> bool:
    return evaluating is False and training is True


def _is_rate_of_training(evaluating: Any, training: Any) -> bool:
    """Whether it is a number in training and zero else, as in ``dropout_p=self.p if self.training else 0.0``."""
    return isinstance(evaluating, float) and evaluating == 0 and isinstance(training, float) and math.isfinite(training)


def _switched(evaluating: Any, training: Any, mode: fx.Node) -> Any:
    """The arguments with the mode in place of what follows it; new nodes go where the graph inserts."""
    if isinstance(evaluating, fx.Node):
        return evaluating
    if isinstance(evaluating, tuple | list):
        return tuple(_switched(one, other, mode) for one, other in zip(evaluating, training, strict=True))
    if isinstance(evaluating, Mapping):
        return {key: _switched(value, training[key], mode) for key, value in evaluating.items()}
    if _is_rate_of_training(evaluating, training) and training:
        return mode.graph.call_function(operator.mul, (mode, training))
    return mode if _is_switched(evaluating, training) else evaluating


def _trace(
    model: nn.Module, leaves: Collection[str], *, training: bool = False, takes_defaults: bool = False
) -> fx.GraphModule:
    # What a graph module calls so itself would be taken in place of what the model holds, as its source is for `code`.
    if any(hasattr(fx.GraphModule, name) for name in model._modules):
        raise _Untraceable
    # The tracer takes the forward of the class, also where the network has one of its own.
    if "forward" in vars(model):
        raise _Untraceable
    before = random_states()
    try:
        # The tracer leaves the tensors that forward makes on the model.
        with (
            attributes_kept(model),
            _buffers_kept(model),
            evaluation_mode(model),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            _autocast_refused(),
            _lengths_as_steps(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            if training:
                model.train()
            graph = _Tracer(leaves, takes_defaults=takes_defaults).trace(model)
            traced = fx.GraphModule(model, graph, type(model).__name__)
    except _Untraceable:
        raise
    except Exception as error:  # a Python forward can fail on proxies in any way; the caller falls back
        raise _Untraceable from error
    # What forward does by a draw of its own (a layer that is left out now and then) would be the same for ever.
    if have_drawn(before):
        raise _Untraceable
    traced.training = model.training
    return traced


class TracedRun(fx.Interpreter):
    """Runs a trace under a label pass, which takes each step as one of the module that it was traced in."""

    def __init__(self, traced: fx.GraphModule, labels: LabelPass) -> None:
        super().__init__(traced)
        self._labels = labels

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        with self._labels.inside(_modules_of(n)):
            return super().run_node(n)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the values of buffers back, and refuse a trace that changed one: counting on is no step of a trace."""
    before = [(buffer, buffer.clone(), _versions([buffer])) for buffer in model.buffers()]
    try:
        yield
    finally:
        changed = [(buffer, values) for buffer, values, version in before if _versions([buffer]) != version]
        with torch.no_grad():
            for buffer, values in changed:
                buffer.copy_(values)
    if changed:
        raise _Untraceable


@contextmanager
def _autocast_refused() -> Iterator[None]:
    """Let ``with torch.autocast(...)`` fail: steps in a precision of their own are in no trace."""
    enter = torch.autocast.__enter__

    def refused(_: torch.autocast) -> None:
        msg = "forward sets the precision"
        raise TraceError(msg)

    torch.autocast.__enter__ = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _lengths_as_steps() -> Iterator[None]:
    """Let ``len(x)`` of what is traced be a step of the trace; Python takes nothing but a number from ``__len__``."""
    plain = builtins.len

    def length(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", plain, (value,), {})
        return plain(value)

    builtins.len = length  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len = plain


class SymbolicRun(TracedRun):
    """Keeps the labels of every node that may hold a channel count.

    Attributes:
        factors: numbers that ``forward`` computes and multiplies tensors by, or combines them with in another way, by
            the node that gives them.
    """

    def __init__(self, traced: fx.GraphModule, labels: LabelPass) -> None:
        super().__init__(traced, labels)
        self._seen: list[Held] = []
        self.factors: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it may hold."""
        n_factors = len(self._labels.record.factors)
        result = super().run_node(n)
        if n.op != "call_module" and len(self._labels.record.factors) > n_factors:
            numbers = {each.name: self.env[each] for each in n.all_input_nodes}
            self.factors.update((name, number) for name, number in numbers.items() if is_number(number))
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
    if (node.op == "call_method" and node.target == "unflatten") or node.target is torch.unflatten:
        return "unflatten"
    if node.op == "call_function" and node.target in _CONVOLUTIONS:
        return "groups"
    return None


def _numbers(node: fx.Node, holder: str, labels: Tensor, position: int, n_outputs: int) -> list[Held]:
    compacted = compact(labels)
    if holder == "size":
        sizes = _sizes_of(node) or [None] * labels.dim()
        varying = varying_dims(labels)
        return [
            # A computed size may follow the channels also where they do not run along its dimension.
            Held(
                node.name,
                ("size", dim, labels.dim()),
                compacted.movedim(dim, 0) if dim in varying else torch.tensor(CONSTANT).expand(labels.shape[dim]),
                _computed_by(size),
            )
            for dim, size in enumerate(sizes)
            if dim in varying or isinstance(size, fx.Node)
        ]
    if holder == "split":
        dim = int(node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)) % labels.dim()  # type: ignore
        given = _argument(node, 1, _split_name(node))
        parts = given if isinstance(given, tuple | list) else [given]
        if compacted.shape[dim] != labels.shape[dim]:
            return []
        # A part of one may be one of a batch.
        computed_by = _computed_by(parts[position if len(parts) > 1 else 0]) if dim in varying_dims(labels) else ""
        return [Held(node.name, ("split", position, n_outputs), compacted.movedim(dim, 0), computed_by)]
    if holder == "unflatten":
        sizes = _argument(node, 2, "sizes")
        # What is computed, or filled in, follows.
        first = int(_argument(node, 1, "dim")) % (labels.dim() + 1 - len(sizes))
        return [
            Held(node.name, ("unflatten", index, 0), compacted.movedim(first + index, 0))
            for index, size in enumerate(sizes)
            if isinstance(size, int) and size != -1 and first + index in varying_dims(labels)
        ]
    if holder == "groups":
        # One for each channel; of others it is the channels in a group that shrink.
        if _argument(node, _GROUPS_AT, "groups") != labels.shape[1] or 1 not in varying_dims(labels):
            return []
        return [Held(node.name, ("groups", 0, 0), compacted.movedim(1, 0))]
    pads = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
    held = []
    for index, count in enumerate(pads):  # type: ignore[arg-type]
        dim = labels.dim() - 1 - index // 2
        if isinstance(count, int) and count > 0 and dim in varying_dims(labels):
            rows = compacted.movedim(dim, 0)
            held.append(Held(node.name, ("pad", index, 0), rows[:count] if index % 2 == 0 else rows[-count:]))
    return held


def _computed_by(size: Any) -> str:
    return size.name if isinstance(size, fx.Node) else ""


class ComputedNumbers(TracedRun):
    """Finds numbers that ``forward`` computes otherwise than is expected of them.

    Attributes:
        wrong: what ``forward`` computes in place of each, by node and dimension of a view, or by node.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        labels: LabelPass,
        sizes: Mapping[tuple[str, int], int],
        numbers: Mapping[str, float],
        *,
        sets_right: bool,
    ) -> None:
        """Expect ``sizes`` of views, by node and dimension, and ``numbers`` of nodes; go on with them if told so."""
        super().__init__(traced, labels)
        self._sizes: dict[str, dict[int, int]] = {}
        for (node, dim), value in sizes.items():
            self._sizes.setdefault(node, {})[dim] = value
        self._numbers = numbers
        self._sets_right = sets_right
        self.wrong: dict[Place, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, with the numbers that are expected of it."""
        for dim, value in self._sizes.get(n.name, {}).items():
            found = self.env[(_sizes_of(n) or [])[dim]]
            if found not in (-1, value):
                self.wrong[n.name, dim] = found
                if self._sets_right:
                    _set_size(n, dim, value)
        result = super().run_node(n)
        expected = self._numbers.get(n.name, result)
        if expected is result or result in (-1, expected):
            return result
        self.wrong[n.name] = result
        return expected if self._sets_right else result


def rewrite(model: nn.Module, graph: NetworkGraph, kept: Mapping[int, Tensor]) -> fx.GraphModule:
    """The symbolic trace of ``model`` with its held numbers set to what is left.

    Modules, parameters, buffers, training mode and forward hooks are the model's own, also where ``forward`` does not
    use them, so that state-dict names are the same.

    Args:
        model: the captured module; the trace shares its modules and tensors.
        graph: its graph.
        kept: boolean of shape ``(size,)`` by group index.

    Raises:
        TraceError: if the module can no longer be traced as it was when it was captured.
    """
    trace = _trace_of_either_mode if graph.follows_mode else _trace
    try:
        traced = trace(model, {*graph.opaque, *graph.whole})
    except _Untraceable as error:
        msg = "the network could be traced when it was captured and cannot be traced now; pass the network as captured"
        raise TraceError(msg) from error
    nodes = {node.name: node for node in traced.graph.nodes}
    missing = {*(held.node for held in graph.rewrites), *(number.node for number in graph.fixed)} - nodes.keys()
    if missing:
        msg = f"the trace of the network has no node '{min(missing)}'; capture the network again"
        raise TraceError(msg)
    for held in graph.rewrites:
        _set_number(nodes[held.node], held, held.value(kept))
    for number in graph.fixed:
        node = nodes[number.node]
        node.op, node.target, node.args, node.kwargs = "call_function", type(number.value), (number.value,), {}
    traced.recompile()
    _give_everything(model, traced)
    return traced


def _give_everything(model: nn.Module, traced: fx.GraphModule) -> None:
    """Put all that ``model`` holds into ``traced``, which has only what its graph uses, in modules of no class."""
    # The graph finds a plain tensor attribute of the model among the buffers; the state dict of the model has none.
    plain = {name: tensor for name, tensor in traced._buffers.items() if name not in model._buffers}
    traced._modules = model._modules
    traced._parameters = model._parameters
    # One mapping where it can be: what is put in place of a buffer in the trace is found by its name in the model.
    traced._buffers = {**model._buffers, **plain} if plain else model._buffers
    traced._non_persistent_buffers_set = {*model._non_persistent_buffers_set, *plain}
    traced.training = model.training
    for hooks in FORWARD_HOOKS:
        setattr(traced, hooks, getattr(model, hooks))


def _set_number(node: fx.Node, held: HeldNumber, value: int) -> None:
    what, index, count = held.argument
    if what == "pad":
        pads = list(node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ()))  # type: ignore[arg-type]
        pads[index] = value
        _set_argument(node, 1, "pad", tuple(pads))
    elif what == "split":
        given = _argument(node, 1, _split_name(node))
        sizes = list(given) if isinstance(given, tuple | list) else [0] * count  # type: ignore[arg-type]
        sizes[index] = value
        _set_argument(node, 1, _split_name(node), sizes)
    elif what == "unflatten":
        sizes = list(_argument(node, 2, "sizes"))
        sizes[index] = value
        _set_argument(node, 2, "sizes", tuple(sizes))
    elif what == "groups":
        _set_argument(node, _GROUPS_AT, "groups", value)
    elif held.is_scaled:
        _scale_size(node, index, value, held.value({}))
    else:
        _set_size(node, index, value)


def _sizes_of(node: fx.Node) -> list[Any] | None:
    """The sizes that a view is given, None where its whole shape is computed (``x.view(y.shape)``)."""
    name, is_nested = _place_of_sizes(node)
    given = node.kwargs[name] if name is not None else node.args[1] if is_nested else node.args[1:]
    return list(given) if isinstance(given, tuple | list) else None


def _place_of_sizes(node: fx.Node) -> tuple[str | None, bool]:
    """The keyword of a view's sizes, if they have one, and whether they are one argument."""
    name = next((name for name in ("shape", "size") if name in node.kwargs), None)
    return name, name is not None or (len(node.args) == 2 and isinstance(node.args[1], tuple | list | fx.Node))


def _set_size(node: fx.Node, dim: int, value: int | fx.Node) -> None:
    sizes = _sizes_of(node)
    # A whole shape that is computed holds no number.
    if sizes is None:
        return
    if sizes[dim] != -1:
        sizes[dim] = value
    name, is_nested = _place_of_sizes(node)
    if name is not None:
        node.kwargs = {**node.kwargs, name: tuple(sizes)}
    else:
        node.args = (node.args[0], tuple(sizes)) if is_nested else (node.args[0], *sizes)


def _scale_size(node: fx.Node, dim: int, left: int, of: int) -> None:
    """Put a size that is computed times ``left / of`` in its place."""
    computed, shared = (_sizes_of(node) or [])[dim], math.gcd(left, of)
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, (computed, left // shared))
        scaled = node.graph.call_function(operator.floordiv, (product, of // shared))
    _set_size(node, dim, scaled)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    if len(node.args) > position:
        args = list(node.args)
        args[position] = value
        node.args = tuple(args)
    else:
        node.kwargs = {**node.kwargs, name: value}
