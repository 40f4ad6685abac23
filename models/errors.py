"""UserError, the one error type whose message is meant for the user, not for the developer."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Interrupted", "NotHere", "UserError", "explain", "nearest", "plainly", "shown"]


# what is expected, by pydantic's name of the error; its own messages speak of Python's types
EXPECTED = {
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "string_type": "must be a text in quotes",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


class UserError(ValueError):
    """Something that the user gave is wrong; the message says what, where, what is allowed, and what to do.

    The command line prints it without a traceback and exits with 2. Every other exception is a defect of ours.
    """


class NotHere(UserError):
    """Data, weights or a package are not on this machine. Elsewhere, or later, the same command may run."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in work that can go on; the message says how, in one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the closest known word, as the end of an error message.

    Args:
        word: what the user wrote.
        known: the words that exist.

    Returns:
        ``did you mean 'x'?``, or an empty string where no word is close.
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else ""


def explain(problem: Mapping[str, Any], known: Iterable[str]) -> str:
    """Write one of pydantic's validation errors as one line.

    Args:
        problem: an entry of ``ValidationError.errors()``.
        known: names of the fields that exist, for an unknown one.
    """
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = list(known)
        return f"{key}: unknown field; known: {', '.join(names)}. {nearest(str(problem['loc'][-1]), names)}".strip()
    message = plainly(problem)
    return f"{key} = {shown(problem['input'])}: {message}" if key else message


def plainly(problem: Mapping[str, Any]) -> str:
    """Return what one of pydantic's validation errors says, in the words of configuration files.

    Args:
        problem: an entry of ``ValidationError.errors()``.
    """
    message = str(problem["msg"]).removeprefix("Value error, ")
    return EXPECTED.get(problem["type"], message)


def shown(value: Any) -> str:
    """Return a value as it is written, cut short in the middle where it is long."""
    return _SHORT.repr(value)
