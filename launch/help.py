"""Help texts: shown as they are written, and for methods, made from their table when the help is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from typer import Exit
from typer.core import HAS_RICH, TyperCommand, TyperGroup

from .console import say_interrupted

__all__ = ["MethodCommand", "PlainGroup", "ScoringCommand"]

INTERRUPTED = 130  # exit code


def _plain(text: str | None) -> str | None:
    """Keep square brackets, which typer would take for markup and leave out, as in ``[default: runs/NAME]``."""
    return escape(text) if text and HAS_RICH else text


class PlainGroup(TyperGroup):
    """A group of commands whose help is shown as it is written, that of its commands and of all their options too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in (self, *self.commands.values()):
            for name in ("help", "short_help", "epilog"):
                setattr(command, name, _plain(getattr(command, name)))
            for parameter in command.params:
                _set_help(parameter, getattr(parameter, "help", None))

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command, and say so where Ctrl-C ended it: typer would exit with 130 and nothing else."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            say_interrupted(error)
            raise Exit(INTERRUPTED) from error


def _set_help(parameter: Any, text: str | None) -> None:
    parameter.help = _plain(text)


class MethodCommand(TyperCommand):
    """A command with an option ``--method`` whose help says of every method when it decides, and what it takes.

    That is not written where the option is declared: the table loads torch, which takes seconds, and other commands do
    not need it.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from prunesweep.pruners import METHODS

        groups: dict[str, list[str]] = {}
        for name in self.listed():
            groups.setdefault(METHODS[name].when, []).append(name)
        for parameter in self.params:
            if parameter.name == "method":
                _set_help(parameter, "; ".join(f"{when}: {', '.join(names)}" for when, names in groups.items()))
        lines = [f"{n}: {METHODS[n].description}. {self.takes(n)}".strip() for names in groups.values() for n in names]
        self.epilog = _plain("\n\n".join([*lines, *self.notes()]))
        super().format_help(ctx, formatter)

    def listed(self) -> Iterable[str]:
        """The names of the methods that the command serves."""
        from prunesweep.pruners import METHODS

        return METHODS

    def takes(self, name: str) -> str:
        """The options of the command that mean something to a method, as a sentence."""
        from .prune_kinds import find_method, runner_of

        method = find_method(name)
        options = sorted(runner_of(method).takes(method))
        settings = f" ({', '.join(method.option_names)})" if "--set" in options else ""
        return f"Takes {', '.join(options)}{settings}." if options else ""

    def notes(self) -> Iterable[str]:
        """What is said below the methods."""
        yield (
            "All take the other options, --finetune, --set finetune.NAME=VALUE and --workers among them. Settings with "
            "their defaults: prunesweep methods NAME; recipes: prunesweep recipes."
        )


class ScoringCommand(MethodCommand):
    """A command with an option ``--method`` whose help lists the methods that score."""

    def listed(self) -> Iterable[str]:
        """The names of the methods that score."""
        from prunesweep.pruners import ScoredMethod, method_names

        return method_names(ScoredMethod)

    def takes(self, name: str) -> str:
        """Nothing: all of them take the same options."""
        return ""

    def notes(self) -> Iterable[str]:
        """Nothing."""
        return ()
