"""How good proposals are on surfaces that they were not made for: ``python -m benchmarks.sampler_quality``.

All samplers have the same ladder of rungs, the same promotions, the same first points and the same knowledge: costs are
exact and known before, qualities are on one scale. Only Syne Tune's MOASHA, which proposes at random, stops trials by a
rule of its own. What counts is, as in ``benchmarks.search_quality``, the hypervolume of the front of what was trained
to the end, each at its quality without noise, as a share of the true front's, or of the best known one. Seconds are of
the processor, for proposals and promotions.

    --half choose    surfaces to look at while a sampler is being changed
    --half report    those that the table is of

BoTorch and Syne Tune are compared where they can be imported: extra ``bench``.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from benchmarks.surfaces import (
    Degenerate,
    DeitProblem,
    Discretised,
    FunctionProblem,
    Infeasible,
    Noisy,
    Permuted,
    Problem,
    RecordedProblem,
    Shifted,
)
from benchmarks.surfaces.base import Floats, Point
from prunesweep.models import UserError
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.search.execution.rungs import MultiObjectiveASHA
from prunesweep.search.proposals.budget_gp import propose
from prunesweep.search.proposals.evaluations import Evaluations
from prunesweep.search.store.pareto import as_losses, hypervolume, non_dominated

RESULT = Path(__file__).parent / "results" / "sampler_quality.json"
DIRECTIONS = ("maximize", "minimize")
WORKERS, OVERHEAD, BANDS = 8, 0.1, 12  # as in ``search_quality``
PARTS = (1 / 3, 1.0)  # of a problem's epochs, at which shares are reported

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Seen:
    """One measurement: candidate, its point, rung, quality (NaN where it has none) and cost."""

    number: int
    point: Point
    rung: int
    quality: float
    cost: float


class Proposer(Protocol):
    """Proposes points from what was measured."""

    def propose(self, number: int, seen: Sequence[Seen], pending: Sequence[Point]) -> Point: ...


def evaluations(problem: Problem, seen: Sequence[Seen]) -> Evaluations:
    """Measurements as our sampler has them."""
    return Evaluations.ordered(
        problem.encoder.rows([s.point for s in seen]),
        np.array([s.rung for s in seen], np.int64),
        np.array([s.number for s in seen], np.int64),
        np.array([s.quality for s in seen], float),
    )


class BudgetGP:
    """``prunesweep.search.proposals``."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem, self._seed = problem, seed

    def propose(self, number: int, seen: Sequence[Seen], pending: Sequence[Point]) -> Point:
        encoder = self._problem.encoder
        return propose(encoder, evaluations(self._problem, seen), number, self._seed, pending=encoder.rows(pending))


def highest(problem: Problem, seen: Sequence[Seen]) -> list[Seen]:
    """What was measured on the highest rung that has twice as many results as there are variables."""
    rungs = [[s for s in seen if s.rung == k] for k in range(len(problem.schedules))]
    return next((own for own in reversed(rungs) if len(own) >= 2 * len(problem.distributions)), rungs[0])


class Optuna:
    """A sampler of Optuna's that learns from all that it is told, of two objectives; new for every proposal."""

    def __init__(self, problem: Problem, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._problem, self._make, self._seed = problem, make, seed

    def propose(self, number: int, seen: Sequence[Seen], pending: Sequence[Point]) -> Point:
        study = optuna.create_study(directions=DIRECTIONS, sampler=self._make(1000 * self._seed + number))
        space = dict(self._problem.distributions)
        known = highest(self._problem, seen)
        worst = min((s.quality for s in known if math.isfinite(s.quality)), default=0.0)
        study.add_trials(
            create_trial(
                params=dict(s.point),
                distributions=space,
                values=[s.quality if math.isfinite(s.quality) else worst, s.cost],
            )
            for s in known
        )
        return dict(study.ask(space).params)


class Genetic:
    """NSGA-II, which keeps its generations in one study, of the first rung's results."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._space = dict(problem.distributions)
        self._study = optuna.create_study(
            directions=DIRECTIONS, sampler=NSGAIISampler(seed=seed, population_size=max(10, 2 * len(self._space)))
        )
        self._told = 0

    def propose(self, number: int, seen: Sequence[Seen], pending: Sequence[Point]) -> Point:
        for s in seen[self._told :]:
            if s.rung == 0:
                values = [s.quality, s.cost] if math.isfinite(s.quality) else [-math.inf, math.inf]
                self._study.add_trial(create_trial(params=dict(s.point), distributions=self._space, values=values))
        self._told = len(seen)
        trial = self._study.ask(self._space)
        self._study.tell(trial, state=TrialState.PRUNED)  # what became of it is added above, with the point as placed
        return dict(trial.params)


class BoTorch:
    """A GP over points and rungs, the cost as a known objective, and qLogEHVI, as BoTorch's tutorials have it.

    The GP is refitted once there is an eighth more data, as ours is; in between it is conditioned on all data.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem, self._seed, self._state, self._fitted = problem, seed, None, 0

    def propose(self, number: int, seen: Sequence[Seen], pending: Sequence[Point]) -> Point:
        from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
        from botorch.optim import optimize_acqf
        from botorch.sampling.normal import SobolQMCNormalSampler
        from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning

        torch.manual_seed(1000 * self._seed + number)
        encoder, last = self._problem.encoder, len(self._problem.schedules) - 1
        inputs = encoder.features(encoder.rows([s.point for s in seen]))
        quality = np.array([s.quality for s in seen])
        finite = np.isfinite(quality)
        quality = np.where(finite, quality, quality[finite].min() if finite.any() else 0.0)
        rungs = np.array([[s.rung / max(last, 1)] for s in seen])
        x = torch.tensor(np.hstack([inputs, rungs]), dtype=torch.double)
        y = torch.tensor(quality, dtype=torch.double)[:, None]
        gp = self._model(x, y)
        if len(pending):  # taken as if they gave what is expected: q candidates together would make 2^q terms
            running = torch.tensor(encoder.features(encoder.rows(pending)))
            running = torch.hstack([running, torch.ones(len(running), 1)])
            with torch.no_grad():
                expected = gp.posterior(running).mean
            x, y = torch.vstack([x, running]), torch.vstack([y, expected])
            gp = self._model(x, y, learn=False)
        column = encoder.names.index("budget")
        budget: Any = self._problem.distributions["budget"]
        place = encoder.groups.index(column)

        def cost(z: torch.Tensor) -> torch.Tensor:
            """Negated, as all is maximised."""
            return -(budget.low + z[..., [place]] * (budget.high - budget.low))

        def objectives(samples: torch.Tensor, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
            return torch.cat([samples, cost(X).expand_as(samples)], dim=-1)

        at_last = x.clone()
        at_last[:, -1] = 1.0
        with torch.no_grad():
            means = torch.cat([gp.posterior(at_last).mean, cost(at_last)], dim=1)
        low, high = means[:, 0].min(), means[:, 0].max()
        corner = torch.stack([low - 0.1 * (high - low), torch.tensor(-budget.high, dtype=torch.double)])
        acquisition = qLogExpectedHypervolumeImprovement(
            model=gp,
            objective=GenericMCMultiOutputObjective(objectives),
            ref_point=corner,
            partitioning=FastNondominatedPartitioning(ref_point=corner, Y=means),
            sampler=SobolQMCNormalSampler(torch.Size([64]), seed=number),
        )
        bounds = torch.tensor([[0.0] * x.shape[1], [1.0] * x.shape[1]], dtype=torch.double)
        found, _ = optimize_acqf(
            acquisition,
            bounds,
            q=1,
            num_restarts=2,
            raw_samples=64,
            fixed_features={x.shape[1] - 1: 1.0},
            options={"maxiter": 20},
            return_best_only=False,
        )
        rows = self._rounded(found[:, 0, :-1].numpy())
        features = np.hstack([encoder.features(rows), np.ones((len(rows), 1))])
        with torch.no_grad():
            gain = acquisition(torch.tensor(features)[:, None]).numpy()
        return encoder.point(rows[int(gain.argmax())])

    def _model(self, x: torch.Tensor, y: torch.Tensor, *, learn: bool = True) -> Any:
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms.outcome import Standardize
        from gpytorch.mlls import ExactMarginalLogLikelihood

        gp = SingleTaskGP(x, y, outcome_transform=Standardize(1))
        if learn and (self._state is None or len(y) >= self._fitted * 9 / 8):
            fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
            kept = ("covar_module", "mean_module", "likelihood")
            self._state = {k: v for k, v in gp.state_dict().items() if k.startswith(kept)}
            self._fitted = len(y)
        else:
            gp.load_state_dict(self._state, strict=False)
        return gp.eval()

    def _rounded(self, features: Floats) -> Floats:
        """Rows of the points nearest to (n, D) features."""
        encoder = self._problem.encoder
        groups, rows = np.array(encoder.groups), np.zeros((len(features), len(encoder.names)))
        for v, choices in enumerate(encoder.choices):
            own = features[:, groups == v]
            rows[:, v] = own.argmax(1) if choices else own[:, 0]
        return encoder.rows([encoder.point(row) for row in rows])


class Ladder:
    """Promotions over the rungs, as in a search; a proposer is asked where none is due."""

    def __init__(self, problem: Problem, proposer: Proposer, seed: int) -> None:
        self._problem, self._proposer, self._seed = problem, proposer, seed
        budget: Any = problem.distributions["budget"]
        bands = tuple(np.linspace(budget.low, budget.high, BANDS + 1)[1:-1])
        self._promotions = MultiObjectiveASHA(len(problem.schedules), problem.reduction_factor, DIRECTIONS, bands=bands)
        self._points: list[Point] = []
        self._seen: list[Seen] = []
        self._running: set[int] = set()
        self._draws = 0

    def ask(self) -> tuple[int, Point, int]:
        """Candidate, point and rung of the next unit."""
        due = self._promotions.next()
        if due is not None:
            rung, number = due
            self._promotions.promoted(rung, number)
        else:
            rung, number = 0, len(self._points)
            self._points.append(self._feasible())
        self._running.add(number)
        return number, self._points[number], rung

    def _feasible(self) -> Point:
        while True:
            point = self._problem.placed(self._proposal())
            try:
                self._problem.cost(point)
            except UserError:
                continue
            return point

    def _proposal(self) -> Point:
        self._draws += 1
        number, encoder = self._draws - 1, self._problem.encoder
        finished = len({s.number for s in self._seen})
        if finished < 2 * len(encoder.names):  # the same first points for all, evenly over the budgets
            nothing = evaluations(self._problem, [])
            return propose(encoder, nothing, number, self._seed)
        pending = [self._points[n] for n in sorted(self._running)]
        return self._proposer.propose(number, self._seen, pending)

    def tell(self, number: int, rung: int, quality: float, cost: float) -> None:
        """Hear a result."""
        self._running.discard(number)
        self._seen.append(Seen(number, self._points[number], rung, quality, cost))
        known = math.isfinite(quality)
        self._promotions.add(rung, number, (quality, cost) if known else (-math.inf, math.inf))


class MOASHA:
    """Syne Tune's: random proposals from the same first points on; goes on or stops after each rung by its own rule."""

    def __init__(self, problem: Problem, seed: int) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.optimizer.schedulers.multiobjective import moasha

        self._problem, self._seed, self._trial = problem, seed, Trial
        self._levels = range(1, len(problem.schedules) + 1)
        self._scheduler = moasha.MOASHA(
            {}, ["loss", "cost"], time_attr="rung", max_t=len(self._levels), grace_period=1, reduction_factor=2
        )
        self._going: list[tuple[int, int]] = []
        self._points: list[Point] = []
        self._draws = itertools.count()

    def ask(self) -> tuple[int, Point, int]:
        if self._going:
            number, rung = self._going.pop()
            return number, self._points[number], rung
        nothing, encoder = evaluations(self._problem, []), self._problem.encoder
        while True:
            point = self._problem.placed(propose(encoder, nothing, next(self._draws), self._seed))
            try:
                self._problem.cost(point)
            except UserError:
                continue
            break
        number = len(self._points)
        self._points.append(point)
        self._scheduler.on_trial_add(self._trial(number, dict(point), None))
        return number, point, 0

    def tell(self, number: int, rung: int, quality: float, cost: float) -> None:
        loss = -quality if math.isfinite(quality) else 1e6
        trial = self._trial(number, dict(self._points[number]), None)
        said = self._scheduler.on_trial_result(trial, {"loss": loss, "cost": cost, "rung": rung + 1})
        if said == "CONTINUE" and rung + 1 < len(self._levels):
            self._going.append((number, rung + 1))


@dataclass
class Found:
    """What a search knew when: epochs that were done; quality as measured, cost and true quality of what it trained."""

    epochs: list[float] = field(default_factory=list)
    trained: list[tuple[float, float, float]] = field(default_factory=list)
    candidates: int = 0
    seconds: float = 0.0

    def known(self, epochs: float) -> Floats:
        """(n, 2) true qualities and costs of the front, by measured quality, after so many epochs."""
        rows = np.array([t for e, t in zip(self.epochs, self.trained, strict=True) if e <= epochs]).reshape(-1, 3)
        best = rows[non_dominated(as_losses(rows[:, :2], DIRECTIONS))]
        return best[:, [2, 1]]


def simulate(problem: Problem, search: Any) -> Found:
    """Run units side by side, in simulated time, until the problem's epochs were handed out."""
    found, spent, done, now = Found(), 0.0, 0.0, 0.0
    queue: list[tuple[float, int, int, Point, int]] = []
    order = itertools.count()
    last = len(problem.schedules) - 1
    while True:
        while len(queue) < WORKERS and spent < problem.epochs:
            start = time.process_time()
            number, point, rung = search.ask()
            found.seconds += time.process_time() - start
            epochs = problem.schedules[rung]
            spent += epochs
            heapq.heappush(queue, (now + epochs * problem.cost(point) + OVERHEAD, next(order), number, point, rung))
        if not queue:
            return found
        now, _, number, point, rung = heapq.heappop(queue)
        done += problem.schedules[rung]
        quality, cost = problem.measured(point, rung, number), problem.cost(point)
        start = time.process_time()
        search.tell(number, rung, quality, cost)
        found.seconds += time.process_time() - start
        found.candidates += rung == 0
        if rung == last and math.isfinite(quality):
            found.epochs.append(done)
            found.trained.append((quality, cost, problem.value(point)))


def _optuna(make: Callable[[int], BaseSampler]) -> Callable[[Problem, int], Any]:
    return lambda problem, seed: Ladder(problem, Optuna(problem, make, seed), seed)


SEARCHES: dict[str, Callable[[Problem, int], Any]] = {
    "budget_gp (ours)": lambda problem, seed: Ladder(problem, BudgetGP(problem, seed), seed),
    "BoTorch qLogEHVI": lambda problem, seed: Ladder(problem, BoTorch(problem, seed), seed),
    "Optuna GPSampler": _optuna(lambda seed: GPSampler(seed=seed, n_startup_trials=0)),
    "Optuna TPE": _optuna(lambda seed: TPESampler(seed=seed, n_startup_trials=0, multivariate=True)),
    "NSGA-II": lambda problem, seed: Ladder(problem, Genetic(problem, seed), seed),
    "random": _optuna(lambda seed: RandomSampler(seed=seed)),
    "Syne Tune MOASHA": MOASHA,
}
NEEDS = {"BoTorch qLogEHVI": "botorch", "Syne Tune MOASHA": "syne_tune"}


def problems(half: str) -> dict[str, Callable[[], Problem]]:
    """The surfaces of one half, by name; the halves share no seed."""
    s = {"choose": 300, "report": 400}[half]
    return {
        "deit": lambda: DeitProblem(s),
        "deit, shifted": lambda: Shifted(DeitProblem(s + 1), s),
        "deit, permuted": lambda: Permuted(DeitProblem(s + 2), s),
        "deit, noisy": lambda: Noisy(DeitProblem(s + 3), s, 0.1),
        "deit, infeasible": lambda: Infeasible(DeitProblem(s + 4), s),
        "deit, discretised": lambda: Discretised(DeitProblem(s + 5), s),
        "deit, degenerate": lambda: Degenerate(DeitProblem(s + 6), s),
        "deit, permuted, infeasible, noisy": lambda: Noisy(Infeasible(Permuted(DeitProblem(s + 7), s), s), s),
        "sphere": lambda: FunctionProblem("sphere", s + 10),
        "ellipsoid, shifted": lambda: Shifted(FunctionProblem("ellipsoid", s + 11), s),
        "rosenbrock, infeasible": lambda: Infeasible(FunctionProblem("rosenbrock", s + 12), s),
        "rastrigin, noisy": lambda: Noisy(FunctionProblem("rastrigin", s + 13), s),
        "ellipsoid, permuted": lambda: Permuted(FunctionProblem("ellipsoid", s + 14), s),
        "rastrigin, discretised, degenerate": lambda: Degenerate(
            Discretised(FunctionProblem("rastrigin", s + 15), s), s
        ),
        **({"digits, recorded": lambda: RecordedProblem(0)} if half == "report" else {}),
    }


def shares(problem: Problem, found: Found) -> list[float]:
    """Shares of the front's hypervolume that a search had at ``PARTS`` of its epochs."""
    low, high = problem.front[:, 0].min(), problem.front[:, 0].max()
    budget: Any = problem.distributions["budget"]
    corner = np.array([-(low - problem.margin * (high - low)), budget.high * (1 + 1e-9)])

    def volume(rows: Floats) -> float:
        floor = np.maximum(rows[:, 1], budget.low)  # cheaper than the window's lower end is worth no more
        return hypervolume(np.column_stack([-rows[:, 0], floor]), corner)

    truth = volume(problem.front)
    return [round(volume(found.known(part * problem.epochs)) / truth, 4) for part in PARTS]


def one_search(surface: str, problem: Problem, sampler: str, seed: int) -> dict[str, Any]:
    """A row of the result: shares, candidates and seconds of one sampler on one surface."""
    found = simulate(problem, SEARCHES[sampler](problem, seed))
    facts = {"surface": surface, "sampler": sampler, "seed": seed, "shares": shares(problem, found)}
    return {**facts, "candidates": found.candidates, "seconds": round(found.seconds, 1)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, mean and worst share, how often it is the best, and median seconds, by sampler."""
    found = {}
    ends = {(row["surface"], row["seed"], row["sampler"]): row["shares"][-1] for row in rows}
    best = {key[:2]: max(share for other, share in ends.items() if other[:2] == key[:2]) for key in ends}
    for name in SEARCHES:
        own = [row for row in rows if row["sampler"] == name]
        if own:
            found[name] = {
                "surfaces": len(own),
                "median": [round(statistics.median(row["shares"][i] for row in own), 3) for i in range(len(PARTS))],
                "mean": round(statistics.mean(row["shares"][-1] for row in own), 3),
                "worst": min(row["shares"][-1] for row in own),
                "best_on": sum(row["shares"][-1] == best[row["surface"], row["seed"]] for row in own),
                "seconds": round(statistics.median(row["seconds"] for row in own), 1),
            }
    return found


def summaries(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``summary`` of the samplers that ran on most surfaces, and of all on those surfaces that each of them ran on."""
    runs = {name: {row["surface"] for row in rows if row["sampler"] == name} for name in SEARCHES}
    ran = {name: own for name, own in runs.items() if own}
    most = max(map(len, ran.values()))
    common = set.intersection(*ran.values())
    return {
        "all": summary([row for row in rows if len(ran[row["sampler"]]) == most]),
        "common": summary([row for row in rows if row["surface"] in common]),
    }


def table(found: Mapping[str, Any], part: str) -> str:
    """One of the summaries in Markdown, as docs/samplers.md has it."""
    lines = [
        "| sampler | after a third | at the end | mean | worst | best on | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in found[part].items():
        first, last = own["median"]
        rest = f"{own['mean']:.3f} | {own['worst']:.3f} | {own['best_on']} of {own['surfaces']} | {own['seconds']:.1f}"
        lines.append(f"| {name} | {first:.3f} | {last:.3f} | {rest} |")
    return "\n".join(lines)


def by_surface(found: Mapping[str, Any]) -> str:
    """Shares at the end of every sampler on every surface in Markdown."""
    ends = {(row["surface"], row["sampler"]): f"{row['shares'][-1]:.3f}" for row in found["rows"]}
    names = [name for name in SEARCHES if name in {own for _, own in ends}]
    lines = [f"| surface | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for surface in dict.fromkeys(surface for surface, _ in ends):
        lines.append(f"| {surface} | {' | '.join(ends.get((surface, name), '') for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("choose", "report"), default="report")
    parser.add_argument("--only", default="", help="surfaces whose name has this in it")
    parser.add_argument("--samplers", default="", help="samplers whose name has one of these in it, by comma")
    parser.add_argument("--out", type=Path, default=RESULT, help="rows of other surfaces and samplers stay in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    for surface, make in problems(args.half).items():
        if args.only not in surface:
            continue
        problem = make()
        for sampler in SEARCHES:
            absent = sampler in NEEDS and importlib.util.find_spec(NEEDS[sampler]) is None
            if absent or not any(part in sampler for part in args.samplers.split(",")):
                continue
            row = one_search(surface, problem, sampler, seed=0)
            kept = [own for own in kept if (own["surface"], own["sampler"]) != (surface, sampler)] + [row]
            print(f"{surface:36} {sampler:18} {row['shares']} {row['seconds']} s", flush=True)
            facts = {"half": args.half, "parts": PARTS, "workers": WORKERS, "versions": versions()}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, json.dumps({**facts, **summaries(kept), "rows": kept}, indent=1) + "\n")
    found = {"rows": kept, **summaries(kept)}
    print(by_surface(found), table(found, "all"), table(found, "common"), sep="\n\n")


if __name__ == "__main__":
    main()
