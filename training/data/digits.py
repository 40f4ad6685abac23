"""The embedded data set: scikit-learn's hand-written digits, 1,797 grey images of 8x8 pixels."""

from __future__ import annotations

import hashlib
from typing import Self

import torch
import torchvision.transforms.v2 as T
from torch.utils.data import Dataset, TensorDataset

from prunesweep.models import UserError
from prunesweep.training.recipe import Recipe

from .base import Batch, Data, DataInfo, OpenOptions, Transformed
from .registry import register

__all__ = ["Digits"]


@register
class Digits(Data):
    """scikit-learn's digits; a fixed stratified quarter is held out as ``val``."""

    kind = "digits"
    SPLIT_SEED, HELD_OUT = 0, 0.25
    MEAN, STD = 0.3053, 0.3760

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(loader_workers=options.loader_workers)

    def __init__(self, *, loader_workers: int = 0) -> None:
        super().__init__(loader_workers=loader_workers)
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise UserError("data 'digits' needs scikit-learn: pip install -e '.[demo]'") from error
        digits = load_digits()
        indices = train_test_split(
            range(len(digits.target)), test_size=self.HELD_OUT, random_state=self.SPLIT_SEED, stratify=digits.target
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

    def labels(self, split: str) -> list[int]:
        return self._splits[split][1].tolist()

    def train_labels(self) -> torch.Tensor:
        return self._splits["train"][1]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        images, labels = self._splits[split]
        if augment is None:
            return TensorDataset((images - self.MEAN) / self.STD, labels)  # type: ignore[return-value]
        move = T.RandomAffine(7, translate=(0.05, 0.05), scale=(0.95, 1.05), interpolation=T.InterpolationMode.BILINEAR)
        return Transformed(TensorDataset(images, labels), T.Compose([move, T.Normalize([self.MEAN], [self.STD])]))  # type: ignore[arg-type]
