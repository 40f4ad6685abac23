"""Labelled images behind one small interface: a training loader, an exact evaluation loader, calibration batches.

``digits`` is scikit-learn's hand-written digits (1,797 grey images of 8x8 pixels), the embedded data set.
``imagefolder:PATH`` has ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*`` and uses timm's transforms.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2 as T
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from models import UserError

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


class Data(ABC):
    """A training and a validation split of normalised images C·H·W with integer labels."""

    info: DataInfo

    def __init__(self, *, loader_workers: int = 0) -> None:
        self.loader_workers = loader_workers

    @abstractmethod
    def split(self, split: str, *, augment: bool) -> Dataset[Batch]:
        """The ``train`` or ``val`` split, map-style, augmented or as for evaluation."""

    def train_loader(self, batch_size: int, generator: torch.Generator) -> DataLoader[Batch]:
        """Augmented training images in an order drawn from ``generator``; a last batch of one image is left out."""
        data = self.split("train", augment=True)
        size = len(data)  # type: ignore[arg-type]
        if size < 2:
            raise UserError(f"{self.info.name}: {size} training images; at least 2 are needed")
        last = size % batch_size == 1
        return DataLoader(
            data, batch_size, shuffle=True, generator=generator, drop_last=last, num_workers=self.loader_workers
        )

    def val_loader(self, batch_size: int) -> DataLoader[Batch]:
        """Every validation image once, in a fixed order."""
        return DataLoader(self.split("val", augment=False), batch_size, num_workers=self.loader_workers)

    def calibration(self, images: int, batch_size: int, seed: int) -> list[Batch]:
        """``images`` training images (or all, where there are fewer) without augmentation, drawn by ``seed``."""
        data = self.split("train", augment=False)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        return list(DataLoader(Subset(data, order[:images].tolist()), batch_size, num_workers=self.loader_workers))


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

    def split(self, split: str, *, augment: bool) -> Dataset[Batch]:
        images, labels = self._splits[split]
        if not augment:
            return TensorDataset((images - self.MEAN) / self.STD, labels)  # type: ignore[return-value]
        move = T.RandomAffine(7, translate=(0.05, 0.05), scale=(0.95, 1.05), interpolation=T.InterpolationMode.BILINEAR)
        return _Augmented(TensorDataset(images, labels), T.Compose([move, T.Normalize([self.MEAN], [self.STD])]))  # type: ignore[arg-type]


class ImageFolder(Data):
    """``PATH/train`` and ``PATH/val`` with one folder per class, through timm's readers and transforms."""

    def __init__(self, path: Path, preprocessing: Mapping[str, Any], *, loader_workers: int = 0) -> None:
        super().__init__(loader_workers=loader_workers)
        for split in ("train", "val"):
            if not (path / split).is_dir():
                raise UserError(f"data 'imagefolder:{path}': no folder {path / split} with one folder per class in it")
        self._path, self._config = path, resolve_data_config(pretrained_cfg=dict(preprocessing))
        classes = {split: sorted(p.name for p in (path / split).iterdir() if p.is_dir()) for split in ("train", "val")}
        if classes["train"] != classes["val"]:
            differ = sorted(set(classes["train"]) ^ set(classes["val"]))
            raise UserError(f"data 'imagefolder:{path}': train and val have different classes: {', '.join(differ[:5])}")
        config = self._config
        self.info = DataInfo(
            name=f"imagefolder:{path}",
            num_classes=len(classes["train"]),
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            fingerprint=_folder_fingerprint(path, config),
        )

    def split(self, split: str, *, augment: bool) -> Dataset[Batch]:
        data = create_dataset("", root=str(self._path / split), split=split, search_split=False)
        config = {k: self._config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")}
        data.transform = create_transform(**config, is_training=augment)
        return data  # type: ignore[no-any-return]


def _folder_fingerprint(path: Path, config: Mapping[str, Any]) -> str:
    """Names and sizes of all files, and the preprocessing: changes are seen without reading the images."""
    content = hashlib.sha256(repr(sorted(config.items())).encode())
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            content.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return content.hexdigest()[:16]


def open_data(name: str, preprocessing: Mapping[str, Any] | None = None, *, loader_workers: int = 0) -> Data:
    """Open a data set by name.

    Args:
        name: ``digits`` or ``imagefolder:PATH``.
        preprocessing: a timm model's ``pretrained_cfg``, which says how its images are resized and normalised;
            ``digits`` has a preprocessing of its own.
        loader_workers: processes that load and augment images; 0 does it in this one.

    Raises:
        UserError: the name is unknown, or the data are not there or not as they must be.
    """
    if name == "digits":
        return Digits(loader_workers=loader_workers)
    kind, colon, path = name.partition(":")
    if kind == "imagefolder" and colon and path:
        return ImageFolder(Path(path).expanduser().absolute(), preprocessing or {}, loader_workers=loader_workers)
    raise UserError(f"data.name = {name!r}: must be 'digits' or 'imagefolder:PATH'")


def images_only(batches: Iterable[Batch]) -> list[torch.Tensor]:
    """The images of labelled batches."""
    return [x for x, _ in batches]
