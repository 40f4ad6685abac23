"""Names and messages of others cannot control the terminal, nor a spreadsheet."""

from __future__ import annotations

import csv
import io

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from prunesweep.launch.cli import main
from prunesweep.launch.console import PlainConsole, without_controls
from prunesweep.launch.spreadsheet import write_csv

EVIL = "a\x1b]0;title\x07\x1b[2Jb\x9b31mc\u202ed\rz"


def shown(what: object) -> str:
    file = io.StringIO()
    PlainConsole(file=file, force_terminal=True, width=80).print(what, style="red", highlight=False)
    return file.getvalue()


def test_text_tables_and_progress_show_no_foreign_escape() -> None:
    table = Table("name")
    table.add_row(EVIL)
    file = io.StringIO()
    with Progress(TextColumn("{task.description}"), console=PlainConsole(file=file, force_terminal=True)) as bars:
        bars.add_task(EVIL)
    for text in (shown(EVIL), shown(table), file.getvalue()):
        for part in ("\x1b]0", "\x07", "\x1b[2J", "\x9b", "\u202e"):
            assert part not in text
        assert "\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}31m" in text


def test_richs_own_colours_and_plain_text_stay() -> None:
    assert "\x1b[31m" in shown("text")
    assert without_controls("name\twith\nä 漢") == "name\twith\nä 漢"
    assert "[bold]x[/]" in shown("[bold]x[/]")


def test_an_error_message_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "/nowhere/\x1b[2Jmodel"])
    assert "\x1b[2J" not in capsys.readouterr().err


def test_text_that_a_spreadsheet_would_compute_is_quoted() -> None:
    file = io.StringIO()
    write_csv(
        file, ["name", "value"], [{"name": text, "value": -1.5} for text in ("=1+1", "+a", "-a", "@a", "\ta", "a=b")]
    )
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["name"] for row in rows] == ["'=1+1", "'+a", "'-a", "'@a", "'\ta", "a=b"]
    assert {row["value"] for row in rows} == {"-1.5"}
