"""Do one unit of work, a candidate on one rung: cut the source or load the model of the rung below, finetune, measure.

A unit can be killed and started again at any moment: finetuning resumes after its last complete epoch, and a unit that
has a result returns it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

from prunesweep.models import (
    Arch,
    Cut,
    LatencyTable,
    UserError,
    arch_of,
    cost,
    cut_arch,
    load,
    read_arch,
    save,
)
from prunesweep.models.io.files import disk_full, machine_fails, write_text
from prunesweep.models.io.lock import Lost
from prunesweep.models.io.objects import StoreFails
from prunesweep.models.io.provenance import versions
from prunesweep.models.io.reading import read_json
from prunesweep.models.io.store import check_saved, saved_digest
from prunesweep.models.memory import out_of_memory
from prunesweep.models.precision import to_float32
from prunesweep.search.config import SearchConfig, load_run_config
from prunesweep.search.space.axes import AXES
from prunesweep.search.space.space import Candidate, Space, candidate_key
from prunesweep.search.space.variables import MODEL
from prunesweep.search.store.front import OWN
from prunesweep.search.store.run import Result, Run, Task, set_aside, task_id
from prunesweep.training import Data, Diverged, EvalMetrics, Recipe
from prunesweep.training.container import memory_kills
from prunesweep.training.jobs.metrics_log import MetricsLog
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.proposal import is_proposal
from prunesweep.training.jobs.run_job import run_job
from prunesweep.training.jobs.training_job import STATE, CannotBegin, LoadedJob, Reports, TrainingJob

from .coordinator import RunBroken
from .cutting import Cutter
from .reopen import check_data, own_table, space_of

if TYPE_CHECKING:
    from prunesweep.training.jobs.warm_workers import Elsewhere

__all__ = ["Away", "run_task"]

ATTEMPT = "attempt.json"  # of a training that has begun and not ended: how often processes were killed for memory then
START = "start"  # folder of the first model of a unit that is trained on workers of its own


@contextlib.contextmanager
def _needed_by_all() -> Iterator[None]:
    """Blame the run for an error in the block, because it would meet every unit; but not for too little memory or disk.

    Raises:
        RunBroken: the block raised something else.
    """
    try:
        yield
    except Exception as error:
        if disk_full(error) or out_of_memory(error):
            raise
        raise RunBroken(str(error) if isinstance(error, UserError) else traceback.format_exc()) from error


class WorkerContext:
    """What all units of a run share in one process: configuration, data and source model, loaded once.

    Attributes:
        away: where the files of units are for workers of their own that do not see the run's folder, if they do not.

    Raises:
        RunBroken: one of them is missing or damaged, or the data are not those that the run was made on.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.away = run, cast("Away | None", None)
        with _needed_by_all():
            self.config: SearchConfig = own_table(run, load_run_config(run.path))  # on nodes it lies elsewhere
            source = to_float32(load(run / "source"))
            self.data: Data = check_data(run, self.config, source)
            self.source = source.to("cuda" if self.config.resources.gpus_per_trial else "cpu")
            self.arch = arch_of(source)
            self.facts = run.metadata()

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, path: Path) -> WorkerContext:
        """Return the context of a run's folder. The last one is kept for the next unit in this process."""
        return cls(Run(path))

    @cached_property
    def space(self) -> Space:
        """The space, for points whose decision is not kept."""
        with _needed_by_all():
            return space_of(self.run, self.config)

    @cached_property
    def latency(self) -> LatencyTable | None:
        """The latency table of the space, if it has one."""
        table = self.config.space.latency_table
        with _needed_by_all():
            return None if table is None else LatencyTable.load(Path(table))

    def candidate(self, unit: Task) -> Candidate:
        """Return the candidate of a unit, from the decision that the driver made and kept, or the model it was given.

        In a run from before decisions were kept, the point is decoded again.

        Raises:
            RunBroken: it is not the candidate that the driver handed out: what says so, the latency table or the scores
                have been damaged.
        """
        given = None if unit.given is None else self.run / unit.given
        with _needed_by_all():  # the driver has checked them
            decision = self.run.read_cut(unit.number) if given is None or is_proposal(given) else given
            arch = self._record(decision)
        if decision is None or arch is None:
            point = unit.point if given is None else {**unit.point, MODEL: str(given)}
            found, how = self.space.decode(point), "the point decodes to"
        else:
            latency = None if self.latency is None else self.latency.predict(arch)
            found = Candidate(decision, arch, cost(arch), latency, candidate_key(decision, unit.point))
            how = f"{unit.given} is" if isinstance(decision, Path) else "cut.json is"
        if (found.key, found.arch.hash) != (unit.key, unit.arch_hash):
            raise RunBroken(
                f"{how} {found.key} of architecture {found.arch.hash}, the driver decoded {unit.key} of architecture "
                f"{unit.arch_hash}"
            )
        return found

    def _record(self, decision: Cut | Path | None) -> Arch | None:
        if isinstance(decision, Path):
            return read_arch(decision)
        return None if decision is None else cut_arch(self.arch, decision)

    @cached_property
    def cutter(self) -> Cutter:
        """Makes the models that units start from."""
        with _needed_by_all():  # a function of one's own must be there
            return self._cutter()

    def _cutter(self) -> Cutter:
        return Cutter(self.source, self.data, self.config, kept=self.run / "scores", reading=_needed_by_all)

    def epochs(self, rung: int) -> int:
        """Epochs of finetuning on a rung."""
        return self.config.search.rungs[rung] if self.config.search.rungs else self.config.finetune.epochs

    def recipe(self, unit: Task) -> Recipe:
        """Return the recipe of a unit: the epochs of its rung as one whole schedule, changed by its training axes."""
        epochs = self.epochs(unit.rung)
        recipe = self.config.finetune
        for axis in AXES.values():
            if axis.trains:
                recipe = axis.recipe(recipe, unit.point[axis.name])
        warmup = min(recipe.warmup_epochs, max(epochs - 1, 0))
        return recipe.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


class Away(Protocol):
    """Where the files of a run's units are for workers of their own that do not see its folder."""

    @property
    def workers(self) -> str:
        """The URL of what Ray Train keeps of them."""

    def unit(self, name: str) -> Elsewhere:
        """Where the files of a unit are."""


class Fencing(Protocol):
    """What says whether a driver still is the one of a run."""

    def check(self) -> None:
        """Raise Lost where it is not."""


def run_task(path: Path, unit: Task, fence: Fencing | None = None, away: Away | None = None) -> dict[str, Any]:
    """Do a task of a run, or what is left of it.

    Args:
        path: the run's folder.
        unit: the task.
        fence: of the driver that handed it out; what another one has taken over is left to that.
        away: where its files are for workers of its own, where they do not see the folder.

    Returns:
        What ``result.json`` says. Where the task has no result: ``{"state": "stopped"}`` if it was asked to stop,
        ``{"state": "disk full"}`` if there was no room to end, or ``{"state": "broken", "reason": ...}`` if what every
        task needs is missing or damaged. Any other exception is the task's failure, and its traceback is the result.
    """
    run = Run(path) if fence is None else Run(path, fence.check)
    found = run.read_result(unit.id)
    if found is not None:
        return found
    try:
        run.fence()
        context = WorkerContext.of(path)
        context.away = away
        result = _work(context, unit)
        return {"state": "stopped"} if result is None else run.write_result(unit.id, result=result)
    except (RunBroken, CannotBegin, Lost, StoreFails) as broken:  # CannotBegin: by a worker of its own, maybe elsewhere
        return {"state": "broken", "reason": str(broken)}
    except Exception as error:
        if disk_full(error):  # it is no fault of the unit's, which goes on once there is room
            return {"state": "disk full"}
        if machine_fails(error):
            return {"state": "broken", "reason": f"{socket.gethostname()}: {error}"}
        failure = traceback.format_exc()
        if reason := _broken(run):
            return {"state": "broken", "reason": reason}
        return run.write_result(unit.id, error=failure)


def _broken(run: Run) -> str | None:
    """Why no unit of a run can be done, if so: all that they share is loaded again, for it may have gone meanwhile."""
    WorkerContext.of.cache_clear()
    try:
        run.fence()
        WorkerContext.of(run.path)
    except (RunBroken, Lost) as broken:
        return str(broken)
    except Exception:  # too little memory or disk: no reason to blame the run
        return None
    return None


def _work(context: WorkerContext, unit: Task) -> Result | None:
    run, start = context.run, time.monotonic()
    folder = run.trial(unit.id)
    candidate = context.candidate(unit)
    write_text(folder / "arch.json", candidate.arch.to_json())
    screens, before = context.epochs(unit.rung) == 0, context.cutter.seconds
    found = _screen(context, unit, candidate) if screens else _train(context, unit, candidate, folder)
    if found is None:
        return None
    zero_shot, after, training = found
    return Result(
        trial=unit.number,
        top1=after.top1,
        zero_shot=zero_shot,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=candidate.arch.hash,
        point=unit.point,
        seconds=time.monotonic() - start,
        key=unit.key,
        rung=unit.rung,
        epochs=sum(context.epochs(rung) for rung in range(unit.rung + 1)),
        latency_ms=candidate.latency_ms,
        has_model=(folder / "model").exists(),
        weights=saved_digest(folder / "model") if (folder / "model").exists() else None,
        training_seconds=training,
        computing_seconds=context.cutter.seconds - before,
        ppl=after.ppl,
        agreement=after.agreement,
        balanced=after.balanced,
        quality=after.quality,
        error=after.error,
        kl=after.kl,
        loss=after.loss,
        images=after.images,
        given=unit.given,
    )


def _screen(context: WorkerContext, unit: Task, candidate: Candidate) -> tuple[float, EvalMetrics, float]:
    found = context.cutter.screened(candidate.decision)
    with _log(context, unit) as log:
        log.event("end", **found.as_dict())
    return context.cutter.accuracy(found), found, 0.0


def _train(
    context: WorkerContext, unit: Task, candidate: Candidate, folder: Path
) -> tuple[float, EvalMetrics, float] | None:
    """Top-1 before any finetuning, figures after it and its seconds, or None where it was asked to stop.

    Training that diverges is a result, too: no number, which counts as worse than all others, and no model.
    """
    model = _start(context, unit, candidate)
    if model is None:
        return None
    zero_shot = _zero_shot(context, unit, model)
    with _log(context, unit) as log:
        log.event("start", resumed=(folder / STATE).exists(), zero_shot=zero_shot)
        begun = time.monotonic()
        try:
            finished = _finetune(context, model, unit, folder, log)
        except Diverged as error:
            log.event("diverged", reason=str(error))
            (folder / ATTEMPT).unlink(missing_ok=True)
            _remove_scratch(folder)
            (folder / STATE).unlink(missing_ok=True)
            ppl, balanced = (None, math.nan) if context.arch.text is None else (math.nan, None)
            own: dict[str, Any] = {name: math.nan for name in OWN if name in context.config.search.objectives}
            nothing = EvalMetrics(math.nan, ppl, math.nan, math.nan, loss=math.nan, balanced=balanced, **own)
            return zero_shot, nothing, time.monotonic() - begun
        seconds = time.monotonic() - begun
        if not finished:
            log.event("stopped")
            return None
        # training has measured by labels, without the source
        after = context.cutter.measured(load(folder / "model").to(next(context.source.parameters()).device))
        log.event("end", **after.as_dict())
    return zero_shot, after, seconds


def _zero_shot(context: WorkerContext, unit: Task, model: nn.Module) -> float:
    """Return the accuracy of a candidate before any training; ``model`` is what its unit starts from."""
    with _needed_by_all():
        below = None if _starts_untrained(context, unit) else context.run.read_result(_below(unit))
    if below is not None and below["state"] == "finished":
        return float(below["result"]["zero_shot"])
    if not _starts_untrained(context, unit):  # the result for which it was promoted was damaged
        model = context.cutter.model(context.candidate(unit).decision)
    return context.cutter.accuracy(context.cutter.measured(model))


def _below(unit: Task) -> str:
    """Name the unit of the same candidate on the rung below."""
    return task_id(unit.number, unit.rung - 1)


def _starts_untrained(context: WorkerContext, unit: Task) -> bool:
    """Whether no rung below has trained the candidate."""
    return unit.rung == 0 or context.epochs(unit.rung - 1) == 0


def _start(context: WorkerContext, unit: Task, candidate: Candidate) -> nn.Module | None:
    """Return the model that a unit starts from: the cut and recovered source, or the model of the rung below.

    If that model is damaged, or was deleted because it was off the front when an earlier search ended, it is trained
    again; None where that was asked to stop. Where training diverged below, it is the cut and recovered source.
    """
    if _starts_untrained(context, unit):
        return context.cutter.model(candidate.decision)
    below = context.run.trial(_below(unit))
    if (below / "model").exists() and not _is_sound(below / "model", _weights(context.run, below.name)):
        set_aside(below / "model")
    if not (below / "model").exists() and not _train(context, context.run.read_task(below.name), candidate, below):
        return None
    if not (below / "model").exists():
        return context.cutter.model(candidate.decision)
    return to_float32(load(below / "model")).to(next(context.source.parameters()).device)


def _weights(run: Run, name: str) -> str | None:
    """The digest of the weights that a task's result is of; None where that is not known."""
    try:
        found = run.read_result(name)
    except UserError:
        return None
    return None if found is None or found["state"] != "finished" else found["result"].get("weights")


def _is_sound(model: Path, weights: str | None = None) -> bool:
    """Whether a saved model is there, holds what was written, and has the weights of a digest if one is given."""
    try:
        check_saved(model, weights=weights)
    except UserError:
        return False
    return True


def _finetune(context: WorkerContext, model: nn.Module, unit: Task, folder: Path, log: MetricsLog) -> bool:
    """Train and save ``model``, here or on workers that bring their own resources; False where it was asked to stop."""
    run, resources = context.run, context.config.resources
    start = folder / START
    placement = Placement(
        resources.workers_per_trial,
        cpus=resources.cpus_per_trial,
        gpus=resources.gpus_per_trial,
    )
    loaded = LoadedJob(model, context.source, context.data) if placement.here else None
    halvings = _lost_for_memory(folder)
    if halvings:
        log.event("note", text="killed for memory before: half as many images at a time as then, in the same batches")
    if loaded is None and not _is_sound(start):
        save(model.cpu(), start)
    if loaded is None:
        log.event("waiting", workers=placement.workers)  # until they tell that they have begun
    job = TrainingJob(
        model=str(start),
        data=context.config.data.name,
        recipe=context.recipe(unit).model_dump(mode="json"),
        teacher=str(run / "source"),
        teacher_cache=str(run.teacher_logits),
        seed=unit.seed,
        data_options=context.config.data.options,
        stop_file=str(run.stop_file),
        halvings=halvings,
    )
    finished = run_job(
        job,
        folder / "model",
        folder,
        data=context.data,
        placement=placement,
        log=log,
        provenance=_provenance(context, unit),
        loaded=loaded,
        name=f"{run.path.name}-{unit.id}-{unit.key}",
        keep_workers=run.workers if context.away is None else context.away.workers,
        elsewhere=None if context.away is None else context.away.unit(folder.name),
        reports=Reports(on_note=lambda text: log.event("note", text=text)),
    )
    (folder / ATTEMPT).unlink(missing_ok=True)
    if finished:
        _remove_scratch(folder)
        (folder / STATE).unlink(missing_ok=True)  # one that was brought here for workers elsewhere
    return finished


def _lost_for_memory(folder: Path) -> int:
    """How often this training's process was killed for memory, as far as it tells by what it noted when it began."""
    file, host, kills, lost = folder / ATTEMPT, socket.gethostname(), memory_kills(), 0
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        before = read_json(file)
        lost = int(before["lost"]) + (before["host"] == host and kills > before["kills"])
    write_text(file, json.dumps({"host": host, "kills": kills, "lost": lost}))
    return lost


def _remove_scratch(folder: Path) -> None:
    """Remove what training on workers of its own needs until it is done."""
    shutil.rmtree(folder / START, ignore_errors=True)


def _provenance(context: WorkerContext, unit: Task) -> dict[str, Any]:
    """Where the weights come from, for ``config.json``."""
    given: dict[str, Any] = {"method": unit.point["method"]}
    if unit.given is not None:
        given = {"method": context.run.made_by(unit.given), "given": unit.given}
    return {
        **given,
        "source": context.facts["source"],
        "scores": context.facts["scores"],
        "data": context.data.info.fingerprint,
        "point": unit.point,
        **({"protect": list(protect)} if (protect := context.config.space.protect) else {}),
        "rung": unit.rung,
        "seed": unit.seed,
        "versions": versions(),
    }


def _log(context: WorkerContext, unit: Task) -> MetricsLog:
    """Lines of a unit's ``metrics.jsonl`` are events, and epochs are also TensorBoard's: one run per candidate."""
    before = sum(context.epochs(rung) for rung in range(unit.rung))
    board = context.run.board(unit.number)
    return MetricsLog(context.run.trial(unit.id) / "metrics.jsonl", board, events=True, before=before)
