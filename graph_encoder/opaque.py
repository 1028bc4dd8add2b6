"""Modules that cannot be captured: what is known of their calls, and the tensors that are within their reach."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten

from .network import Operator

PLAIN = (bool, int, float, str, type(None))
"""What may stand beside tensors in the arguments of a module and hides none."""
_BARRED = (type, ModuleType, CodeType, TorchDispatchMode)
"""Objects that refer to far more than a module uses; a pass refers to all the tensors of its run."""


@dataclass(frozen=True)
class TensorLike:
    """Size and type of a tensor of some call."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLike:
        """Of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def on_meta(self) -> Tensor:
        """A meta tensor of this size and type."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module in a run on values.

    Attributes:
        arguments: shape and type of each tensor, and every plain value, that the module was given.
        outputs: its tensors, and None, that it returned.
        spec: how the outputs nest.
        operators: what ran inside, in that order.
        tensors: qualified names of the parameters and buffers that were read.
        refusal: why the call does not tell what the others are like; empty if it does.
    """

    arguments: tuple[object, ...]
    outputs: tuple[TensorLike | None, ...]
    spec: TreeSpec
    operators: tuple[Operator, ...]
    tensors: frozenset[str]
    refusal: str = ""

    @property
    def macs(self) -> int:
        """Multiply-adds for a batch of one."""
        return sum(operator.macs for operator in self.operators)


@dataclass(frozen=True)
class Opaque:
    """The modules of a network that stay as they are.

    Attributes:
        causes: why each cannot be captured, by qualified name.
        calls: their calls in the order of the forward pass, by qualified name; of other modules too.
    """

    causes: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, tuple[ModuleCall, ...]] = field(default_factory=dict)

    def around(self, module: str, cause: str) -> Opaque:
        """With ``module`` in place of those inside it."""
        outside = {name: why for name, why in self.causes.items() if not name.startswith(f"{module}.")}
        return Opaque({**outside, module: cause}, self.calls)

    @property
    def reasons(self) -> dict[str, str]:
        """By qualified name, why each module stays as it is, and what it was taken to cost."""
        return {
            name: (
                f"cannot be captured ({cause}) and stays as it is; the {sum(c.macs for c in self.calls[name]):,} "
                f"multiply-adds counted for it are those of PyTorch's operators on random inputs"
            )
            for name, cause in self.causes.items()
        }


def summary_of(args: Any, kwargs: Any) -> tuple[object, ...]:
    """Shape and type of each tensor among the arguments of a call, and whatever else there is."""
    leaves = tree_flatten((args, kwargs))[0]
    return tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def tensors_within_reach(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that ``module`` refers to: its own, and those in lists, objects and closures that it holds."""
    known: dict[int, Any] = {}
    ahead: list[Any] = [module]
    while ahead:
        item = ahead.pop()
        if id(item) in known or isinstance(item, _BARRED):
            continue
        known[id(item)] = item
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, FunctionType):
            # Not its globals, which lead everywhere.
            ahead += [item.__defaults__, item.__kwdefaults__, *(item.__closure__ or ())]
        else:
            ahead += gc.get_referents(item)


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have each module run another forward; hooks are called as ever."""
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
            if module in own:
                module.__dict__["forward"] = own[module]
