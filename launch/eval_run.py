"""``prunesweep eval RUN``: measure the models of a run's front again, on the data that the run was made on."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["evaluate_run", "is_run"]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, not a saved model's."""
    return any((path / name).is_file() for name in ("run.json", "search.toml"))


def evaluate_run(path: Path, data: str | None, *, as_json: bool) -> None:
    """Print a line for every member of the front: what it gives now, and what it gave in the search.

    Args:
        path: the run's folder.
        data: name of the run's data, if they were moved.
        as_json: print a list of all figures instead.

    Raises:
        UserError: the run's settings were edited, the data are not those that it was made on, or a model is damaged.
        NothingLeft: damage left no model of the front, or one whose answers are no numbers.
    """
    from prunesweep.models import UserError, arch_of, load
    from prunesweep.models.precision import to_float32
    from prunesweep.search import Run
    from prunesweep.search.execution.cutting import measure_of
    from prunesweep.search.execution.reopen import check_data, reopen
    from prunesweep.training import EVAL_BATCH, EvalMetrics, quality_name
    from prunesweep.training import evaluate as measure

    from .console import PlainConsole
    from .nothing_left import check_answers, check_front, check_weights

    run = Run.existing(path)
    notes = PlainConsole(stderr=True)

    def note(text: str) -> None:
        notes.print(text, highlight=False, markup=False, soft_wrap=True)

    config = reopen(run, () if data is None else [f"data.name={data}"], on_note=note)
    name = None if config.search.quality is None else quality_name(config.search.quality)
    searched_on = check_data(run, config)
    opened, further = searched_on.report, measure_of(config, searched_on)
    if not as_json:
        note("\n".join(opened.describe()))
    points = run.front()
    check_front(run)
    source = to_float32(load(run / "source"))
    found = []
    for point in points:
        model = to_float32(load(run / point["model"]))
        if arch_of(model).hash != point["arch_hash"]:
            raise UserError(
                f"{run / point['model']} holds another model than that of trial {point['trial']}: put the right one "
                "back, or remove the folder, and resume the run to make it again"
            )
        check_weights(model, run / point["model"])
        batches = opened.val_loader(EVAL_BATCH)
        own = {} if further is None else further(model, batches)
        now = EvalMetrics.of({**measure(model, batches, source=source), **own})
        check_answers(now, run / point["model"])
        found.append({**point, "model": str(path / point["model"]), "measured": now.with_interval()})
        if not as_json:
            searched = EvalMetrics.of({name: point.get(f"searched_{name}", point.get(name)) for name in now._fields})
            where = f"trial {point['trial']}, rung {point['rung']}"
            print(
                f"{where}: {now.told(name)}; {searched.brief(name)} in the search; {point['macs']:,} MACs, "
                f"{point['params']:,} params"
            )
    if as_json:
        print(json.dumps(found))
    elif not found:
        print("the front is empty")
