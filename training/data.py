"""Labelled images behind one small interface: a training loader, an exact evaluation loader, calibration batches.
``digits`` is scikit-learn's hand-written digits (1,797 grey images of 8x8 pixels), the embedded data set.
``imagefolder:PATH`` has ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``, ``wds:PATH`` webdataset shards
``PATH/train*.tar`` and ``PATH/val*.tar``, ``hfds:NAME`` a data set of Hugging Face's ``datasets``; these use timm's
transforms. All are read by index, so that any number of workers sees every image once, in an order that a seed gives.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torchvision.transforms.v2 as T
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from prunesweep.models import UserError

from .batches import EpochBatches, WithRows, own_share
from .recipe import Recipe
from .world import World

__all__ = ["Data", "DataInfo", "open_data"]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """Facts of a data set. ``fingerprint`` changes whenever an image, a label, a split or the preprocessing does."""

    name: str
    num_classes: int
    input_size: tuple[int, int, int]  # channels, rows, columns
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    vocabulary: str = ""  # of a text: a digest of its words, by which models know theirs


class Data(ABC):
    """A training and a validation split of normalised images C·H·W with integer labels (texts: ``training.text``)."""

    info: DataInfo

    def __init__(self, *, loader_workers: int = 0) -> None:
        self.loader_workers = loader_workers

    @abstractmethod
    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        """The ``train`` or ``val`` split, map-style, augmented as a recipe says or as for evaluation."""

    @property
    @abstractmethod
    def train_images(self) -> int:
        """Number of training images."""

    @abstractmethod
    def train_labels(self) -> torch.Tensor:
        """Labels of all training images, without reading the images."""

    def train_loader(
        self, batches: EpochBatches, recipe: Recipe, known: Mapping[str, Any] = MappingProxyType({})
    ) -> DataLoader[Any]:
        """Training images, augmented as ``recipe`` says, in the order of ``batches``; (images, labels) per batch.

        With ``known``, tables that have a row for every training image by index, batches have their rows as a third
        item, by the tables' names.
        """
        data: Dataset[Any] = self.split("train", augment=None if recipe.fixed_view else recipe)
        if known:
            data = WithRows(data, known)
        return DataLoader(data, batch_sampler=batches, num_workers=self.loader_workers, pin_memory=_pin())

    def val_loader(self, batch_size: int, world: World | None = None) -> DataLoader[Batch]:
        """Every validation image once, in a fixed order; with a ``world``, this worker's share of them."""
        data = self.split("val", augment=None)
        if world is not None:
            data = Subset(data, own_share(len(data), world))  # type: ignore[arg-type]
        return DataLoader(data, batch_size, num_workers=self.loader_workers, pin_memory=_pin())

    def calibration(self, images: int, batch_size: int, seed: int, *, per_class: bool = False) -> list[Batch]:
        """``images`` training images (or all, where there are fewer) without augmentation, drawn by ``seed``.

        With ``per_class``, that many of every class, in class order (UP-ViT's proxy set).
        """
        order = torch.randperm(self.train_images, generator=torch.Generator().manual_seed(seed))
        if per_class:
            labels = self.train_labels()[order]
            chosen = torch.cat([order[labels == c][:images] for c in range(self.info.num_classes)])
        else:
            chosen = order[:images]
        data = Subset(self.split("train", augment=None), chosen.tolist())
        return list(DataLoader(data, batch_size, num_workers=self.loader_workers))


def _pin() -> bool:
    return torch.cuda.is_available()


class _Augmented(Dataset[Batch]):
    def __init__(self, data: Dataset[Batch], transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        image, label = self.data[index]
        return self.transform(image), label


class Digits(Data):
    """scikit-learn's digits; a stratified quarter, fixed for ever, is held out as ``val``."""

    SPLIT_SEED = 0
    MEAN, STD = 0.3053, 0.3760

    def __init__(self, *, loader_workers: int = 0) -> None:
        super().__init__(loader_workers=loader_workers)
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise UserError("data 'digits' needs scikit-learn: pip install -e '.[demo]'") from error
        digits = load_digits()
        indices = train_test_split(
            range(len(digits.target)), test_size=0.25, random_state=self.SPLIT_SEED, stratify=digits.target
        )
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # N 1 8 8 in [0, 1]
        labels = torch.tensor(digits.target, dtype=torch.long)
        self._splits = dict(zip(("train", "val"), ((images[i], labels[i]) for i in indices), strict=True))
        content = hashlib.sha256(f"{self.MEAN} {self.STD}".encode())
        for split in self._splits.values():
            for tensor in split:
                content.update(tensor.numpy().tobytes())
        self.info = DataInfo(
            name="digits",
            num_classes=10,
            input_size=(1, 8, 8),
            mean=(self.MEAN,),
            std=(self.STD,),
            fingerprint=content.hexdigest()[:16],
        )

    @property
    def train_images(self) -> int:
        return len(self.train_labels())

    def train_labels(self) -> torch.Tensor:
        return self._splits["train"][1]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        images, labels = self._splits[split]
        if augment is None:
            return TensorDataset((images - self.MEAN) / self.STD, labels)  # type: ignore[return-value]
        move = T.RandomAffine(7, translate=(0.05, 0.05), scale=(0.95, 1.05), interpolation=T.InterpolationMode.BILINEAR)
        return _Augmented(TensorDataset(images, labels), T.Compose([move, T.Normalize([self.MEAN], [self.STD])]))  # type: ignore[arg-type]


class _Files(Data):
    """Image files of any size behind timm's transforms; ``_open(split)`` gives (PIL image, label) pairs by index."""

    def __init__(self, name: str, preprocessing: Mapping[str, Any], facts: Any, classes: int, workers: int) -> None:
        super().__init__(loader_workers=workers)
        self._config = resolve_data_config(pretrained_cfg=dict(preprocessing))
        self._splits: dict[str, Dataset[Any]] = {}
        config = self._config
        content = hashlib.sha256(repr((sorted(config.items()), facts)).encode())
        self.info = DataInfo(
            name=name,
            num_classes=classes,
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            fingerprint=content.hexdigest()[:16],
        )

    @abstractmethod
    def _open(self, split: str) -> Dataset[Any]:
        """The images of a split, not yet transformed; may have to list all files."""

    def _images(self, split: str) -> Dataset[Any]:
        """A split, opened once."""
        if split not in self._splits:
            self._splits[split] = self._open(split)
        return self._splits[split]

    @property
    def train_images(self) -> int:
        return len(self._images("train"))  # type: ignore[arg-type]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        config = {k: self._config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")}
        if augment is None:
            return _Readable(self._images(split), create_transform(**config))
        transform = create_transform(
            **config,
            is_training=True,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode="pixel",
        )
        return _Readable(self._images(split), transform)


class _Readable(Dataset[Batch]):
    """Transformed images; one that cannot be read is replaced by its neighbour, up to ``LIMIT`` of them."""

    LIMIT = 10

    def __init__(self, data: Any, transform: Any) -> None:
        self.data, self.transform, self.unreadable = data, transform, list[str]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        try:
            image, label = self.data[index]
            return self.transform(image), label
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for damaged files
            self.unreadable.append(f"image {index}: {error}")
            if len(self.unreadable) > self.LIMIT:
                listed = "; ".join(self.unreadable)
                raise UserError(f"more than {self.LIMIT} images cannot be read: {listed}") from error
            warnings.warn(f"an image cannot be read and is replaced by its neighbour: {error}", stacklevel=2)
            return self[(index + 1) % len(self)]


class ImageFolder(_Files):
    """``PATH/train`` and ``PATH/val`` with one folder per class, through timm's readers and transforms."""

    def __init__(self, path: Path, preprocessing: Mapping[str, Any], *, loader_workers: int = 0) -> None:
        for split in ("train", "val"):
            if not (path / split).is_dir():
                raise UserError(f"data 'imagefolder:{path}': no folder {path / split} with one folder per class in it")
        classes = {split: sorted(p.name for p in (path / split).iterdir() if p.is_dir()) for split in ("train", "val")}
        if classes["train"] != classes["val"]:
            differ = sorted(set(classes["train"]) ^ set(classes["val"]))
            raise UserError(f"data 'imagefolder:{path}': train and val have different classes: {', '.join(differ[:5])}")
        self._path = path
        super().__init__(
            f"imagefolder:{path}", preprocessing, _names_and_sizes(path), len(classes["train"]), loader_workers
        )

    def _open(self, split: str) -> Dataset[Any]:
        return _Opened(create_dataset("", root=str(self._path / split), split=split, search_split=False).reader)

    def train_labels(self) -> torch.Tensor:
        data: Any = self._images("train")
        return torch.tensor([label for _, label in data.reader.samples])


class _Opened(Dataset[Any]):
    """What a timm reader has, as images; timm's own data set would skip damaged ones in silence."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            return Image.open(file).convert("RGB"), label


def _names_and_sizes(path: Path) -> list[tuple[str, int]]:
    """Names and sizes of all files: changes are seen without reading the images."""
    return sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file())


class Shards(_Files):
    """Webdataset shards ``PATH/train*.tar`` and ``PATH/val*.tar`` with KEY.jpg (jpeg, png, webp) and KEY.cls.

    Members are found once by reading the tar headers, then read by position: every image once per epoch, in any order,
    for any number of workers, which streaming shards cannot give.
    """

    IMAGES = ("jpg", "jpeg", "png", "webp")

    def __init__(self, path: Path, preprocessing: Mapping[str, Any], *, loader_workers: int = 0) -> None:
        self._members = {split: self._index(path, split) for split in ("train", "val")}
        labels = [label for members in self._members.values() for *_, label in members]
        facts = [(str(file.relative_to(path)), at, size) for m in self._members.values() for file, at, size, _ in m]
        super().__init__(f"wds:{path}", preprocessing, facts, max(labels) + 1, loader_workers)

    def _index(self, path: Path, split: str) -> list[tuple[Path, int, int, int]]:
        """(shard, position, bytes, label) of every image of a split."""
        found = []
        for shard in sorted(path.glob(f"{split}*.tar")):
            parts: dict[str, dict[str, Any]] = {}
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, ending = member.name.rpartition(".")
                    if ending in self.IMAGES:
                        parts.setdefault(key, {})["image"] = (shard, member.offset_data, member.size)
                    elif ending == "cls":
                        text = tar.extractfile(member)
                        parts.setdefault(key, {})["label"] = int(text.read()) if text else -1
            for key, part in parts.items():
                if len(part) != 2:
                    has = ", ".join(part)
                    raise UserError(
                        f"data 'wds:{path}': {key} in {shard.name} has {has} only; it needs an image and .cls"
                    )
                found.append((*part["image"], part["label"]))
        if not found:
            raise UserError(f"data 'wds:{path}': no shard {path}/{split}*.tar with images in it")
        return found

    def _open(self, split: str) -> Dataset[Any]:
        return _Members(self._members[split])

    def train_labels(self) -> torch.Tensor:
        return torch.tensor([label for *_, label in self._members["train"]])


class _Members(Dataset[Any]):
    def __init__(self, members: list[tuple[Path, int, int, int]]) -> None:
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard, position, size, label = self.members[index]
        with shard.open("rb") as file:
            file.seek(position)
            return Image.open(io.BytesIO(file.read(size))).convert("RGB"), label


class HuggingFace(_Files):
    """A data set of Hugging Face's ``datasets`` with columns ``image`` and ``label``, through timm's reader."""

    def __init__(self, name: str, preprocessing: Mapping[str, Any], *, loader_workers: int = 0) -> None:
        self._name = name
        try:
            splits = {split: self._open(split) for split in ("train", "val")}
        except ImportError as error:
            raise UserError(f"data 'hfds:{name}' needs the datasets package: pip install datasets") from error
        except Exception as error:  # whatever datasets raises where there is no such data set, or no network
            raise UserError(f"data 'hfds:{name}' cannot be opened: {error}") from error
        reader: Any = splits["train"].reader  # type: ignore[attr-defined]
        classes = reader.dataset.features[reader.label_key].num_classes
        facts = {split: data.reader.dataset._fingerprint for split, data in splits.items()}  # type: ignore[attr-defined]
        super().__init__(f"hfds:{name}", preprocessing, facts, classes, loader_workers)

    def _open(self, split: str) -> Dataset[Any]:
        named = {"train": "train", "val": "validation"}[split]
        return create_dataset(f"hfds/{self._name}", root=None, split=named)  # type: ignore[no-any-return]

    def train_labels(self) -> torch.Tensor:
        reader: Any = self._images("train").reader  # type: ignore[attr-defined]
        return torch.tensor(reader.dataset[reader.label_key])


def open_data(name: str, preprocessing: Mapping[str, Any] | None = None, *, loader_workers: int = 0) -> Data:
    """Open a data set by name.

    Args:
        name: ``digits``, ``imagefolder:PATH``, ``wds:PATH`` or ``hfds:NAME``; ``pydocs`` or ``wikitext:PATH``.
        preprocessing: a timm model's ``pretrained_cfg``, which says how images are prepared; ``digits`` has its own.
        loader_workers: processes that load and augment images; 0 does it in this one.

    Raises:
        UserError: the name is unknown, or the data are not there or not as they must be.
    """
    if name == "digits":
        return Digits(loader_workers=loader_workers)
    kind, colon, path = name.partition(":")
    if kind in ("imagefolder", "wds") and colon and path:
        reader = ImageFolder if kind == "imagefolder" else Shards
        return reader(Path(path).expanduser().absolute(), preprocessing or {}, loader_workers=loader_workers)
    if kind == "hfds" and colon and path:
        return HuggingFace(path, preprocessing or {}, loader_workers=loader_workers)
    if name == "pydocs" or (kind == "wikitext" and colon and path):
        from .text import open_text

        return open_text(name, preprocessing or {}, loader_workers=loader_workers)
    known = "'digits', 'imagefolder:PATH', 'wds:PATH' or 'hfds:NAME'; of texts, 'pydocs' or 'wikitext:PATH'"
    raise UserError(f"data.name = {name!r}: must be {known}")


def images_only(batches: Iterable[Batch]) -> list[torch.Tensor]:
    """The images of labelled batches."""
    return [x for x, _ in batches]
