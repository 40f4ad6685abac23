"""What it adds to start from methods' decisions: ``python -m benchmarks.starts [--seeds 0] [--seconds 240]``.

UVC, SPViT and NViT's iterative pruning decide about the digits example's source, as ``search.start_methods`` asks.
``decisions`` sets each beside the neutral point of its cost, whose widths the scores alone decide: KL to the source
and top-1 on the validation split, both computed in the same way and untrained. Then come two searches as in the
example, of equal seconds of the processor: ``with`` the decisions, whose training counts, and ``without``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import begun, write_result
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.reopen import open_study, space_of
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.execution.validation import validate_front
from prunesweep.search.space.variables import MODEL
from prunesweep.search.space.warm_start import met_points, neutral_points, proposed_points, start_points
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, Compared
from prunesweep.training.jobs.proposal import Proposal

RESULT = Path(__file__).parent / "results" / "starts.json"
CONFIG = Path(__file__).parents[1] / "examples" / "digits.toml"
WAYS = {"with": ["search.start_methods=['uvc', 'spvit', 'nvit-iterative']"], "without": list[str]()}
CLOCKS = ("seconds", "computing_seconds", "training_seconds")  # of the clock, summed over units
BUDGETS = (0.5, 0.3, 0.15, 0.07)  # at which fronts are looked at


def quiet(what: str, share: float, note: str) -> None:
    """Report no progress."""


def beside(config: SearchConfig, prepared: LoadedSource) -> list[dict[str, Any]]:
    """Measure every decision, and the neutral point of its cost."""
    space, cutter = prepared.space, Cutter(prepared.model, prepared.data, config)
    reported = Compared(list(prepared.data.report.val_loader(EVAL_BATCH)), prepared.model)
    rows = list[dict[str, Any]]()
    for point in proposed_points(space, prepared.proposals):
        if MODEL not in point:
            continue
        share = space.decode(point).cost.macs / space.source_cost.macs
        row: dict[str, Any] = {"method": Proposal.load(Path(str(point[MODEL]))).method, "share": share}
        neutral = {**neutral_points(space, 1)[0], "budget": share}
        for name, own in (("decision", point), ("neutral", neutral)):
            found = reported.measure(cutter.model(space.decode(own).decision))
            row[name] = {"kl": found.kl, "top1": found.top1}
        rows.append(row)
    return rows


def searched(config: SearchConfig, prepared: LoadedSource, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a search in this process until it has taken so many seconds of the processor; return its front."""
    begin = time.process_time()
    points = met_points(prepared.space, start_points(config, prepared.space, prepared.proposals))
    changes = {"start": tuple(dict(point) for point in points), "start_methods": ()}
    config = config.model_copy(update={"search": config.search.model_copy(update=changes), "start": {}})
    run = Run(folder)
    config = create_run(run, config, prepared)
    space = space_of(run, config)
    study = open_study(run, config, space, run / "study.journal")
    coordinator = Coordinator(run, study, space, config.search, max_concurrent=1, seed=config.seed)
    while time.process_time() - begin < seconds and (unit := coordinator.next()) is not None:
        run_task(run.path, unit)
        coordinator.complete(unit.id)
    spent = time.process_time() - begin
    validate_front(run.path, config, quiet)
    whole = run.metadata()["source"]["macs"]
    front = [
        {
            "share": row["macs"] / whole,
            **{name: row[name] for name in ("kl", "top1", "epochs")},
            "by": row.get("proposed_by"),
        }
        for row in run.front()
    ]
    status, results = run.status(), run.results()
    of_units = {name: sum(getattr(r, name) for r in results) for name in CLOCKS}
    times = {"seconds": spent, "clock": {"driver": coordinator.seconds, **of_units}}
    return {**times, "rungs": status["rungs"], "hypervolume": status["hypervolume"], "front": front}


def one_seed(seed: int, cache: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """Decide about the source of a seed, and search it with the decisions and without."""
    row: dict[str, Any] = {"seed": seed}
    for way, settings in WAYS.items():
        config = load_config(CONFIG, [f"seed={seed}", "search.trials=400", *settings])
        prepare(config, cache, quiet, decide=False)  # source and scores, which both have
        own = folder / "cache"  # without decisions
        own.mkdir(exist_ok=True)
        for path in cache.iterdir():
            if path.name != "decisions" and not (own / path.name).exists():
                (own / path.name).symlink_to(path.absolute())
        begin = time.process_time()
        prepared = prepare(config, own, quiet)
        deciding = time.process_time() - begin
        row[way] = {"deciding": deciding, **searched(config, prepared, folder / way, seconds - deciding)}
        if way == "with":
            row["decisions"] = beside(config, prepared)
    return row


def main() -> None:
    given = begun(__doc__, seeds="0", cache=Path("runs/cache"), seconds=240.0)
    rows = list[dict[str, Any]]()
    for seed in map(int, given.seeds.split(",")):
        with tempfile.TemporaryDirectory(prefix="prunesweep-") as folder:
            rows.append(one_seed(seed, given.cache, given.seconds, Path(folder)))
        for own in rows[-1]["decisions"]:
            print(f"{own['method']:15} {own['share']:.3f}  decided {own['decision']}  neutral {own['neutral']}")
        for way in WAYS:
            own = rows[-1][way]
            print(f"{way:8} {own['rungs']} units, {own['seconds']:.0f} s, hypervolume {own['hypervolume']:.4f}")
            for budget in BUDGETS:
                best = max((one for one in own["front"] if one["share"] <= budget), key=lambda one: one["share"])
                print(f"    within {budget}: {best}")
        write_result(RESULT, seconds=given.seconds, seeds=rows)


if __name__ == "__main__":
    main()
