"""Functions by name, "module:function". Knows no process."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ray_pipeline.errors import UserError, did_you_mean


def import_function(name: str, role: str) -> Callable[..., Any]:
    """The function that "module:function" means; modules of the working folder are found too.

    Args:
        role: what it is used as, for the message: "reward", "tool".
    Raises:
        UserError: the module or the function is not there, or the import fails.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f'{role} "{name}": write module:function, for example my_{role}s:{role}.')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script's own folder is on the path, the user's is not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001  a user's module may raise anything
        raise UserError(
            f'{role} "{name}": importing {module_name} failed ({type(error).__name__}: {error}). '
            "Run from the folder it lies in, or install it."
        ) from None
    found = getattr(module, function_name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f'{role} "{name}": {module_name} has no function "{function_name}"{did_you_mean(function_name, there)}.'
        )
    return found  # type: ignore[no-any-return]


def address(function: Callable[..., Any], role: str) -> str:
    """ "module:function" by which another process finds a function.

    Raises:
        UserError: it is not at the top of an importable module.
    """
    name: str = getattr(function, "__qualname__", "")
    module: str = getattr(function, "__module__", "")
    if not name.isidentifier() or module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise UserError(
            f"{role} {function!r}: processes of their own call it, so it must be a function at the top of a module "
            "that can be imported. Move it into a file, and name it as module:function."
        )
    return f"{module}:{name}"


def entry_points(group: str) -> Iterator[tuple[str, Any]]:
    """(name, what it means) of each entry point that installed packages bring.

    Raises:
        UserError: one cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group=group):
        try:
            yield entry.name, entry.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f'the entry point "{entry.name}" of {group} ({entry.value}) cannot be loaded: {error}. '
                "Fix or uninstall the package that brings it."
            ) from None
