"""Writing files so that they are whole or absent, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["disk_full", "publish_file", "publish_folder", "write_text"]


def _scratch(path: Path) -> Path:
    """Name a scratch path that no other process uses.

    The host's name is part of it: containers on several nodes may well have the same process ids.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part.

    Args:
        path: the file; one that exists is replaced.
        text: the new content, written in UTF-8.
    """
    with publish_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``, and move the file there to ``path`` once the block ends well.

    A file that exists is replaced. If the block fails, ``path`` is left as it was and the scratch file is removed.
    """
    scratch = _scratch(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a scratch folder beside ``path``, and move it to ``path`` once the block ends well.

    If the block fails, ``path`` is left as it was and the scratch folder is removed.

    Args:
        path: the folder.
        replace: replace a folder that exists.

    Raises:
        FileExistsError: there is a folder with something in it, and it is not to be replaced.
    """
    scratch = _scratch(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not replace:
        try:
            os.rename(scratch, path)  # in one step, whoever else is making the folder
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    elif path.exists():
        old = _scratch(path).with_suffix(".old")
        os.replace(path, old)
        os.replace(scratch, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, path)


def disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the quota is full.

    Libraries in other languages put this into the message only, so the message is searched too.
    """
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(os.strerror(code) in str(error) for code in codes)
