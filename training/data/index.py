"""Keep indices of files in the user's cache, one per data set, and hash the files' contents.

An index is used again only while everything it was made from still has the stamp (inode, change times, size) it had
then. A file that was changed within two seconds before the index was made is looked at again: a file system's clock
may be too coarse to show a second change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prunesweep.models.io.files import make_folder, publish_file

__all__ = [
    "HASH_ALL",
    "SAMPLED",
    "Arrays",
    "Stamp",
    "cache_home",
    "chosen_to_hash",
    "digest_of",
    "join_names",
    "load_index",
    "save_index",
    "settled",
    "split_names",
    "stamp_of",
]

FORMAT = 1
HASH_ALL = 256 * 2**20  # splits of up to so many bytes are hashed whole
SAMPLED = 1024  # files that are hashed of a larger split
SETTLED_NS = 2 * 10**9
DIGEST = 16  # bytes

Stamp = tuple[int, int, int, int]
Arrays = dict[str, npt.NDArray[Any]]


def cache_home(what: str) -> Path:
    """Return the user's cache folder for the kind of things named ``what``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunesweep" / what


def stamp_of(path: str | Path) -> Stamp:
    """Return inode, time of the last change of content and of the inode (ns), and size (bytes); links are followed."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def settled(stamp: Sequence[int], made_ns: int) -> bool:
    """Return True if a file was unchanged for so long that any later change shows in its stamp.

    Args:
        stamp: the file's stamp, as from ``stamp_of``.
        made_ns: time at which the stamp was taken, in ns.
    """
    return max(stamp[1], stamp[2]) < made_ns - SETTLED_NS


def chosen_to_hash(sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the indices of the files to hash: all if they are small together, otherwise a fixed, evenly spread choice.

    Args:
        sizes: size of every file in bytes.
    """
    if sum(sizes) <= HASH_ALL:
        return np.arange(len(sizes))
    return np.unique(np.linspace(0, len(sizes) - 1, min(SAMPLED, len(sizes))).astype(np.int64))


def digest_of(content: bytes) -> npt.NDArray[np.uint8]:
    """Return a hash of ``content``, ``DIGEST`` bytes as (16,) uint8."""
    return np.frombuffer(hashlib.blake2b(content, digest_size=DIGEST).digest(), dtype=np.uint8)


def join_names(names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Join file names to one array of bytes, separated by NUL, which no file name has."""
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def split_names(joined: npt.NDArray[np.uint8]) -> list[str]:
    """Split what ``join_names`` joined."""
    return os.fsdecode(joined.tobytes()).split("\0") if len(joined) else []


def _place(kind: str, path: str | Path) -> Path:
    key = hashlib.sha256(os.fsencode(f"{FORMAT} {kind} {path}")).hexdigest()[:32]
    return cache_home("data") / f"{key}.npz"


def load_index(kind: str, path: str | Path) -> tuple[dict[str, Any], Arrays] | None:
    """Return the facts and arrays that were kept for a path; None if there are none, or they are damaged.

    Args:
        kind: kind of the data set.
        path: the data set's folder, or its URL.
    """
    try:
        with np.load(_place(kind, path), allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        facts = json.loads(arrays.pop("facts").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (facts, arrays) if isinstance(facts, dict) and facts.get("path") == str(path) else None


def save_index(kind: str, path: str | Path, facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Keep the facts and arrays of a path; do nothing if the cache cannot be written.

    Args:
        kind: kind of the data set.
        path: the data set's folder, or its URL.
        facts: JSON-ready facts by name.
        arrays: arrays by name.
    """
    place = _place(kind, path)
    written = np.frombuffer(json.dumps({**facts, "path": str(path)}).encode(), dtype=np.uint8)
    with contextlib.suppress(OSError):
        make_folder(place.parent)
        with publish_file(place) as scratch, scratch.open("wb") as file:
            np.savez(file, allow_pickle=False, facts=written, **arrays)
