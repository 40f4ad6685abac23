"""One unit of work: a candidate on one rung. Cut the source, or take the model of the rung below; finetune it; report.

It can be killed and started again at any moment: finetuning goes on from its last whole epoch, and a unit that has a
result returns it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from torch import nn

from prunesweep.models import arch_of, cut, load, load_provenance, save
from prunesweep.models.io.files import disk_full, write_text
from prunesweep.models.io.provenance import versions
from prunesweep.models.recalibrate import recalibrate
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.space.space import Candidate, Space, read_scores
from prunesweep.search.store.run import Result, Run, Unit, read_json, unit_id
from prunesweep.training import EVAL_BATCH, Data, Epoch, Quality, Recipe, evaluate, fit, open_data

__all__ = ["run_unit"]


class Workplace:
    """What every unit of a run needs, loaded once per process: configuration, data, source model and space."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config: SearchConfig = load_config(run / "search.toml")
        source = load(run / "source")
        cfg: Any = source.pretrained_cfg
        self.data: Data = open_data(self.config.data.name, cfg, **self.config.data.options)
        self.source = source.to("cuda" if self.config.resources.gpus_per_trial else "cpu")
        self.facts = run.facts()
        scores = read_scores(run / "scores", self.facts["scores"])
        self.space = Space(self.config.space, arch_of(source), scores)

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, path: Path) -> Workplace:
        """The workplace of a run's folder; the last one is kept, for the next unit in this process."""
        return cls(Run(path))

    def images(self) -> Iterator[Any]:
        """``screen``, loaded only once somebody looks."""
        yield from self.screen

    @cached_property
    def screen(self) -> list[Any]:
        """Images of the training split, for rungs that do not train and for BatchNorm."""
        return self.data.calibration(self.config.search.screen_images, EVAL_BATCH, self.config.seed)

    def evaluate(self, model: nn.Module) -> Quality:
        """Of the validation split."""
        return Quality.of(evaluate(model, self.data.val_loader(EVAL_BATCH)))

    def epochs(self, rung: int) -> int:
        """Epochs of finetuning on a rung."""
        return self.config.search.rungs[rung] if self.config.search.rungs else self.config.finetune.epochs

    def recipe(self, unit: Unit) -> Recipe:
        """The finetuning of a unit: complete in itself, with its own schedule."""
        epochs = self.epochs(unit.rung)
        recipe = self.config.finetune
        terms = [
            term.model_copy(update={"weight": term.weight * unit.point["distill_weight"]}) for term in recipe.distill
        ]
        changes = {
            "lr": unit.point["lr"],
            "epochs": epochs,
            "warmup_epochs": min(recipe.warmup_epochs, max(epochs - 1, 0)),
            "distill": tuple(terms),
        }
        return recipe.model_copy(update=changes)


def run_unit(path: Path, unit: Unit) -> dict[str, Any]:
    """Do a unit of the run at ``path``, or what is left of it.

    Returns what ``result.json`` says, or ``{"state": "stopped"}``, or ``{"state": "disk full"}`` where that kept it
    from ending. Any other exception is the unit's failure: its traceback is the result.
    """
    run = Run(path)
    found = run.read_result(unit.id)
    if found is not None:
        return found
    try:
        result = _work(Workplace.of(path), unit)
        return {"state": "stopped"} if result is None else run.write_result(unit.id, result=result)
    except Exception as error:
        if disk_full(error):  # it is no fault of the unit's, which goes on once there is room
            return {"state": "disk full"}
        return run.write_result(unit.id, error=traceback.format_exc())


def _work(workplace: Workplace, unit: Unit) -> Result | None:
    run, start = workplace.run, time.monotonic()
    folder = run.trial(unit.id)
    candidate = workplace.space.decode(unit.point)
    if candidate.key != unit.key:
        raise RuntimeError(f"the point decodes to {candidate.key}, the driver decoded {unit.key}")
    write_text(folder / "arch.json", candidate.arch.to_json())
    screens = workplace.epochs(unit.rung) == 0
    found = _screen(workplace, unit, candidate) if screens else _train(workplace, unit, candidate, folder)
    if found is None:
        return None
    before, after, training = found
    return Result(
        trial=unit.number,
        top1=after.top1,
        zero_shot=before.top1,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=candidate.arch.hash,
        point=unit.point,
        seconds=time.monotonic() - start,
        key=unit.key,
        rung=unit.rung,
        epochs=sum(workplace.epochs(rung) for rung in range(unit.rung + 1)),
        latency_ms=candidate.latency_ms,
        has_model=not screens,
        training_seconds=training,
        ppl=after.ppl,
    )


def _screen(workplace: Workplace, unit: Unit, candidate: Candidate) -> tuple[Quality, Quality, float]:
    found = Quality.of(evaluate(_cut(workplace, candidate), workplace.screen))
    with _log(workplace.run, unit) as log:
        log("end", **found.facts)
    return found, found, 0.0


def _train(
    workplace: Workplace, unit: Unit, candidate: Candidate, folder: Path
) -> tuple[Quality, Quality, float] | None:
    """Quality before and after finetuning and its seconds, or None where it was asked to stop."""
    model = _start(workplace, unit, candidate)
    before = workplace.evaluate(model)
    state = folder / "state.safetensors"
    workers = workplace.config.resources.workers_per_trial
    with _log(workplace.run, unit) as log:
        log("start", resumed=state.exists(), zero_shot=before.top1)
        train = _finetune if workers == 1 else _finetune_on_workers
        begun = time.monotonic()
        after = train(workplace, model, unit, folder, log)
        seconds = time.monotonic() - begun
        if after is None:
            log("stopped")
            return None
        log("end", **after.facts)
    state.unlink(missing_ok=True)
    return before, after, seconds


def _cut(workplace: Workplace, candidate: Candidate) -> nn.Module:
    """The source, cut; BatchNorms of new convolutions have seen images."""
    model = cut(workplace.source, candidate.decision)
    recalibrate(model, workplace.images())
    return model


def _start(workplace: Workplace, unit: Unit, candidate: Candidate) -> nn.Module:
    """The model that a unit starts from: the cut source, or what the rung below has made of it.

    Where that model is gone, because it was off the front when an earlier search ended, it is made again.
    """
    if unit.rung == 0 or workplace.epochs(unit.rung - 1) == 0:
        return _cut(workplace, candidate)
    below = workplace.run.trial(unit_id(unit.number, unit.rung - 1))
    if not (below / "model").exists():
        _train(workplace, Unit(**read_json(below / "spec.json")), candidate, below)
    return load(below / "model").to(next(workplace.source.parameters()).device)


def _finetune(
    workplace: Workplace, model: nn.Module, unit: Unit, folder: Path, log: Callable[..., None]
) -> Quality | None:
    """Train and save ``model``; its quality, or None where it was asked to stop before the last epoch."""
    last: list[Quality] = []

    def on_epoch(epoch: Epoch) -> None:
        last[:] = [Quality(epoch.top1, epoch.ppl)]
        log("epoch", **asdict(epoch))

    finished = fit(
        model,
        workplace.data,
        workplace.recipe(unit),
        teacher=workplace.source,
        seed=unit.seed,
        state=folder / "state.safetensors",
        teacher_cache=workplace.run.teacher_logits,
        on_epoch=on_epoch,
        should_stop=workplace.run.stop_file.exists,
    )
    if not finished:
        return None
    found = last[0] if last else workplace.evaluate(model)  # no epoch was left to do
    save(model.cpu(), folder / "model", _provenance(workplace, unit, found))
    return found


def _finetune_on_workers(
    workplace: Workplace, model: nn.Module, unit: Unit, folder: Path, log: Callable[..., None]
) -> Quality | None:
    """``_finetune`` by Ray Train, on workers that bring their own resources."""
    from prunesweep.training.ray_train import FinetuneJob, Workers, finetune_on_ray

    run, resources = workplace.run, workplace.config.resources
    start = folder / "start"
    if not start.exists():
        save(model.cpu(), start)
    job = FinetuneJob(
        model=str(start),
        data=workplace.config.data.name,
        recipe=workplace.recipe(unit).model_dump(mode="json"),
        teacher=str(run / "source"),
        teacher_cache=str(run.teacher_logits),
        seed=unit.seed,
        loader_workers=workplace.config.data.loader_workers,
        stop_file=str(run.stop_file),
    )
    finished = finetune_on_ray(
        job,
        Workers(resources.workers_per_trial, resources.cpus_per_trial, resources.gpus_per_trial),
        folder / "model",
        storage=str(folder / "train"),
        name=f"{run.path.name}-{unit.id}-{unit.key}",
        provenance=_provenance(workplace, unit, None),
        on_epoch=lambda epoch: log("epoch", **asdict(epoch)),
    )
    if not finished:
        return None
    for scratch in (start, folder / "train"):
        shutil.rmtree(scratch)
    return Quality.of(load_provenance(folder / "model"))


def _provenance(workplace: Workplace, unit: Unit, found: Quality | None) -> dict[str, Any]:
    """Where the weights come from, for ``config.json``."""
    return {
        "method": unit.point["method"],
        "source": workplace.facts["source"],
        "scores": workplace.facts["scores"],
        "data": workplace.data.info.fingerprint,
        "point": unit.point,
        "rung": unit.rung,
        "seed": unit.seed,
        **({} if found is None else found.facts),
        "versions": versions(),
    }


@contextlib.contextmanager
def _log(run: Run, unit: Unit) -> Iterator[Callable[..., None]]:
    """``log(event, **values)``: a line of ``metrics.jsonl``, and TensorBoard scalars for epochs."""
    board = SummaryWriter(str(run / "tb" / unit.id))
    path = run.trial(unit.id) / "metrics.jsonl"

    def log(event: str, **values: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **values}) + "\n")
        if event == "epoch":
            for name in ("loss", "top1", "lr", "images_per_s"):
                board.add_scalar(name, values[name], values["epoch"])

    try:
        yield log
    finally:
        board.close()
