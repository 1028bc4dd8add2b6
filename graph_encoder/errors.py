"""The errors that a user can mend, and what an error says, in one line."""

from __future__ import annotations

import re

from torch import fx, nn


class SecateurError(Exception):
    """An error that a user can mend: the message says what was found, where, what is allowed and what to do.

    What is raised is of a class below this one, and of one of Python's own.
    """


def first_line(error: BaseException) -> str:
    """The first line of a message; with the type where that makes no sense alone, as of a KeyError, or says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if line and not isinstance(error, LookupError | AssertionError | AttributeError | NameError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def why_not_exported(error: BaseException, model: nn.Module) -> str:
    """What keeps ``model`` from being a program of PyTorch, in one line, of the error that its exporter raised."""
    line = first_line(_innermost(error))
    # A program holds the network's own parts beside attributes of its own, and fails where it looks for one of them.
    program = fx.GraphModule(nn.Module(), fx.Graph())
    for name in (*model._modules, *model._parameters, *model._buffers):
        if hasattr(program, name) and re.search(rf"\b{name}\b", line):
            return (
                f"its '{name}' has the name of an attribute of PyTorch's programs, which nothing that the network "
                "itself holds may have; give it another name"
            )
    return line


def _innermost(error: BaseException) -> BaseException:
    """The error that others were raised from: exporters wrap it in advice on what to try next."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
