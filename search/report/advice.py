"""What a search that has ended says about its own settings: short lines for people, and only those that apply.

Sources: the habit of a service that names what is wrong with an experiment beside its result (Ax's health checks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunesweep.models import Arch, UserError, read_arch
from prunesweep.search.config import SearchConfig, SpaceTable, load_run_config
from prunesweep.search.space.axes import Axis, active_axes
from prunesweep.search.store.front import Ranking, hypervolume, quality_of
from prunesweep.search.store.run import Result, Run

__all__ = ["advice", "advise"]

Floats = NDArray[np.float64]

AT_BOUND = 0.02  # of a range: values that near to its end count as the end
FEW_MEMBERS, FEW_RESULTS = 4, 30  # below, nothing is said of bounds and overlap, and of effects
GAP = 2.0  # times: neighbours of a front whose MACs lie that far apart leave a gap
REACH = 1.25  # times the smallest budget: a front that begins above leaves the window's low end empty
NEAR = 9  # candidates of about the same cost, to whose median one is compared
SHUFFLES, CHANCE = 400, 0.25  # of the test for an effect, and the share of shuffles that hide a weak one
HOUR = 3600.0  # seconds


def advice(run: Run) -> list[str]:
    """Return what a run's results say about its settings.

    Args:
        run: whose search has ended, or was stopped.

    Raises:
        UserError: the run's configuration or its facts are damaged.
    """
    config, arch = load_run_config(run.path), read_arch(run / "source")
    return advise(config, arch, run.results(), run.current(), run.front(), run.searched_source())


def advise(
    config: SearchConfig,
    arch: Arch,
    results: Sequence[Result],
    current: Sequence[Result],
    front: Sequence[Mapping[str, Any]],
    source: Mapping[str, Any],
) -> list[str]:
    """Return what results say about the settings of their search.

    Args:
        config: the search's configuration.
        arch: the source's record.
        results: of all units.
        current: the latest one of every candidate.
        front: the entries of ``front.json``, ascending in cost.
        source: the source's costs by name.
    """
    ranking, own = config.search.ranking, {point["trial"] for point in front}
    members = [result for result in current if result.trial in own]
    screened = [r for r in results if r.rung == 0 and math.isfinite(ranking.goodness(r))]
    return [
        *_at_bounds(config.space, arch, members),
        *_without_effect(config.space, ranking, screened),
        *_gaps(config.space, members, current, int(source["macs"])),
        *_noise(ranking, front),
        *_one_more_hour(config, results, current, source),
    ]


def _varying(table: SpaceTable) -> Iterator[tuple[Axis, float, float]]:
    """The axes with a range of their own, but for the budget, and their ends."""
    for axis in active_axes(table):
        low, high = getattr(table, axis.name, None) or (0, 0)
        if low < high and axis.name != "budget":
            yield axis, low, high


def _at_bounds(table: SpaceTable, arch: Arch, members: Sequence[Result]) -> Iterator[str]:
    """Where half of the front lies at an end of a range that is not the source's own value."""
    for axis, low, high in _varying(table):
        values = np.array([float(r.point[axis.name]) for r in members if axis.name in r.point])
        if len(values) < FEW_MEMBERS:
            continue
        scale = math.log if axis.log else float
        width = scale(high) - scale(low)
        for end in (low, high):
            reached = int((abs(np.array([scale(v) for v in values]) - scale(end)) <= AT_BOUND * width).sum())
            if end == axis.neutral or 2 * reached < len(values):
                continue
            wider = _wider(axis, table, arch, low, high, end)
            if wider is not None:
                yield (
                    f"{reached} of {len(values)} members of the front have {axis.name} = {end:g}, the end of its "
                    f"range: widen it, for example space.{axis.name} = [{wider[0]:g}, {wider[1]:g}]"
                )


def _wider(
    axis: Axis, table: SpaceTable, arch: Arch, low: float, high: float, end: float
) -> tuple[float, float] | None:
    """The range with half as much again beyond one end, or less where no more is allowed; None where nothing is."""
    for share in (0.5, 0.25, 0.0):
        factor = (high / low) ** share if axis.log else 1.0
        step = max(math.ceil(share * (high - low)), 1) if axis.whole else share * (high - low)
        below = low / factor if axis.log else low - step
        above = high * factor if axis.log else high + step
        wider = (round(below, 6), high) if end == low else (low, round(above, 6))
        if wider == (low, high) or (axis.limits is not None and not axis.limits.allow(*wider)):
            continue
        try:
            axis.fit(table.model_copy(update={axis.name: tuple(map(int, wider)) if axis.whole else wider}), arch)
        except UserError:
            continue
        return wider
    return None


def _without_effect(table: SpaceTable, ranking: Ranking, screened: Sequence[Result]) -> Iterator[str]:
    """Variables along which candidates of about the same cost do not differ in what they are compared by."""
    if len(screened) < FEW_RESULTS:
        return
    ordered = sorted(screened, key=lambda r: r.macs)
    good = np.array([ranking.goodness(r) for r in ordered])
    # ranks: KL divergences span orders of magnitude over the budgets
    own = np.array([_rank_near(good, i) for i in range(len(good))])
    measure = ranking.names(ordered[0].epochs)[ranking.objectives.index(_quality(ranking))]
    names = [axis.name for axis, *_ in _varying(table) if not axis.trains and axis.name in ordered[0].point]
    idle = [name for name in names if not _matters(np.array([float(r.point[name]) for r in ordered]), own)]
    if idle and len(idle) < len(names):
        values = ", ".join(idle)
        yield (
            f"no effect of {values} on {measure} was seen among {len(ordered)} candidates, compared at equal cost: "
            f"fewer variables are searched sooner"
        )


def _quality(ranking: Ranking) -> str:
    return quality_of(ranking.objectives)


def _rank_near(good: Floats, place: int) -> float:
    """The share of candidates of about the same cost that are worse, in [0, 1]."""
    first = min(max(place - NEAR // 2, 0), max(len(good) - NEAR, 0))
    near = good[first : first + NEAR]
    return float((near < good[place]).mean() + (near == good[place]).mean() / 2)


def _matters(values: Floats, ranks: Floats) -> bool:
    """Whether thirds of the values differ in their mean ranks by more than shuffled ones mostly do."""
    groups = np.searchsorted(np.unique(np.quantile(values, (1 / 3, 2 / 3))), values, side="right")
    sizes = np.bincount(groups)

    def spread(own: Floats) -> float:
        means = np.bincount(groups, own)[sizes > 0] / sizes[sizes > 0]
        return float((sizes[sizes > 0] * (means - own.mean()) ** 2).sum())

    generator, seen = np.random.default_rng(0), spread(ranks)
    return sum(spread(generator.permutation(ranks)) >= seen for _ in range(SHUFFLES)) < CHANCE * SHUFFLES


def _gaps(table: SpaceTable, members: Sequence[Result], current: Sequence[Result], macs: int) -> Iterator[str]:
    """Parts of the budget window in which the front has no member."""
    low, high = table.budget
    shares = sorted(r.macs / macs for r in members)
    if not shares or low == high:
        return
    top = max(r.rung for r in members)
    if shares[0] > REACH * low:
        tried, _ = _tried(current, top, macs, low, shares[0])
        yield f"the front ends at {shares[0]:.3f} of the source's MACs, the budget window at {low:g}{tried}"
    for below, above in pairwise(shares):
        if above > GAP * below:
            tried, _ = _tried(current, top, macs, below, above)
            yield f"no member of the front has {below:.3f} to {above:.3f} of the source's MACs{tried}"
    if high > GAP * shares[-1]:
        tried, promoted = _tried(current, top, macs, shares[-1], high)
        if not promoted:  # otherwise what costs more is no better, which is what the front says
            yield f"no member of the front has {shares[-1]:.3f} to {high:.3f} of the source's MACs{tried}"


def _tried(current: Sequence[Result], top: int, macs: int, low: float, high: float) -> tuple[str, int]:
    """What became of the candidates between two costs, and how many of them were promoted to the front's rung."""
    inside = [r for r in current if low < r.macs / macs < high]
    if not inside:
        window = f"space.budget = [{low:.3g}, {high:.3g}]"
        return f": no candidate there; look there with {window} and search.start_from", 0
    count, promoted = f": {len(inside)} candidate{'s' * (len(inside) > 1)} there", sum(r.rung >= top for r in inside)
    if not promoted:
        return f"{count}, none of them promoted: more trials, or a smaller search.reduction_factor, promote more", 0
    return f"{count}, {promoted} of them promoted, none better than what costs less", promoted


def _noise(ranking: Ranking, front: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where most neighbours of a front cannot be told apart by their accuracy."""
    name = "top1" if "top1" in ranking.objectives else "agreement"
    known = [p for p in front if f"{name}_low" in p]
    pairs = [(a, b) for a, b in pairwise(known) if a[f"{name}_high"] >= b[f"{name}_low"]]
    if len(known) < FEW_MEMBERS or 2 * len(pairs) < len(known) - 1:
        return
    word, images = {"top1": "top-1"}.get(name, name), known[0].get("images", 0)
    line = (
        f"{word} of {len(pairs)} of {len(known) - 1} neighbours of the front cannot be told apart on {images:,} images"
    )
    if ranking.rank_by == "objective":
        yield f"{line}: compare candidates by search.rank_by = 'auto', or on more images"
    else:
        yield f"{line} (95 % intervals overlap): take the cheaper one, or look at KL and loss, which are less noisy"


def _one_more_hour(
    config: SearchConfig, results: Sequence[Result], current: Sequence[Result], source: Mapping[str, Any]
) -> Iterator[str]:
    """What the hypervolume would become, if its growth in the second half of the search went on with log time."""
    objectives = config.search.objectives
    seconds = dict[int, float]()
    for result in results:
        seconds[result.trial] = seconds.get(result.trial, 0.0) + result.seconds
    order = sorted(current, key=lambda r: r.trial)
    spent = np.cumsum([seconds[r.trial] for r in order])
    if len(order) < FEW_RESULTS or not math.isfinite(float(spent[-1])) or spent[-1] <= 0:
        return
    places = sorted({round(len(order) * part) for part in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)})
    found = [
        hypervolume(config.search.ranking.front(r for r in order[:place] if r.has_model), source, objectives)
        for place in places
    ]
    times = np.log(spent[np.array(places) - 1])
    slope = float(np.polyfit(times, found, 1)[0]) if np.ptp(times) > 0 else 0.0
    gain = max(slope, 0.0) * math.log1p(HOUR / float(spent[-1]))
    more = round(HOUR / float(spent[-1]) * len(order))
    yield (
        f"a guess: one more hour of one worker, about {more} candidates, would raise the hypervolume from "
        f"{found[-1]:.4f} to about {min(found[-1] + gain, 1.0):.4f}"
    )
