"""Data of a search: a share of the training images is held out to compare candidates by, the rest trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from prunesweep.models import UserError
from prunesweep.models.io.provenance import digest
from prunesweep.training.recipe import Recipe
from prunesweep.training.world import World

from .base import Batch, ClassOrder, Data, Replaced
from .text import WORDS_AT_A_TIME

__all__ = ["SEARCH_IMAGES", "SearchSplit"]

SEARCH_IMAGES = 10_000  # at most: a top-1 of 95 % has a standard error of 0.2 % there
SEED = 0


class SearchSplit(Data):
    """Data whose ``val`` is a share of the training images, and whose ``train`` is the rest of them.

    The images are drawn from every class alike, and are the same ones for the same data and share. The data's own
    validation split, on which a search reports, is that of ``report``.

    Args:
        data: the data as they are.
        share: of the training images, in (0, 1); ``SEARCH_IMAGES`` at most.

    Raises:
        UserError: there are too few training images.
    """

    def __init__(self, data: Data, share: float) -> None:
        super().__init__(loader_workers=data.loader_workers)
        self._data, images = data, data.train_images
        if images < 2:
            raise UserError(
                f"data.search_split = {share:g}: {data.info.name!r} has {images} training images, none to hold out: "
                "set data.search_split = 0, and candidates are compared on the validation split"
            )
        held = _drawn(_labels(data), min(share, SEARCH_IMAGES / images))
        rest = torch.ones(images, dtype=torch.bool)
        rest[held] = False
        self._rows = {"val": held.tolist(), "train": rest.nonzero().flatten().tolist()}
        facts = {"data": data.info.fingerprint, "search_split": self._rows["val"]}
        self.info = replace(data.info, fingerprint=digest(facts))

    @property
    def report(self) -> Data:
        return self._data

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        images = self.marked(split, augment=augment)
        return Replaced(images) if split == "train" else images  # never by an image that is held out

    def marked(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        return Subset(self._data.marked("train", augment=augment), self._rows[split])

    @property
    def train_images(self) -> int:
        return len(self._rows["train"])

    def train_labels(self) -> torch.Tensor:
        return self._data.train_labels()[self._rows["train"]]

    def labels(self, split: str) -> Sequence[int] | None:
        found = self._data.labels("train")
        return None if found is None else [found[row] for row in self._rows[split]]

    def in_other_order(self) -> tuple[ClassOrder, Data] | None:
        return self._data.in_other_order()

    def describe(self) -> list[str]:
        return [
            *self._data.describe(),
            f"of the training images, {self.val_images:,} are held out: candidates are compared on them, nothing is "
            "fitted to them; the validation split is for the front at the end",
        ]

    def val_loader(self, batch_size: int, world: World | None = None) -> DataLoader[Batch]:
        if self.info.vocabulary:  # long pieces of text come in smaller batches
            batch_size = max(1, min(batch_size, WORDS_AT_A_TIME // self.info.input_size[-1]))
        return super().val_loader(batch_size, world)


def _labels(data: Data) -> torch.Tensor:
    """The labels of the training images; zeros where there are none."""
    try:
        return data.train_labels()
    except UserError:
        return torch.zeros(data.train_images, dtype=torch.long)


def _drawn(labels: torch.Tensor, share: float) -> torch.Tensor:
    """Draw indices of about a share of the images of every class, of all images in random order; at least one image."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    by_class = order[labels[order].argsort(stable=True)]
    _, place, sizes = np.unique(labels[by_class].numpy(), return_inverse=True, return_counts=True)
    number = np.arange(len(labels)) - (sizes.cumsum() - sizes)[place]  # of an image within its class
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[by_class[torch.from_numpy(number < (share * sizes).round()[place])]] = True
    if not drawn.any():  # classes of so few images that none has one to spare
        drawn[order[0]] = True
    return order[drawn[order]]
