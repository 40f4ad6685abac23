"""Compute the Pareto front of a search's results, for the objectives of the search, and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from prunesweep.search.store import pareto

from .pareto import Direction, as_losses

__all__ = [
    "OBJECTIVES",
    "OWN",
    "QUALITIES",
    "TWO",
    "RankBy",
    "Ranking",
    "comparable",
    "corner",
    "cost_of",
    "directions",
    "hypervolume",
    "latest",
    "pareto_front",
    "quality_of",
    "values",
]

OBJECTIVES: dict[str, Direction] = {
    "top1": "maximize",
    "balanced": "maximize",  # the mean of the classes' recalls
    "ppl": "minimize",  # of language models
    "agreement": "maximize",  # with the source's answers; needs no labels
    "quality": "maximize",  # what search.quality measures
    "error": "minimize",  # the same, where lower is better
    "macs": "minimize",
    "params": "minimize",
    "latency_ms": "minimize",
}
OWN = ("quality", "error")  # of search.quality, on a scale of its own
QUALITIES = ("top1", "balanced", "ppl", "agreement", *OWN)
COSTS = ("macs", "params", "latency_ms")
TWO = ("top1", "macs")  # default objectives
RankBy = Literal["auto", "kl", "loss", "objective"]
MEASURES: dict[str, Direction] = {**OBJECTIVES, "kl": "minimize", "loss": "minimize"}
P = TypeVar("P")


class _OnRung(Protocol):
    @property
    def trial(self) -> int: ...
    @property
    def rung(self) -> int: ...


R = TypeVar("R", bound=_OnRung)


def quality_of(objectives: Sequence[str]) -> str:
    """Return the objective that is a quality, not a cost."""
    return next(name for name in objectives if name in QUALITIES)


def cost_of(objectives: Sequence[str]) -> str:
    """Return the first objective that is a cost."""
    return next(name for name in objectives if name in COSTS)


def directions(objectives: Sequence[str]) -> list[Direction]:
    """Return the direction of every objective."""
    return [MEASURES[name] for name in objectives]


def values(point: Any, objectives: Sequence[str]) -> list[float]:
    """Return the objectives of a point.

    Args:
        point: anything that has the objectives as attributes.
        objectives: names in ``OBJECTIVES``.
    """
    return [float(getattr(point, name)) for name in objectives]


def comparable(given: Sequence[float], objectives: Sequence[str]) -> tuple[float, ...]:
    """Return values in which those that are not finite are infinitely bad, because NaN cannot be compared.

    Args:
        given: one value per objective.
        objectives: names in ``OBJECTIVES``.
    """
    worst = {"maximize": -math.inf, "minimize": math.inf}
    return tuple(
        value if math.isfinite(value) else worst[direction]
        for value, direction in zip(given, directions(objectives), strict=True)
    )


def latest(results: Iterable[R]) -> list[R]:
    """Return the result of every candidate on the highest rung that it reached, which is what the candidate is worth.

    What it gave on a rung below was measured on weights that further training has replaced, better or not.

    Args:
        results: anything with the attributes ``trial``, the candidate, and ``rung``.

    Returns:
        One result per candidate, in the order of their first ones.
    """
    found: dict[int, R] = {}
    for result in results:
        if result.trial not in found or found[result.trial].rung < result.rung:
            found[result.trial] = result
    return list(found.values())


def pareto_front(points: Iterable[P], objectives: Sequence[str] = TWO) -> list[P]:
    """Return the points that no other point dominates.

    A point dominates another one if it is at least as good in every objective and better in one. Of points with equal
    objectives the first one given stays. A point with an objective that is not finite is left out.

    Args:
        points: anything that has the objectives as attributes.
        objectives: names in ``OBJECTIVES``, one of them a cost.

    Returns:
        The points, ascending in the first objective that is a cost.
    """
    return _front([(values(point, objectives), point) for point in points], objectives)


def _front(points: Iterable[tuple[Sequence[float], P]], objectives: Sequence[str]) -> list[P]:
    """The points that are not dominated, each given with its values."""
    found: dict[tuple[float, ...], P] = {}
    for key, point in points:
        if all(map(math.isfinite, key)):
            found.setdefault(tuple(key), point)
    if not found:
        return []
    losses = as_losses(list(found), directions(objectives))
    best = [
        (key, point) for (key, point), stays in zip(found.items(), pareto.non_dominated(losses), strict=True) if stays
    ]
    first = next(i for i, name in enumerate(objectives) if name in COSTS)
    return [point for _, point in sorted(best, key=lambda pair: pair[0][first])]


@dataclass(frozen=True)
class Ranking:
    """What candidates are compared by: the costs among the objectives, and a measure in place of the quality.

    The loss and the KL divergence from the source are smooth; top-1 on few images mostly is noise.

    Args:
        objectives: names in ``OBJECTIVES``.
        rank_by: the measure: "objective", the quality itself; "loss", the mean cross-entropy; "kl"; "auto", the loss of
            trained candidates and the KL of untrained ones, as of all where the quality is agreement with the source.
            The loss is a mean over images: where the quality is balanced accuracy, "auto" is the quality itself, and
            so it is where the search has a measure of its own.
    """

    objectives: tuple[str, ...] = TWO
    rank_by: RankBy = "objective"

    def names(self, epochs: int) -> tuple[str, ...]:
        """Return the objectives with the measure of candidates that were trained for so many epochs."""
        quality = quality_of(self.objectives)
        measure: str = self.rank_by
        if self.rank_by == "auto":
            measure = "loss" if epochs and quality != "agreement" else "kl"
            measure = "objective" if quality in ("balanced", *OWN) else measure
        return tuple(measure if name == quality and measure != "objective" else name for name in self.objectives)

    @property
    def directions(self) -> list[Direction]:
        """The directions of ``values``, the same for all epochs."""
        return directions(self.names(0))

    def values(self, result: Any) -> list[float]:
        """Return what a result is compared by; NaN for what was not measured.

        Args:
            result: anything that has the objectives, ``epochs``, ``kl`` and ``loss`` as attributes.
        """
        found = [getattr(result, name) for name in self.names(result.epochs)]
        return [math.nan if value is None else float(value) for value in found]

    def comparable(self, result: Any) -> tuple[float, ...]:
        """Return ``values``, in which those that are not finite are infinitely bad."""
        return comparable(self.values(result), self.names(result.epochs))

    def goodness(self, result: Any) -> float:
        """Return what a result is compared by besides costs, negated where less is better."""
        names = self.names(result.epochs)
        place = self.objectives.index(quality_of(self.objectives))
        return self.values(result)[place] * (1 if MEASURES[names[place]] == "maximize" else -1)

    def front(self, results: Iterable[P]) -> list[P]:
        """Return the results that no other one dominates, as ``pareto_front`` does.

        Those of trained and of untrained candidates are on different scales: give one kind.
        """
        return _front([(self.values(result), result) for result in results], self.names(0))


def hypervolume(points: Sequence[Any], source: Mapping[str, float], objectives: Sequence[str] = TWO) -> float:
    """Return the share of the unit cube that the points dominate, in [0, 1].

    The cube's axes are top-1 / 100, or balanced accuracy or agreement / 100, and the saved share of the source's MACs,
    parameters or latency. Its worst corner is a model that costs what the source costs and gives no correct answer.
    Points outside the cube add nothing. The axis of a perplexity is the source's perplexity divided by it, at most 1;
    that of a measure of one's own is the share of the source's value, at most 1, or likewise where lower is better.

    Args:
        points: anything that has the objectives as attributes.
        source: the source's costs, and its perplexity, by objective.
        objectives: names in ``OBJECTIVES``.
    """
    if not points:
        return 0.0
    columns = zip(objectives, np.array([values(p, objectives) for p in points]).T, strict=True)
    losses = np.column_stack([_loss(name, column, source) for name, column in columns])
    corner = [0.0 if name in QUALITIES else 1.0 for name in objectives]
    return pareto.hypervolume(losses, corner)


def corner(objectives: Sequence[str]) -> str:
    """Name the point that ``hypervolume`` is counted from, its reference point.

    Args:
        objectives: names in ``OBJECTIVES``.
    """
    words = {"top1": "0 % top-1", "balanced": "0 % balanced accuracy", "agreement": "0 % agreement"}
    words |= {"quality": "no quality", "error": "infinite error"}
    words |= {"ppl": "infinite perplexity", "macs": "MACs", "params": "params", "latency_ms": "latency"}
    quality = words[quality_of(objectives)]
    return f"{quality} at the source's {' and '.join(words[name] for name in objectives if name in COSTS)}"


def _loss(name: str, found: pareto.Floats, source: Mapping[str, float]) -> pareto.Floats:
    """Return a column of values as shares of the cube's axis, where less is better."""
    if name in ("top1", "balanced", "agreement"):
        return -found / 100
    if name in OWN:
        return -_share(found if name == "quality" else -found, source[name] * (1 if name == "quality" else -1))
    return -np.minimum(source["ppl"] / found, 1) if name == "ppl" else found / float(source[name])


def _share(found: pareto.Floats, own: float) -> pareto.Floats:
    """Return values of which larger is better as shares of the source's, in [0, 1], whatever their signs are."""
    if own > 0:
        return np.clip(found / own, 0, 1)
    return 1 / (1 + np.maximum(own - found, 0) / max(-own, np.finfo(float).tiny))
