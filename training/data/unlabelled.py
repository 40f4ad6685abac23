"""``images:PATH``: any tree of images without labels, for whatever learns from a source model and not from labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere

from .base import NO_LABEL, OpenOptions
from .images import IMAGE_ENDINGS, ImageFiles, ListedImages, is_hidden
from .index import chosen_to_hash, digest_of, join_names
from .registry import register

__all__ = ["UnlabelledImages"]

HELD_OUT, MOST_HELD_OUT = 0.25, 5000  # share of the images that is ``val``, and at most how many
SPLIT_SEED = 0


@register
class UnlabelledImages(ImageFiles):
    """All images below ``PATH``, however deep; a fixed quarter of them, 5,000 at most, is held out as ``val``.

    Folders ``PATH/train`` and ``PATH/val`` are the splits where both are there. Every label is ``NO_LABEL``.

    Args:
        path: the folder, absolute.
        options: how it is opened; names and orders of classes do not concern it.

    Raises:
        UserError: there is no such folder, or fewer than two images in it.
    """

    kind = "images"
    argument = "PATH"

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(Path(argument), options)

    def __init__(self, path: Path, options: OpenOptions) -> None:
        name = f"images:{path}"
        if not path.is_dir():
            raise NotHere(f"data {name!r}: no folder {path}")
        self._path = path
        files, unused = _find(path)
        self._files = _split(files)
        if outside := len(files) - sum(map(len, self._files.values())):
            unused["beside train and val"] += outside
        if not all(self._files.values()):
            found = "no image" if not files else f"{len(files)} image{'s' * (len(files) > 1)}"
            raise UserError(f"data {name!r}: {found} below it; give at least 2, some are held out")
        files = [file for own in self._files.values() for file in own]
        sizes = [os.stat(path / file).st_size for file in files]
        hashed = chosen_to_hash(sizes)
        notes = []
        if unused:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(unused.items()))
            notes.append(f"not used in {path}: {reasons}")
        if len(hashed) < len(files):
            notes.append(f"fingerprint: names and sizes of {len(files):,} files, bytes of {len(hashed):,}")

        def facts() -> Iterator[str | bytes]:
            for split, own in self._files.items():
                yield f"\0{split}\0"
                yield join_names(own).tobytes()
            yield repr(sizes)
            for i in hashed:
                try:
                    yield digest_of((path / files[i]).read_bytes()).tobytes()
                except OSError as error:  # such a file counts as unreadable once it is wanted
                    yield f"cannot be read: {error.errno}"

        super().__init__(name, options, facts(), 0, notes=tuple(notes))

    def _open(self, split: str) -> Dataset[Any]:
        files = self._files[split]
        return ListedImages(self._path, files, [NO_LABEL] * len(files), self.info.input_size[0])

    def train_labels(self) -> torch.Tensor:
        raise UserError(f"{self.info.name} has no labels")


def _find(root: Path) -> tuple[list[str], Counter[str]]:
    """List all images below a folder by their paths in it, sorted, and count what is not used by reason."""
    files, unused, seen = list[str](), Counter[str](), set[tuple[int, int]]()
    for folder, below, names in os.walk(root, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder around it
            below.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        unused["hidden or made by a system"] += sum(map(is_hidden, [*below, *names]))
        below[:] = [name for name in below if not is_hidden(name)]
        for name in names:
            ending = os.path.splitext(name)[1]
            if is_hidden(name):
                continue
            if ending.lower() not in IMAGE_ENDINGS:
                unused[f"of kind {ending or 'without an ending'}"] += 1
            elif not os.path.isfile(os.path.join(folder, name)):
                unused["links to nothing"] += 1
            else:
                files.append(os.path.relpath(os.path.join(folder, name), root))
    return sorted(files), +unused


def _split(files: list[str]) -> dict[str, list[str]]:
    """Split by the folders ``train`` and ``val`` where both have images, otherwise by a fixed draw."""
    named = {split: [file for file in files if file.split(os.sep, 1)[0] == split] for split in ("train", "val")}
    if all(named.values()):
        return named
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held = min(max(1, round(len(files) * HELD_OUT)), MOST_HELD_OUT)
    return {"train": [files[i] for i in sorted(order[held:])], "val": [files[i] for i in sorted(order[:held])]}
