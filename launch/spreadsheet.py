"""Comma-separated tables that a spreadsheet reads as what they say."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

__all__ = ["write_csv"]

FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # a cell of text that begins with one is computed by spreadsheets


def write_csv(file: IO[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and rows; text that a spreadsheet would compute gets an apostrophe in front.

    Args:
        file: open for text.
        columns: names of the columns.
        rows: values by column; other entries are left out, missing ones are empty.
    """
    writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
