"""Finetuning one model: in this process, as a worker that torchrun started, or on Ray Train."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter

from prunesweep.models import UserError, load, read_arch, save, weights_digest
from prunesweep.models.io.provenance import digest, versions
from prunesweep.pruners.hook import Hook
from prunesweep.training import (
    EVAL_BATCH,
    Data,
    Epoch,
    Quality,
    Recipe,
    World,
    batches_of,
    check_words,
    evaluate,
    fit,
    open_data,
)
from prunesweep.training.second_stage import SecondStageJob

if TYPE_CHECKING:
    from prunesweep.training.ray_train import FinetuneJob

__all__ = ["Finetuning", "Place", "StepRate", "finetune", "logged", "on_ray", "worker_range"]


@dataclass(frozen=True)
class Place:
    """Where training runs: in this process, or on Ray Train's workers where their number or an address is given.

    Args:
        workers: processes that train together; each takes its share of every batch.
        least: go on with as few as that where nodes are lost; the batches stay the same.
        cpus, gpus: of each worker.
        address: of a running Ray cluster, all of whose nodes see the job's folders; a Ray of its own by default.
        storage: path or URI that all nodes can write to; beside the result by default.
    """

    workers: int = 1
    least: int | None = None
    cpus: int = 1
    gpus: float = 0
    address: str | None = None
    storage: str | None = None

    @property
    def here(self) -> bool:
        """Without Ray."""
        return self.workers == 1 and self.least is None and self.address is None


@dataclass(frozen=True)
class Finetuning:
    """One job: folders of saved models, data by name, and a recipe.

    ``work`` is a folder beside the result, named by the job's content: training state, ``metrics.jsonl`` and
    TensorBoard logs. The same job goes on from what is there.
    """

    model: Path
    data: str
    recipe: Recipe
    out: Path
    teacher: Path | None = None
    seed: int = 0
    loader_workers: int = 0
    second_stage: SecondStageJob | None = None

    @cached_property
    def name(self) -> str:
        """The result's name and the hash of everything that it depends on."""
        facts = {"data": self.data, "recipe": self.recipe.model_dump(mode="json"), "seed": self.seed}
        if self.second_stage is not None:
            facts["second_stage"] = asdict(self.second_stage)
        models = {
            "model": weights_digest(load(self.model)),
            "teacher": self.teacher and weights_digest(load(self.teacher)),
        }
        return f"{self.out.name}-{digest({**facts, **models})}"

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.name}"

    @property
    def teacher_cache(self) -> Path:
        """Beside the result too, but for all jobs there: teachers' logits, named by what they follow from."""
        return self.out.parent / ".teacher_logits"

    def check(self) -> Data:
        """Open the data; UserError where they, the model and the teacher do not go together."""
        model: Any = load(self.model)
        data = open_data(self.data, model.pretrained_cfg, loader_workers=self.loader_workers)
        for what, path in (("model", self.model), ("teacher", self.teacher)):
            if path is None:
                continue
            arch = read_arch(path)
            check_words(arch, data)
            if arch.num_classes != data.info.num_classes:
                raise UserError(
                    f"{what} {path} has {arch.num_classes} classes, {data.info.name} has {data.info.num_classes}: give "
                    f"it a new head with timm.create_model('local-dir:{path}', pretrained=True, "
                    f"num_classes={data.info.num_classes}) and models.save, or take data of its classes"
                )
            size = (arch.in_chans, *arch.img_size)
            if size != data.info.input_size:
                raise UserError(f"{what} {path} takes images of {size}, {data.info.name} has {data.info.input_size}")
        if self.second_stage is not None:
            self.second_stage.check(self.model, self.teacher)
        return data

    def provenance(self, data: Data) -> dict[str, Any]:
        """For the result's ``config.json``."""
        return {
            "method": "finetune",
            "source": str(self.model),
            "teacher": None if self.teacher is None else str(self.teacher),
            "data": data.info.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
            **({} if self.second_stage is None else {"second_stage": asdict(self.second_stage)}),
        }


@contextmanager
def logged(work: Path, on_epoch: Callable[[Epoch], None] | None = None) -> Iterator[Callable[[Epoch], None]]:
    """Writes every epoch to ``metrics.jsonl`` and TensorBoard, and then tells ``on_epoch``."""
    work.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(work / "tb")) as board, (work / "metrics.jsonl").open("a", buffering=1) as lines:

        def log(epoch: Epoch) -> None:
            lines.write(json.dumps(asdict(epoch)) + "\n")
            scalars = {name: getattr(epoch, name) for name in ("loss", "top1", "top5", "lr", "images_per_s")}
            scalars |= {} if epoch.ppl is None else {"ppl": epoch.ppl}
            scalars |= {f"facts/{name}": fact for name, fact in epoch.facts.items() if not isinstance(fact, str)}
            for name, value in scalars.items():
                board.add_scalar(name, value, epoch.epoch)
            if on_epoch:
                on_epoch(epoch)

        yield log


class StepRate:
    """How fast training goes: updates of the last ``window`` seconds, without what lies between epochs."""

    def __init__(self, batch_size: int, window: float = 30.0) -> None:
        self.batch_size, self.window = batch_size, window
        self._seen: deque[tuple[float, int]] = deque()

    def step(self, done: int) -> tuple[float, float] | None:
        """Images and updates per second; None until two calls have come since the last epoch's end."""
        now = time.monotonic()
        self._seen.append((now, done))
        while now - self._seen[0][0] > self.window and len(self._seen) > 2:
            self._seen.popleft()
        (before, first), (_, last) = self._seen[0], self._seen[-1]
        if last <= first or now <= before:
            return None
        rate = (last - first) / (now - before)
        return rate * self.batch_size, rate

    def pause(self) -> None:
        """An epoch has ended: what follows is not training."""
        self._seen.clear()


def finetune(
    job: Finetuning,
    place: Place = Place(),
    *,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Train and publish the result. The callables are as for ``fit``.

    Without Ray, this process may be one of torchrun's.

    Raises:
        UserError: the parts do not go together, training failed or diverged, or the machine cannot hold the workers.
    """
    reports: Any = {"on_step": on_step, "on_epoch": on_epoch, "on_note": on_note}
    if place.here:
        _train_here(job, **reports)
        return
    from prunesweep.training.ray_train import FinetuneJob

    data = job.check()
    described = FinetuneJob(
        model=str(job.model),
        data=job.data,
        recipe=job.recipe.model_dump(mode="json"),
        teacher=None if job.teacher is None else str(job.teacher),
        teacher_cache=str(job.teacher_cache),
        seed=job.seed,
        loader_workers=job.loader_workers,
        second_stage=None if job.second_stage is None else asdict(job.second_stage),
    )
    on_ray(described, place, job.out, job.work, data, job.provenance(data), **reports)


def _train_here(
    job: Finetuning,
    *,
    on_step: Callable[[int, int, float], None] | None,
    on_epoch: Callable[[Epoch], None] | None,
    on_note: Callable[[str], None] | None,
) -> None:
    with _process_group() as (world, device):
        data = job.check()
        model: Any = load(job.model).to(device)
        teacher = None if job.teacher is None else load(job.teacher).to(device)
        hook = Hook() if job.second_stage is None else job.second_stage.hook(job.model, job.teacher)
        folder = job.work if world.first else job.work / f"rank{world.rank}"
        with logged(folder, on_epoch if world.first else None) as log:
            fit(
                model,
                data,
                job.recipe,
                teacher=teacher,
                hook=hook,
                seed=job.seed,
                state=job.work / "state.safetensors",
                teacher_cache=job.teacher_cache,
                on_step=on_step if world.first else None,
                on_epoch=log,
                on_note=on_note if world.first else None,
            )
        hook.finish()
        found = evaluate(model, data.val_loader(EVAL_BATCH, world), world)
        if world.first:
            save(model.cpu(), job.out, {**job.provenance(data), **Quality.of(found).facts})
            (job.work / "state.safetensors").unlink(missing_ok=True)


@contextmanager
def _process_group() -> Iterator[tuple[World, torch.device]]:
    """torchrun's process group where it started this process, and the device of this worker."""
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if gpu else "cpu")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(), device
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield World.current(), device
    finally:
        dist.destroy_process_group()


def on_ray(
    job: FinetuneJob,
    place: Place,
    out: Path,
    work: Path,
    data: Data,
    provenance: Mapping[str, Any],
    *,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Train on Ray Train's workers and publish the result.

    Args:
        job: what is trained; its folders are paths that every node can read.
        place: the workers.
        out: folder of the result.
        work: folder of logs; its name, but for a leading dot, is the run's.
        data: what is trained on.
        provenance: for the result's ``config.json``.
        on_step, on_epoch, on_note: as for ``finetune_on_ray``.

    Raises:
        UserError: a batch cannot be shared among the workers, training failed, or Ray cannot hold them.
    """
    from prunesweep.search.execution.runtime import connected
    from prunesweep.training.ray_train import TrainingFailed, Workers, finetune_on_ray

    recipe = Recipe.model_validate(job.recipe)
    for number in range(place.least or place.workers, place.workers + 1):
        batches_of(data, recipe, World(0, number))
    needed = place.workers if place.least is None or place.address is None else place.least
    with (
        logged(work, on_epoch) as log,
        connected(place.address, cpus=needed * place.cpus, gpus=needed * place.gpus),
    ):
        try:
            finetune_on_ray(
                job,
                Workers(place.workers, place.cpus, place.gpus, place.least),
                out,
                storage=place.storage or str(work / "ray"),
                name=work.name.removeprefix("."),
                provenance=provenance,
                on_step=on_step,
                on_epoch=log,
                on_note=on_note,
            )
        except TrainingFailed as error:
            raise UserError(f"training failed: {error}") from error


def worker_range(given: str) -> tuple[int, int]:
    """Least and most workers of ``N`` or ``MIN-MAX``. Raises UserError for anything else."""
    low, dash, high = given.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
        raise UserError(f"--workers {given}: must be a number from 1 on, or a range such as 2-4")
    return int(low), int(high or low)
