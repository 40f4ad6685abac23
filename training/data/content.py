"""What data hold, in a few facts, so that it can be said what of them has changed.

The fingerprint (``DataInfo.fingerprint``) decides whether data are the same; these facts only tell why they are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunesweep.models import UserError

from .base import Data

__all__ = ["content_changes", "content_of"]

SHOWN = 5  # classes that a line names


def content_of(data: Data) -> dict[str, Any]:
    """Return the facts about the content of data, JSON-ready and independent of where the data lie.

    Args:
        data: the opened data set.
    """
    info, whole = data.info, data.report  # what of the training images is held out does not hide what they are
    return {
        "fingerprint": info.fingerprint,
        "classes": list(info.classes) or info.num_classes,
        "vocabulary": info.vocabulary,
        "preprocessing": [list(info.input_size), list(info.mean), list(info.std)],
        "held_out": 0 if whole is data else data.val_images,
        "train": {"images": whole.train_images, "labels": _digest(whole, "train")},
        "val": {"images": len(whole.split("val", augment=None)), "labels": _digest(whole, "val")},  # type: ignore[arg-type]
    }


def _digest(data: Data, split: str) -> str | None:
    """16 hex digits of a split's labels, or None where they are not known without reading the images."""
    try:
        labels = data.labels(split)
    except UserError:  # there are none
        labels = None
    return None if labels is None else hashlib.sha256(np.asarray(labels, dtype="<i8").tobytes()).hexdigest()[:16]


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return lines that say how data differ; none if they are the same.

    Args:
        before: facts of ``content_of``.
        now: those of the data as they are.
    """
    if before["fingerprint"] == now["fingerprint"]:
        return []
    found = _class_changes(before["classes"], now["classes"])
    if before["vocabulary"] != now["vocabulary"]:
        found.append(f"words: vocabulary {before['vocabulary']}, now {now['vocabulary']}")
    if before["preprocessing"] != now["preprocessing"]:
        found.append(f"size, mean and std: {before['preprocessing']}, now {now['preprocessing']}")
    if before.get("held_out", 0) != now.get("held_out", 0):
        found.append(f"held out of train: {before.get('held_out', 0):,} images, now {now.get('held_out', 0):,}")
    for split in ("train", "val"):
        old, new = before[split], now[split]
        if old["images"] != new["images"]:
            found.append(f"{split}: {old['images']:,} images, now {new['images']:,}")
        elif old["labels"] != new["labels"]:
            found.append(f"{split}: as many images, with other labels")
    return found or ["as many images with the same labels, but their bytes, names or order are not the same"]


def _class_changes(before: Sequence[str] | int, now: Sequence[str] | int) -> list[str]:
    if before == now:
        return []
    if isinstance(before, int) or isinstance(now, int):
        count, other = (n if isinstance(n, int) else len(n) for n in (before, now))
        return [f"classes: {count:,}, now {other:,}"] if count != other else ["classes: with or without names"]
    gone, new = (_named([c for c in a if c not in set(b)]) for a, b in ((before, now), (now, before)))
    if not gone and not new:
        return ["classes: the same names in another order"]
    return ["classes: " + "; ".join([*([f"{gone} gone"] if gone else []), *([f"{new} new"] if new else [])])]


def _named(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
    return ", ".join(map(repr, classes[:SHOWN])) + more
