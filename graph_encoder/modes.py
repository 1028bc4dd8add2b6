"""Putting a network into evaluation mode for a while, and leaving no trace of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what every module of ``model`` holds, at the end.

    A forward may keep what it has made for the next call, a grid of positions for one: made from shapes alone, or in
    inference mode, it is of no use to the next. Tensors are not copied, so values changed in place stay changed.
    """
    before = [(module, _held(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, (attributes, contents) in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                # The same object, for others may hold it: handles of hooks do.
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(content)


def _held(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    attributes = dict(vars(module))
    return attributes, [(value, value.copy()) for value in attributes.values() if isinstance(value, dict | list)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into evaluation mode, and each back into its own mode at the end.

    One flag for the whole model would thaw a batch norm that its owner had frozen inside a training model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
