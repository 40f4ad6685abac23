"""One error for a file that is not what it must be; and all files are read through it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.models.io.reading import read_json, read_toml

PACKAGES = ("models", "pruners", "training", "search", "launch")
# json.loads or tomllib.loads of what a file holds; pack.py runs where only Python is
READERS = re.compile(r"(json|tomllib)\.loads?\([^\n]*(read_text|read_bytes|open\()")
ELSEWHERE = {"models/io/lock.py", "models/io/store.py", "launch/cluster/pack.py"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is not JSON: Expecting value: line 1"),
        (b'{"a": 1,\n}', r"is not JSON: .*line 2 column 1"),
        (b"\xff\xfe{\0", "is no text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (None, "No such file"),
        ("pipe", "it is no file"),
        ("folder", "it is no file"),
    ],
)
def test_json_that_is_none(content: bytes | str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json is damaged or missing: .*{reason.removeprefix('is ')}"):
        read_json(path)
    with pytest.raises(UserError, match=rf"x\.json.*{reason}"):
        read_json(path, what="table")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_toml(tmp_path / "x.toml") == {"a": 1}
    (tmp_path / "x.toml").write_bytes(b"a = \n")
    with pytest.raises(UserError, match=r"x\.toml is not TOML: .*line 1"):
        read_toml(tmp_path / "x.toml", what="configuration")


def test_files_of_json_and_toml_are_read_in_one_place() -> None:
    root = Path(__file__).parents[3]
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in files if READERS.search(path.read_text(encoding="utf-8"))}
    assert found == ELSEWHERE
