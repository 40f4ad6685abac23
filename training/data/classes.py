"""Match the classes of data with those of a model: by name where both have names, otherwise by position."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunesweep.models import UserError

__all__ = ["matched_names", "model_names", "read_names", "renumbered"]

SHOWN = 5  # names that a message lists of a kind


def read_names(given: Any) -> tuple[str, ...]:
    """Read class names by label.

    Args:
        given: a list of names, or a file with one name per line.

    Raises:
        UserError: the file cannot be read, there are no names, or one is there twice.
    """
    if isinstance(given, str | Path):
        file = Path(given).expanduser()
        try:
            names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.classes = {str(given)!r}: cannot be read: {error}") from error
    else:
        names = tuple(map(str, given))
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise UserError(f"data.classes: {f'{twice[0]!r} is there twice' if twice else 'no names'}")
    return names


def model_names(preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes by label, timm's ``label_names``; none if it has none."""
    own = preprocessing.get("label_names")
    return tuple(map(str, own)) if isinstance(own, list | tuple) else ()


def matched_names(name: str, names: Sequence[str], preprocessing: Mapping[str, Any], remedy: str) -> tuple[str, ...]:
    """Return the class names by label in the model's order if they are those of the data; none if labels are positions.

    Args:
        name: name of the data set, for messages.
        names: its class names.
        preprocessing: the model's ``pretrained_cfg``.
        remedy: what to do where names match in part.

    Raises:
        UserError: only some of the names are those of the model's classes.
    """
    own = model_names(preprocessing)
    if not own or len(own) != len(names):  # where the numbers of classes differ, the model does not fit the data
        return ()
    same = set(own) & set(names)
    if len(same) == len(names):
        return own
    here, there = ([c for c in some if c not in same] for some in (names, own))
    if same:
        raise UserError(
            f"data {name!r}: {len(same)} of {len(names)} classes have names of the model's classes "
            f"({_listed([c for c in names if c in same])}), the others have not ({_listed(here)} in the data, "
            f"{_listed(there)} in the model), so it is not known which class is which: {remedy}"
        )
    warnings.warn(
        f"data {name!r}: the model's classes are named otherwise ({_listed(here)} in the data, {_listed(there)} in the "
        "model): labels are its classes by position; data.classes or --classes gives another order",
        stacklevel=2,
    )
    return ()


def renumbered(
    name: str, names: Sequence[str], preprocessing: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[int, int] | None]:
    """Return the class names by label and, for data whose labels are numbers, the new number of each number.

    Args:
        name: name of the data set, for messages.
        names: names of the numbers, in order.
        preprocessing: the model's ``pretrained_cfg``.

    Returns:
        The names in the model's order, and the model's label of each number; ``names`` and None where labels stay as
        they are.

    Raises:
        UserError: as for ``matched_names``.
    """
    remedy = "give the data's numbers the model's names (data.classes or --classes), in the order of the numbers"
    own = matched_names(name, names, preprocessing, remedy)
    if own in ((), tuple(names)):
        return tuple(names), None
    return own, {number: own.index(one) for number, one in enumerate(names)}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
