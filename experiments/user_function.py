"""Functions that a user names as ``package.module:function``: a model's constructor, a data source."""

import difflib
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class UserFunctionError(ValueError):
    """A ``package.module:function`` that does not lead to a function."""


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
        raise UserFunctionError(msg) from error
    except Exception as error:
        msg = f"importing '{module_name}' of '{reference}' failed with {type(error).__name__}: {error}"
        raise UserFunctionError(msg) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        nearest = difflib.get_close_matches(function_name, callables, n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        msg = f"module '{module_name}' ({module.__file__}) has no function '{function_name}'{hint}"
        raise UserFunctionError(msg)
    return function  # type: ignore[no-any-return]
