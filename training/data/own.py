"""Data of one's own: a pair of ``torch.utils.data.Dataset``, here or, by the name of a function, in any process."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.training.named_code import allow, find_named
from prunesweep.training.recipe import Recipe

from .base import Batch, Data, DataInfo, OpenOptions
from .classes import renumbered
from .registry import register

__all__ = ["OwnData", "own_data"]

HASHED = 4096  # images of a split whose numbers are in the fingerprint; of more, as many at equal distances
MARK = "__prunesweep_data__"
Function = Callable[[], Data]


def own_data(function: Function) -> Function:
    """Let ``data.name = "python:MODULE:FUNCTION"`` name the data that a function returns; a decorator.

    A configuration names no code by itself: the module must have been imported by this process, or be named in the
    environment variable ``PRUNESWEEP_MODULES``. The decorator adds it there, for the processes that this one starts.

    Args:
        function: takes nothing and returns ``Data.of(...)``; it is called in every process that needs the data, each of
            which must be able to import its module.
    """
    return allow(function, MARK)


@register
class OwnData(Data):
    """A pair of map-style data sets of (image, label), made by ``Data.of``.

    Args:
        train: training images, prepared as for evaluation: float tensors (C, rows, columns), all of one size.
        val: validation images, likewise.
        classes: names by label; numbers of classes are otherwise those of the training labels.
        augmented: the training images with random changes, in the same order, for recipes to train on.
        mean, std: by channel, with which images were normalised, for saved models to say.
        name: in messages.
        loader_workers: processes that load images.

    Raises:
        UserError: an item is not (image, label), images differ in size from the first one, or a label has no class.
    """

    kind, argument = "python", "MODULE:FUNCTION"

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        name = f"python:{argument}"
        found = find_named(name, "data.name", MARK, "prunesweep.training.own_data")
        data = found()
        if not isinstance(data, cls):
            raise UserError(f"data.name = {name!r}: returned a {type(data).__name__}, not Data.of(train, val)")
        return data.described(name, options)

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any],
        *,
        classes: Sequence[str] | None = None,
        augmented: Dataset[Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str = "own",
        loader_workers: int = 0,
    ) -> None:
        super().__init__(loader_workers=loader_workers)
        self._splits: dict[str, Any] = {"train": train, "val": val}
        self._augmented = augmented
        for split, data in self._splits.items():
            if len(data) == 0:
                raise UserError(f"{name}: {split} has no images")
        if augmented is not None and len(augmented) != len(train):  # type: ignore[arg-type]
            raise UserError(f"{name}: augmented has {len(augmented)} images, train {len(train)}: give the same ones")  # type: ignore[arg-type]
        shape = tuple(_item(train, 0, f"{name}: train")[0].shape)
        if len(shape) != 3:
            raise UserError(f"{name}: an image has shape {list(shape)}: must be channels, rows and columns")
        content = hashlib.sha256(repr((shape, classes and list(classes), mean, std)).encode())
        self._labels = {}
        for split, data in self._splits.items():
            self._labels[split] = _labels(data, f"{name}: {split}", shape, content)
        count = len(classes) if classes is not None else int(self._labels["train"].max()) + 1
        for split, labels in self._labels.items():
            if labels.min() < 0 or labels.max() >= count:
                wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
                raise UserError(f"{name}: {split} has the label {wrong}: must lie in 0..{count - 1}")
        channels = shape[0]
        self.info = DataInfo(
            name=name,
            num_classes=count,
            input_size=shape,
            mean=tuple(mean or (0.0,) * channels),
            std=tuple(std or (1.0,) * channels),
            fingerprint=content.hexdigest()[:16],
            classes=tuple(map(str, classes or ())),
        )

    def described(self, name: str, options: OpenOptions) -> Self:
        """Take a name, and number the classes as the model of ``options`` does if it has their names; return self."""
        classes, fingerprint, numbers = self.info.classes, self.info.fingerprint, None
        if classes:
            classes, numbers = renumbered(name, classes, options.preprocessing)
        if numbers is not None:
            fingerprint = hashlib.sha256(repr((fingerprint, classes)).encode()).hexdigest()[:16]
            table = torch.tensor([numbers[label] for label in range(len(classes))])
            self._labels = {split: table[labels] for split, labels in self._labels.items()}
        self.info = dataclasses.replace(self.info, name=name, classes=classes, fingerprint=fingerprint)
        self.loader_workers = options.loader_workers or self.loader_workers
        return self

    @property
    def train_images(self) -> int:
        return len(self._labels["train"])

    def train_labels(self) -> torch.Tensor:
        return self._labels["train"]

    def labels(self, split: str) -> list[int]:
        return self._labels[split].tolist()

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        own = self._splits[split]
        if augment is not None and self._augmented is not None:
            own = self._augmented
        return _Labelled(own, self._labels[split])  # type: ignore[return-value]


class _Labelled(Dataset[Any]):
    """Images of a data set with labels that are known already."""

    def __init__(self, data: Any, labels: torch.Tensor) -> None:
        self.data, self.known = data, labels

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data[index][0], self.known[index]


def _item(data: Any, index: int, where: str) -> tuple[torch.Tensor, int]:
    item = data[index]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"{where}: item {index} is a {type(item).__name__}: must be (image, label)")
    image, label = item
    if not isinstance(image, torch.Tensor) or not image.is_floating_point():
        what = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
        raise UserError(f"{where}: image {index} is {what}: must be a tensor of floats, channels, rows and columns")
    try:
        number = int(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: label {index} is {label!r}: must be a whole number") from error
    return image, number


def _labels(data: Any, where: str, shape: tuple[int, ...], content: Any) -> torch.Tensor:
    """Read all labels (N,), and put them and the numbers of some images into a digest."""
    known = getattr(data, "targets", None)  # as torchvision's data sets have them: images need not be read for them
    chosen = set(range(0, len(data), -(-len(data) // HASHED)))
    found = torch.zeros(len(data), dtype=torch.long)
    if known is not None:
        found = torch.as_tensor(known).long().reshape(-1)
    for i in range(len(data)) if known is None else sorted(chosen):
        image, label = _item(data, i, where)
        if tuple(image.shape) != shape:
            raise UserError(f"{where}: image {i} has shape {list(image.shape)}, others have {list(shape)}")
        if int(found[i]) != label and known is not None:
            raise UserError(f"{where}: item {i} has the label {label}, its targets say {int(found[i])}")
        found[i] = label
        if i in chosen:
            content.update(image.detach().float().cpu().contiguous().numpy().tobytes())
    content.update(found.numpy().tobytes())
    return found
