"""What each way to propose candidates adds: ``python -m benchmarks.proposers [--seeds 3] [--candidates 60]``.

Searches of the digits example's sources, each of as many candidates, which are computed and never trained. They see the
KL to the source on the images held out for the search; what is reported is, on the validation split, that of the
candidates that this picks for a budget. ``path`` are neutral points alone, over the whole window. The others propose
with ``budget_gp`` after the points that they start from. A row has the geometric mean of the KL by budget over the
budgets, and the seconds of the processor that proposals and candidates took.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.record import begun, write_result
from prunesweep.models import UserError
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.proposals.budget_gp import log_nats, propose
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations
from prunesweep.search.space.space import Params, candidate_names
from prunesweep.search.space.warm_start import met_points, neutral_points, start_points
from prunesweep.training import EVAL_BATCH, Compared

RESULT = Path(__file__).parent / "results" / "proposers.json"
CONFIG = Path(__file__).parents[1] / "examples" / "digits.toml"
BUDGETS = (0.5, 0.26, 0.1, 0.05, 0.03)  # at which the best candidates are looked at
WINDOW = "space.budget=[0.03, 0.9]"
LOG = "space.budget_scale=log"
START = "search.start_neutral=12"
BLOCKS = ("skip", "conv", "conv3", "merge_start")
WIDTHS = [f"space.{name}=[0, 0]" for name in BLOCKS] + ["space.keep_rate=[1.0, 1.0]"]
WEIGHTS = [
    "space.mlp_weight=[0.33, 3.0]",
    "space.embed_weight=[0.33, 3.0]",
    "space.qk_weight=[0.33, 3.0]",
    "space.depth_slope=[-1.5, 1.5]",
]
PLAIN = [
    "space.mlp_weight=[0.5, 2.0]",
    "space.embed_weight=[1.0, 1.0]",
    "space.qk_weight=[1.0, 1.0]",
    "space.depth_slope=[0.0, 0.0]",
]
LINEAR = ["space.budget_scale=linear", "search.start_neutral=0"]
WAYS: Mapping[str, list[str]] = {
    "path": [LOG, *WIDTHS, *PLAIN],
    "before": [*LINEAR, *PLAIN],
    "log": [LOG, "search.start_neutral=0", *PLAIN],
    "log+path": [LOG, START, *PLAIN],
    "weights": [LOG, START, *WIDTHS, *WEIGHTS],
    "all": [LOG, START, *WEIGHTS],
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

    def run(self, only_path: bool) -> dict[str, Any]:
        """Compute all candidates."""
        begin = time.process_time()
        fixed = self._neutral() if only_path else self._proposals()
        for point in fixed:
            self._compute(point)
            if len(self.found) == self.candidates:
                break
        return {"seconds": time.process_time() - begin, "candidates": self.found}

    def _neutral(self) -> Iterator[Params]:
        for point in neutral_points(self.space, self.candidates):
            yield self.space.placed(point)

    def _proposals(self) -> Iterator[Params]:
        config = self.config.model_copy(
            update={"search": self.config.search.model_copy(update={"trials": self.candidates})}
        )
        yield from met_points(self.space, start_points(config, self.space))
        number = 0
        while True:
            rows = self._encoder.rows(self._points)
            qualities = log_nats(np.array([one["searched"] for one in self.found], float))
            numbers = np.arange(len(self.found))
            known = Evaluations.ordered(rows, np.zeros(len(rows), np.int64), numbers, qualities)
            point = propose(self._encoder, known, number, config.seed, fit=self.space.fitted)
            yield self.space.placed(point)
            number += 1

    def _compute(self, point: Params) -> None:
        try:
            candidate = self.space.decode(point)
        except UserError:
            return
        names = candidate_names(candidate.key, candidate.arch.hash, self.space.complete(point))
        if not self._names.isdisjoint(names):
            return
        self._names.update(names)
        model = self._cutter.model(candidate.decision)
        searched, reported = self._cutter.measured(model), self._reported.measure(model)
        self._points.append({name: point[name] for name in self._encoder.names})
        share = candidate.cost.macs / self.space.source_cost.macs
        self.found.append(
            {
                "share": share,
                "searched": searched.kl,
                "kl": reported.kl,
                "top1": reported.top1,
                "point": {k: round(v, 4) if isinstance(v, float) else v for k, v in point.items()},
            }
        )


def chosen(candidates: list[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """The candidate that the search picks for a budget."""
    within = [one for one in candidates if one["share"] <= budget * (1 + 1e-9)]
    return min(within, key=lambda one: one["searched"], default=None)


def one_search(way: str, seed: int, cache: Path, candidates: int) -> dict[str, Any]:
    """The candidates of one way on the source of one seed, and what they are worth."""
    config = load_config(CONFIG, [f"seed={seed}", WINDOW, *WAYS[way]])
    prepared = prepare(config, cache, lambda *_: None)
    found = Search(config, prepared, candidates).run(way == "path")
    best = {budget: chosen(found["candidates"], budget) for budget in BUDGETS}
    kl = {str(budget): None if one is None else one["kl"] for budget, one in best.items()}
    known = [max(value, 1e-6) for value in kl.values() if value is not None]
    return {"way": way, "seed": seed, "asked": candidates, "kl": kl, "mean_log_kl": mean(map(math.log, known)), **found}


def main() -> None:
    given = begun(__doc__, seeds="0,1,2", cache=Path("runs/cache"), candidates=60, ways=",".join(WAYS), out=RESULT)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for seed in map(int, given.seeds.split(",")):
        for way in given.ways.split(","):
            if any((row["way"], row["seed"], row["asked"]) == (way, seed, given.candidates) for row in rows):
                continue
            row = one_search(way, seed, given.cache, given.candidates)
            rows.append(row)
            by_budget = "  ".join(f"{value:.5f}" for value in row["kl"].values())
            print(
                f"{way:12} {seed}  {math.exp(row['mean_log_kl']):.5f}  {by_budget}  {row['seconds']:.0f} s", flush=True
            )
            write_result(given.out, budgets=BUDGETS, rows=rows)


if __name__ == "__main__":
    main()
