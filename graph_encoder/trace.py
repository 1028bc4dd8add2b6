"""One run of a network with labels in place of activations.

The module runs as it is, on meta tensors, under a dispatch mode that sees every operator before it is decomposed. Data
movement is executed on the labels, element-wise operators merge the labels that meet, a weighted operator reads a label
for each of its input channels and writes fresh ones. What is not understood freezes the labels that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import first_line
from .labels import CONSTANT, LabelClasses, compact, varying_dims
from .modes import attributes_kept, autocast_on_shapes
from .network import ForwardError, Operator, TraceError
from .opaque import ModuleCall, Opaque, forwards_replaced, summary_of, tensors_within_reach
from .rules import RULES, Call, Result, Rule
from .shapes import is_pointwise, quick_result, tensors_in

_LOOSE_LIMIT = 1 << 20
"""Largest parameter that is labelled element by element when it meets activations outside a weighted operator."""
_NO_RULE = "which has no rule"
_ARITHMETIC = {"mul", "div", "add", "sub", "rsub", "pow", "floor_divide", "scaled_dot_product_attention"}
"""Operators in which the value of a number beside an activation counts, and not only a place or a size."""


@dataclass
class Axis:
    """A dimension of a parameter or buffer, its labels, and how operators use it."""

    tensor: str
    dim: int
    role: str
    labels: Tensor


@dataclass
class Multiply:
    """MACs of one operator: ``factor`` times the product of the numbers of labels left in ``dims``."""

    operator: str
    factor: int
    dims: tuple[Tensor | int, ...]


@dataclass
class Held:
    """Labels counted by a number that ``forward`` holds, at a node of the symbolic trace."""

    node: str
    argument: tuple[str, int, int]
    labels: Tensor
    computed_by: str = ""


@dataclass
class Shadow:
    """What is known of one tensor of the run; holding the tensor keeps its identity from being used again."""

    tensor: Tensor
    labels: Tensor | None
    sources: frozenset[int]


@dataclass(frozen=True)
class Fold:
    """A view of channels as several dimensions.

    Attributes:
        view: which of the run's views it is.
        module: qualified name of the module that made it.
        labels: of its result, with one entry along dimensions in which they do not vary.
    """

    view: int
    module: str
    labels: Tensor


@dataclass(frozen=True)
class Factor:
    """Numbers that activations meet in one operator: ``scores / q.shape[-1] ** 0.5``.

    Attributes:
        module: qualified name of the module that ran.
        operator: name of the operator.
        numbers: in the order of its arguments.
    """

    module: str
    operator: str
    numbers: tuple[float, ...]


@dataclass
class Record:
    """Everything that one run leaves behind."""

    classes: LabelClasses = field(default_factory=LabelClasses)
    operators: list[Operator] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    views: list[tuple[int, ...]] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    shared: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    multiplies: list[Multiply] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    readers: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def at_least_two(example: Tensor) -> Tensor:
    """``example``, with a second entry in its batch dimension where there is only one."""
    return torch.cat([example, example]) if example.dim() and example.shape[0] < 2 else example


def batch_of_two(example: Tensor) -> Tensor:
    """A meta tensor like ``example`` with at least two entries in its batch dimension."""
    batch = max(2, example.shape[0]) if example.dim() else 0
    shape = (batch, *example.shape[1:]) if example.dim() else ()
    return torch.empty(shape, dtype=example.dtype, device="meta")


class LabelPass(TorchDispatchMode):
    """The dispatch mode; `record` holds the result after the module has run under it."""

    def __init__(self, model: nn.Module, opaque: Opaque | None = None, *, with_labels: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self.with_labels = with_labels
        self._names: dict[int, str] = {}
        self._of_inputs: set[int] = set()
        self._holders: dict[int, int] = {}
        self._fixed: dict[str, str] = {}
        self._module_names: dict[int, str] = {}
        self._model = model
        self._modules = dict(model.named_modules())
        bound: dict[str, str] = {}
        for name, module in self._modules.items():
            self._module_names[id(module)] = name
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
                bound[name] = f"is bound to one width by nn.{type(module).__name__}"
            holder = next((why for at, why in bound.items() if name == at or name.startswith(f"{at}.")), "")
            for own, tensor in (*module._parameters.items(), *module._buffers.items()):
                full_name = f"{name}.{own}" if name else own
                self._names.setdefault(id(tensor), full_name)
                self._holders[id(tensor)] = self._holders.get(id(tensor), 0) + 1
                if holder:
                    self._fixed[full_name] = holder
        self._opaque = opaque or Opaque()
        for name in self._opaque.causes:
            why = f"is within reach of '{name}', which cannot be captured,"
            for tensor in tensors_within_reach(self._modules[name]):
                if (held := self.name_of(tensor)) is not None:
                    self._fixed[held] = why
            for call in self._opaque.calls.get(name, ()):
                self._fixed.update(dict.fromkeys(call.tensors, why))
        self._replayed: dict[str, int] = {}
        self._stack: list[str] = []
        self._shadows: dict[int, Shadow] = {}
        self._meta: dict[int, tuple[Tensor, Tensor]] = {}
        self._overwritten: dict[int, Tensor] = {}
        own_tensors = [*model.parameters(), *model.buffers()]
        self._device = next((tensor.device for tensor in own_tensors if not tensor.is_meta), torch.device("cpu"))
        self.batch = 1
        self._used_names: dict[str, int] = {}

    # ---------------------------------------------------------------- running

    def run(self, forward: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Run ``forward`` on ``inputs`` (meta tensors, batch first) and keep the record.

        Raises:
            ForwardError: naming the module, where an operator cannot run without values.
            TraceError: if it returns what cannot be seen.
        """
        self.batch = next((int(tensor.shape[0]) for tensor in inputs if tensor.dim()), 1)
        for tensor in inputs:
            size = tuple(tensor.shape)
            index = self._add_operator(
                "input", "input", frozenset(), in_channels=0, out_channels=_channels(size), out_size=_out_size(size)
            )
            self._remember(tensor, self.constant(tensor), frozenset({index}))
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            # What forward keeps for its next call fits these widths alone.
            with (
                attributes_kept(self._model), torch.inference_mode(), autocast_on_shapes(), self._module_stack(),
                self._replays(), self,
            ):  # fmt: skip
                output = forward(*inputs)
        except Exception as error:  # a Python forward can fail in any way: an assert on a width, a missing key
            modules = [name for name in dict.fromkeys(self._stack) if name]
            raise ForwardError(modules, first_line(error), [tuple(t.shape) for t in inputs]) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
        self._finish(output)
        return output

    @contextmanager
    def _module_stack(self) -> Iterator[None]:
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave)
        try:
            yield
            self._stack.clear()
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        parent = self._stack[-1] if self._stack else ""
        self._stack.append(self._module_names.get(id(module), parent))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    @contextmanager
    def inside(self, modules: Sequence[str]) -> Iterator[None]:
        """Take what runs as part of these modules' forward, the innermost last, although none of them is called."""
        before = list(self._stack)
        self._stack.extend(modules)
        yield
        # What stops a run stops it there: it is told of the modules that ran.
        self._stack[:] = before

    def _replays(self) -> AbstractContextManager[None]:
        return forwards_replaced({self._modules[name]: partial(self._replay, name) for name in self._opaque.causes})

    def _replay(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The results of an opaque module's next call, on shapes; the channels that it reads and writes stay dense."""
        call = self._next_call(name, args, kwargs)
        read = [*tree_flatten((args, kwargs))[0], *tensors_within_reach(self._modules[name])]
        shadows = [shadow for leaf in read if (shadow := self._shadows.get(id(leaf))) is not None]
        sources = self._add_as_counted(call.operators, frozenset[int]().union(*(s.sources for s in shadows)))
        why = f"by a module that cannot be captured ({self._opaque.causes[name]}),"
        for shadow in shadows:
            if shadow.labels is not None:
                self.freeze(shadow.labels, f"is read {why}")
        outputs = [None if output is None else output.on_meta() for output in call.outputs]
        for tensor in outputs:
            if tensor is not None:
                self._remember(tensor, self._frozen(tuple(tensor.shape), f"is written {why}"), sources)
        return tree_unflatten(outputs, call.spec)

    def _next_call(self, name: str, args: Any, kwargs: Any) -> ModuleCall:
        """What the run on values knows of this call; `RuntimeError` if that does not hold for it."""
        position = self._replayed[name] = self._replayed.get(name, -1) + 1
        calls = self._opaque.calls.get(name, ())
        if position >= len(calls):
            msg = f"it is called {position + 1} times on shapes and {len(calls)} times on values"
            raise RuntimeError(msg)
        call = calls[position]
        if call.refusal:
            raise RuntimeError(call.refusal)
        if (found := summary_of(args, kwargs)) != call.arguments:
            msg = f"it is given {list(found)} instead of {list(call.arguments)}"
            raise RuntimeError(msg)
        return call

    def _add_as_counted(self, operators: Sequence[Operator], sources: frozenset[int]) -> frozenset[int]:
        """Add operators with fixed costs and no weights, one behind the other: how data flows there is not known."""
        for operator in operators:
            values = {**operator.__dict__, "weight": "", "norm": "", "layer_type": "", "is_called": False}
            name, kind = values.pop("name").partition("#")[0], values.pop("kind")
            index = self._add_operator(name, kind, sources, **values)
            self.record.multiplies.append(Multiply(self.record.operators[index].name, operator.macs, ()))
            sources = frozenset({index})
        return sources

    def _frozen(self, shape: tuple[int, ...], reason: str) -> Tensor | None:
        """Labels of channels that have to stay for ``reason``."""
        if not self.with_labels:
            return None
        labels = self.record.classes.fresh(_channels(shape))
        self.freeze(labels, reason)
        dim = len(shape) - 1 if len(shape) == 3 else 1
        return labels.reshape([len(labels) if d == dim else 1 for d in range(len(shape))]).expand(shape)

    def _finish(self, output: Any) -> None:
        leaves = tree_flatten(output)[0]
        _check_outputs(output, leaves)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.record.output_shapes = [tuple(leaf.shape) for leaf in outputs]
        for leaf in outputs:
            shadow = self._shadows.get(id(leaf))
            if shadow is None:
                continue
            size = tuple(leaf.shape)
            self._add_operator("output", "output", shadow.sources, in_channels=_channels(size), out_channels=0)
            if shadow.labels is not None:
                self.record.classes.freeze(shadow.labels, "is an output of the network")

    def labels_of(self, tensor: Tensor) -> Tensor | None:
        """Labels that ``tensor`` got in this run."""
        shadow = self._shadows.get(id(tensor))
        return None if shadow is None else shadow.labels

    # ---------------------------------------------------------------- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on shapes, then give its outputs labels."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        rule = RULES.get(name)
        pointwise = is_pointwise(func, name)
        if rule is None and not pointwise and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        on_meta = any(map(self.is_unknown, tensors))
        out = self._on_shapes(func, name, args, kwargs, tensors) if on_meta else self._on_values(func, args, kwargs)
        sources = frozenset[int]().union(*(s.sources for t in tensors if (s := self._shadows.get(id(t))) is not None))
        outputs = [out] if isinstance(out, Tensor) else list(tensors_in(out)) if isinstance(out, list | tuple) else []
        if not on_meta and not any(self.is_labelled(t) for t in tensors):
            return out
        if name in _ARITHMETIC:
            numbers = tuple(n for value in (*args, *kwargs.values()) if (n := self._number(value)) is not None)
            self.record.factors.extend([Factor(self.here(), name, numbers)] if numbers else [])
        follow = rule or (LabelPass.elementwise if pointwise else LabelPass.unknown)
        labels, sources = self._followed(follow, Call(name, func, args, kwargs, outputs, sources))
        for position, tensor in enumerate(outputs):
            self._remember(tensor, labels[position] if position < len(labels) else None, sources)
        return out

    def _number(self, value: Any) -> float | None:
        """The number that an argument is, or that a tensor of one element holds; None where it is no number."""
        if is_number(value):
            return value  # type: ignore[no-any-return]
        is_one = isinstance(value, Tensor) and value.numel() == 1 and not self.is_unknown(value)
        return float(value.item()) if is_one and not value.dtype.is_complex else None

    def _followed(self, rule: Rule, call: Call) -> Result:
        """What ``rule`` says of a call; what it reads stays dense where the rule fails: forward is not to blame."""
        n_operators = len(self.record.operators)
        try:
            labels, sources = rule(self, call)
            if self.with_labels:
                pairs = zip(labels, call.outputs, strict=False)
                labels = [one if one is None else _fitted(one, tensor) for one, tensor in pairs]
            return labels, sources
        except Exception as error:  # a rule may meet what nobody thought of, and fail in any way
            labels, sources = self.unknown(call, f"whose rule failed ({first_line(error)})")
        if len(self.record.operators) > n_operators:
            return labels, frozenset({len(self.record.operators) - 1})
        if self.with_labels:
            # It costs what runs without labels say that it does.
            self.with_labels = False
            _, sources = self._followed(rule, call)
            self.with_labels = True
        return labels, sources

    def _on_shapes(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        try:
            result = quick_result(func, name, args, kwargs, tensors)
            if result is not None:
                return result
            if name == "index":
                args = (args[0], [each for index in args[1] for each in self._as_integers(index)])
            for tensor in _written(func, args, kwargs):
                if not tensor.is_meta:
                    self._overwritten[tensor.untyped_storage().data_ptr()] = tensor
            return func(*tree_map(self._to_meta, args), **tree_map(self._to_meta, kwargs))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            msg = f"{reason} ({func} on shapes {[tuple(t.shape) for t in tensors]})"
            raise RuntimeError(msg) from error

    def _as_integers(self, index: Any) -> Sequence[Any]:
        """The indices that a mask with values stands for, one for each of its dimensions; others as they are."""
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not self.is_unknown(index)
        return index.nonzero(as_tuple=True) if is_mask else [index]

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return value
        if id(value) not in self._meta:
            meta = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta", requires_grad=False
            )
            # With the tensor itself, so that its identity is not used again.
            self._meta[id(value)] = value, meta
        return self._meta[id(value)][1]

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what reads no activation; integers made where the activations are have values all the same.

        They are positions and masks, which forward may ask for a value, and follow from shapes alone.
        """
        out = func(*args, **kwargs)
        is_made = isinstance(out, Tensor) and out.is_meta and "device" in kwargs
        if not is_made or out.is_floating_point() or out.is_complex() or torch.Tag.nondeterministic_seeded in func.tags:
            return out
        return func(*args, **{**kwargs, "device": self._device})

    def is_unknown(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor are not known: on ``meta`` there are none, others may be overwritten."""
        if tensor.is_meta or not self._overwritten:
            return tensor.is_meta
        return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in self._overwritten

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor was computed in this run."""
        return id(tensor) in self._shadows

    def is_labelled(self, tensor: Tensor) -> bool:
        """Whether the tensor carries labels: an activation, or a parameter or buffer of floats."""
        if id(tensor) in self._shadows:
            return True
        return tensor.is_floating_point() and id(tensor) in self._names

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter or buffer, or was computed from such alone (a transpose, a multiple)."""
        shadow = self._shadows.get(id(tensor))
        if shadow is None:
            return id(tensor) in self._names
        return not shadow.sources and shadow.labels is not None and bool((compact(shadow.labels) != CONSTANT).any())

    def _remember(self, tensor: Tensor, labels: Tensor | None, sources: frozenset[int]) -> None:
        fitting = None if labels is None or not self.with_labels else _fitted(labels, tensor)
        self._shadows[id(tensor)] = Shadow(tensor, fitting, sources)

    # ---------------------------------------------------------------- labels of operands

    def constant(self, tensor: Tensor) -> Tensor:
        """Labels of values that no channel owns."""
        return torch.tensor(CONSTANT).expand(tensor.shape)

    def labels_or_constant(self, tensor: Tensor) -> Tensor:
        """Labels of an operand; a parameter met outside a weighted operator gets one label an element."""
        shadow = self._shadows.get(id(tensor))
        if shadow is not None and shadow.labels is not None:
            return shadow.labels
        name = self._names.get(id(tensor))
        if name is None or not tensor.is_floating_point() or tensor.numel() > _LOOSE_LIMIT or not self.with_labels:
            return self.constant(tensor)
        if name not in self.record.loose:
            self.record.loose[name] = self.record.classes.fresh(tensor.numel()).reshape(tensor.shape)
            if name in self._fixed:
                self.freeze(self.record.loose[name], self._fixed[name])
        return self.record.loose[name]

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Qualified name of a parameter or buffer, or None for any other tensor."""
        return None if tensor is None else self._names.get(id(tensor))

    def here(self) -> str:
        """Qualified name of the module that runs."""
        return self._stack[-1] if self._stack else ""

    def running_module(self) -> nn.Module | None:
        """The module that runs, None if it has no name in the network."""
        return self._modules.get(self.here())

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keep ``labels`` dense and say where."""
        where = self.here() or "the network"
        self.record.classes.freeze(labels, f"{reason} in '{where}'")

    def fold(self, labels: Tensor) -> None:
        """Note that the last view has made several dimensions of channels."""
        self.record.folds.append(Fold(len(self.record.views) - 1, self.here(), compact(labels)))

    def axis(self, tensor: str, dim: int, role: str, labels: Tensor) -> Tensor:
        """Bind ``labels`` to a dimension of a parameter; a second use of the parameter merges both."""
        if tensor in self._fixed:
            self.freeze(labels, self._fixed[tensor])
        axis = self.record.axes.get((tensor, dim))
        if axis is None:
            self.record.axes[tensor, dim] = Axis(tensor, dim, role, labels)
            return labels
        self.record.classes.union(axis.labels, labels)
        return axis.labels

    def out_axis(self, tensor: str, dim: int, n: int) -> Tensor:
        """Labels of the channels that a weight produces: fresh at its first use."""
        axis = self.record.axes.get((tensor, dim))
        return axis.labels if axis is not None else self.axis(tensor, dim, "out", self.record.classes.fresh(n))

    # ---------------------------------------------------------------- operators

    def _add_operator(self, name: str, kind: str, sources: frozenset[int], **values: Any) -> int:
        count = self._used_names[name] = self._used_names.get(name, 0) + 1
        unique = name if count == 1 else f"{name}#{count}"
        index = len(self.record.operators)
        if kind == "input" or self._of_inputs & sources:
            self._of_inputs.add(index)
        self.record.operators.append(Operator(name=unique, kind=kind, **values))
        self.record.edges.extend((source, index) for source in sorted(sources))
        return index

    def add_weighted(
        self, call: Call, weight: Tensor, bias: Tensor | None, kind: str, factor: int, dims: tuple[Tensor | int, ...],
        **values: Any,
    ) -> frozenset[int]:  # fmt: skip
        """Add a weighted operator with its MACs, ``factor * dims`` for a batch of one."""
        weight_name = self.name_of(weight) or ""
        name = _layer_name(weight_name) or f"{self.here()}.{kind}".lstrip(".")
        macs = factor * math.prod(len(d) if isinstance(d, Tensor) else d for d in dims)
        params = weight.numel() + (bias.numel() if bias is not None else 0)
        values.setdefault("out_size", _out_size(tuple(call.outputs[0].shape)))
        index = self._add_operator(
            name, kind, call.sources, macs=macs, params=params, weight=weight_name, layer_type=self._layer_type(weight),
            is_called=weight_name == f"{self.here()}.weight".lstrip("."), **values,
        )  # fmt: skip
        unique = self.record.operators[index].name
        self.record.multiplies.append(Multiply(unique, factor, dims))
        for dim in (0, 1):
            self.record.readers.setdefault((weight_name, dim), []).append(unique)
        return frozenset({index})

    def add_product(self, call: Call, kind: str, factor: int, dims: tuple[Tensor | int, ...]) -> frozenset[int]:
        """Add a product of two activations (matmul, attention)."""
        macs = factor * math.prod(len(d) if isinstance(d, Tensor) else d for d in dims)
        size = tuple(call.outputs[0].shape)
        index = self._add_operator(
            f"{self.here()}.{kind}".lstrip("."), kind, call.sources,
            in_channels=_channels(tuple(call.args[0].shape)), out_channels=_channels(size), macs=macs,
            out_size=_out_size(size),
        )  # fmt: skip
        self.record.multiplies.append(Multiply(self.record.operators[index].name, factor, dims))
        return frozenset({index})

    def join(self, call: Call, kind: str, operands: Sequence[Tensor]) -> frozenset[int]:
        """Sources of a join: a node of its own where two or more flows of data meet."""
        flows = {s.sources for t in operands if (s := self._shadows.get(id(t))) is not None and s.sources}
        if len(flows) < 2:
            return call.sources
        size = tuple(call.outputs[0].shape)
        name = f"{self.here()}.{kind}".lstrip(".")
        is_line = any(map(self._is_line, operands))
        widest = max(_channels(tuple(t.shape), is_line=is_line) for t in operands)
        channels, out_size = _channels(size, is_line=is_line), _out_size(size, is_line=is_line)
        index = self._add_operator(
            name, kind, call.sources, in_channels=widest, out_channels=channels, out_size=out_size
        )
        return frozenset({index})

    def _is_line(self, tensor: Tensor) -> bool:
        """Whether positions follow the channels, as one-dimensional convolutions write them, and are no tokens."""
        shadow = self._shadows.get(id(tensor))
        if shadow is None or tensor.dim() != 3:
            return False
        # Tokens are such a map transposed. Other widths come of what is no operator: gates, chunks, pooling.
        lines = [op for index in shadow.sources if len((op := self.record.operators[index]).out_size) == 1]
        return any(tensor.shape[2] != line.out_channels or tensor.shape[1] == line.out_channels for line in lines)

    def per_image(self, call: Call, work: int) -> int:
        """Work for one image of the batch: all of it where no input is read, as of a table of positions."""
        # What was repeated for the batch, or written in place into a tensor made for it, has no sources.
        is_batched = self.batch in call.outputs[0].shape[:-1]
        return work // self.batch if is_batched or self._of_inputs & call.sources else work

    def note_computed(self, weight: Tensor) -> None:
        """Name the running module as one that stays as it is, since its weight is no parameter."""
        module = self.running_module()
        if module is None or any(weight is tensor for tensor in module.parameters(recurse=False)):
            return
        why = "its weight is computed from other tensors"
        if is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            why += (
                "; torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm, remove_spectral_norm) "
                "makes it a parameter that can be sliced"
            )
        self.record.skipped[self.here()] = why

    def _layer_type(self, weight: Tensor) -> str:
        holder, _, own = (self.name_of(weight) or "").rpartition(".")
        if not holder or own != "weight" or self._holders[id(weight)] > 1:
            return ""
        return type(self._modules[holder]).__name__

    def note_norm(self, call: Call, x: Tensor, weight: Tensor | None) -> None:
        """Name the batch norm on the weighted operator whose output it reads."""
        name, shadow = self.name_of(weight), self._shadows.get(id(x))
        if name is None or shadow is None or len(shadow.sources) != 1:
            return
        (index,) = shadow.sources
        operator = self.record.operators[index]
        if operator.weight and not operator.norm:
            values = {**operator.__dict__, "norm": _layer_name(name)}
            self.record.operators[index] = Operator(**values)

    # ---------------------------------------------------------------- general rules

    def elementwise(self, call: Call) -> Result:
        """Merge the labels that meet."""
        operands = [*tensors_in(call.args), *tensors_in(call.kwargs)]
        labelled = [t for t in operands if self.is_labelled(t)]
        kind = "mul" if call.name in ("mul", "div") else "add"
        activations = [t for t in labelled if id(t) in self._shadows]
        sources = self.join(call, kind, activations) if len(activations) > 1 else call.sources
        if not self.with_labels:
            return [None], sources
        if len(labelled) == 1 and len(operands) == 1:
            return [self.labels_or_constant(labelled[0])], sources
        shape = call.outputs[0].shape
        merged: Tensor | None = None
        for tensor in sorted(operands, key=self.is_parameter):
            labels = self.labels_or_constant(tensor)
            if tensor.dim() == 0:
                continue
            labels = labels.reshape((1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape))
            if merged is not None and self.is_parameter(tensor) and _is_shared(labels, merged):
                self.record.shared.append((compact(merged), compact(labels)))
            else:
                merged = labels if merged is None else self.meet(merged, labels)
        if merged is None:
            return [None], sources
        return [merged.expand(shape)], sources

    def meet(self, first: Tensor, second: Tensor) -> Tensor:
        """Merge the labels of two operands that broadcast to one shape; returns the labels of the result."""
        for wide, narrow in ((first, second), (second, first)):
            dims = varying_dims(wide)
            if dims and all(narrow.shape[d] == 1 for d in dims):
                self.freeze(narrow, "is broadcast over channels")
                return wide.expand(torch.broadcast_shapes(first.shape, second.shape))
        a, b = compact(first), compact(second)
        self.record.classes.union(a, b)
        shape = torch.broadcast_shapes(first.shape, second.shape)
        for labels in (a, b):
            others = [dim for dim in varying_dims(b if labels is a else a) if labels.shape[dim] == 1]
            if bool((labels > 0).all()) and not (labels is b and others):
                return labels.expand(shape)
        a, b = torch.broadcast_tensors(a, b)
        return torch.where(a > 0, a, b).expand(shape)

    def unknown(self, call: Call, why: str = _NO_RULE) -> Result:
        """Keep dense everything that an operator reads of which no more is known."""
        reason = f"is read by the operator '{call.func}', {why},"
        for leaf in (*tensors_in(call.args), *tensors_in(call.kwargs)):
            if self.is_labelled(leaf):
                self.freeze(self.labels_or_constant(leaf), reason)
            if (name := self.name_of(leaf)) is not None:
                self._fix(name, reason)
                if why == _NO_RULE and self.is_parameter(leaf) and leaf.dim() > 1:
                    # Most likely a layer's weight; elementwise operators and reductions have rules.
                    self.record.skipped[_layer_name(name)] = f"{reason} so that its multiply-adds are not counted"
        return [None for _ in call.outputs], call.sources

    def _fix(self, tensor: str, reason: str) -> None:
        """Keep a parameter or buffer as it is, whatever else reads it."""
        self._fixed.setdefault(tensor, reason)
        for axis in self.record.axes.values():
            if axis.tensor == tensor:
                self.freeze(axis.labels, reason)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fitted(labels: Tensor, tensor: Tensor) -> Tensor:
    """``labels`` in the shape of the tensor that they are of."""
    return labels if labels.shape == tensor.shape else labels.expand(tensor.shape)


def _is_shared(labels: Tensor, by: Tensor) -> bool:
    """Whether one value goes with several channels, which other dimensions tell apart: those of heads."""
    own, others = set(varying_dims(labels)), set(varying_dims(by))
    return bool(own) and own < others and all(labels.shape[dim] == 1 for dim in others - own)


def _check_outputs(output: Any, leaves: list[Any]) -> None:
    """Refuse an output whose tensors, or some of them, would not be seen."""
    advice = (
        "forward must return tensors, alone or in tuples, lists or dicts, beside which only None, bool, int, float and "
        "str may stand"
    )
    for leaf in leaves:
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            kind = type(leaf)
            msg = f"forward returns an object of class '{kind.__module__}.{kind.__qualname__}'; {advice}"
            raise TraceError(msg)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        msg = f"forward returns no tensor but {output!r}; {advice}"
        raise TraceError(msg)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes into."""
    for position, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            yield value


def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _layer_name(parameter: str) -> str:
    for suffix in (".weight", "_weight", ".bias"):
        parameter = parameter.removesuffix(suffix)
    return parameter


def _channels(shape: tuple[int, ...], *, is_line: bool = False) -> int:
    """Channels by the usual layouts: (N, C), (N, tokens, C), or (N, C, positions) if ``is_line``, (N, C, H, W)."""
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) == 3 and not is_line else shape[1]


def _out_size(shape: tuple[int, ...], *, is_line: bool = False) -> tuple[int, ...]:
    if len(shape) >= 4 or (len(shape) == 3 and is_line):
        return shape[2:]
    return (shape[1], 1) if len(shape) == 3 else (1, 1)
