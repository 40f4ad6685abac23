"""Functions of one's own that a configuration names: ``python:MODULE:FUNCTION``, in any process that may import it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prunesweep.models import UserError

__all__ = ["MODULES", "PREFIX", "allow", "allow_modules", "allowed_modules", "find_named", "name_of"]

MODULES = "PRUNESWEEP_MODULES"  # environment: modules, by commas, whose functions a configuration may name
PREFIX = "python:"
F = TypeVar("F", bound=Callable[..., Any])


def allow(function: F, mark: str, value: object = True) -> F:
    """Let configurations name a function, in this process and in those that it starts; return it.

    Args:
        function: of a module that every process can import.
        mark: attribute that says what it is for.
        value: of that attribute.
    """
    setattr(function, mark, value)
    allow_modules([function.__module__])
    return function


def allow_modules(modules: Iterable[str]) -> None:
    """Let configurations name functions of these modules, in this process and in those that it starts."""
    known = allowed_modules()
    if new := [name for name in dict.fromkeys(modules) if name not in known]:
        os.environ[MODULES] = ",".join([*known, *new])


def allowed_modules() -> list[str]:
    """Modules whose functions configurations may name in this process.

    A process of a Ray that was there before them has to be told: it has the environment of when that began.
    """
    return [name.strip() for name in os.environ.get(MODULES, "").split(",") if name.strip()]


def find_named(name: str, key: str, mark: str, decorator: str) -> Any:
    """Import the function that a configuration names.

    Args:
        name: ``python:MODULE:FUNCTION``.
        key: of the configuration, for messages.
        mark: attribute that the function must have.
        decorator: what gives it that attribute, for messages.

    Raises:
        UserError: nobody has allowed its module, which cannot be imported, or has no such function.
    """
    said = f"{key} = {name!r}"
    place, colon, function = name.removeprefix(PREFIX).rpartition(":")
    if not colon:
        raise UserError(f"{said}: must be python:MODULE:FUNCTION")
    if place not in allowed_modules():
        raise UserError(
            f"{said}: names code, which a configuration alone does not run: set {MODULES}={place}, "
            f"or import {place} first"
        )
    try:
        found = getattr(importlib.import_module(place), function, None)
    except ImportError as error:
        raise UserError(
            f"{said}: {error}; the module must be one that every process can import: install it, or "
            "put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"{said}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if found is None or not hasattr(found, mark):
        raise UserError(f"{said}: is no function with the decorator {decorator}")
    return found


def name_of(function: Callable[..., Any], key: str) -> str:
    """Return ``python:MODULE:FUNCTION`` of a function.

    Args:
        function: at the top of a module.
        key: what is given it, for the message.

    Raises:
        UserError: other processes could not import it.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        raise UserError(
            f"{key}: {name or function!r} of {module} is not seen by other processes: define it at the top of a module "
            "that can be imported, and import it from there"
        )
    return f"{PREFIX}{module}:{name}"
