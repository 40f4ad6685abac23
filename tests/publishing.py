"""Watches how files are published: whether each is on the disk before its rename, and the rename before all else."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Watch", "watched"]


class Watch:
    """What was published, and what is not yet sure to outlast a power failure."""

    def __init__(self) -> None:
        self.published: set[Path] = set()
        self.unsettled: set[Path] = set()  # folders in which something was renamed that were not synced since
        self._synced: dict[tuple[int, int], tuple[int, int]] = {}  # size and time of change by inode

    def sync(self, found: os.stat_result) -> None:
        self._synced[found.st_dev, found.st_ino] = _state(found)
        self.unsettled = {one for one in self.unsettled if (one.stat().st_dev, one.stat().st_ino) != _inode(found)}

    def rename(self, source: Path, target: Path) -> None:
        """Fails where anything that gets its name now might not be on the disk."""
        for path in (source, *source.rglob("*")):
            found = path.stat()
            assert self._synced.get(_inode(found)) == _state(found), f"{path} was renamed before it was synced"
        self.published.add(target)
        self.unsettled.add(target.parent)

    def covers(self, path: Path) -> bool:
        """Whether a file, or a folder that it is in, was published."""
        return bool({path, *path.parents} & self.published)


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _state(found: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written, or a folder's entries change."""
    return (0 if stat.S_ISDIR(found.st_mode) else found.st_size), found.st_mtime_ns


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch ``os.fsync``, ``os.rename`` and ``os.replace`` of this process; renames away from a place are let be."""
    watch, patch = Watch(), pytest.MonkeyPatch()
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        watch.sync(os.fstat(descriptor))

    def renaming(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **options: Any) -> None:
            if Path(source).name.startswith(".") or "scratch" in str(source) or "/." in str(source):
                watch.rename(Path(source), Path(target))
            real(source, target, **options)

        return rename

    with patch.context() as patched:
        patched.setattr(os, "fsync", sync)
        for name in ("rename", "replace"):
            patched.setattr(os, name, renaming(getattr(os, name)))
        yield watch
    assert not watch.unsettled, "a rename was not synced"
