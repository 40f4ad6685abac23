"""The commands that are shown at the end of others are ones that the command line takes."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import typer
from rich.console import Console

from prunesweep.launch.cli import app
from prunesweep.launch.next_commands import after_model, after_search, show_next


def parse(command: str) -> dict[str, object]:
    """Parameters that the command line reads from a command, which is not run."""
    program, name, *arguments = shlex.split(command)
    assert program == "prunesweep"
    group = typer.main.get_command(app)
    with group.make_context(program, [name, *arguments]) as context:
        _, found, rest = group.resolve_command(context, [name, *arguments])  # type: ignore[attr-defined]
        return dict(found.make_context(name, rest).params)


def test_commands_after_a_search_are_taken_and_can_be_copied() -> None:
    run = "runs/my digits"
    models = [f"{run}/front/01", f"{run}/front/02"]
    found = dict(after_search(run, models, links=True))
    assert parse(found["look"])["run"] == Path(run)
    assert parse(found["train the best in full"])["top"] == 1
    assert str(parse(found["export one"])["model"]) == models[0]
    assert found["measure speed"] == "prunesweep bench 'runs/my digits'/front/* --source 'runs/my digits'/source"
    assert parse(dict(after_search(run, models, links=False))["measure speed"])["names"] == models
    assert list(after_search(run, [], links=True)) == []
    console = Console(file=io.StringIO(), width=40)
    show_next(console, list(found.items()))
    assert found["measure speed"] in console.file.getvalue()  # type: ignore[attr-defined]


def test_commands_after_a_model_was_made_are_taken(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    found = dict(after_model("a b/0.5", str(tmp_path / "source"), "imagefolder:/x y"))
    given = parse(found["finetune"])
    assert (given["model"], given["data"], given["teacher"]) == (
        Path("a b/0.5"),
        "imagefolder:/x y",
        tmp_path / "source",
    )
    assert parse(found["measure speed"])["source"] == str(tmp_path / "source")
    assert "--teacher" not in dict(after_model("m", "vit_tiny_patch16_224", "digits"))["finetune"]
    assert "finetune" not in dict(after_model("m", "s"))
