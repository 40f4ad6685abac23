"""What a front comes to in a few numbers: which of its models cannot be told apart from the source, at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunesweep.search.store.front import OWN
from prunesweep.training.metrics import wilson_interval

__all__ = ["headline", "least_alike", "told_apart"]

WITHIN = 1.0  # points of accuracy


def told_apart(share: float, other: float, number: int) -> bool:
    """Return whether two shares that were seen on samples of one size differ, at 95 % confidence.

    They do not where 0 lies in Newcombe's interval of their difference, made of their Wilson intervals. Models that
    are measured on the same images differ less by chance than that, so it errs towards "not told apart".

    Source: Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10.

    Args:
        share, other: in [0, 1].
        number: size of each sample, at least 1.
    """
    high, low = max(share, other), min(share, other)
    below, above = wilson_interval(high, number)[0], wilson_interval(low, number)[1]
    return high - low > math.hypot(high - below, above - low)


def least_alike(share: float, number: int) -> float:
    """Return the smallest share that cannot be told apart from another one.

    Args:
        share: the other one, in [0, 1].
        number: size of each sample, at least 1.
    """
    low, high = 0, round(share * number)  # correct answers; told apart at the first unless it is the answer
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if told_apart(middle / number, share, number) else (low, middle)
    return low / number


def headline(
    front: Sequence[Mapping[str, Any]], source: Mapping[str, Any], searched: Mapping[str, Any], quality: str, cost: str
) -> dict[str, Any]:
    """Return the cheapest members that cannot be told apart from the source and that are within a point of it.

    Args:
        front: the entries of ``front.json``, whose figures all are of one split.
        source: the source's costs, and its figures on validation images.
        searched: the same on the images by which candidates are compared.
        quality: the objective that is a quality.
        cost: the first objective that is a cost.

    Returns:
        ``alike`` and ``within``, trial and rung each, or None where no member is or it cannot be said; ``least``, the
        smallest quality that is not told apart, in percent; ``split`` and ``images`` that it is of.
    """
    splits = {point.get("split") for point in front}
    own = searched if splits == {"search"} else source
    found: dict[str, Any] = {"alike": None, "within": None, "least": None, "split": None, "images": own.get("images")}
    value = own.get(quality)
    if quality == "agreement":
        value = 100.0  # with itself
    if len(splits) > 1 or not isinstance(value, float) or not math.isfinite(value):
        return found
    found["split"] = next(iter(splits), None)
    if quality in ("ppl", *OWN):  # no share of images
        return found
    by_cost = sorted((p for p in front if math.isfinite(p.get(quality, math.nan))), key=lambda p: p[cost])
    near = [p for p in by_cost if p[quality] >= value - WITHIN]
    found["within"] = _place(near)
    if (images := own.get("images")) and quality != "balanced":  # a mean of shares has no interval of one share
        found["least"] = 100 * least_alike(value / 100, images)
        found["alike"] = _place(
            [p for p in by_cost if p[quality] >= value or not told_apart(p[quality] / 100, value / 100, images)]
        )
    return found


def _place(points: Sequence[Mapping[str, Any]]) -> list[int] | None:
    return [points[0]["trial"], points[0]["rung"]] if points else None
