"""Read data sets of Hugging Face's ``datasets``."""

from __future__ import annotations

import json
from typing import Any, Self

import torch
from timm.data import create_dataset
from torch.utils.data import Dataset

from prunesweep.models.errors import NotHere

from .base import OpenOptions
from .images import ImageFiles
from .registry import register

__all__ = ["HuggingFace"]


@register
class HuggingFace(ImageFiles):
    """A data set of Hugging Face's ``datasets`` with columns ``image`` and ``label``, through timm's reader.

    Args:
        name: name of the data set on the Hub.
        options: how it is opened.

    Raises:
        UserError: the package ``datasets`` is missing, or the data set cannot be opened.
    """

    kind = "hfds"
    argument = "NAME"

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(argument, options)

    def __init__(self, name: str, options: OpenOptions) -> None:
        self._name = name
        try:
            splits = {split: self._open(split) for split in ("train", "val")}
        except ImportError as error:
            raise NotHere(f"data 'hfds:{name}' needs the datasets package: pip install datasets") from error
        except Exception as error:  # datasets raises many kinds of errors for an unknown data set or a missing network
            raise NotHere(f"data 'hfds:{name}' cannot be opened: {error}") from error
        reader: Any = splits["train"].reader  # type: ignore[attr-defined]
        label = reader.dataset.features[reader.label_key]
        facts = {split: data.reader.dataset._fingerprint for split, data in splits.items()}  # type: ignore[attr-defined]
        names = tuple(getattr(label, "names", None) or ())
        super().__init__(f"hfds:{name}", options, [json.dumps(facts)], label.num_classes, classes=names)

    def _open(self, split: str) -> Dataset[Any]:
        named = {"train": "train", "val": "validation"}[split]
        return create_dataset(f"hfds/{self._name}", root=None, split=named)  # type: ignore[no-any-return]

    def train_labels(self) -> torch.Tensor:
        reader: Any = self._images("train").reader  # type: ignore[attr-defined]
        return torch.tensor(reader.dataset[reader.label_key])
