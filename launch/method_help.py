"""Command classes whose help lists the pruning methods, read from their table when the help is shown."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["MethodCommand", "ScoringCommand"]


class MethodCommand(TyperCommand):
    """A command with an option ``--method`` whose help lists the methods, by when a method decides.

    The list is not made where the option is declared: the table loads torch, which takes seconds, and other commands do
    not need it.
    """

    scored_only = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from prunesweep.pruners import METHODS, ScoredMethod

        groups: dict[str, list[str]] = {}
        for name, method in METHODS.items():
            if isinstance(method, ScoredMethod) or not self.scored_only:
                groups.setdefault(method.when, []).append(name)
        for parameter in self.params:
            if parameter.name == "method":
                listed = "; ".join(f"{when}: {', '.join(names)}" for when, names in groups.items())
                parameter.help = listed  # type: ignore[attr-defined]  # options have one
        self.epilog = "\n\n".join(f"{name}: {METHODS[name].description}" for names in groups.values() for name in names)
        super().format_help(ctx, formatter)


class ScoringCommand(MethodCommand):
    """A command with an option ``--method`` whose help lists the methods that score."""

    scored_only = True
