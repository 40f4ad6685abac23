"""What every data set offers: a training loader, an exact evaluation loader, calibration batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from prunesweep.training.batches import EpochBatches, WithRows, own_share
from prunesweep.training.recipe import Recipe
from prunesweep.training.world import World

from .loader import PersistentLoader

__all__ = ["Batch", "ClassOrder", "Data", "DataInfo", "OpenOptions", "Transformed", "images_only"]

Batch = tuple[torch.Tensor, torch.Tensor]
ClassOrder = Literal["natural", "codepoint"]


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
    classes: tuple[str, ...] = ()  # names by label, where the data have names
    notes: tuple[str, ...] = ()  # what a user should know: empty classes, files that are not used, sampled bytes


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """How a data set is to be opened; every kind reads what concerns it.

    Attributes:
        preprocessing: a timm model's ``pretrained_cfg``; its ``label_names`` put the classes in the model's order.
        loader_workers: processes that load and augment images; 0 does it in this one.
        class_order: of class folders: timm's ("natural": case-insensitive, 2 before 10) or torchvision's ("codepoint").
        classes: class names by label, or a file with one per line; goes before every other order.
        unreadable: share of a split's images that may be unreadable; 10 images always may.
        length, context: of pieces of text.
    """

    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    loader_workers: int = 0
    class_order: ClassOrder = "natural"
    classes: Sequence[str] | str | Path | None = None
    unreadable: float = 0.001
    length: int | None = None
    context: int = 0


class Data(ABC):
    """A training and a validation split of normalised images C·H·W with integer labels (texts: ``data.text``).

    A kind of data set is a subclass with ``kind``, ``argument`` and ``open``, made known by ``register``.
    """

    kind: ClassVar[str]  # what stands before the colon of a data set's name
    argument: ClassVar[Literal["", "PATH", "NAME"]] = ""  # what stands behind it
    info: DataInfo

    def __init__(self, *, loader_workers: int = 0) -> None:
        self.loader_workers = loader_workers

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        """Open the data set that ``KIND:argument`` names; of ``argument = "PATH"``, the path is absolute."""
        raise NotImplementedError

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

    def describe(self) -> list[str]:
        """Lines for a user: images and classes, how images are prepared, and what to know of the files."""
        info = self.info
        val = len(self.split("val", augment=None))  # type: ignore[arg-type]
        named = f" ({info.classes[0]} .. {info.classes[-1]})" if info.classes else ""
        lines = [f"{info.name}: {self.train_images:,} train, {val:,} val, {info.num_classes:,} classes{named}"]
        return [*lines, *info.notes]

    def train_loader(
        self, batches: EpochBatches, recipe: Recipe, known: Mapping[str, Any] = MappingProxyType({})
    ) -> DataLoader[Any]:
        """Training images, augmented as ``recipe`` says, in the order of ``batches``; (images, labels) per batch.

        With ``known``, tables that have a row for every training image by index, batches have their rows as a third
        item, by the tables' names. Its workers persist over epochs.
        """
        data: Dataset[Any] = self.split("train", augment=None if recipe.fixed_view else recipe)
        if known:
            data = WithRows(data, known)
        return self._loader(data, batches)

    def val_loader(self, batch_size: int, world: World | None = None) -> DataLoader[Batch]:
        """Every validation image once, in a fixed order; with a ``world``, this worker's share of them."""
        return self._val_loader("val", batch_size, world)

    def _val_loader(self, split: str, batch_size: int, world: World | None) -> DataLoader[Batch]:
        """One loader per split, batch size and share, so that its workers persist from one evaluation to the next."""
        kept: dict[tuple[Any, ...], DataLoader[Any]] = self.__dict__.setdefault("_val_loaders", {})
        key = (split, batch_size, None if world is None else (world.rank, world.size))
        if key not in kept:
            data = self.split(split, augment=None)
            if world is not None:
                data = Subset(data, own_share(len(data), world))  # type: ignore[arg-type]
            order = BatchSampler(SequentialSampler(data), batch_size, drop_last=False)  # type: ignore[arg-type]
            kept[key] = self._loader(data, order)
        return kept[key]

    def _loader(self, data: Dataset[Any], batches: Any) -> DataLoader[Any]:
        return PersistentLoader.make(data, batches, workers=self.loader_workers, pin_memory=torch.cuda.is_available())

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


class Transformed(Dataset[Batch]):
    """A data set's images through a transform."""

    def __init__(self, data: Dataset[Batch], transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        image, label = self.data[index]
        return self.transform(image), label


def images_only(batches: Iterable[Batch]) -> list[torch.Tensor]:
    """The images of labelled batches."""
    return [x for x, _ in batches]
