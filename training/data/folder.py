"""``imagefolder:PATH``: ``PATH/train`` and ``PATH/val`` with one folder of images per class."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere

from .base import ClassOrder, Data, OpenOptions
from .classes import matched_names, model_names, read_names
from .images import IMAGE_ENDINGS, READ_ERRORS, ImageFiles, ListedImages, check_range, is_hidden
from .index import (
    DIGEST,
    Stamp,
    chosen_to_hash,
    digest_of,
    join_names,
    load_index,
    save_index,
    settled,
    split_names,
    stamp_of,
)
from .registry import register

__all__ = ["ImageFolder", "class_names"]

CHECK_ALL = 50_000  # splits of up to so many files are checked whole before an index is used again
CHECKED = 4096  # files of a larger split that are checked, besides all folders


@dataclass(frozen=True)
class _Listing:
    """The images of a split, in timm's order.

    ``files`` are paths ``CLASS/NAME``. ``stamps`` and ``digests`` have a row for each file; ``hashed`` is true for
    files whose bytes were read. ``folders`` are the stamps of the split's folder and of its class folders.
    """

    classes: tuple[str, ...]
    files: list[str]
    stamps: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    hashed: npt.NDArray[np.bool_]
    folders: Mapping[str, Stamp]
    unused: Mapping[str, int]
    made_ns: int


def _scan(name: str, root: Path, made_ns: int, known: Mapping[str, tuple[Stamp, bytes]]) -> _Listing:
    """List a split's images and hash those of ``chosen_to_hash``; a file with a known stamp is not read again."""
    classes, files, stamps, unused = [], list[str](), dict[str, Stamp](), Counter[str]()
    folders = {"": stamp_of(root)}
    for entry in os.scandir(root):
        if is_hidden(entry.name):
            unused["hidden or made by a system"] += 1
        elif not entry.is_dir():
            unused["beside the class folders"] += 1
        else:
            classes.append(entry.name)
            folders[entry.name] = stamp_of(entry.path)
            for file in os.scandir(entry.path):
                path = f"{entry.name}/{file.name}"
                if is_hidden(file.name):
                    unused["hidden or made by a system"] += 1
                elif file.is_dir():
                    _refuse_nested(name, root, Path(file.path))
                elif os.path.splitext(file.name)[1].lower() not in IMAGE_ENDINGS:
                    unused[f"of kind {os.path.splitext(file.name)[1] or 'without an ending'}"] += 1
                else:
                    try:
                        stamps[path] = stamp_of(file.path)
                        files.append(path)
                    except OSError:
                        unused["links to nothing"] += 1
    files.sort()  # names that differ in case only have one order everywhere
    files.sort(key=natural_key)
    digests = np.zeros((len(files), DIGEST), dtype=np.uint8)
    hashed = np.zeros(len(files), dtype=bool)
    for i in chosen_to_hash([stamps[file][3] for file in files]):
        file = files[i]
        stamp, digest = known.get(file, (None, b""))
        if stamp == stamps[file]:
            digests[i] = np.frombuffer(digest, dtype=np.uint8)
        else:
            digests[i] = digest_of(_bytes(root / file))
        hashed[i] = True
    table = np.array([stamps[file] for file in files], dtype=np.int64).reshape(-1, 4)
    return _Listing(tuple(sorted(classes)), files, table, digests, hashed, folders, dict(unused), made_ns)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # such a file counts as unreadable once it is wanted
        return f"cannot be read: {error.errno}".encode()


def _refuse_nested(name: str, root: Path, folder: Path) -> None:
    for _, below, names in os.walk(folder, followlinks=True):
        below[:] = [n for n in below if not is_hidden(n)]
        if any(os.path.splitext(n)[1].lower() in IMAGE_ENDINGS and not is_hidden(n) for n in names):
            raise UserError(
                f"data {name!r}: {folder} has images below a class folder; it must look like {root}/CLASS/IMAGE, "
                "without folders in between"
            )


def _pack(split: str, listing: _Listing) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    facts = {
        "classes": listing.classes,
        "folders": listing.folders,
        "unused": listing.unused,
        "made_ns": listing.made_ns,
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "files": join_names(listing.files),
        "stamps": listing.stamps,
        "digests": listing.digests,
        "hashed": listing.hashed,
    }
    return {split: facts}, {f"{split}.{key}": value for key, value in arrays.items()}


def _unpack(split: str, kept: tuple[dict[str, Any], dict[str, npt.NDArray[Any]]] | None) -> _Listing | None:
    if kept is None:
        return None
    try:
        facts, arrays = kept[0][split], kept[1]
        folders = {name: (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in facts["folders"].items()}
        listing = _Listing(
            tuple(facts["classes"]),
            split_names(arrays[f"{split}.files"]),
            stamps=arrays[f"{split}.stamps"],
            digests=arrays[f"{split}.digests"],
            hashed=arrays[f"{split}.hashed"],
            folders=folders,
            unused=facts["unused"],
            made_ns=int(facts["made_ns"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    shapes = listing.stamps.shape, listing.digests.shape, listing.hashed.shape
    n = len(listing.files)
    return listing if shapes == ((n, 4), (n, DIGEST), (n,)) else None


def _still_true(root: Path, listing: _Listing) -> bool:
    """Check that folders and files are unchanged; of a large split, all folders and a choice of files."""
    n = len(listing.files)
    some: Iterable[int] = range(n)
    if n > CHECK_ALL:
        some = np.unique(np.linspace(0, n - 1, CHECKED).astype(int)).tolist()
    try:
        for name, stamp in listing.folders.items():
            if stamp_of(root / name) != stamp or not settled(stamp, listing.made_ns):
                return False
        for i in some:
            stamp = listing.stamps[i].tolist()
            if list(stamp_of(root / listing.files[i])) != stamp or not settled(stamp, listing.made_ns):
                return False
    except OSError:
        return False
    return True


def _listings(name: str, path: Path) -> dict[str, _Listing]:
    """Return the images of both splits, from the kept index if it still holds, otherwise from a new scan."""
    kept = load_index("imagefolder", path)
    found, new = dict[str, _Listing](), False
    for split in ("train", "val"):
        old = _unpack(split, kept)
        if old is not None and _still_true(path / split, old):
            found[split] = old
            continue
        known = {}
        if old is not None:
            for i in np.flatnonzero(old.hashed).tolist():
                a, b, c, d = old.stamps[i].tolist()
                if settled((a, b, c, d), old.made_ns):
                    known[old.files[i]] = ((a, b, c, d), old.digests[i].tobytes())
        found[split], new = _scan(name, path / split, time.time_ns(), known), True
    if new:
        packed = [_pack(split, listing) for split, listing in found.items()]
        facts = {k: v for facts, _ in packed for k, v in facts.items()}
        save_index("imagefolder", path, facts, {k: v for _, arrays in packed for k, v in arrays.items()})
    return found


def class_names(name: str, folders: Sequence[str], options: OpenOptions) -> tuple[str, ...]:
    """Return class names by label.

    The order is that of ``options.classes``; otherwise of the model's ``label_names``, if they are the same names;
    otherwise ``options.class_order``: timm's (case-insensitive, numbers by value) or by code point, torchvision's.

    Args:
        name: name of the data set, for messages.
        folders: names of the class folders.
        options: how the data set is opened.

    Raises:
        UserError: ``options.classes`` are not the names of the class folders; or only some of the folders have names
            of the model's classes, and no order is given; or the order given is not that of the model's names.
    """
    if options.classes is not None:
        given = read_names(options.classes)
        differ = sorted(set(given) ^ set(folders))
        if differ:
            raise UserError(f"data.classes: not the class folders of data {name!r}: {', '.join(differ[:5])}")
        return given
    # sorted by code point first, so that names which differ in case only have one order everywhere
    ordered = sorted(folders) if options.class_order == "codepoint" else sorted(sorted(folders), key=natural_key)
    if options.class_order is None:
        remedy = (
            "list the folders in the order of the model's classes (data.classes or --classes), or give an order "
            "(data.class_order or --class-order, natural or codepoint) to number them by position"
        )
        return matched_names(name, folders, options.preprocessing, remedy) or tuple(ordered)
    own = model_names(options.preprocessing)
    if set(own) == set(folders) and own != tuple(ordered):
        raise UserError(
            f"data.class_order (--class-order) = {options.class_order!r}: the model names its classes as data {name!r} "
            f"does, but in another order, from {own[0]!r} to {own[-1]!r}; leave it out to match them by name, or list "
            "the folders in the order you want (data.classes or --classes)"
        )
    return tuple(ordered)


def _check_classes(name: str, path: Path, found: Mapping[str, _Listing]) -> list[str]:
    """Return notes on classes. Raises UserError if val has others than train, or a class cannot be trained on."""
    train, val = found["train"], found["val"]
    if not train.classes:
        raise UserError(f"data {name!r}: {path / 'train'} has no folder per class in it")
    if more := sorted(set(val.classes) - set(train.classes)):
        raise UserError(
            f"data {name!r}: no folder in {path / 'train'} for class {_named(more)}, which {path / 'val'} has; the "
            "classes are the folders of train"
        )
    notes = []
    for split, listing in found.items():
        images: dict[str, list[str]] = {c: [] for c in train.classes}
        for file in listing.files:
            images[file.split("/", 1)[0]].append(file)
        if split == "train":
            dead = {c: why for c in train.classes if (why := _unreadable(path / split, images[c])) is not None}
            if dead:
                why = next(filter(None, dead.values()), "")
                raise UserError(
                    f"data {name!r}: no image that can be read in {path / split} for class {_named(list(dead))}{why}"
                )
        elif not listing.files:
            raise UserError(f"data {name!r}: no images in {path / split}")
        elif empty := [c for c in train.classes if not images[c]]:
            notes.append(f"no images in {path / split} for class {_named(empty)}")
        if listing.unused:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(listing.unused.items()))
            notes.append(f"not used in {path / split}: {reasons}")
        if not listing.hashed.all():
            n = int(listing.hashed.sum())
            notes.append(
                f"fingerprint of {split}: names, labels and sizes of {len(listing.files):,} files, bytes of {n:,}"
            )
    return notes


def _named(classes: Sequence[str], most: int = 5) -> str:
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(map(repr, classes[:most])) + more


def _unreadable(root: Path, files: Sequence[str]) -> str | None:
    """Say why the first of a class's images cannot be read; None if one can be, as far as its header tells."""
    first = ""
    for file in files:
        try:
            with Image.open(root / file) as image:
                check_range(image)
                return None
        except READ_ERRORS as error:
            first = first or f" ({file}: {error})"
    return first


def _facts(found: Mapping[str, _Listing], names: Sequence[str]) -> Iterator[str | bytes]:
    """Yield what the fingerprint hashes: the classes in order, then names, sizes and bytes of the images in order."""
    yield "\0".join(names)
    for split, listing in found.items():
        yield f"\0{split}\0"
        yield join_names(listing.files).tobytes()
        yield listing.stamps[:, 3].astype("<i8").tobytes()
        yield listing.hashed.tobytes() + listing.digests.tobytes()


@register
class ImageFolder(ImageFiles):
    """``PATH/train`` and ``PATH/val`` with one folder of images per class; ``val`` has the classes of ``train``.

    Args:
        path: the folder with both splits, absolute.
        options: how it is opened.

    Raises:
        UserError: a folder is missing, ``val`` has a class that ``train`` lacks, a class cannot be trained on, or
            classes are not those of the model (``class_names``).
    """

    kind = "imagefolder"
    argument = "PATH"
    class_options = frozenset({"class_order", "classes"})

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(Path(argument), options)

    def __init__(self, path: Path, options: OpenOptions) -> None:
        name = f"imagefolder:{path}"
        for split in ("train", "val"):
            if not (path / split).is_dir():
                raise NotHere(f"data {name!r}: no folder {path / split} with one folder per class in it")
        self._path, self._found, self._options = path, _listings(name, path), options
        notes = _check_classes(name, path, self._found)
        names = class_names(name, self._found["train"].classes, options)
        given = options.class_order is not None or options.classes is not None
        other = tuple(sorted(names))
        if not given and other != names and set(model_names(options.preprocessing)) != set(names):
            notes.append(
                f"classes by position, in timm's natural order ({names[0]} .. {names[-1]}); torchvision's is another "
                f"({other[0]} .. {other[-1]}): data.class_order or --class-order codepoint"
            )
        self._labels = {c: i for i, c in enumerate(names)}
        super().__init__(name, options, _facts(self._found, names), len(names), classes=names, notes=tuple(notes))

    def in_other_order(self) -> tuple[ClassOrder, Data] | None:
        if self._options.classes is not None:
            return None
        order: ClassOrder = "natural" if self._options.class_order == "codepoint" else "codepoint"
        other = type(self)(self._path, replace(self._options, class_order=order))
        return None if other.info.classes == self.info.classes else (order, other)

    def labels(self, split: str) -> list[int]:
        """Return the labels of a split's images, without reading the images."""
        return [self._labels[file.split("/", 1)[0]] for file in self._found[split].files]

    def _open(self, split: str) -> Dataset[Any]:
        root, files = self._path / split, self._found[split].files
        return ListedImages(root, files, self.labels(split), self.info.input_size[0])

    def train_labels(self) -> torch.Tensor:
        return torch.tensor(self.labels("train"))
