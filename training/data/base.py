"""The interface of every data set: a training loader, an exact evaluation loader, calibration batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, default_collate

from prunesweep.models import UserError
from prunesweep.training.batches import EpochBatches, WithRows, own_share
from prunesweep.training.recipe import Recipe
from prunesweep.training.world import World

from .loader import PersistentLoader

__all__ = [
    "NO_LABEL",
    "UNREADABLE",
    "Batch",
    "ClassOrder",
    "Data",
    "DataInfo",
    "OpenOptions",
    "Replaced",
    "Transformed",
    "images_only",
]

Batch = tuple[torch.Tensor, torch.Tensor]
ClassOrder = Literal["natural", "codepoint"]
NO_LABEL = -1  # stands where data have no labels; every loss on labels refuses it
UNREADABLE = -2  # "label" of a validation image that cannot be read; loaders leave such images out


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """Facts about a data set. ``fingerprint`` changes with any image, label, split or setting of preprocessing."""

    name: str
    num_classes: int  # 0 where there are no labels
    input_size: tuple[int, int, int]  # channels, rows, columns
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    vocabulary: str = ""  # of a text: a digest of its words, which models record
    classes: tuple[str, ...] = ()  # names by label, where the data have names
    open_ended: bool = False  # labels are numbers, and there may be more of them than occur here
    notes: tuple[str, ...] = ()  # lines for people: empty classes, files that are not used, sampled bytes

    @property
    def labelled(self) -> bool:
        """Whether images have labels."""
        return self.num_classes > 0


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """Options for opening a data set; every kind uses those that concern it.

    Attributes:
        preprocessing: a timm model's ``pretrained_cfg``; its ``label_names`` put the classes in the model's order.
        loader_workers: processes that load and augment images; 0 does it in this process.
        class_order: order in which class folders are numbered: timm's ("natural": case-insensitive, 2 before 10) or
            torchvision's ("codepoint"). None: by name where the model has names, otherwise timm's.
        classes: class names by label, or a file with one name per line; overrides every other order.
        unreadable: share of a split's images that may be unreadable; 10 images always may.
        length: words in a piece of text; None takes the model's or the kind's default.
        context: words of a piece of text that are seen but not predicted, in validation.
    """

    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    loader_workers: int = 0
    class_order: ClassOrder | None = None
    classes: Sequence[str] | str | Path | None = None
    unreadable: float = 0.001
    length: int | None = None
    context: int = 0


class Data(ABC):
    """A training and a validation split of normalised images C·H·W with integer labels (texts: ``data.text``).

    A kind of data set is a subclass with ``kind``, ``argument`` and ``open``, added to the table by ``register``.
    """

    kind: ClassVar[str]  # part of a data set's name before the colon
    argument: ClassVar[Literal["", "PATH", "NAME", "MODULE:FUNCTION"]] = ""  # what follows the colon
    urls: ClassVar[bool] = False  # whether a path may be a URL
    class_options: ClassVar[frozenset[str]] = frozenset()  # of "class_order" and "classes", those that concern it
    info: DataInfo

    def __init__(self, *, loader_workers: int = 0) -> None:
        self.loader_workers = loader_workers

    @staticmethod
    def of(train: Dataset[Any], val: Dataset[Any], **options: Any) -> Data:
        """Make data of two map-style data sets of (image, label).

        Every image of a data set without ``targets`` is read once for its label. Data that go to other processes, such
        as a search's, are named by a function that makes them: see ``own_data``.

        Args:
            train: training images, prepared as for evaluation: float tensors (C, rows, columns), all of one size, and
                labels from 0.
            val: validation images, likewise.
            options: ``classes``, names by label; ``augmented``, the training images with random changes in the same
                order, to train on; ``mean`` and ``std`` by channel, for saved models to say; ``name``, for messages;
                ``loader_workers``, processes that load images.

        Raises:
            UserError: an item is not (image, label), images differ in size, or a label has no class.
        """
        from .own import OwnData

        return OwnData(train, val, **options)

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        """Open the data set named ``KIND:argument``.

        Args:
            argument: what follows the colon; an absolute path if the class's ``argument`` is "PATH".
            options: how to open it.

        Raises:
            UserError: the data are not there, or not as they must be.
        """
        raise NotImplementedError

    @abstractmethod
    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        """Return a split as a map-style data set.

        Args:
            split: ``train`` or ``val``.
            augment: recipe whose augmentation is applied; None prepares images as for evaluation.
        """

    def marked(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        """Return a split in which an image that cannot be read is a blank with the label ``UNREADABLE``.

        Args:
            split, augment: as for ``split``, which has another image in its place where the split is to train on.
        """
        return self.split(split, augment=augment)

    @property
    @abstractmethod
    def train_images(self) -> int:
        """Number of training images."""

    @abstractmethod
    def train_labels(self) -> torch.Tensor:
        """Return the labels (N,) int64 of all training images, without reading the images.

        Raises:
            UserError: the data have no labels.
        """

    def labels(self, split: str) -> Sequence[int] | None:
        """Return the labels of a split's images, or None if this kind of data must read the images for them.

        Args:
            split: ``train`` or ``val``.

        Raises:
            UserError: the data have no labels.
        """
        return self.train_labels().tolist() if split == "train" else None

    def in_other_order(self) -> tuple[ClassOrder, Data] | None:
        """Return the other usual order of classes, and the data in it; None if that is this one, or there is none."""
        return None

    @property
    def report(self) -> Data:
        """The data whose validation split is for what a search has found; other ones where that of these chooses."""
        return self

    @property
    def val_images(self) -> int:
        """Number of validation images, without those that were found to be unreadable so far."""
        return len(self.split("val", augment=None))  # type: ignore[arg-type]

    def describe(self) -> list[str]:
        """Return lines for people: numbers of images and classes, the preprocessing, and notes on the files."""
        info = self.info
        named = f" ({info.classes[0]} .. {info.classes[-1]})" if info.classes else ""
        classes = f"{info.num_classes:,} classes{named}" if info.labelled else "without labels"
        counted = f"{info.name}: {self.train_images:,} train, {self.val_images:,} val, {classes}"
        return [counted, f"preprocessing: {self._prepared()}", *info.notes]

    def _prepared(self) -> str:
        """Say how images are prepared for evaluation."""
        numbers = {name: ", ".join(f"{v:.4g}" for v in getattr(self.info, name)) for name in ("mean", "std")}
        return f"mean {numbers['mean']}, std {numbers['std']}"

    def train_loader(
        self, batches: EpochBatches, recipe: Recipe, known: Mapping[str, Any] = MappingProxyType({})
    ) -> DataLoader[Any]:
        """Return a loader of training images, whose worker processes persist over epochs.

        Args:
            batches: the indices of every batch, in order.
            recipe: gives the augmentation.
            known: tables by name, each with a row per training image.

        Returns:
            A loader of (images, labels) per batch; with ``known``, the tables' rows by name are a third item.
        """
        data: Dataset[Any] = self.split("train", augment=None if recipe.fixed_view else recipe)
        if known:
            data = WithRows(data, known)
        return self._loader(data, batches)

    def val_loader(self, batch_size: int, world: World | None = None) -> DataLoader[Batch]:
        """Return a loader of every validation image once, in a fixed order; with a ``world``, of this worker's share.

        Images that cannot be read are left out, so a batch may be smaller, or empty.

        Args:
            batch_size: images per batch of this worker.
            world: the workers that share the images.
        """
        return self._val_loader("val", batch_size, world)

    def plain_loader(self, images: Sequence[int], batch_size: int) -> DataLoader[Batch]:
        """Return a loader of some training images, prepared as for evaluation, in a fixed order.

        Images that cannot be read are left out, as by ``val_loader``.

        Args:
            images: their indices.
            batch_size: images per batch.
        """
        data = Subset(self.marked("train", augment=None), images)
        return self._loader(data, BatchSampler(SequentialSampler(data), batch_size, drop_last=False), _readable)

    def _val_loader(self, split: str, batch_size: int, world: World | None) -> DataLoader[Batch]:
        """Return the one loader of a split, batch size and share; its workers persist from evaluation to evaluation."""
        kept: dict[tuple[Any, ...], DataLoader[Any]] = self.__dict__.setdefault("_val_loaders", {})
        key = (split, batch_size, None if world is None else (world.rank, world.size))
        if key not in kept:
            data = self.marked(split, augment=None)
            if world is not None:
                data = Subset(data, own_share(len(data), world))  # type: ignore[arg-type]
            order = BatchSampler(SequentialSampler(data), batch_size, drop_last=False)  # type: ignore[arg-type]
            kept[key] = self._loader(data, order, _readable)
        return kept[key]

    def _loader(self, data: Dataset[Any], batches: Any, collate: Any = None) -> DataLoader[Any]:
        pinned = torch.cuda.is_available()
        return PersistentLoader.make(data, batches, workers=self.loader_workers, pin_memory=pinned, collate=collate)

    def calibration(self, images: int, batch_size: int, seed: int, *, per_class: bool = False) -> list[Batch]:
        """Draw training images without augmentation; arguments as for ``calibration_loader``."""
        return list(self.calibration_loader(images, batch_size, seed, per_class=per_class))

    def calibration_loader(
        self, images: int, batch_size: int, seed: int, *, per_class: bool = False
    ) -> DataLoader[Batch]:
        """Draw training images without augmentation, which are read as they are asked for.

        Args:
            images: number of images; all of them if there are fewer.
            batch_size: images per batch.
            seed: seed of the draw.
            per_class: draw ``images`` of every class, in class order (UP-ViT's proxy set).
        """
        order = torch.randperm(self.train_images, generator=torch.Generator().manual_seed(seed))
        if per_class:
            labels = self.train_labels()[order]
            chosen = torch.cat([order[labels == c][:images] for c in range(self.info.num_classes)])
        else:
            chosen = order[:images]
        data = Subset(self.split("train", augment=None), chosen.tolist())
        return DataLoader(data, batch_size, num_workers=self.loader_workers)


class Transformed(Dataset[Batch]):
    """Apply a transform to the images of a data set.

    Args:
        data: map-style data set of (image, label).
        transform: function of an image.
    """

    def __init__(self, data: Dataset[Batch], transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        image, label = self.data[index]
        return self.transform(image), label


class Replaced(Dataset[Batch]):
    """A data set in which the next image that can be read, with its label, stands for one that cannot be.

    Args:
        data: map-style data set of ``Data.marked``.
    """

    def __init__(self, data: Dataset[Batch]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration
        for step in range(len(self)):
            image, label = self.data[(index + step) % len(self)]
            if isinstance(label, torch.Tensor) or label != UNREADABLE:  # of files, labels are numbers
                return image, label
        raise UserError(f"none of {len(self)} images can be read")


def _readable(items: list[Batch]) -> list[torch.Tensor]:
    """Make a batch of the images that could be read."""
    x, y = default_collate(items)
    if y.ndim > 1 or not (bad := y == UNREADABLE).any():  # next words of texts, or nothing to leave out
        return [x, y]
    return [x[~bad], y[~bad]]


def images_only(batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Return the images of labelled batches."""
    return [x for x, _ in batches]
