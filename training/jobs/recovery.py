"""The model of a decision: cut, cut and refitted in closed form, or projected to the widths that the decision keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from prunesweep.models import Arch, Cut, UserError, arch_of, weights_digest
from prunesweep.models.io.digest import read_tensors, tensors_digest
from prunesweep.models.io.files import make_folder, publish_file, publish_folder
from prunesweep.models.io.provenance import digest
from prunesweep.pruners.subspaces import (
    Moments,
    SourceStatistics,
    SourceStreams,
    compress,
    projected_widths,
    rank_units,
    recover,
    unit_moments,
    units_by,
)
from prunesweep.pruners.subspaces.batches import Batches
from prunesweep.pruners.subspaces.calibration import images_of

from ..data import Data

__all__ = ["Known", "Recovery"]

FORMAT = "prunesweep/subspaces/1"  # to be counted up when statistics or orders change, so that no cache is believed

KINDS = ("streams", "heads", "hidden")  # of sums in ``SourceStatistics``
BATCH = 64  # images at a time: sums add up exactly, so no figure depends on it but for rounding
STATISTICS = "statistics.safetensors"  # file of a part's sums, beside one for the units of every block


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
        _save(tensors, path, {"key": key, "counts": counts})

    @classmethod
    def is_sound(cls, path: Path) -> bool:
        """Whether a file holds what ``save`` wrote, of whatever key."""
        return _read(path)[1] is not None

    @classmethod
    def load(cls, path: Path, key: Mapping[str, Any]) -> Known | None:
        """Read what ``save`` wrote; None where the file is not there, is damaged, or is of another key."""
        tensors, facts = _read(path)
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


def _save(tensors: dict[str, torch.Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Write a safetensors file with facts and a digest of all of it inside."""
    text = json.dumps(facts)
    save_file(tensors, path, metadata={"facts": text, "sha256": tensors_digest(tensors, text)})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors and the facts of a file; no facts where it is damaged or not there."""
    try:
        tensors, metadata = read_tensors(path)
    except UserError:
        return {}, None
    text = metadata.get("facts", "")
    return tensors, json.loads(text) if metadata.get("sha256") == tensors_digest(tensors, text) else None


def _parts_of(kept: Path) -> Path:
    """The folder of the parts of what is to be kept as a file."""
    return kept.with_suffix(".parts")


def _units_file(block: int) -> str:
    return f"units-{block}.safetensors"


class _Part:
    """What ``Recovery.sum_part`` wrote; ``statistics`` is None where it did not, or they are damaged."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self._key = folder, json.loads(json.dumps(key))
        found = Known.load(folder / STATISTICS, key)
        self.statistics = None if found is None else found.statistics

    def units(self, block: int) -> Moments | None:
        """The moments of a block's hidden units; None where they are damaged."""
        tensors, facts = _read(self.folder / _units_file(block))
        if facts is None or facts["key"] != self._key:
            return None
        found = Moments(0)
        found.rows, found.products, found.sum = facts["rows"], tensors["products"], tensors["sum"]
        return found


def _added_up(source: nn.Module, folder: Path, key: Mapping[str, Any]) -> Known | None:
    """What all parts of a folder give together, in their order; None where one is missing or damaged."""
    for places in _whole(folder):
        found = [_Part(place, key) for place in places]
        whole = SourceStatistics()
        for part in found:
            if part.statistics is None:
                break
            whole.merge(part.statistics)
        else:
            try:
                return Known(whole, units_by(source, _units(found, list(whole.hidden))))
            except LookupError:
                continue
    return None


def _whole(folder: Path) -> Iterator[list[Path]]:
    """Divisions of which all parts are in a folder."""
    counts = (path.name.rpartition("-")[2] for path in folder.glob("*-of-*"))
    for parts in {int(count) for count in counts if count.isdecimal()}:
        places = [folder / f"{part}-of-{parts}" for part in range(parts)]
        if all(place.is_dir() for place in places):
            yield places


def _units(parts: list[_Part], blocks: list[int]) -> Iterator[tuple[int, Moments]]:
    """Add up the moments of one block after the other. Raises LookupError where one is damaged."""
    for block in blocks:
        whole: Moments | None = None
        for part in parts:
            own = part.units(block)
            if own is None:
                raise LookupError(part.folder)
            if whole is None:
                whole = own
            else:
                whole.merge(own)
        assert whole is not None
        yield block, whole


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

    def batches(self, data: Data) -> int:
        """How many batches ``calibration`` has: the most parts that its sums can be divided into."""
        return -(-min(self.images, data.train_images) // BATCH)

    def is_summed(self, source: nn.Module, data: Data, cache: Path, weights: str) -> bool:
        """Whether ``known`` needs no image: it is in the cache, or all parts of it are. Arguments are as for that."""
        path, key = self.kept(cache, weights, arch_of(source), data.info.fingerprint)
        return any(_whole(_parts_of(path))) or Known.load(path, key) is not None

    def sum_part(
        self,
        source: nn.Module,
        data: Data,
        cache: Path,
        part: int,
        parts: int,
        *,
        weights: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Sum over one part of the images, whole batches of them, for ``known`` to add up.

        The sums are those of ``known`` taken batch by batch in another order: sums in float64 of the same terms, which
        differ by rounding alone.

        Args:
            source, data, weights: as for ``known``.
            cache: as for ``known``; seen by all that make parts.
            part: which one, from 0 on.
            parts: how many there are, ``batches`` at most.
            progress: told of batches done and of all.

        Returns:
            The folder of the part.
        """
        kept, key = self.kept(cache, weights or weights_digest(source), arch_of(source), data.info.fingerprint)
        place = _parts_of(kept) / f"{part}-of-{parts}"
        if _Part(place, key).statistics is not None:
            return place
        whole = data.calibration_loader(self.images, BATCH, self.seed)
        first, last = (BATCH * (i * self.batches(data) // parts) for i in (part, part + 1))
        own = Subset(whole.dataset, range(first, min(last, min(self.images, data.train_images))))
        loader = DataLoader(own, BATCH, num_workers=data.loader_workers)
        images = Batches(x for x, *_ in loader)
        sums = Known(SourceStatistics.collect(source, images, progress=progress), {})
        with publish_folder(place) as scratch:
            for block, own_moments in unit_moments(source, images):
                tensors = {"products": own_moments.products.cpu(), "sum": own_moments.sum.cpu()}
                _save(tensors, scratch / _units_file(block), {"key": key, "rows": own_moments.rows})
            sums.save(scratch / STATISTICS, key)
        return place

    def known(
        self, source: nn.Module, data: Data, images: Iterable[Any], cache: Path | None, *, weights: str | None = None
    ) -> Known:
        """Return what projections of a source have in common, from the cache where it is there.

        Where the cache has all parts of it (``sum_part``), they are added up, and deleted.

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
            found = _added_up(source, _parts_of(path), key) or Known.of(source, images)
            make_folder(path.parent)
            with publish_file(path) as scratch:
                found.save(scratch, key)
            shutil.rmtree(_parts_of(path), ignore_errors=True)
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
