"""Read data sets of Hugging Face's ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from timm.data.readers import create_reader
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere

from .base import OpenOptions
from .classes import read_names, renumbered
from .images import ImageFiles, read_image
from .registry import register

__all__ = ["HuggingFace"]


@register
class HuggingFace(ImageFiles):
    """A data set of Hugging Face's ``datasets`` with columns ``image`` and ``label``, through timm's reader.

    Args:
        name: name of the data set on the Hub.
        options: how it is opened.

    Raises:
        UserError: the package ``datasets`` is missing, the data set cannot be opened, its labels are no classes, or
            ``options.classes`` are not as many as its classes.
    """

    kind = "hfds"
    argument = "NAME"
    class_options = frozenset({"classes"})

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(argument, options)

    def __init__(self, name: str, options: OpenOptions) -> None:
        try:
            self._readers = {split: _reader(name, split) for split in ("train", "val")}
        except ImportError as error:
            raise NotHere(f"data 'hfds:{name}' needs the datasets package: pip install datasets") from error
        except Exception as error:  # datasets raises many kinds of errors for an unknown data set or a missing network
            raise NotHere(f"data 'hfds:{name}' cannot be opened: {error}") from error
        reader = self._readers["train"]
        label = reader.dataset.features[reader.label_key]
        count = getattr(label, "num_classes", None)
        if count is None:
            raise UserError(f"data 'hfds:{name}': its column {reader.label_key!r} holds {label}, not classes")
        own = tuple(getattr(label, "names", None) or ())
        names = own if options.classes is None else read_names(options.classes)
        if names and len(names) != count:
            raise UserError(f"data.classes: {len(names)} names, data 'hfds:{name}' has {count} classes")
        names, self._numbers = renumbered(f"hfds:{name}", names, options.preprocessing)
        facts = [json.dumps({split: reader.dataset._fingerprint for split, reader in self._readers.items()})]
        if self._numbers is not None or options.classes is not None:
            facts.append(json.dumps([names, self._numbers]))
        super().__init__(f"hfds:{name}", options, facts, count, classes=names)

    def _open(self, split: str) -> Dataset[Any]:
        return _HubImages(self._readers[split], self._numbers, self.info.input_size[0])

    def train_labels(self) -> torch.Tensor:
        reader = self._readers["train"]
        numbers = list(reader.dataset[reader.label_key])
        return torch.tensor(numbers if self._numbers is None else [self._numbers[number] for number in numbers])


def _reader(name: str, split: str) -> Any:
    named = {"train": "train", "val": "validation"}[split]
    return create_reader(f"hfds/{name}", root=None, split=named)


class _HubImages(Dataset[Any]):
    """Images of timm's reader by index. It replaces timm's own data set, which skips damaged images in silence."""

    def __init__(self, reader: Any, numbers: Mapping[int, int] | None, channels: int) -> None:
        self.reader, self.numbers, self.channels = reader, numbers, channels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, number = self.reader[index]
        with file:
            return read_image(file, self.channels), number if self.numbers is None else self.numbers[number]
