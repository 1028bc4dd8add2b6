"""Functions that a user names as ``package.module:function``: a model's constructor, a data source."""

import difflib
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graph_encoder.errors import SecateurError

_OWN = ("agent", "envs", "experiments", "graph_encoder", "latency", "pruning")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class UserFunctionError(SecateurError, ValueError):
    """A ``package.module:function`` that does not lead to a function, or a function that fails."""


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:function``."""
    return _REFERENCE.fullmatch(text) is not None


def load_function(reference: str) -> Callable[..., Any]:
    """Import the function that ``reference`` (``package.module:function``) names.

    The working directory is appended to the import path, never put first: a user's ``random.py`` must not shadow the
    standard library's.

    Raises:
        UserFunctionError: if the module cannot be found, fails while it is imported, or holds no such function.
    """
    module_name, _, function_name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            msg = f"'{module_name}' of '{reference}' needs the module '{error.name}', which is not installed"
            raise UserFunctionError(msg) from error
        msg = (
            f"no module '{error.name}' for '{reference}': it must be installed or lie in the working directory '{here}'"
        )
        package, _, _ = module_name.partition(".")
        if package in _OWN and (Path(here) / package).exists():
            own = Path(__file__).parent.parent / package
            msg += f"; '{package}' is Secateur's own package '{own}': give yours in the working directory another name"
        raise UserFunctionError(msg) from error
    except Exception as error:
        msg = f"importing '{module_name}' of '{reference}' failed{_place(error)} with {type(error).__name__}: {error}"
        raise UserFunctionError(msg) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        nearest = difflib.get_close_matches(function_name, callables, n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        msg = f"module '{module_name}' ({module.__file__}) has no function '{function_name}'{hint}"
        raise UserFunctionError(msg)
    return function  # type: ignore[no-any-return]


def call_function(reference: str, offered: Mapping[str, Any], to_any: Mapping[str, Any] | None = None) -> Any:
    """Call the function that ``reference`` names with those of the ``offered`` arguments that it has parameters for.

    Args:
        reference: ``package.module:function``.
        offered: arguments by name.
        to_any: those of them that one that takes any keywords gets, whatever they are called; none if not given.

    Raises:
        UserFunctionError: if it cannot be loaded, needs other arguments, or raises; the message names the line.
    """
    function = load_function(reference)
    try:
        passed = _accepted(function, offered, to_any or {})
        inspect.signature(function).bind(**passed)
    except (TypeError, ValueError) as error:  # a built-in type may have no signature
        passes = "no arguments"
        if offered:
            passes = f"{_arguments(offered)} as keywords, each if there is a parameter of that name"
        msg = (
            f"'{reference}' cannot be called: {error}. Secateur passes {passes}; give "
            f"{'the others' if offered else 'every parameter'} a default, or name a function that sets them"
        )
        raise UserFunctionError(msg) from error
    return call(f"'{reference}', called with {_arguments(passed)},", function, passed)


def call(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a user's function returns.

    Raises:
        UserFunctionError: if it raises; the message starts with ``what`` and names the line.
    """
    try:
        return function(**arguments)
    except Exception as error:
        msg = f"{what} failed{_place(error)} with {type(error).__name__}: {error}"
        raise UserFunctionError(msg) from error


def _accepted(function: Callable[..., Any], offered: Mapping[str, Any], to_any: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    by_name = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        by_name |= to_any.keys()
    return {name: value for name, value in offered.items() if name in by_name}


def _arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) or "no arguments"


def _place(error: Exception) -> str:
    """Where in the user's own code it happened: the innermost frame that is neither a library's nor this module's."""
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and not frame.filename.startswith("<")
        and not any(Path(frame.filename).is_relative_to(folder) for folder in libraries)
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
