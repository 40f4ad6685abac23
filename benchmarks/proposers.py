"""What each way to propose candidates adds: ``python -m benchmarks.proposers [--seeds 0,1,2] [--candidates 40]``.

Searches of the digits example's sources, each of as many candidates, which are computed and never trained. They see the
KL to the source on the images held out for the search; what is reported is, on the validation split, that of the
candidates that this picks for a budget.

    path        neutral points over the window: the scores alone decide all widths
    programme   an integer programme per budget and residual width over one-block losses, with cuts for diversity
    before      budget_gp over blocks, tokens and ``mlp_weight``, the budget on a linear scale, without idle values
    half        the same after 20 neutral points, on a logarithmic scale, with idle values
    all         budget_gp over everything that the compact encoding has, after 10 neutral points
    full        budget_gp over weights, halves and mixers of every block, likewise
    switch      level switches (EvoPress) of the best candidates near a budget, likewise: one weight up, another down

A row has the KL at some budgets, its geometric mean over all budgets from the smallest to the largest of them, equal
factors counting alike, and the seconds of the processor that it took.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.record import begun, write_result
from prunesweep.models import BlockCut, Cut, UserError, cost, cut_arch
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.proposals.budget_gp import GOLDEN, log_nats, propose
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations
from prunesweep.search.space.space import Params, Space
from prunesweep.search.space.warm_start import met_points, neutral_points, start_points
from prunesweep.training import EVAL_BATCH, Compared

RESULT = Path(__file__).parent / "results" / "proposers.json"
CONFIG = Path(__file__).parents[1] / "examples" / "digits.toml"
STREAM = (12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 88, 96)  # residual widths that programmes are solved for
DIVERSE, APART = 3, 4  # solutions of a programme, and choices that two of them differ in
IMAGES = 256  # that candidates are fitted to
BUDGETS = (0.5, 0.26, 0.1, 0.05, 0.03)  # at which the best candidates are looked at
WINDOW = "space.budget=[0.03, 0.9]"
LOG = "space.budget_scale=log"
START = "search.start_neutral=10"
BLOCKS = ("skip", "conv", "conv3", "merge_start")
WIDTHS = [f"space.{name}=[0, 0]" for name in BLOCKS] + ["space.keep_rate=[1.0, 1.0]"]
WEIGHTS = [
    "space.mlp_weight=[0.5, 2.0]",
    "space.embed_weight=[0.5, 2.0]",
    "space.qk_weight=[0.5, 2.0]",
    "space.depth_slope=[-1.0, 1.0]",
]
PLAIN = [
    "space.mlp_weight=[0.5, 2.0]",
    "space.embed_weight=[1.0, 1.0]",
    "space.qk_weight=[1.0, 1.0]",
    "space.depth_slope=[0.0, 0.0]",
]
FULL = [
    "space.encoding=full",
    *(f"space.{name}=[0, 0]" for name in ("skip", "conv", "conv3")),
    "space.mlp_weight=[1.0, 1.0]",
    "space.embed_weight=[0.5, 2.0]",
    "space.attention_weights=[0.5, 2.0]",
    "space.mlp_weights=[0.5, 2.0]",
]
LINEAR = ["space.budget_scale=linear", "search.start_neutral=0"]
WAYS: Mapping[str, list[str]] = {
    "path": [LOG, *WIDTHS, *PLAIN],
    "half": [LOG, "search.start_neutral=20", *PLAIN],
    "before": [*LINEAR, *PLAIN],
    "all": [LOG, START, *WEIGHTS],
    "full": [LOG, START, *FULL, "space.mlp_skip=[0, 1]"],
    "switch": [LOG, START, *FULL],
    "programme": [LOG, "search.start_neutral=0", *WIDTHS, *PLAIN],
}


class Search:
    """Candidates of one way, one after the other, as a search has them on a first rung of no epochs."""

    def __init__(self, config: SearchConfig, prepared: LoadedSource, candidates: int) -> None:
        self.config, self.space, self.candidates = config, prepared.space, candidates
        self._cutter = Cutter(prepared.model, prepared.data, config)
        self._reported = Compared(list(prepared.data.report.val_loader(EVAL_BATCH)), prepared.model)
        self._encoder = SearchSpaceEncoder(self.space.distributions)
        self.found: list[dict[str, Any]] = []
        self._points: list[Params] = []
        self._names: set[str] = set()

    def run(self, way: str) -> dict[str, Any]:
        """Compute all candidates."""
        begin = time.process_time()
        for point, decision in self._path() if way == "path" else self._proposals(way):
            self._compute(point, decision)
            if len(self.found) == self.candidates:
                break
        return {"seconds": time.process_time() - begin, "candidates": self.found}

    def _path(self) -> Iterator[tuple[Params, None]]:
        for point in neutral_points(self.space, self.candidates):
            yield self.space.placed(point), None

    def _proposals(self, way: str) -> Iterator[tuple[Params, Cut | None]]:
        if way == "programme":
            for budget, decision in programmes(self.space, self.candidates):
                yield {**self.space.neutral, "budget": budget}, decision
        search = self.config.search.model_copy(update={"trials": self.candidates})
        config = self.config.model_copy(update={"search": search})
        for point in met_points(self.space, start_points(config, self.space)):
            yield point, None
        for number in count():
            rows = self._encoder.rows(self._points)
            qualities = log_nats(np.array([one["searched"] for one in self.found], float))
            numbers = np.arange(len(self.found))
            known = Evaluations.ordered(rows, np.zeros(len(rows), np.int64), numbers, qualities)
            if way == "switch":
                point = switched(self._encoder, known, number, config.seed)
            else:
                idle = None if way == "before" else self.space.idle
                point = propose(self._encoder, known, number, config.seed, fit=self.space.fitted, idle=idle)
            yield self.space.placed(point), None

    def _compute(self, point: Params, given: Cut | None) -> None:
        try:
            decision = given or self.space.decode(point).decision
        except UserError:
            return
        assert isinstance(decision, Cut)
        arch = cut_arch(self.space.arch, decision)
        if arch.hash in self._names:
            return
        self._names.add(arch.hash)
        model = self._cutter.model(decision)
        searched, reported = self._cutter.measured(model), self._reported.measure(model)
        self._points.append({name: point[name] for name in self._encoder.names})
        share = cost(arch).macs / self.space.source_cost.macs
        self.found.append({"share": share, "searched": searched.kl, "kl": reported.kl, "top1": reported.top1})


def switched(encoder: SearchSpaceEncoder, known: Evaluations, number: int, seed: int) -> Params:
    """Move one weight of a good candidate near a budget up and another one down, by one of a few levels."""
    rng = np.random.default_rng([seed, number])
    budget = encoder.names.index("budget")
    at = number * GOLDEN % 1
    near = np.argsort(abs(known.rows[:, budget] - at), kind="stable")[:8]
    row = known.rows[near[np.argsort(-known.values[near], kind="stable")[rng.integers(3)]]].copy()
    weights = [v for v, name in enumerate(encoder.names) if "_weight" in name]
    up, down = rng.choice(weights, 2, replace=False)
    step = rng.choice([0.06, 0.12, 0.25])
    row[up], row[down] = min(row[up] + step, 1.0), max(row[down] - step, 0.0)
    row[budget] = at
    return encoder.point(row)


def programmes(space: Space, candidates: int) -> Iterator[tuple[float, Cut]]:
    """Solutions of integer programmes at all budgets: of several residual widths, and several that differ of each."""
    for budget in BUDGETS:
        room = budget * space.source_cost.macs
        solved = [found for width in STREAM if (found := Programme(space, width, room).solve()) is not None]
        solved.sort(key=lambda one: one.loss)
        for best in solved[: max(candidates // (len(BUDGETS) * DIVERSE), 1)]:
            yield budget, best.decision
            for _ in range(DIVERSE - 1):
                other = best.programme.solve()
                if other is not None:
                    yield budget, other.decision


@dataclass(frozen=True)
class Solution:
    """A decision with the sum of its one-block losses, and the programme that it solves."""

    loss: float
    decision: Cut
    programme: Programme


class Programme:
    """min sum_s loss_s(level) subject to MACs, one level per space of a block, or the half of the block dropped.

    Losses are those of the scores of subspaces; MACs add up over spaces once the residual width is given. Solutions
    after the first one differ from all before in ``APART`` choices.
    """

    def __init__(self, space: Space, width: int, room: float) -> None:
        """All blocks of the source are alike, so what a level costs is looked up in the first one."""
        self.space, self.width, self.room = space, width, room
        arch, vectors = space.arch, space.scores["subspaces"].vectors
        self.stream = float(vectors["stages.0.embed"][width:].sum())
        self.choices: list[tuple[int, str, int]] = []
        losses, costs = [], []
        thin = self._cost({})
        for kind, step in (("qk", 1), ("v", 1), ("mlp", 8)):
            for level in (0, *range(step, getattr(arch.blocks[0], kind) + 1, step)):
                # without its queries and keys an attention is gone, and its values with them
                spent = self._cost({(0, kind): level}) - thin if level or kind == "qk" else 0.0
                for i in range(arch.depth):
                    self.choices.append((i, kind, level))
                    losses.append(float(vectors[f"blocks.{i}.{kind}"][level:].sum()))
                    costs.append(spent)
        self.losses, self.costs, self.fixed = np.array(losses), np.array(costs), thin
        self.before: list[np.ndarray] = []

    def solve(self) -> Solution | None:
        """The next best solution."""
        n = len(self.choices)
        groups = sorted({(i, kind) for i, kind, _ in self.choices})
        one = np.array([[(i, kind) == group for i, kind, _ in self.choices] for group in groups], float)
        both = np.array(
            [
                [(level == 0) * ((kind == "qk") - (kind == "v")) * (i == b) for i, kind, level in self.choices]
                for b in range(self.space.arch.depth)
            ],
            float,
        )
        rules = [
            LinearConstraint(one, 1, 1),
            LinearConstraint(both, 0, 0),
            LinearConstraint(self.costs[None], -np.inf, self.room - self.fixed),
            *(LinearConstraint(own[None], -np.inf, own.sum() - APART) for own in self.before),
        ]
        scale = 1 / max(self.losses.max(), 1e-12)
        found = milp(
            self.losses * scale,
            constraints=rules,
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            options={"time_limit": 5.0, "mip_rel_gap": 1e-3},
        )
        if found.x is None:
            return None
        taken = np.round(found.x)
        self.before.append(taken)
        levels = {(i, kind): level for (i, kind, level), x in zip(self.choices, taken, strict=True) if x}
        return Solution(self.stream + float(self.losses @ taken), self._cut(levels), self)

    def _cost(self, levels: Mapping[tuple[int, str], int]) -> float:
        """MACs with some levels, all others 1, MLPs 0."""
        least = {(i, kind): int(kind != "mlp") for i in range(self.space.arch.depth) for kind in ("qk", "v", "mlp")}
        return cost(cut_arch(self.space.arch, self._cut({**least, **levels}))).macs

    def _cut(self, levels: Mapping[tuple[int, str], int]) -> Cut:
        blocks = []
        for i, block in enumerate(self.space.arch.blocks):
            qk, v, mlp = (levels[i, kind] for kind in ("qk", "v", "mlp"))
            if not qk and not mlp:
                blocks.append(BlockCut(keep=False))
            elif not qk:
                blocks.append(BlockCut(mixer="none", mlp=tuple(range(mlp))))
            else:
                heads = range(block.heads)
                blocks.append(BlockCut.aligned(block, heads=heads, qk=range(qk), v=range(v), mlp=range(mlp)))
        return Cut(embed=(tuple(range(self.width)),), blocks=tuple(blocks))


def chosen(candidates: list[dict[str, Any]], budget: float) -> float:
    """The KL, on the validation split, of the candidate that the search picks for a budget; 1 where it has none."""
    within = [one for one in candidates if one["share"] <= budget * (1 + 1e-9)]
    picked = min(within, key=lambda one: one["searched"], default={"kl": 1.0})
    return max(float(picked["kl"]), 1e-6)


def one_search(way: str, seed: int, cache: Path, candidates: int) -> dict[str, Any]:
    """The candidates of one way on the source of one seed, and what they are worth."""
    config = load_config(CONFIG, [f"seed={seed}", WINDOW, f"search.recover_images={IMAGES}", *WAYS[way]])
    prepared = prepare(config, cache, lambda *_: None)
    found = Search(config, prepared, candidates).run(way)
    kl = [chosen(found["candidates"], budget) for budget in BUDGETS]
    over = np.geomspace(BUDGETS[-1], BUDGETS[0], 100)
    between = mean(math.log(chosen(found["candidates"], budget)) for budget in over)
    return {"way": way, "seed": seed, "asked": candidates, "mean_kl": math.exp(between), "kl": kl, **found}


def main() -> None:
    given = begun(__doc__, seeds="0,1,2", cache=Path("runs/cache"), candidates=40, ways=",".join(WAYS), out=RESULT)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for seed in map(int, given.seeds.split(",")):
        for way in given.ways.split(","):
            if any((row["way"], row["seed"], row["asked"]) == (way, seed, given.candidates) for row in rows):
                continue
            row = one_search(way, seed, given.cache, given.candidates)
            rows.append(row)
            by_budget = "  ".join(f"{value:.5f}" for value in row["kl"])
            print(f"{way:12} {seed}  {row['mean_kl']:.5f}  {by_budget}  {row['seconds']:.0f} s", flush=True)
            write_result(given.out, budgets=BUDGETS, rows=rows)


if __name__ == "__main__":
    main()
