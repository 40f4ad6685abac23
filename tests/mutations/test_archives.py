"""Archives for ``fetch``, changed: plain files below the folder, or one clear error."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest

from prunesweep.launch.cluster.unpacking import unpack_archive
from tests.mutations.judging import Tally, files_below, rounds
from tests.mutations.mutators import changed_bytes

NAMES = ("..", "../x", "/tmp/x", "a//b", "./a", "run.json/x", "n" * 256, "a/" * 600 + "b", "", "a\\b", "\udcff", "-x")
LINK, SPARSE = tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE
TYPES = (LINK, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, SPARSE, b"Z")
RESULT = b'{"state": 1}' * 9
FILES = {"run.json": b"{}" * 40, "trials/r0-0000/result.json": RESULT, "trials/r0-0000/model/w": bytes(3000)}
HEADERS, FACTS = ("size", "path", "mtime", "GNU.sparse.map", "x"), ("x", "-1", "9" * 30, "../x")
LIMIT = 20_000


def tarred(draw: Random) -> bytes:
    """A tar of a run's files, of which some members are strange."""
    file, form = io.BytesIO(), draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=form) as files:
        for name, content in FILES.items():
            info = tarfile.TarInfo(draw.choice(NAMES) if draw.random() < 0.15 else name)
            info.size = len(content)
            if draw.random() < 0.15:
                info.type, info.linkname = draw.choice(TYPES), draw.choice((*NAMES, *FILES))
                info.size = draw.choice((0, len(content)))
            if draw.random() < 0.1 and form == tarfile.PAX_FORMAT:
                info.pax_headers = {draw.choice(HEADERS): draw.choice(FACTS)}
            try:
                files.addfile(info, io.BytesIO(content[: info.size].ljust(info.size)))
            except (ValueError, UnicodeEncodeError):  # a name that this format cannot hold
                continue
    return file.getvalue()


def reheadered(draw: Random, data: bytes) -> bytes:
    """A tar with a header's bytes changed and its checksum right again, so that they are believed."""
    at = draw.choice(range(0, max(len(data) - 512, 1), 512))
    header = bytearray(data[at : at + 512])
    if len(header) < 512 or not any(header):
        return data
    for _ in range(draw.randrange(1, 4)):
        header[draw.randrange(512)] = draw.choice((0, 0x20, 0x2F, 0x30, 0x37, 0x80, 0xFF, draw.randrange(256)))
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def archive(draw: Random) -> tuple[str, bytes]:
    data = tarred(draw)
    kind = draw.choice(("as it is", "header", "header", "tar", "gzip", "bomb", "parts"))
    if kind == "header":
        data = reheadered(draw, data)
    elif kind == "tar":
        how, changed = changed_bytes(draw, data)
        data, kind = changed or b"", f"tar: {how}"
    elif kind == "bomb":
        data += bytes(10**7)
    zipped = gzip.compress(data, 1)
    if kind == "gzip":
        how, changed = changed_bytes(draw, zipped)
        return f"gzip: {how}", changed or b""
    if kind == "parts":
        return kind, zipped + gzip.compress(tarred(draw))
    return kind, zipped


def tried(root: Path, tally: Tally, numbers: Iterator[int]) -> None:
    for number in numbers:
        shutil.rmtree(root, ignore_errors=True)
        folder = root / "a" / "b"
        folder.mkdir(parents=True)
        draw = Random(number)
        how, data = archive(draw)
        unpack = partial(unpack_archive, data, folder, LIMIT)
        tally.attempt(f"{number}: {how}", unpack, size=len(data))
        outside = [name for name in files_below(root) if not name.startswith("a/b/") and name not in ("a", "a/b")]
        odd = [path for path in folder.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
        tally.check(how, good=not outside and not odd, reason=f"{outside}, {odd}")
        for path in folder.rglob("*"):
            os.chmod(path, 0o700)


@pytest.mark.parametrize("seconds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_changed_archives(tmp_path: Path, seconds: float) -> None:
    assert zlib.crc32(tarred(Random(0))) == zlib.crc32(tarred(Random(0)))
    tally = Tally()
    tried(tmp_path / "root", tally, rounds(seconds))
    tally.settle()
    assert tally.counts["accepted"]
