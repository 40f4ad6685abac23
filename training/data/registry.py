"""The table of kinds of data sets, and opening one by its name, ``KIND`` or ``KIND:PATH``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prunesweep.models import UserError

from .base import ClassOrder, Data, OpenOptions

if TYPE_CHECKING:
    from .text import TextData

__all__ = ["KINDS", "absolute_name", "check_data_name", "open_data", "open_text", "register"]

KINDS: dict[str, type[Data]] = {}
Kind = TypeVar("Kind", bound=type[Data])


def register(kind: Kind) -> Kind:
    """Add a kind of data sets to the table under its ``kind``; a class decorator.

    Raises:
        ValueError: another kind has that name.
    """
    if KINDS.get(kind.kind, kind) is not kind:
        raise ValueError(f"data kind {kind.kind!r} is registered already")
    KINDS[kind.kind] = kind
    return kind


def absolute_name(name: str) -> str:
    """Return a data set's name with an absolute path, so that it names the same data in any process and folder.

    A URL is left as it is.
    """
    kind, _, path = name.partition(":")
    if kind in KINDS and KINDS[kind].argument == "PATH" and path and not (KINDS[kind].urls and "://" in path):
        try:
            return f"{kind}:{Path(path).expanduser().absolute()}"
        except RuntimeError as error:  # ~user with an unknown user
            raise UserError(f"data.name = {name!r}: {error}") from error
    return name


def _find(name: str) -> tuple[type[Data], str] | None:
    """Return the kind of a named data set, and what follows the colon; None if the kind is unknown."""
    kind, colon, argument = absolute_name(name).partition(":")
    found = KINDS.get(kind)
    if found is None or bool(found.argument) != bool(argument) or (colon and not argument):
        return None
    return found, argument


def _forms(*, texts: bool) -> str:
    from .text import TextData

    kinds = [kind for kind in KINDS.values() if issubclass(kind, TextData) is texts]
    kinds.sort(key=lambda kind: ("", "PATH", "NAME", "MODULE:FUNCTION").index(kind.argument))
    return ", ".join(map(_form, kinds))


def _form(kind: type[Data]) -> str:
    return f"'{kind.kind}:{kind.argument}'" if kind.argument else f"'{kind.kind}'"


def _listed(forms: str, word: str) -> str:
    return f" {word} ".join(forms.rsplit(", ", 1))


def check_data_name(name: str, options: Mapping[str, Any]) -> tuple[type[Data], str]:
    """Check a name, and that options concern its kind of data, before anything is opened.

    Args:
        name: as for ``open_data``.
        options: of its keyword arguments; others than ``class_order`` and ``classes`` are for every kind.

    Returns:
        The kind of the data, and what follows it in the name.

    Raises:
        UserError: the name is unknown or a URL that this kind does not read, or an option does not concern it.
    """
    found = _find(name)
    if found is None:
        known = f"{_listed(_forms(texts=False), 'or')}; of texts, {_listed(_forms(texts=True), 'or')}"
        raise UserError(f"data.name = {name!r}: must be {known}")
    if found[0].argument == "PATH" and "://" in name and not found[0].urls:
        able = ", ".join(f"{kind.kind}:URL" for kind in KINDS.values() if kind.urls)
        raise UserError(f"data.name = {name!r}: must be a folder that this machine sees; from a URL read: {able}")
    for option in ("class_order", "classes"):
        if options.get(option) is not None and option not in found[0].class_options:
            for_it = [_form(kind) for kind in KINDS.values() if option in kind.class_options]
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"data.{option} ({flag}): is for {_listed(', '.join(for_it), 'and')}, not for {name!r}")
    return found


def open_data(
    name: str,
    preprocessing: Mapping[str, Any] | None = None,
    *,
    loader_workers: int = 0,
    class_order: ClassOrder | None = None,
    classes: Sequence[str] | str | Path | None = None,
    unreadable: float = 0.001,
    search_split: float = 0.0,
) -> Data:
    """Open a data set by name.

    Args:
        name: ``digits``, ``glyphs``, ``imagefolder:PATH``, ``images:PATH``, ``wds:PATH`` or ``hfds:NAME``; ``pydocs``
            or ``wikitext:PATH``.
        preprocessing: a timm model's ``pretrained_cfg``, which gives the preprocessing; ``digits`` and ``glyphs``
            have their own.
        loader_workers: processes that load and augment images; 0 does it in this process.
        class_order: order in which class folders are numbered: ``natural`` (timm's) or ``codepoint`` (torchvision's).
            By default folders are matched with the model's ``label_names`` by name; where it has none, or none of them
            is a folder's, the order is timm's. Where only some are folders' names, an order must be given.
        classes: class names by label, or a file with one name per line. Of data whose labels are numbers, names of
            these numbers.
        unreadable: share of a split's images that may be unreadable (10 images always may).
        search_split: share of the training images that becomes the validation split instead (``SearchSplit``).

    Raises:
        UserError: the name is unknown, or the data are not there or not as they must be, or an option does not concern
            this kind of data.
    """
    found = check_data_name(name, {"class_order": class_order, "classes": classes})
    options = OpenOptions(
        preprocessing=preprocessing or {},
        loader_workers=loader_workers,
        class_order=class_order,
        classes=classes,
        unreadable=unreadable,
    )
    data = found[0].open(found[1], options)
    if not search_split:
        return data
    from .search_split import SearchSplit

    return SearchSplit(data, search_split)


def open_text(
    name: str, preprocessing: Mapping[str, Any], *, context: int = 0, length: int | None = None, loader_workers: int = 0
) -> TextData:
    """Open a text by name.

    Args:
        name: ``pydocs`` or ``wikitext:PATH``.
        preprocessing: a model's ``pretrained_cfg``. If it is a language model's, pieces are as long as its texts;
            otherwise 64 words of ``pydocs``, and 512 of other texts (fairseq's ``tokens_per_sample``).
        context: words of every piece of validation that are seen but not predicted.
        length: words in a piece, instead of the model's; sinusoidal position embeddings have any length.
        loader_workers: processes that make pieces; 0 does it in this process.

    Raises:
        UserError: the name is not a text's, a file is missing or not a text, ``dict.txt`` is not a dictionary, or
            ``context`` leaves nothing to predict.
    """
    from .text import TextData

    found = _find(name)
    if found is None or not issubclass(found[0], TextData):
        forms = _listed(_forms(texts=True), "and")
        raise UserError(f"{name!r} is no text: length, context and the test split are for {forms}")
    options = OpenOptions(preprocessing=preprocessing, loader_workers=loader_workers, length=length, context=context)
    return found[0].open(found[1], options)
