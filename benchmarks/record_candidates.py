"""Record real candidates of the digits example's space: ``python -m benchmarks.record_candidates [--seeds 2]``.

They are what ``benchmarks.surfaces.recorded`` answers from. Of every source, ``count`` candidates are computed: half at
random points, half at points that ``budget_gp`` proposes from what was found before, so that the neighbourhood of the
front is covered more densely. Every so many are trained as on the example's last rung. Figures are those on the images
held out for the search: KL to the source and loss in nats, top-1 in percent.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import begun
from benchmarks.subspaces import CONFIG
from prunesweep.models import UserError
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.proposals.budget_gp import log_nats, propose
from prunesweep.search.proposals.encoder import SearchSpaceEncoder
from prunesweep.search.proposals.evaluations import Evaluations
from prunesweep.training import fit

FOLDER = Path(__file__).parent / "surfaces" / "digits"
FIGURES = ("macs", "kl", "loss", "top1", "seconds", "trained_kl", "trained_loss", "trained_top1", "trained_seconds")


def record(seed: int, cache: Path, count: int, every: int) -> Iterator[dict[str, Any]]:
    """Compute candidates one after the other.

    Args:
        seed: of source and points.
        cache: folder of sources and scores.
        count: how many candidates.
        every: one of so many is trained.
    """
    config = load_config(CONFIG, [f"seed={seed}"])
    source = prepare(config, cache, lambda *_: None)
    cutter, space = Cutter(source.model, source.data, config, kept=cache / "scores"), source.space
    encoder, random = SearchSpaceEncoder(space.distributions), np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        if number % 2 or len(rows) < 30:
            point = encoder.point(encoder.random(random, 1)[0])
        else:
            point = propose(encoder, _known(encoder, rows), number, seed, fit=space.fitted)
        point = dict(space.placed(point))
        try:
            decision = space.decode(point)
        except UserError:
            continue
        start = time.process_time()
        model = cutter.model(decision.decision)
        found = cutter.measured(model)
        row = {**point, "macs": decision.cost.macs, "kl": found.kl, "loss": found.loss, "top1": found.top1}
        row["seconds"] = time.process_time() - start
        if number % every == 0:
            row |= _trained(config, source, cutter, model, number)
        rows.append(row)
        yield row


def _known(encoder: SearchSpaceEncoder, rows: list[dict[str, Any]]) -> Evaluations:
    numbers = np.arange(len(rows))
    return Evaluations(encoder.rows(rows), 0 * numbers, numbers, log_nats(np.array([row["kl"] for row in rows])))


def _trained(config: SearchConfig, source: LoadedSource, cutter: Cutter, model: Any, seed: int) -> dict[str, Any]:
    """Figures of a model after the epochs of the last rung, in place."""
    epochs, start = config.search.rungs[-1], time.process_time()
    recipe = config.finetune.model_copy(update={"epochs": epochs, "warmup_epochs": 0})
    fit(model, source.data, recipe, teacher=source.model, seed=seed)
    found = cutter.measured(model)
    figures = {"kl": found.kl, "loss": found.loss, "top1": found.top1, "seconds": time.process_time() - start}
    return {f"trained_{name}": value for name, value in figures.items()}


def main() -> None:
    given = begun(__doc__, seeds=2, count=300, every=5, cache=Path("runs/cache"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        with (FOLDER / f"seed{seed}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = None
            for number, row in enumerate(record(seed, given.cache, given.count, given.every)):
                if writer is None:
                    points = [name for name in row if name not in FIGURES]
                    writer = csv.DictWriter(file, [*points, *FIGURES], lineterminator="\n")
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) and k != "macs" else v for k, v in row.items()})
                file.flush()
                if number % 20 == 0:
                    print(seed, number, row, flush=True)


if __name__ == "__main__":
    main()
