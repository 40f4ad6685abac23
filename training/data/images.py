"""Image files of any size behind timm's transforms: read them, replace damaged ones, preprocess, fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.models.builder import check_preprocessing
from prunesweep.training.recipe import Recipe

from .base import UNREADABLE, Batch, Data, DataInfo, OpenOptions, Replaced

__all__ = [
    "IMAGE_ENDINGS",
    "READ_ERRORS",
    "ImageFiles",
    "ListedImages",
    "Readable",
    "check_range",
    "is_hidden",
    "read_image",
]

# what PIL raises for damaged files
READ_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
SYSTEM = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "#recycle", "$recycle.bin"}
# formats that PIL knows but cannot read, or reads with the help of another program
NOT_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}


def _endings() -> frozenset[str]:
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in Image.OPEN and kind not in NOT_IMAGES)


IMAGE_ENDINGS = _endings()  # with the dot, in lower case


def is_hidden(name: str) -> bool:
    """Return True if a file or folder of this name is hidden or made by a system, and so is not data."""
    return name.startswith(".") or name.lower() in SYSTEM


def read_image(file: Any, channels: int = 3) -> Image.Image:
    """Read an image file as grey or RGB; 16-bit grey is scaled to 8 bits.

    Args:
        file: path or open file.
        channels: 1 for grey, otherwise RGB.

    Raises:
        ValueError: pixels are 32-bit or signed numbers, or floats, of which no file says what is black and white.
    """
    image: Image.Image = Image.open(file)
    check_range(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def check_range(image: Image.Image) -> None:
    """Raise ValueError for an opened image whose range of values is not known."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # in these it is 16 bits
        kind = "floats" if image.mode == "F" else "32-bit or signed numbers"
        raise ValueError(f"its pixels are {kind}, whose black and white are not known; save it with 8 or 16 bits")


class ImageFiles(Data):
    """Image files behind timm's transforms; ``_open(split)`` returns (PIL image, label) pairs by index."""

    def __init__(
        self,
        name: str,
        options: OpenOptions,
        facts: Iterable[str | bytes],
        num_classes: int,
        *,
        classes: tuple[str, ...] = (),
        open_ended: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Keep the facts about the files, and make the fingerprint.

        Args:
            name: name of the data set.
            options: how it is opened.
            facts: everything that determines images, labels and their order; it is hashed into the fingerprint.
            num_classes: number of classes; 0 where there are no labels.
            classes: class names by label, if they have names.
            open_ended: there may be more classes than occur here.
            notes: lines for people.
        """
        super().__init__(loader_workers=options.loader_workers)
        check_preprocessing(options.preprocessing)
        self._config = dict(resolve_data_config(pretrained_cfg=dict(options.preprocessing)))
        self._unreadable = options.unreadable
        self._splits: dict[str, Dataset[Any]] = {}
        self._damaged: dict[str, torch.Tensor] = {}
        config = self._config
        for key in ("mean", "std"):
            if len(config[key]) not in (1, channels := config["input_size"][0]):
                raise UserError(
                    f"the model's pretrained_cfg.{key} = {list(config[key])}: {len(config[key])} numbers for images of "
                    f"{channels} channels; give one per channel"
                )
        content = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())  # tuples become lists
        for fact in facts:
            content.update(fact.encode(errors="surrogateescape") if isinstance(fact, str) else fact)
        self.info = DataInfo(
            name=name,
            num_classes=num_classes,
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            fingerprint=content.hexdigest()[:16],
            classes=classes,
            open_ended=open_ended,
            notes=notes,
        )

    @abstractmethod
    def _open(self, split: str) -> Dataset[Any]:
        """Return the images of a split, not yet transformed."""

    def _images(self, split: str) -> Dataset[Any]:
        """Return a split's images; open it the first time."""
        if split not in self._splits:
            self._splits[split] = self._open(split)
        return self._splits[split]

    @property
    def train_images(self) -> int:
        return len(self._images("train"))  # type: ignore[arg-type]

    def _prepared(self) -> str:
        config = self._config
        size = config["input_size"][1:]
        scaled = _shape([math.floor(side / config["crop_pct"]) for side in size])  # as timm does
        how = config["interpolation"]
        crop = {
            "squash": f"squash to {scaled} {how}, centre crop {_shape(size)}",
            "border": f"resize into {scaled} {how}, crop or pad to {_shape(size)}",
        }.get(config["crop_mode"], f"resize {scaled} {how}, centre crop {_shape(size)}")
        return f"{crop}, {super()._prepared()}"

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        images = self.marked(split, augment=augment)
        return Replaced(images) if split == "train" else images

    def marked(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        if augment is None:
            transform = create_transform(**self._config)
        else:
            config = {k: self._config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")}
            transform = create_transform(
                **config,
                is_training=True,
                color_jitter=augment.color_jitter,
                auto_augment=augment.auto_augment,
                re_prob=augment.random_erasing,
                re_mode="pixel",
            )
        images: Any = self._images(split)
        if split not in self._damaged:  # one list for all views of a split, and all processes that load it
            self._damaged[split] = torch.zeros(len(images), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        given: dict[str, Any] = {"share": self._unreadable, "damaged": self._damaged[split]}
        return Readable(images, transform, blank=torch.zeros(self.info.input_size), **given)

    @property
    def val_images(self) -> int:
        damaged = self._damaged.get("val")
        return super().val_images - (0 if damaged is None else int(damaged.sum()))


class ListedImages(Dataset[Any]):
    """Images below a folder by index. It replaces timm's own data set, which would skip damaged images in silence.

    Args:
        root: the folder.
        files: paths in it.
        labels: of the files.
        channels: 1 for grey, otherwise RGB.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int], channels: int) -> None:
        self.root, self.files, self.labels, self.channels = str(root), files, labels, channels

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        """Return the path of a file."""
        return f"{self.root}/{self.files[index]}"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with open(self.name_of(index), "rb") as file:
            return read_image(file, self.channels), self.labels[index]


def _shape(sides: Sequence[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


class Readable(Dataset[Batch]):
    """Transformed images; ``blank`` with the label ``UNREADABLE`` stands for one that cannot be read.

    Distinct damaged images are counted over all processes and epochs, and each is named once. If they are more than
    ``share`` of the images, and more than ``ALWAYS``, an error is raised.

    Args:
        data: map-style data set of (PIL image, label); its ``name_of`` an index, if it has one, is for messages.
        transform: function of an image.
        share: share of the images that may be unreadable.
        damaged: (N,) bool in shared memory, true for the images that could not be read.
        blank: an image C·H·W.
    """

    ALWAYS = 10

    def __init__(self, data: Any, transform: Any, *, share: float, damaged: torch.Tensor, blank: torch.Tensor) -> None:
        self.data, self.transform, self.damaged, self.blank = data, transform, damaged, blank
        self.limit = max(self.ALWAYS, int(share * len(data)))
        self.reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration
        if index not in self.reasons:
            try:
                image, label = self.data[index]
            except UserError:  # a store that does not answer, or refuses, is no damaged image
                raise
            except READ_ERRORS as error:
                self._count(index, error)
            else:
                return self.transform(image), label
        return self.blank, UNREADABLE  # type: ignore[return-value]  # labels become tensors in batches

    def _count(self, index: int, error: BaseException) -> None:
        known = bool(self.damaged[index])
        name = self.data.name_of(index) if hasattr(self.data, "name_of") else f"image {index}"
        self.reasons[index] = f"{name}: {str(error).partition(' <')[0]}"  # Pillow shows the object that it reads from
        self.damaged[index] = True
        if int(self.damaged.sum()) > self.limit:
            raise UserError(f"more than {self.limit} images cannot be read: {self._listed()}") from error
        if self.damaged.all():
            raise UserError(f"none of {len(self)} images can be read: {self._listed()}") from error
        if not known:
            warnings.warn(
                "an image cannot be read (training takes another one, evaluation leaves it out): "
                f"{self.reasons[index]}",
                stacklevel=1,
            )

    def _listed(self, most: int = 12) -> str:
        listed = list(self.reasons.values())
        return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more" if len(listed) > most else "")
