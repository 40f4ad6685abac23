"""Epochs that a search needs until it knows the front: ``python -m benchmarks.search_quality``.

Searches run in simulated asynchronous time over ``search.surface``, whose true Pareto front is known: workers take
units from an event queue, a unit lasts its epochs times its share of the source's MACs plus an overhead. What counts
is the hypervolume of what a user would take (the front, by measured accuracy, of the models trained in full; each at
its accuracy without noise) as a share of the true front's. Its worst corner lies at the window's upper end and a tenth
of the front's range below its lowest accuracy, so that a model that is merely accurate is worth little.

Syne Tune is compared where it can be imported. Every row says when it was run, and by which Optuna.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table

from benchmarks.surface import BUDGET, Choice, Surface
from prunesweep.models import UserError
from prunesweep.models.io.files import write_text
from prunesweep.search.execution.rungs import MultiObjectiveASHA
from prunesweep.search.proposals.budget_gp import EXPLORE, GOLDEN, log_error, propose
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations
from prunesweep.search.store.pareto import as_losses, hypervolume, non_dominated
from prunesweep.search.store.run import Result

RESULT = Path(__file__).parent / "results" / "search_quality.json"
FULL = 27  # epochs of finetuning that the front is for
OVERHEAD = 0.1  # of a unit, in epochs of the source: start, BatchNorm statistics, evaluation
WORKERS = 8
DIRECTIONS = ("maximize", "minimize")

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Unit:
    """One complete schedule of a candidate, after those that it had."""

    candidate: int
    rung: int
    choice: Choice
    lr: float
    schedules: tuple[float, ...]


class Search(Protocol):
    """Hands out units, and hears of their results."""

    def ask(self) -> Unit: ...
    def tell(self, unit: Unit, top1: float, macs: int) -> None: ...


def decoded(surface: Surface, draw: Callable[[], tuple[int, Mapping[str, Any]]], reject: Callable[[int], None]) -> Any:
    """The first proposal whose budget can be met: its number, point and choice."""
    while True:
        number, point = draw()
        try:
            return number, point, surface.decode(point)
        except UserError:
            reject(number)


class FullFidelity:
    """Optuna's ask and tell; every candidate is trained in full."""

    def __init__(self, surface: Surface, sampler: BaseSampler) -> None:
        self._surface = surface
        self._study = optuna.create_study(directions=DIRECTIONS, sampler=sampler)

    def _draw(self) -> tuple[int, Mapping[str, Any]]:
        trial = self._study.ask(self._surface.distributions)
        return trial.number, trial.params

    def ask(self) -> Unit:
        number, point, choice = decoded(
            self._surface, self._draw, lambda n: self._study.tell(n, state=TrialState.PRUNED)
        )
        return Unit(number, 0, choice, point["lr"], (FULL,))

    def tell(self, unit: Unit, top1: float, macs: int) -> None:
        self._study.tell(unit.candidate, [top1, macs])


class RayOptuna:
    """Ray Tune's own ``OptunaSearch`` as its documentation shows it, driven without Tune; trained in full."""

    def __init__(self, surface: Surface, seed: int) -> None:
        from ray.tune.search.optuna import OptunaSearch

        self._surface, self._numbers = surface, itertools.count()
        self._search = OptunaSearch(dict(surface.distributions), ["top1", "macs"], ["max", "min"], seed=seed)

    def _draw(self) -> tuple[int, Mapping[str, Any]]:
        number = next(self._numbers)
        return number, self._search.suggest(str(number))

    def ask(self) -> Unit:
        # a trial that raises is what a user of Tune makes of a budget that cannot be met
        number, point, choice = decoded(
            self._surface, self._draw, lambda n: self._search.on_trial_complete(str(n), error=True)
        )
        return Unit(number, 0, choice, point["lr"], (FULL,))

    def tell(self, unit: Unit, top1: float, macs: int) -> None:
        self._search.on_trial_complete(str(unit.candidate), {"top1": top1, "macs": macs})


class SyneTune:
    """Syne Tune's MOASHA: random proposals, trials stopped after 1, 3 or 9 epochs, in the same schedules as ours."""

    def __init__(self, surface: Surface, seed: int) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

        self._surface, self._random, self._trial = surface, RandomSampler(seed), Trial
        self._moasha = MOASHA({}, ["loss", "macs"], time_attr="epoch", max_t=FULL, grace_period=1, reduction_factor=3)
        self._study = optuna.create_study(directions=DIRECTIONS, sampler=self._random)
        self._going: list[Unit] = []
        self._trials: dict[int, Any] = {}

    def _draw(self) -> tuple[int, Mapping[str, Any]]:
        trial = self._study.ask(self._surface.distributions)
        return trial.number, trial.params

    def ask(self) -> Unit:
        if self._going:
            return self._going.pop()
        number, point, choice = decoded(self._surface, self._draw, lambda n: None)
        self._trials[number] = self._trial(number, dict(point), None)
        self._moasha.on_trial_add(self._trials[number])
        return Unit(number, 0, choice, point["lr"], (1,))

    def tell(self, unit: Unit, top1: float, macs: int) -> None:
        result = {"loss": -top1, "macs": macs, "epoch": int(sum(unit.schedules))}
        if self._moasha.on_trial_result(self._trials[unit.candidate], result) == "CONTINUE":
            more = 2 * int(sum(unit.schedules))  # to the next rung
            self._going.append(Unit(unit.candidate, unit.rung + 1, unit.choice, unit.lr, (*unit.schedules, more)))


@dataclass(frozen=True)
class Ladder:
    """Our design choices, made on seeds 100 to 107."""

    schedules: tuple[float, ...] = (3, 24)  # of the rungs; each goes on from the one before
    reduction_factor: float = 2
    bands: int = 12
    sampler: str = "budget_gp"  # budget_gp, search.proposals | budget-tpe | tpe | random


class Ours:
    """Promotions over the rungs, and proposals from what they gave.

    MACs are known before any training, so a sampler need not learn them. ``budget_gp`` fixes a budget first, evenly
    over the window, and a Gaussian process over all rungs proposes the rest: ``search.proposals``. In ``budget-tpe``
    that is TPE, from the half of the highest rung with enough results whose MACs are nearest, by how much their top-1
    exceeds the trend of all at their MACs. ``tpe`` learns both objectives, as Optuna has it, from that rung too.
    """

    def __init__(self, surface: Surface, seed: int, ladder: Ladder) -> None:
        self._surface, self._ladder, self._seed = surface, ladder, seed
        self._enough = 2 * len(surface.distributions)
        self._random = RandomSampler(seed)
        self._tpe = TPESampler(seed=seed, multivariate=ladder.sampler == "budget-tpe", n_startup_trials=0)
        low, high = (share * surface.source_macs for share in BUDGET)
        bands = tuple(np.linspace(low, high, ladder.bands + 1)[1:-1])
        self._promotions = MultiObjectiveASHA(len(ladder.schedules), ladder.reduction_factor, DIRECTIONS, bands=bands)
        self._points: list[Mapping[str, Any]] = []
        self._units: dict[int, Unit] = {}
        self._results: list[Result] = []
        self._draws = 0

    def ask(self) -> Unit:
        found = self._promotions.next()
        if found is not None:
            rung, number = found
            self._promotions.promoted(rung, number)
            before, more = self._units[number], self._ladder.schedules[rung]
            unit = Unit(number, rung, before.choice, before.lr, (*before.schedules, more))
        else:
            _, point, choice = decoded(self._surface, self._draw, lambda _: None)
            unit = Unit(len(self._points), 0, choice, point["lr"], self._ladder.schedules[:1])
            self._points.append(point)
        self._units[unit.candidate] = unit
        return unit

    def tell(self, unit: Unit, top1: float, macs: int) -> None:
        point = dict(self._points[unit.candidate])
        self._results.append(Result(unit.candidate, top1, 0.0, macs, 0, "", point, 0.0, rung=unit.rung))
        self._promotions.add(unit.rung, unit.candidate, (top1, macs))

    def _draw(self) -> tuple[int, Mapping[str, Any]]:
        self._draws += 1
        if self._ladder.sampler == "budget_gp":
            encoder = SearchSpaceEncoder(self._surface.distributions)
            return -1, propose(encoder, evaluations(encoder, self._results), self._draws - 1, self._seed)
        rungs = [
            {r.trial: (r.top1, r.macs) for r in self._results if r.rung == k}
            for k in range(len(self._ladder.schedules))
        ]
        known = next((r for r in reversed(rungs) if len(r) >= self._enough), {})
        if self._ladder.sampler == "random" or not known or self._draws % EXPLORE == 0:
            return -1, self._proposal(self._random, {})
        if self._ladder.sampler == "tpe":
            return -1, self._proposal(self._tpe, known)
        budget = BUDGET[0] + self._draws * GOLDEN % 1 * (BUDGET[1] - BUDGET[0])
        near = above_trend(known, budget * self._surface.source_macs, self._enough)
        return -1, self._proposal(PartialFixedSampler({"budget": budget}, self._tpe), near)

    def _proposal(self, sampler: BaseSampler, known: Mapping[int, Sequence[float]]) -> Mapping[str, Any]:
        """A point, from a study with nothing in it but ``known``: values by candidate."""
        directions = DIRECTIONS[: len(next(iter(known.values()), DIRECTIONS))]
        study = optuna.create_study(directions=directions, sampler=sampler)
        space = self._surface.distributions
        study.add_trials(
            [create_trial(params=dict(self._points[n]), distributions=space, values=v) for n, v in known.items()]
        )
        return study.ask(space).params


def evaluations(encoder: SearchSpaceEncoder, results: Sequence[Result]) -> Evaluations:
    """Results as the sampler has them."""
    return Evaluations.ordered(
        encoder.rows([r.point for r in results]),
        np.array([r.rung for r in results], np.int64),
        np.array([r.trial for r in results], np.int64),
        log_error(np.array([r.top1 for r in results], float)),
    )


def above_trend(known: Mapping[int, tuple[float, int]], macs: float, at_least: int) -> dict[int, tuple[float]]:
    """Top-1 above the trend (a parabola over log MACs) of the half of the results that are nearest to ``macs``."""
    numbers, (top1, spent) = list(known), np.array(list(known.values())).T
    cost = np.log(spent / macs)
    above = top1 - np.polyval(np.polyfit(cost, top1, 2), cost)
    nearest = np.argsort(abs(cost), kind="stable")[: max(at_least, len(numbers) // 2)]
    return {numbers[i]: (float(above[i]),) for i in nearest}


@dataclass
class Trace:
    """What a search had found when."""

    epochs: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    trained: int = 0  # candidates that were trained in full
    candidates: int = 0
    seconds: float = 0.0

    def reached(self, share: float) -> float | None:
        """Epochs when ``share`` was first known, or None."""
        return next((e for e, s in zip(self.epochs, self.share, strict=True) if s >= share), None)

    def at(self, epochs: float) -> float:
        """Share that was known after ``epochs``."""
        return [0.0, *(s for e, s in zip(self.epochs, self.share, strict=True) if e <= epochs)][-1]


@cache
def surface_of(seed: int) -> tuple[Surface, np.ndarray, float]:
    """A surface, its hypervolume's reference corner and the true hypervolume."""
    surface = Surface(seed)
    top1, macs, _ = surface.front(FULL)
    corner = np.array([-(top1.min() - 0.1 * np.ptp(top1)), BUDGET[1] * surface.source_macs * (1 + 1e-9)])
    return surface, corner, hypervolume(clipped(surface, top1, macs), corner)


def clipped(surface: Surface, top1: Any, macs: Any) -> np.ndarray:
    """Losses; smaller than the window's lower end is worth no more than its lower end."""
    return as_losses(np.column_stack([top1, np.maximum(macs, BUDGET[0] * surface.source_macs)]), DIRECTIONS)


def simulate(search: Search, seed: int, epochs: float, workers: int = WORKERS) -> Trace:
    """Run units side by side until ``epochs`` of training were handed out."""
    surface, corner, truth = surface_of(seed)
    trace, started = Trace(), time.perf_counter()
    queue: list[tuple[float, int, Unit, int]] = []
    order, spent, done, now = itertools.count(), 0.0, 0.0, 0.0
    measured: list[tuple[float, int, float]] = []
    while True:
        while len(queue) < workers and spent < epochs:
            unit = search.ask()
            macs = int(surface.macs(np.array([astuple(unit.choice)]))[0])
            spent += unit.schedules[-1]
            duration = unit.schedules[-1] * macs / surface.source_macs + OVERHEAD
            heapq.heappush(queue, (now + duration, next(order), unit, macs))
        if not queue:
            break
        now, _, unit, macs = heapq.heappop(queue)
        done += unit.schedules[-1]
        top1 = surface.measure(unit.choice, unit.lr, unit.schedules, unit.candidate)
        search.tell(unit, top1, macs)
        trace.candidates += unit.rung == 0
        if sum(unit.schedules) >= FULL:
            measured.append((top1, macs, surface.value(unit.choice, unit.lr, unit.schedules)))
            trace.trained += 1
            points = np.array(measured)
            chosen = points[non_dominated(as_losses(points[:, :2], DIRECTIONS))]
            trace.epochs.append(done)
            trace.share.append(hypervolume(clipped(surface, chosen[:, 2], chosen[:, 1]), corner) / truth)
    trace.seconds = time.perf_counter() - started
    return trace


MARKS = (300, 600, 900, 1200, 1500, 1800, 2400, 3600, 5400, 7200)  # epochs at which the table shows the share
SEARCHES: dict[str, tuple[float, Callable[[Surface, int], Search]]] = {
    "ours: budget_gp + promotions": (2700, lambda surface, seed: Ours(surface, seed, Ladder())),
    "budget first, then TPE + promotions": (
        1800,
        lambda surface, seed: Ours(surface, seed, Ladder(sampler="budget-tpe")),
    ),
    "TPE + promotions": (1800, lambda surface, seed: Ours(surface, seed, Ladder(sampler="tpe"))),
    "random + promotions": (1800, lambda surface, seed: Ours(surface, seed, Ladder(sampler="random"))),
    "Ray Tune OptunaSearch, full": (7200, RayOptuna),
    "NSGA-II, full": (
        3600,
        lambda surface, seed: FullFidelity(surface, NSGAIISampler(seed=seed, population_size=20)),
    ),
    "Optuna GPSampler, full": (1200, lambda surface, seed: FullFidelity(surface, GPSampler(seed=seed))),  # the slowest
    "random, full": (3600, lambda surface, seed: FullFidelity(surface, RandomSampler(seed))),
    "Syne Tune MOASHA": (1200, SyneTune),  # sorts all results again at every report: minutes beyond that
}


def summary(traces: Sequence[Trace], epochs: float) -> dict[str, Any]:
    """Medians over the seeds, and every seed's epochs to two shares."""
    shares = {str(mark): [t.at(mark) for t in traces] for mark in MARKS if mark <= epochs}
    return {
        "epochs": epochs,
        "date": date.today().isoformat(),
        "optuna": optuna.__version__,
        "candidates": statistics.median(t.candidates for t in traces),
        "trained_in_full": statistics.median(t.trained for t in traces),
        "median_share": {mark: round(statistics.median(each), 4) for mark, each in shares.items()},
        "quartiles": {mark: np.quantile(each, (0.25, 0.75)).round(4).tolist() for mark, each in shares.items()},
        "epochs_to": {share: [t.reached(float(share)) for t in traces] for share in ("0.7", "0.8", "0.9", "0.95")},
        "seconds": round(sum(t.seconds for t in traces), 1),
    }


def show(found: Mapping[str, Any]) -> None:
    table = Table(title="share of the true hypervolume after so many epochs, median over the surfaces")
    for heading in ("search", *map(str, MARKS), "0.8 at", "0.9 at", "0.95 at"):
        table.add_column(heading, justify="left" if heading == "search" else "right")
    for name, each in found.items():
        cells = [f"{each['median_share'][m]:.3f}" if m in each["median_share"] else "" for m in map(str, MARKS)]
        for share in ("0.8", "0.9", "0.95"):
            median = statistics.median(float("inf") if e is None else e for e in each["epochs_to"][share])
            cells.append(f"{median:.0f}" if median < float("inf") else "not")
        table.add_row(name, *cells)
    Console(width=140).print(table)


def kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run over the same surfaces, in the table's order."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if any(before.get(name) != value for name, value in settings.items()):
        return {}
    return {name: before["searches"][name] for name in SEARCHES if name in before["searches"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="surfaces; the first is --first")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name has this in it; the others stay as --out has them")
    parser.add_argument("--epochs", type=float, help="how far a search goes, in place of each row's own")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    settings = {"surfaces": [seeds[0], seeds[-1]], "full_epochs": FULL, "workers": WORKERS}
    rows = kept(args.out, settings)
    for name, (epochs, make) in SEARCHES.items():
        absent = name.startswith("Syne") and importlib.util.find_spec("syne_tune") is None
        if absent or args.only not in name:
            continue
        far = args.epochs or epochs
        rows[name] = summary([simulate(make(surface_of(s)[0], s), s, far) for s in seeds], far)
        print(name, rows[name]["median_share"], flush=True)
        ordered = {each: rows[each] for each in SEARCHES if each in rows}
        result = {**settings, "ladder": asdict(Ladder()), "searches": ordered}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    show(json.loads(args.out.read_text(encoding="utf-8"))["searches"])


if __name__ == "__main__":
    main()
