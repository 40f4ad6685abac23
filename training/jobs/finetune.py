"""Finetune one saved model, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prunesweep.models import Arch, UserError, arch_of, load, load_provenance, read_arch
from prunesweep.models.io.provenance import digest, versions

from ..compatibility import check_features, check_fits, check_labels, check_order
from ..data import Data, absolute_name, open_data
from ..loop import Epoch
from ..recipe import Recipe
from ..second_stage import SecondStageJob
from ..settling import check_settles, settled
from .metrics_log import MetricsLog
from .placement import Placement
from .run_job import run_job
from .training_job import Inputs, Reports, TrainingJob, load_sized
from .work import FORMAT, Work, model_facts

__all__ = ["Finetuning", "finetune"]


@dataclass(frozen=True)
class Finetuning:
    """A finetuning: folders of saved models, data by name, and a recipe.

    The very same job is resumed from its ``work`` folder; when it is done, the logs there are moved into ``out``.

    Args:
        model: folder of the model to train.
        data: name of the data set, as for ``open_data``.
        recipe: the recipe.
        out: folder of the result.
        teacher: folder of the model that distillation calls the source, if any.
        seed: seed of the training.
        data_options: keyword arguments of ``open_data``.
        second_stage: the pruning method whose own way of finetuning is used, if any.
        work_folder: folder to use as ``work``, for a job that is part of another one.
        teacher_logits: folder to use as ``teacher_cache``, for a job that is part of another one.
        img_size: rows and columns of the images to train at, the teacher too; the model's own by default.
    """

    model: Path
    data: str
    recipe: Recipe
    out: Path
    teacher: Path | None = None
    seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    second_stage: SecondStageJob | None = None
    work_folder: Path | None = None
    teacher_logits: Path | None = None
    img_size: tuple[int, int] | None = None

    def record(self, path: Path) -> Arch:
        """Return the record of the model or of the teacher as it is trained, at ``img_size``.

        Raises:
            UserError: it is for one size, as a model with a token plan is.
        """
        try:
            return read_arch(path) if self.img_size is None else arch_of(load_sized(path, self.img_size))
        except UserError as error:
            raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error

    @cached_property
    def opened(self) -> Data:
        """The data as the model expects them."""
        model = load_sized(self.model, self.img_size)
        return open_data(self.data, model.pretrained_cfg, **self.data_options)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the result depends on, JSON-ready."""
        return {
            "model": model_facts(load(self.model)),
            "teacher": self.teacher and model_facts(load(self.teacher)),
            "data": {"name": absolute_name(self.data), "fingerprint": self.opened.info.fingerprint},
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "second_stage": None if self.second_stage is None else asdict(self.second_stage),
            **({} if self.img_size is None else {"img_size": list(self.img_size)}),
        }

    @property
    def name(self) -> str:
        """The result's name and a hash of everything that it depends on."""
        return f"{self.out.name}-{digest({'format': FORMAT, **self.facts})}"

    @property
    def unfinished(self) -> Work:
        """The work folder, with everything that it depends on."""
        return Work.beside(self.out, self.facts) if self.work_folder is None else Work(self.work_folder, self.facts)

    @property
    def work(self) -> Path:
        """Folder of training state, ``metrics.jsonl`` and TensorBoard logs, beside the result and named by ``name``."""
        return self.unfinished.folder

    @property
    def teacher_cache(self) -> Path:
        """Folder of teachers' logits, which all workers share."""
        return self.teacher_logits or self.work / "teacher_logits"

    def check(self) -> Data:
        """Open the data and check that data, model, teacher and recipe fit together.

        Raises:
            UserError: they do not, or the second stage cannot serve the model.
        """
        data = self.opened
        for what, path in (("model", self.model), ("teacher", self.teacher)):
            if path is None:
                continue
            head = f"timm.create_model('local-dir:{path}', pretrained=True, num_classes={data.info.num_classes})"
            remedy = f"give it a new head with {head} and models.save, or take data of its classes"
            check_fits(self.record(path), data, name=f"{what} {path}", remedy=remedy)
        if self.teacher is not None and self.data_options.get("classes") is None:
            teacher: Any = load(self.teacher)
            check_order(teacher.pretrained_cfg, data, f"teacher {self.teacher}")
        check_settles(self.recipe, source=self.teacher is not None, method=self.second_stage is not None)
        arch, source = self.record(self.model), None if self.teacher is None else self.record(self.teacher)
        recipe = settled(self.recipe, data, arch, source)
        if arch.headless:
            check_features(recipe, f"model {self.model}")
        check_labels(data, recipe)
        if self.second_stage is not None:
            self.second_stage.check(self.model, self.teacher)
        if self.teacher is None and any(term.weight and term.teacher == "source" for term in recipe.distill):
            raise UserError(
                "recipe: a distill term has teacher = 'source', but there is no source model to learn from: give one "
                "(--teacher), or take a recipe without distillation"
            )
        return data

    @property
    def described(self) -> TrainingJob:
        """The job in the JSON-ready form that its workers get."""
        return TrainingJob(
            model=str(self.model),
            data=absolute_name(self.data),  # workers may run in another folder
            recipe=self.recipe.model_dump(mode="json"),
            teacher=None if self.teacher is None else str(self.teacher),
            teacher_cache=str(self.teacher_cache),
            seed=self.seed,
            data_options=dict(self.data_options),
            second_stage=None if self.second_stage is None else asdict(self.second_stage),
            img_size=self.img_size,
        )

    def provenance(self, data: Data) -> dict[str, Any]:
        """Return the metadata for the result's ``config.json``; what the model was cut for stays with it."""
        origin = load_provenance(self.model)
        return {
            **{name: origin[name] for name in ("budget", "spent") if name in origin},
            "method": "finetune",
            "source": str(self.model),
            "teacher": None if self.teacher is None else str(self.teacher),
            "data": data.info.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
            **({} if self.second_stage is None else {"second_stage": asdict(self.second_stage)}),
            **({} if self.img_size is None else {"img_size": list(self.img_size)}),
        }


def finetune(
    job: Finetuning,
    placement: Placement = Placement(),  # noqa: B008 (frozen)
    *,
    inputs: Inputs | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Train a job and publish the result.

    Without Ray, this process may be one of torchrun's.

    Args:
        job: the finetuning.
        placement: where it runs, and on how many workers.
        inputs: as for ``run_job``.
        on_step: called with (updates done, updates in all, loss of this worker).
        on_epoch: called after every epoch's evaluation.
        on_note: called with a line for people.

    Raises:
        UserError: the parts do not fit together, training failed or diverged, or the machine cannot hold the workers.
        Interrupted: Ctrl-C; the message says how to go on.
    """
    data = job.check()
    with job.unfinished.held(), MetricsLog.beside(job.work) as log:
        run_job(
            job.described,
            job.out,
            job.work,
            data=data,
            placement=placement,
            log=log,
            provenance=job.provenance(data),
            name=job.name,
            inputs=inputs,
            reports=Reports(on_step, on_epoch, on_note),
        )
