"""Copies of a network, whatever its forward left on it."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""Where a module keeps what runs before and after its forward."""

Network = TypeVar("Network", bound=nn.Module)


def copied(model: Network, *, shared: Iterable[Tensor] = ()) -> Network:
    """A deep copy of ``model``, in which tensors that follow from others are values of their own.

    Such are features that forward keeps for later, and weights that an old-style `torch.nn.utils.weight_norm` has
    computed: PyTorch refuses to copy them.

    Args:
        model: the network; untouched.
        shared: tensors that the copy takes as they are.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        # Weights of a computed kind lie among the plain attributes, tensors that forward replaced among the buffers.
        held = {name: value for name, value in vars(module).items() if name != "_modules"}
        for leaf in tree_leaves(held):
            if isinstance(leaf, Tensor) and not leaf.is_leaf and id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone()
    found = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            # These are what its own way of copying forgets.
            other = memo[id(module)]
            other._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
            for hooks in FORWARD_HOOKS:
                setattr(other, hooks, copy.deepcopy(getattr(module, hooks), memo))
    return found
