"""Check all files of a run, of a saved model or of a front of computed models, without changing any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from prunesweep.models import Arch, LatencyTable, UserError, arch_of, cost, load, read_arch, weights_digest
from prunesweep.models.finite import check_finite
from prunesweep.models.io.reading import read_json
from prunesweep.models.io.scratch import scratch_folder
from prunesweep.models.io.store import CONFIG, check_saved
from prunesweep.models.precision import to_float32
from prunesweep.pruners import Scores
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.cutting import recovery_of
from prunesweep.search.execution.promote import promoted
from prunesweep.search.execution.reopen import check_given, check_settings, open_study, space_of
from prunesweep.search.space.space import candidate_key
from prunesweep.search.store.computed import ComputedFront
from prunesweep.search.store.progress import planned
from prunesweep.search.store.records import Validation
from prunesweep.search.store.run import Outcomes, Result, Run, Task, task_id
from prunesweep.search.store.study_url import JOURNAL
from prunesweep.training import load_state
from prunesweep.training.jobs.recovery import Known
from prunesweep.training.jobs.training_job import STATE
from prunesweep.training.teacher_cache import is_shard

__all__ = ["Problem", "verify"]

AGAIN = "'prunesweep resume {}' makes it again"
REPORT = "report.html"


class Problem(NamedTuple):
    """Something that is damaged, lost or does not agree, and what to do about it."""

    found: str
    remedy: str


def verify(path: str | Path) -> list[Problem]:
    """Return what is wrong with a run, a saved model, or a folder of ``prunesweep instant``; nothing is changed.

    Models are built and loaded, records and figures are compared with each other and with the journal. The data are not
    opened.

    Args:
        path: the folder.

    Raises:
        UserError: it is none of these.
    """
    path = Path(path)
    if any((path / name).is_file() for name in ("search.toml", "run.json")):
        return list(_run(Run(path)))
    if ComputedFront.is_one(path):
        return list(_front(path))
    if (path / CONFIG).is_file() or any(path.glob("*.safetensors")):
        return list(_said("copy the folder or save the model again", _loaded, path))
    raise UserError(f"{path} is no run, no saved model and no front of computed models")


def _said(remedy: str, check: Callable[..., object], *arguments: object) -> Iterator[Problem]:
    """The problem that a check raises, if it does."""
    try:
        check(*arguments)
    except UserError as error:
        yield Problem(str(error), remedy)


def _loaded(folder: Path) -> nn.Module:
    """Load a saved model. Raises UserError where it is damaged, or where weights are no numbers."""
    model = load(folder)
    check_finite(model, str(folder))
    return model


def _front(path: Path) -> Iterator[Problem]:
    remedy = "compute the front again with `prunesweep instant`, or copy it again"
    try:
        front = ComputedFront(path)
    except UserError as error:
        yield Problem(str(error), remedy)
        return
    if front.sealed and not (path / REPORT).is_file():
        yield Problem(f"{path / REPORT} is lost", remedy)
    for number in range(len(front.points)):
        yield from _said(remedy, _computed, front, number)


def _computed(front: ComputedFront, number: int) -> None:
    folder, point = front.folders[number], front.points[number]
    found = cost(arch_of(_loaded(folder)))
    front.check_model(number)
    if (found.macs, found.params) != (point["macs"], point["params"]):
        raise UserError(f"{folder} holds another model than the one that front.json is about")


def _run(run: Run) -> Iterator[Problem]:
    again = AGAIN.format(run.shown)
    try:
        facts = run.metadata()
    except UserError as error:
        yield Problem(*str(error).split("\n", 1))
        return
    try:
        config = check_settings(run)
    except UserError as error:
        yield Problem(str(error), f"'prunesweep resume {run.shown}' writes a torn or lost one again as it was")
        return
    of_source = list(_said("put that folder back: the cache beside the run has it, in sources/", _source, run, facts))
    yield from of_source
    scores = [run / "scores" / name for name in facts["scores"].values()]
    for file in scores:
        yield from _said("the cache has it, in scores/", Scores.load, file, "put it back")
    for file in sorted((run / "scores").glob("*.safetensors")):
        if file not in scores and not Known.is_sound(file):
            yield Problem(f"{file} is damaged", again)
    if not of_source:
        yield from _shared(run, config, facts)
    for file in sorted(run.teacher_logits.rglob("*.safetensors")):
        if not is_shard(file):
            yield Problem(f"{file} is damaged", again)
    if run.latency_table.exists():
        yield from _said("copy the table again", LatencyTable.load, run.latency_table)
    yield from _said("put a copy of it in its place", check_given, run, config)
    outcomes = run.outcomes()
    for reason in outcomes.damaged.values():
        yield Problem(reason, f"'prunesweep resume {run.shown}' does the trial again")
    yield from _trials(run, outcomes, again)
    yield from _promoted(run)
    yield from _journal(run, config, outcomes, again)
    yield from _end(run, config, outcomes, again)


def _shared(run: Run, config: SearchConfig, facts: dict[str, Any]) -> Iterator[Problem]:
    """What all projections share, which the first of them has kept."""
    arch = read_arch(run / "source")
    recovery = recovery_of(config, arch)
    if recovery is None or not recovery.project or all(r.given is not None for r in run.outcomes().results):
        return
    file, _ = recovery.kept(run / "scores", facts["source"]["weights"], arch, facts["data"])
    if not file.is_file():
        yield Problem(f"{file} is lost", "nothing that is finished needs it, and the next trial computes it again")


def _promoted(run: Run) -> Iterator[Problem]:
    again = "delete it, and promote again"
    problems = list(_said(again, promoted, run))
    yield from problems
    known = {} if problems else {found["unit"]: found.get("weights") for found in promoted(run)}
    for folder in sorted((run / "promoted").glob("*/model")):
        yield from _said(again, _loaded, folder)
        unit = folder.parent.name
        if unit in known:
            yield from _said(again, lambda folder=folder, unit=unit: check_saved(folder, weights=known[unit]))
        elif not (file := folder.with_name("promoted.json")).is_file():
            yield Problem(f"{file} is lost", "promote again with the same options, which trains nothing anew")


def _end(run: Run, config: SearchConfig, outcomes: Outcomes, again: str) -> Iterator[Problem]:
    """What a search leaves when it has ended."""
    advice, report = run / "advice.json", run / REPORT
    settled = len(outcomes.results) + len(outcomes.failures)
    expected = sum(planned(config.search.trials, max(len(config.search.rungs), 1), config.search.reduction_factor))
    measured = any(any(run.path.glob(f"trials/*/{name}")) for name in ("validation.json", "test.json"))
    if not (advice.is_file() or measured or settled >= expected):
        return
    if not report.is_file():
        yield Problem(f"{report} is lost", f"'prunesweep report {run.shown}' writes it again")
    try:
        lines = read_json(advice)
    except UserError:
        lines = None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        yield Problem(f"{advice} is damaged or lost", again)
    yield from _said(again, run.read_speed)


def _source(run: Run, facts: dict[str, Any]) -> None:
    if weights_digest(to_float32(_loaded(run / "source"))) != facts["source"]["weights"]:
        raise UserError(f"{run / 'source'} holds another model than the one that the run was made with")


def _trials(run: Run, outcomes: Outcomes, again: str) -> Iterator[Problem]:
    results = {result.id: result for result in outcomes.results}
    for folder in sorted((run / "trials").glob("r*-*")):
        unit, result = folder.name, results.get(folder.name)
        if not any((folder / name).is_file() for name in ("spec.json", "arch.json", "result.json")):
            continue  # the driver died before it handed the trial out
        try:
            task = run.read_task(unit)
        except UserError as error:
            yield Problem(str(error), again)
            continue
        for check in (_decision, _record, _result, _state, _model, _validation):
            yield from _said(again, check, run, task, result)
    for result, reason in run.lost_models(outcomes.current):
        if not run.model(result).is_dir():
            yield Problem(reason, again)


def _decision(run: Run, task: Task, _: Result | None) -> None:
    cut = run.read_cut(task.number)
    if task.given is None and (cut is None or candidate_key(cut, task.point) != task.key):
        raise UserError(f"{run.trial(task_id(task.number)) / 'cut.json'} is lost, or is that of another candidate")


def _record(run: Run, task: Task, result: Result | None) -> None:
    file = run.trial(task.id) / "arch.json"
    if not file.is_file():
        if result is not None:
            raise UserError(f"{file} is lost")
        return
    try:
        found = Arch.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if found.hash != task.arch_hash:
        raise UserError(f"{file} is damaged: it is the record of another candidate")


def _result(run: Run, task: Task, result: Result | None) -> None:
    if result is not None and (result.key, result.point) != (task.key, task.point):
        raise UserError(f"{run.trial(task.id) / 'result.json'} is the result of another candidate")


def _state(run: Run, task: Task, _: Result | None) -> None:
    file = run.trial(task.id) / STATE
    if file.exists() and load_state(file) is None:
        raise UserError(f"{file} is damaged, or of another version: its training begins anew")


def _model(run: Run, task: Task, result: Result | None) -> None:
    model = run.trial(task.id) / "model"
    if not model.is_dir():
        return
    if arch_of(_loaded(model)).hash != task.arch_hash:
        raise UserError(f"{model} holds another model than that of trial {task.number}")
    check_saved(model, weights=None if result is None else result.weights)


def _validation(run: Run, task: Task, _: Result | None) -> None:
    for name in ("validation.json", "test.json"):
        file = run.trial(task.id) / name
        if file.is_file():
            run.read(file, Validation)


def _journal(run: Run, config: SearchConfig, outcomes: Outcomes, again: str) -> Iterator[Problem]:
    """Whether the journal agrees with the results, by a copy of it; and whether the front does."""
    tasks = dict[int, Task]()
    for path in run.path.glob("trials/r0-*/spec.json"):
        try:
            task = run.read_task(path.parent.name)
        except UserError:  # said already
            return
        tasks[task.number] = task
    failed = {task.number for task in tasks.values() if task.id in outcomes.failures}
    if config.search.study == JOURNAL and ((run / "study.journal").is_file() or tasks):
        with scratch_folder() as scratch:
            copy = scratch / "study.journal"
            if (run / "study.journal").is_file():
                shutil.copyfile(run / "study.journal", copy)
            try:
                study = open_study(run, config, space_of(run, config), copy)
                study.follow(tasks, outcomes.results, failed, run.next_number())
            except UserError as error:
                yield Problem(str(error), again)
                return
        journal = run / "study.journal"
        told = [note for note in study.notes if "was made again" not in note]
        for note in told:
            yield Problem(f"{journal}: {note.partition(': kept as')[0]}", again)
        if study.notes and not told:
            yield Problem(f"{journal} is {'empty' if journal.is_file() else 'lost'}", again)
    if outcomes.results and not outcomes.damaged:
        file = run / "front.json"
        try:
            kept = read_json(file)
        except UserError as error:
            yield Problem(str(error), again)
            return
        if kept != json.loads(json.dumps(run.front(outcomes.current))):
            yield Problem(f"{file} is not the front of the results", again)
