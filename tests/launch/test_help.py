"""Help says what it was written to say: nothing in square brackets is taken for markup, methods say what they take."""

from __future__ import annotations

import re

import pytest
import typer.main
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.launch.prune_kinds import runner_of
from prunesweep.pruners import METHODS, ScoredMethod, method_names

DRAWN = re.compile(r"[│╭╮╰╯─]")


def shown(*arguments: str) -> str:
    """The output of a command on a wide terminal, without boxes and with single spaces."""
    output = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"}).output
    return " ".join(DRAWN.sub(" ", output).split())


def written() -> dict[str, list[str]]:
    """Every text in the help of every command, as it is in the code."""
    found: dict[str, list[str]] = {}
    for info in app.registered_commands:
        command = typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")
        texts = [command.help, *(getattr(one, "help", None) for one in command.params)]
        found[str(command.name)] = [text for text in texts if text]
    return found


@pytest.mark.parametrize(("command", "texts"), written().items())
def test_no_bracketed_text_is_lost(command: str, texts: list[str]) -> None:
    output = shown(command, "--help")
    bracketed = [part for text in texts for part in re.findall(r"\[[^\]]*\]", text)]
    assert [part for part in bracketed if " ".join(part.split()) not in output] == []


def test_there_are_brackets_to_lose() -> None:
    assert sum(text.count("[default: ") for texts in written().values() for text in texts) > 10


def test_the_list_of_commands_keeps_brackets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = next(info.callback for info in app.registered_commands if info.name == "eval")
    monkeypatch.setattr(callback, "__doc__", "Measure [a thing]. And more.")
    assert "Measure [a thing]." in shown("--help")


def test_prunes_help_says_what_every_method_takes() -> None:
    output = shown("prune", "--help")
    for method in METHODS.values():
        said = output.split(f"{method.name}: {method.description}. ")[1].split(". ")[0]
        options = runner_of(method).takes(method)
        assert set(re.findall(r"--[a-z-]+", said)) == options or not options
    ratios = "isomorphic: Taylor importance, ranked among structures of one kind, cut by ratios."
    assert (
        f"{ratios} Takes --budget, --measure, --project, --recover, --recover-images, --scores, --set (round_to)."
        in output
    )


def test_scores_help_lists_the_methods_that_score() -> None:
    output = shown("score", "--help")
    for name, method in METHODS.items():
        assert (f"{name}: {method.description}" in output) == (name in method_names(ScoredMethod))
