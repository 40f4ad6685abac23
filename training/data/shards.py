"""Read webdataset shards, ``wds:PATH``: ``PATH/train*.tar`` and ``PATH/val*.tar`` with KEY.jpg and KEY.cls.

The path may be a URL: see ``shard_files``.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere

from .base import OpenOptions
from .classes import read_names, renumbered
from .images import IMAGE_ENDINGS, ImageFiles, is_hidden, read_image
from .index import chosen_to_hash, digest_of, join_names, load_index, save_index, settled, split_names
from .registry import register
from .shard_files import ShardFiles, shard_files

__all__ = ["Shards"]


@dataclass(frozen=True)
class _Members:
    """The images of a split: keys; (shard, position, bytes, label) of each; digests of those in ``hashed``."""

    shards: list[str]
    keys: list[str]
    table: npt.NDArray[np.int64]
    hashed: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]


def _read_shard(name: str, files: ShardFiles, shard: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (key, position, bytes, label) of every image of a shard, found in its headers."""
    parts: dict[str, dict[str, Any]] = {}
    try:
        with files.whole(shard) as file, tarfile.open(fileobj=file, mode="r:" if file.seekable() else "r|") as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                if not member.isfile() or any(is_hidden(part) for part in member.name.split("/") if part != "."):
                    continue
                if f".{ending.lower()}" in IMAGE_ENDINGS:
                    parts.setdefault(key, {})["image"] = (member.offset_data, member.size)
                elif ending == "cls":
                    text = tar.extractfile(member)
                    parts.setdefault(key, {})["label"] = _label(name, shard, member.name, text.read() if text else b"")
    except tarfile.TarError as error:
        raise UserError(f"data {name!r}: {shard} is no tar file, or damaged: {error}") from error
    except OSError as error:
        raise NotHere(f"data {name!r}: {shard} cannot be read: {error}") from error
    for key, part in parts.items():
        if len(part) != 2:
            has = ", ".join(part)
            raise UserError(f"data {name!r}: {key} in {shard} has {has} only; it needs an image and .cls")
        yield (key, *part["image"], part["label"])


def _label(name: str, shard: str, member: str, text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0:
        raise UserError(f"data {name!r}: {member} in {shard} is {text[:40]!r}, not a class number from 0 on")
    return label


def _scan(name: str, files: ShardFiles, shards: list[str], split: str) -> _Members:
    keys, rows = [], []
    for number, shard in enumerate(shards):
        for key, position, size, label in _read_shard(name, files, shard):
            keys.append(key)
            rows.append((number, position, size, label))
    if not rows:
        raise NotHere(f"data {name!r}: no shard {files}/{split}*.tar with images in it")
    table = np.array(rows, dtype=np.int64)
    hashed = chosen_to_hash(table[:, 2].tolist())
    digests = [digest_of(files.read(shards[row[0]], int(row[1]), int(row[2]))) for row in table[hashed]]
    return _Members(shards, keys, table, hashed, np.stack(digests))


def _members(name: str, files: ShardFiles) -> dict[str, _Members]:
    """Return the images of both splits, from the kept index if all shards are unchanged, otherwise read anew."""
    shards = {split: files.names(split) for split in ("train", "val")}
    stamps = {shard: files.stamp(shard) for names in shards.values() for shard in names}
    kept, made_ns = load_index("wds", str(files)), time.time_ns()
    if kept is not None and kept[0].get("stamps") == stamps:
        facts, arrays = kept
        if all(settled(stamp, facts["made_ns"]) for stamp in stamps.values()):
            try:
                return {split: _unpack(split, names, arrays) for split, names in shards.items()}
            except KeyError:
                pass  # the kept index has another form
    found = {split: _scan(name, files, names, split) for split, names in shards.items()}
    columns: dict[str, npt.NDArray[Any]] = {}
    for split, members in found.items():
        columns[f"{split}.keys"] = join_names(members.keys)
        columns[f"{split}.table"] = members.table
        columns[f"{split}.hashed"] = members.hashed
        columns[f"{split}.digests"] = members.digests
    save_index("wds", str(files), {"stamps": stamps, "made_ns": made_ns}, columns)
    return found


def _unpack(split: str, shards: list[str], arrays: Mapping[str, npt.NDArray[Any]]) -> _Members:
    rest = (arrays[f"{split}.{column}"] for column in ("table", "hashed", "digests"))
    return _Members(shards, split_names(arrays[f"{split}.keys"]), *rest)


def _facts(found: Mapping[str, _Members]) -> Iterator[str | bytes]:
    """Yield what the fingerprint hashes: shards, and the images' keys, places, sizes, labels and bytes in order."""
    for split, members in found.items():
        yield f"{split}\0" + "\0".join(members.shards) + "\0"
        yield join_names(members.keys).tobytes()
        yield members.table.astype("<i8").tobytes()
        yield members.hashed.astype("<i8").tobytes() + members.digests.tobytes()


@register
class Shards(ImageFiles):
    """Webdataset shards with KEY.jpg (or another image) and KEY.cls, the label as text.

    Members are found once by reading the tar headers, then read by position. So every image comes once per epoch, in
    any order, for any number of workers, which is impossible with streamed shards.

    Args:
        place: folder of the shards, an absolute path or a URL.
        options: how it is opened.

    Raises:
        UserError: shards are missing or damaged, or there are fewer class names than labels.
    """

    kind = "wds"
    argument = "PATH"
    urls = True
    class_options = frozenset({"classes"})

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(argument, options)

    def __init__(self, place: str, options: OpenOptions) -> None:
        name, self._files = f"wds:{place}", shard_files(place)
        with self._files.at_once():
            self._found = _members(name, self._files)
        num_classes = 1 + max(int(members.table[:, 3].max()) for members in self._found.values())
        names = () if options.classes is None else read_names(options.classes)
        if names and len(names) < num_classes:
            raise UserError(f"data.classes: {len(names)} names, data {name!r} have labels up to {num_classes - 1}")
        notes = []
        for split, members in self._found.items():
            if len(members.hashed) < len(members.keys):
                listed = f"names, labels and sizes of {len(members.keys):,} images, bytes of {len(members.hashed):,}"
                notes.append(f"fingerprint of {split}: {listed}")
        names, self._numbers = renumbered(name, names, options.preprocessing)
        facts = ["\0".join(names), str(self._numbers or ""), *_facts(self._found)] if names else _facts(self._found)
        known: dict[str, Any] = {"classes": names, "open_ended": not names, "notes": tuple(notes)}
        super().__init__(name, options, facts, len(names) or num_classes, **known)

    def _open(self, split: str) -> Dataset[Any]:
        return _Images(self._files, self._found[split], self.labels(split), self.info.input_size[0])

    def labels(self, split: str) -> list[int]:
        numbers = self._found[split].table[:, 3].tolist()
        return numbers if self._numbers is None else [self._numbers[number] for number in numbers]

    def train_labels(self) -> torch.Tensor:
        return torch.tensor(self.labels("train"))


class _Images(Dataset[Any]):
    """Images of shards by index."""

    def __init__(self, files: ShardFiles, members: _Members, labels: list[int], channels: int) -> None:
        self.files, self.shards, self.table, self.channels = files, members.shards, members.table, channels
        self.keys, self.labels = members.keys, labels

    def __len__(self) -> int:
        return len(self.table)

    def name_of(self, index: int) -> str:
        """Return the shard and the key of an image."""
        return f"{self.files}/{self.shards[int(self.table[index, 0])]}, {self.keys[index]}"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard, position, size, _ = self.table[index].tolist()
        content = self.files.read(self.shards[shard], position, size)
        return read_image(io.BytesIO(content), self.channels), self.labels[index]
