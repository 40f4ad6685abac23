"""What to do next with what a command has made: lines that can be copied to the shell as they are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

__all__ = ["after_model", "after_search", "after_stored", "show_next"]


def show_next(console: Console, commands: Sequence[tuple[str, str]]) -> None:
    """Print commands, each with what it does, below ``next:``.

    Args:
        console: where to print.
        commands: pairs of what it does and the command.
    """
    if commands:
        console.print("next:", highlight=False)
    width = max((len(what) for what, _ in commands), default=0)
    for what, command in commands:
        console.print(f"  {what:{width}}  {command}", highlight=False, markup=False, soft_wrap=True)


def after_search(run: str, models: Sequence[str], *, links: bool, text: bool = False) -> Iterator[tuple[str, str]]:
    """Yield what can be done with a search's front.

    Args:
        run: its folder, as a user would type it.
        models: folders of the front's models, ascending in cost.
        links: the run has links to them, ``front/01`` and so on.
        text: they are language models.
    """
    if not models:
        return
    folder = shlex.quote(run)
    every = f"{folder}/front/*" if links else shlex.join(models)
    yield "look", f"prunesweep watch {folder}"
    if text:
        return
    yield "measure speed", f"prunesweep bench {every} --source {folder}/source"
    yield "train the best in full", f"prunesweep promote {folder} --recipe gentle --top 1"
    yield "export one", f"prunesweep export {shlex.quote(models[0])} --to onnx"


def after_stored(url: str) -> list[tuple[str, str]]:
    """List what can be done with a run on an object store."""
    place = shlex.quote(url)
    return [("look", f"prunesweep watch {place}"), ("bring it here", f"prunesweep fetch {place}")]


def after_model(model: str, source: str, data: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield what can be done with a model that was made.

    Args:
        model: its folder.
        source: of the model that it was made from, a folder or a timm name.
        data: to finetune it on; nothing is said of finetuning without.
    """
    quoted, teacher = shlex.quote(model), shlex.quote(source)
    if data is not None:
        out = shlex.quote(f"{model.rstrip('/')}-finetuned")
        of = f" --teacher {teacher}" if Path(source).exists() else ""
        yield "finetune", f"prunesweep finetune {quoted} --data {shlex.quote(data)} --recipe gentle{of} --out {out}"
    yield "measure speed", f"prunesweep bench {quoted} --source {teacher}"
    yield "export", f"prunesweep export {quoted} --to onnx"
