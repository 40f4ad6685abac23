"""The console that commands print on: plain text, of which no character controls the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

__all__ = ["PlainConsole", "say_interrupted", "without_controls"]

# C0 but for tab and newline, C1, and those that reorder what follows
_CONTROLS = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
SHOWN = "\N{REPLACEMENT CHARACTER}"  # as wide as it is laid out
_TABLE = dict.fromkeys(_CONTROLS, SHOWN)


def without_controls(text: str) -> str:
    """Replace characters that a terminal obeys, as in escape sequences, by a visible one; tabs and newlines stay.

    Args:
        text: what may have come from somebody else: names of files, classes, hosts, messages.
    """
    return text.translate(_TABLE)


class PlainConsole(Console):
    """A console of rich's without markup, on which names and messages of others can do nothing but be read.

    Args:
        options: of ``rich.console.Console``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; only sequences that rich itself has made for the terminal stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


def say_interrupted(error: KeyboardInterrupt) -> None:
    """Print in one line that Ctrl-C ended the command, and how it goes on where the error says so (``Interrupted``)."""
    how = f"; {error}" if str(error) else ""
    PlainConsole(stderr=True).print(f"interrupted{how}", highlight=False, soft_wrap=True)
