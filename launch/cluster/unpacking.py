"""Unpack the archive of a run that came from a cluster, which is trusted with nothing but its content."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from prunesweep.launch.console import without_controls
from prunesweep.models import UserError

__all__ = ["unpack_archive"]

MOST_FILES = 100_000
EXPANSION = 8  # how much larger than its archive a run may be; weights hardly shrink, results some four times


def unpack_archive(archive: bytes, folder: Path, limit: int) -> None:
    """Write the files of a gzipped tar below a folder; nothing of it is written anywhere else, and nothing but files.

    Args:
        archive: the archive.
        folder: an empty folder.
        limit: bytes that the archive might have; its files may have ``EXPANSION`` times as many.

    Raises:
        UserError: it is no archive, a name leads out of the folder or is there twice, a member is a link, a device or
            anything else that is no plain file, or there are too many or too large ones.
    """
    room, seen = EXPANSION * limit, set[PurePosixPath]()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            for member in files:  # one after the other: the list of a hostile archive may be endless
                if member.isdir():
                    continue
                name = _safe(member)
                if name in seen:
                    raise UserError(f"{_shown(member)} is in it twice")
                seen.add(name)
                room -= member.size
                if room < 0 or len(seen) > MOST_FILES:
                    most = f"{MOST_FILES:,} files or {EXPANSION * limit / 2**20:g} MiB"
                    raise UserError(f"it unpacks to more than {most}; allow more with --limit")
                content = files.extractfile(member)
                assert content is not None  # it is a plain file
                path = folder.joinpath(*name.parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as target:
                    shutil.copyfileobj(content, target)
    except UserError as error:
        raise UserError(f"the archive is refused: {error}") from error
    except (tarfile.TarError, EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"the archive is refused: it cannot be read: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"the archive is refused: its names contradict each other: {error}") from error


def _safe(member: tarfile.TarInfo) -> PurePosixPath:
    """The name of a plain file that stays below any folder that it is written to."""
    name = PurePosixPath(member.name)
    if not member.isreg():
        raise UserError(f"{_shown(member)} is no plain file")
    odd = name.is_absolute() or not name.parts or ".." in name.parts or "\\" in member.name or "\0" in member.name
    if odd or len(os.fsencode(member.name)) > 1024 or any(len(os.fsencode(part)) > 255 for part in name.parts):
        raise UserError(f"{_shown(member)} is no name of a file below the run's folder")
    return name


def _shown(member: tarfile.TarInfo) -> str:
    return repr(without_controls(member.name[:80]))
