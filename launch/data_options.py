"""The options with which a command reads labelled images: which class has which label, and what may be unreadable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["UNREADABLE", "ClassOrderOption", "ClassesOption", "UnreadableOption", "check_data", "data_options"]

UNREADABLE = 0.001

ClassOrderOption = Annotated[
    Literal["natural", "codepoint"] | None,
    typer.Option(
        help="number class folders by position, in timm's order (natural) or torchvision's (codepoint); without it, by "
        "the model's class names, and in natural order where it has none of these",
        show_default=False,
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        help="class names by label: a file with one per line, or names with commas between them", show_default=False
    ),
]
UnreadableOption = Annotated[
    float, typer.Option(min=0, max=1, help="share of a split's images that may be unreadable; 10 always may")
]


def check_data(name: str, options: Mapping[str, Any]) -> None:
    """Check what ``--data`` names, before anything is opened.

    Args:
        name: of the data.
        options: what ``data_options`` gave.

    Raises:
        UserError: there are no such data, or an option does not concern them.
    """
    from prunesweep.models import UserError
    from prunesweep.training.data import check_data_name

    kind, argument = check_data_name(name, options)
    if kind.argument == "PATH" and not Path(argument).exists():
        raise UserError(f"--data {name}: {argument} does not exist")


def data_options(class_order: str | None, classes: str | None, unreadable: float = UNREADABLE) -> dict[str, Any]:
    """Return keyword arguments of ``open_data``, JSON-ready: a file of names is read here, for processes elsewhere too.

    Raises:
        UserError: the file of names cannot be read, or a name is there twice.
    """
    from prunesweep.training.data import read_names

    named: Any = classes
    if classes is not None and "," in classes and not Path(classes).expanduser().exists():
        named = [name.strip() for name in classes.split(",")]
    names = None if named is None else list(read_names(named))
    return {"class_order": class_order, "classes": names, "unreadable": unreadable}
