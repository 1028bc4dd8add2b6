"""A run of a network on values, for what a run on shapes cannot tell of the modules that stop it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .copies import copied
from .network import TraceError
from .opaque import PLAIN, ModuleCall, TensorLike, summary_of
from .rules import Call
from .shapes import tensors_in
from .trace import LabelPass, at_least_two

_DRAWS = (0, 1)
"""Seeds of the inputs: two, to see whether shapes depend on values."""


def record_calls(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[ModuleCall, ...]]:
    """What every call of every sub-module reads, returns and costs, by qualified name.

    A copy of the network runs twice, on inputs of random floats and on the values of all other inputs, so that the
    result depends on no more than a run on shapes does.

    Args:
        model: the network; untouched.
        inputs: as for `graph_encoder.capture.capture`.

    Raises:
        TraceError: if the network does not run.
    """
    model = copied(model)
    device = next((parameter.device for parameter in model.parameters()), inputs[0].device)
    first, second = (_calls(model, [_draw(x, seed).to(device) for x in inputs]) for seed in _DRAWS)
    return {name: _agreed(calls, second.get(name, [])) for name, calls in first.items()}


def _draw(example: Tensor, seed: int) -> Tensor:
    example = at_least_two(example)
    if not example.is_floating_point():
        return example.clone()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(example.shape, generator=generator).to(example.dtype)


def _calls(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, list[ModuleCall]]:
    run = RealRun(model)
    run.run(model, inputs)
    if run.n_unfinished:
        msg = f"{run.n_unfinished} calls of modules fail, and the network goes on without what they return"
        raise TraceError(msg)
    return run.calls


def _agreed(calls: list[ModuleCall], others: list[ModuleCall]) -> tuple[ModuleCall, ...]:
    """The calls; refused where those on other values have other shapes."""
    shapes, other_shapes = ([(c.arguments, c.outputs, c.spec) for c in each] for each in (calls, others))
    if shapes == other_shapes:
        return tuple(calls)
    return tuple(replace(c, refusal=c.refusal or "its calls, or the shapes in them, depend on values") for c in calls)


@dataclass
class _Frame:
    """A call that has begun."""

    start: int
    n_operators: int
    n_read: int


class RealRun(LabelPass):
    """The pass on tensors with values; `calls` holds the result by qualified name after the module has run under it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, with_labels=False)
        self.calls: dict[str, list[ModuleCall]] = {}
        self._frames: list[_Frame] = []
        self._clock = 0
        self._read: list[Tensor] = []
        self._born: dict[int, int] = {}

    @property
    def n_unfinished(self) -> int:
        """Calls that have begun and have not ended."""
        return len(self._frames)

    def is_labelled(self, tensor: Tensor) -> bool:
        """Every tensor counts: what has gone through NumPy is an activation that no one saw being made."""
        return True

    def per_image(self, call: Call, work: int) -> int:
        """Work for one image of the batch, which everything counts as here: see `is_labelled`."""
        return work // self.batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and note what it reads and when its results were made."""
        self._clock += 1
        for tensor in (*tensors_in(args), *tensors_in(kwargs or {})):
            self._read.append(tensor)
            self._born.setdefault(id(tensor), self._clock)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tensors_in([out]):
            self._born.setdefault(id(tensor), self._clock)
        return out

    @contextmanager
    def _module_stack(self) -> Iterator[None]:
        # Hooks of each module: PyTorch never quite forgets one of all modules that is given keywords.
        with ExitStack() as hooks:
            for module in self._modules.values():
                hooks.enter_context(module.register_forward_pre_hook(self._enter, prepend=True))
                hooks.enter_context(module.register_forward_hook(self._leave_with, prepend=True, with_kwargs=True))
            yield
            self._stack.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        super()._enter(module, args)
        self._clock += 1
        self._frames.append(_Frame(self._clock, len(self.record.operators), len(self._read)))

    def _leave_with(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._call(self._frames.pop(), args, kwargs, output)
        self.calls.setdefault(self.here(), []).append(call)
        super()._leave(module, args, output)

    def _call(self, frame: _Frame, args: Any, kwargs: Any, output: Any) -> ModuleCall:
        given = tree_flatten((args, kwargs))[0]
        returned, spec = tree_flatten(output)
        for leaf in returned:
            if isinstance(leaf, Tensor) and not self.is_activation(leaf):
                self._remember(leaf, None, frozenset())
                self._born.setdefault(id(leaf), self._clock)
        return ModuleCall(
            summary_of(args, kwargs),
            tuple(TensorLike.of(leaf) if isinstance(leaf, Tensor) else None for leaf in returned),
            spec,
            tuple(self.record.operators[frame.n_operators :]),
            frozenset(name for tensor in self._read[frame.n_read :] if (name := self.name_of(tensor)) is not None),
            self._refusal(frame, given, returned),
        )

    def _refusal(self, frame: _Frame, given: list[Any], returned: list[Any]) -> str:
        for leaf in given:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                return f"it is given an object of class '{type(leaf).__qualname__}', which may hold activations"
        for leaf in returned:
            if not isinstance(leaf, Tensor | None):
                return f"it returns a value of class '{type(leaf).__qualname__}', which may depend on activations"
        known = {id(leaf) for leaf in given}
        for tensor in self._read[frame.n_read :]:
            is_older = self._born[id(tensor)] < frame.start and self.is_activation(tensor)
            if is_older and id(tensor) not in known:
                return f"it reads an activation of shape {tuple(tensor.shape)} that it was not given"
        return ""
