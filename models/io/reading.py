"""Reading files of text that users or other programs may have changed: one error that says file, place and reason."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunesweep.models.errors import UserError

__all__ = ["parse_json", "parse_toml", "read_json", "read_toml"]


def read_json(path: Path, *, what: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what a user's file is called in messages; by default it is one that this package wrote.

    Raises:
        UserError: it is missing, cannot be read, or is not JSON; the message names the file, the place and the reason.
    """
    return _read(path, what, parse_json, "JSON")


def read_toml(path: Path, *, what: str = "") -> dict[str, Any]:
    """Read a TOML file; arguments and errors as for ``read_json``."""
    found: dict[str, Any] = _read(path, what, parse_toml, "TOML")
    return found


def parse_json(text: str | bytes) -> Any:
    """Read JSON. Raises ValueError with the place and the reason where it is none."""
    return _parsed(json.loads, text)


def parse_toml(text: str) -> dict[str, Any]:
    """Read TOML. Raises ValueError with the place and the reason where it is none."""
    found: dict[str, Any] = _parsed(tomllib.loads, text)
    return found


def _parsed(parse: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        return parse(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _read(path: Path, what: str, parse: Callable[[str], Any], form: str) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # reading a pipe would wait for ever
        return parse(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        reason = f"is no text in UTF-8: {error}"
    except OSError as error:
        if what:
            raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = f"is not {form}: {error}"
    raise UserError(f"{path} {reason}" if what else f"{path} is damaged or missing: {reason}")
