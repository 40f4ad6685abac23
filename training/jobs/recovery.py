"""The model of a decision: cut, cut and refitted in closed form, or projected to the widths that the decision keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from prunesweep.models import Arch, Cut, UserError, arch_of, weights_digest
from prunesweep.models.io.digest import read_tensors, tensors_digest
from prunesweep.models.io.files import make_folder, publish_file
from prunesweep.models.io.provenance import digest
from prunesweep.pruners.subspaces import (
    SourceStatistics,
    SourceStreams,
    compress,
    projected_widths,
    rank_units,
    recover,
)
from prunesweep.pruners.subspaces.calibration import images_of

from ..data import Data

__all__ = ["Known", "Recovery"]

FORMAT = "prunesweep/subspaces/1"  # to be counted up when statistics or orders change, so that no cache is believed

KINDS = ("streams", "heads", "hidden")  # of sums in ``SourceStatistics``
BATCH = 64  # images at a time: sums add up exactly, so no figure depends on it but for rounding


@dataclass(frozen=True)
class Known:
    """What projections of a source to any widths have in common: its statistics, and the order of its hidden units."""

    statistics: SourceStatistics
    units: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, source: nn.Module, batches: Iterable[Any]) -> Known:
        """Compute it from ``Recovery.calibration``'s images."""
        images = images_of(batches, arch_of(source))
        return cls(SourceStatistics.collect(source, images), rank_units(source, images))

    def save(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write one safetensors file with the key inside; the caller names a scratch path and publishes it."""
        own = self.statistics
        tensors = {f"{kind}.{i}": t.cpu() for kind in KINDS for i, t in getattr(own, kind).items()}
        tensors |= {f"units.{i}": order.cpu() for i, order in self.units.items()}
        counts = {"images": own.images, "rows": own.rows, "tokens": list(own.tokens.items())}
        text = json.dumps({"key": key, "counts": counts})
        save_file(tensors, path, metadata={"facts": text, "sha256": tensors_digest(tensors, text)})

    @classmethod
    def is_sound(cls, path: Path) -> bool:
        """Whether a file holds what ``save`` wrote, of whatever key."""
        return cls._read(path)[1] is not None

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """The tensors and the facts of a file; no facts where it is damaged."""
        try:
            tensors, metadata = read_tensors(path)
        except UserError:
            return {}, None
        text = metadata.get("facts", "")
        return tensors, json.loads(text) if metadata.get("sha256") == tensors_digest(tensors, text) else None

    @classmethod
    def load(cls, path: Path, key: Mapping[str, Any]) -> Known | None:
        """Read what ``save`` wrote; None where the file is not there, is damaged, or is of another key."""
        tensors, facts = cls._read(path)
        if facts is None or facts["key"] != json.loads(json.dumps(key)):
            return None
        by_kind: dict[str, dict[int, torch.Tensor]] = {kind: {} for kind in (*KINDS, "units")}
        for name, tensor in tensors.items():
            kind, _, i = name.partition(".")
            by_kind[kind][int(i)] = tensor
        units, counts = by_kind.pop("units"), facts["counts"]
        tokens = {int(i): count for i, count in counts["tokens"]}
        statistics = SourceStatistics(images=counts["images"], rows=counts["rows"], tokens=tokens, **by_kind)
        return cls(statistics, units)


@dataclass(frozen=True)
class Recovery:
    """How a cut model is recovered, without labels and without training.

    Args:
        images: calibration images, drawn from the training split without augmentation.
        seed: of the draw.
        project: take of the decision only how much of every width stays; the subspace decides what.
    """

    images: int = 512
    seed: int = 0
    project: bool = False

    def calibration(self, data: Data) -> Iterable[Any]:
        """Draw the images, as batches of (images, labels) that are read as they are asked for."""
        return data.calibration_loader(self.images, BATCH, self.seed)

    def kept(self, cache: Path, weights: str, arch: Arch, data: str) -> tuple[Path, dict[str, Any]]:
        """Return the file in which ``known`` is kept, and the key inside it.

        Args:
            cache: its folder.
            weights: ``weights_digest`` of the source.
            arch: its record.
            data: the fingerprint of the data.
        """
        key = {
            "weights": weights,
            "arch": arch.hash,
            "data": data,
            "images": self.images,
            "seed": self.seed,
            "format": FORMAT,
        }
        return cache / f"subspaces-{digest(key)}.safetensors", key

    def known(
        self, source: nn.Module, data: Data, images: Iterable[Any], cache: Path | None, *, weights: str | None = None
    ) -> Known:
        """Return what projections of a source have in common, from the cache where it is there.

        Args:
            source: the model that is projected.
            data: the data set.
            images: ``calibration``'s.
            cache: folder; a file is named by the hash of everything that it depends on, which it also carries inside;
                it is made again if that differs, or if it is damaged. None keeps nothing.
            weights: ``weights_digest(source)``, if it is known already.
        """
        if cache is None:
            return Known.of(source, images)
        path, key = self.kept(cache, weights or weights_digest(source), arch_of(source), data.info.fingerprint)
        found = Known.load(path, key)
        if found is None:
            found = Known.of(source, images)
            make_folder(path.parent)
            with publish_file(path) as scratch:
                found.save(scratch, key)
        return found

    def model(
        self,
        source: nn.Module,
        decision: Cut,
        batches: Iterable[Any] | SourceStreams,
        *,
        known: Known | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> nn.Module:
        """Compute the small model; ``pruners.subspaces.can_recover`` says of which sources.

        Args:
            source: the model that the decision is about; it is not changed.
            decision: what stays.
            batches: ``calibration``'s images, or the source's streams on them.
            known: of the same source and images, where several models are projected.
            progress: told of kept blocks done and of all.

        Raises:
            UserError: the decision does not fit, or the source cannot be recovered.
        """
        if not self.project:
            return recover(source, decision, batches, progress=progress)
        widths = projected_widths(arch_of(source), decision)
        streams = SourceStreams.of(batches, source)
        known = known or Known.of(source, streams.inputs)
        return compress(source, widths, streams, statistics=known.statistics, units=known.units, progress=progress)
