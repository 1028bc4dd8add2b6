"""What an error says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a message; with the type where that makes no sense alone, as of a KeyError, or says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if line and not isinstance(error, LookupError | AssertionError | AttributeError | NameError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def innermost(error: BaseException) -> BaseException:
    """The error that others were raised from: exporters wrap it in advice on what to try next."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
