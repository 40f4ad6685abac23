"""What an archive from a cluster may do: become plain files below the run's folder, and nothing else."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prunesweep.launch.cluster import unpacking
from prunesweep.launch.cluster.unpacking import unpack_archive
from prunesweep.models import UserError

LIMIT = 1000


def member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as files:
        for info, content in members:
            files.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_plain_files_are_written(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("trials")
    folder.type = tarfile.DIRTYPE
    unpack_archive(
        archive([(folder, b""), member("run.json", b"{}"), member("trials/r0-0000/a", b"1")]), tmp_path, LIMIT
    )
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"run.json": b"{}", "trials/r0-0000/a": b"1"}


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE = {
    "above": [member("../out")],
    "above, further in": [member("a/../../out")],
    "absolute": [member("/tmp/prunesweep-out")],
    "backslashes": [member("..\\out")],
    "nowhere": [member(".")],
    "link": [member("a", b"", type=LINK, linkname="..")],
    "file through a link": [member("a", b"", type=LINK, linkname=".."), member("a/out")],
    "hard link": [member("a", b"", type=HARD, linkname="../../etc/passwd")],
    "device": [member("a", b"", type=tarfile.CHRTYPE)],
    "pipe": [member("a", b"", type=tarfile.FIFOTYPE)],
    "bomb": [member("a", b"0" * (unpacking.EXPANSION * LIMIT + 1))],
    "bomb in parts": [member(str(i), b"0" * LIMIT) for i in range(unpacking.EXPANSION + 1)],
    "twice": [member("a"), member("./a", b"other")],
    "file as a folder": [member("a"), member("a/b")],
    "folder as a file": [member("a/b"), member("a")],
    "long name": [member("n" * 256)],
    "long path": [member("/".join(["n" * 200] * 6))],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="the archive is refused: ") as error:
        unpack_archive(archive(HOSTILE[what]), folder, LIMIT)
    assert "\n" not in str(error.value)
    assert [path for path in tmp_path.rglob("*") if not path.is_relative_to(folder) and path.is_file()] == []
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not Path("/tmp/prunesweep-out").exists()


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MOST_FILES", 3)
    with pytest.raises(UserError, match="more than 3 files"):
        unpack_archive(archive([member(str(i)) for i in range(4)]), tmp_path, LIMIT)


@pytest.mark.parametrize("kept", [0, 1, 10, 40, 120])
def test_what_is_no_archive_is_refused(tmp_path: Path, kept: int) -> None:
    torn = archive([member("a", bytes(range(256)) * 3)])[:kept]
    for data in (torn, b"\0" * kept, b"text" * kept):
        with pytest.raises(UserError, match="the archive is refused: it cannot be read"):
            unpack_archive(data, tmp_path, LIMIT)


def test_an_escape_in_a_name_is_not_shown_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        unpack_archive(archive([member("../\x1b[31mred")]), tmp_path, LIMIT)
    assert "\x1b" not in str(error.value)
