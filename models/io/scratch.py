"""Folders for work that nobody reads later: gone with their ``with`` block, and soon if their process was killed.

Such a folder holds a file that its process has locked, and the kernel lets go of that lock when the process ends,
however it does, in whatever container it ran. The next process that makes one in the same place removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["remove_left", "remove_scratch_folders", "scratch_folder", "scratch_for_libraries"]

PREFIX, OWNER = "prunesweep-", ".owner"

_held: dict[Path, int] = {}  # folders of this process, with the descriptors of their locked files


@contextlib.contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """Yield a new folder ``prunesweep-...``, which exists for the time of a ``with`` block.

    Args:
        place: the folder that it is made in; that of temporary files by default.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    _sweep(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        _held[folder] = _own(folder)
        yield folder
    finally:
        _drop(folder)


@contextlib.contextmanager
def scratch_for_libraries() -> Iterator[None]:
    """Let libraries make their temporary files in a scratch folder for the time of a ``with`` block."""
    before = tempfile.tempdir
    with scratch_folder() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def remove_left(place: Path | None = None) -> None:
    """Remove the folders of this user's processes that have ended without doing so.

    Args:
        place: the folder that they are in; that of temporary files by default.
    """
    _sweep(Path(tempfile.gettempdir()) if place is None else place)


def remove_scratch_folders() -> None:
    """Remove all folders of this process: before it ends by ``os._exit``, which leaves no ``with`` block."""
    for folder in list(_held):
        _drop(folder)


def _own(folder: Path) -> int:
    """Lock a file in the folder for as long as this process lives; it has its name once it is locked."""
    descriptor = os.open(folder / f"{OWNER}.new", os.O_CREAT | os.O_RDWR, 0o600)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: such folders are left alone
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(folder / f"{OWNER}.new", folder / OWNER)
    return descriptor


def _drop(folder: Path) -> None:
    descriptor = _held.pop(folder, None)
    _remove(folder)
    if descriptor is not None:
        os.close(descriptor)


def _sweep(place: Path) -> None:
    """Remove this user's folders whose processes have ended."""
    if fcntl is None:
        return
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if folder in _held or folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # not one of these, or gone by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        except OSError:  # in use
            continue
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder; while something in it cannot be removed, what tells of its owner stays, for the next sweep."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name == OWNER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] in ([], [OWNER]):
            shutil.rmtree(folder, ignore_errors=True)
