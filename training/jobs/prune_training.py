"""Prune a model by a method that decides while it trains, from the source to saved models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from prunesweep.models import (
    Cost,
    arch_of,
    cost,
    load_provenance,
    preprocessing_of,
    read_arch,
    save,
    weights_digest,
)
from prunesweep.models.io.provenance import digest, versions
from prunesweep.models.precision import in_float32
from prunesweep.pruners import TrainedMethod, get_method

from ..data import Data, absolute_name, open_data
from ..loop import Epoch
from ..recipe import Recipe
from .metrics_log import MetricsLog
from .one_shot import to_device
from .placement import Placement
from .prune_loop import PruneJob, check_decides
from .run_job import run_job
from .scoring import Calibration
from .training_job import LoadedJob, Reports, TrainingJob
from .work import FORMAT, Work, model_facts

__all__ = ["SavedModel", "TrainedPruning"]


@dataclass(frozen=True)
class SavedModel:
    """A saved model: its budget, its exact cost, its top-1 in percent without finetuning, and ``pruners.spent``."""

    budget: float
    folder: Path
    cost: Cost
    top1: float
    spent: Mapping[str, Any]


@dataclass(frozen=True)
class TrainedPruning:
    """One run of a method that decides while it trains.

    The very same run is resumed from its ``work`` folder; when it is done, the logs there are moved into ``out``.

    Args:
        model: the source, one of ours or one that ``Arch.from_timm`` accepts; also the teacher. It is not changed.
        data_name: name of the data set, as for ``training.open_data``.
        method: the method's name in ``pruners.METHODS``.
        budgets: shares of the source's MACs.
        recipe: the training during which the method decides.
        out: folder of the result. Several budgets give several results, each in a folder inside, named by its budget.
        options: the method's settings, except for the budgets.
        calibration: images that BatchNorms of new convolutions are estimated on.
        seed: seed of the training.
        data_options: keyword arguments of ``open_data``.
        work_folder: folder to use as ``work``, for a run that is part of another job.
    """

    model: nn.Module
    data_name: str
    method: str
    budgets: Sequence[float]
    recipe: Recipe
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = Calibration()  # noqa: RUF009 (frozen)
    seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    work_folder: Path | None = None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Everything that the run depends on, JSON-ready."""
        return {
            "method": self.method,
            "source": {"name": arch_of(self.model).source, "weights": weights_digest(self.model)},
            "data": self.data_name,
            "budgets": sorted(self.budgets, reverse=True),
            "settings": dict(self.options),
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
        }

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the result depends on, JSON-ready."""
        return {
            **self.metadata,
            "source": {"name": arch_of(self.model).source, **model_facts(self.model)},
            "data": {"name": absolute_name(self.data_name), "fingerprint": self.opened.info.fingerprint},
            "calibration": asdict(self.calibration),
        }

    @cached_property
    def opened(self) -> Data:
        """The data as the source expects them."""
        return open_data(self.data_name, preprocessing_of(self.model), **self.data_options)

    @property
    def unfinished(self) -> Work:
        """The folder of the work, with what it depends on."""
        return Work.beside(self.out, self.facts) if self.work_folder is None else Work(self.work_folder, self.facts)

    @property
    def work(self) -> Path:
        """Folder of training state and logs, beside ``out`` and named by the hash of ``metadata``."""
        return self.unfinished.folder

    def run(
        self,
        placement: Placement = Placement(),  # noqa: B008 (frozen)
        *,
        on_step: Callable[[int, int, float], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> list[SavedModel]:
        """Train, decide, cut and save.

        Args:
            placement: where training runs, and on how many workers.
            on_step: called with (updates done, updates in all, loss of this worker).
            on_epoch: called after every epoch's evaluation.
            on_note: called with a line for people.

        Returns:
            The saved models, the one with the largest budget first.

        Raises:
            UserError: a setting does not fit, the budget cannot be met, the search collapsed, or training failed.
            Interrupted: Ctrl-C; the message says how to go on.
        """
        data = self.check()
        loaded = LoadedJob(to_device(in_float32(self.model)), None, data) if placement.here else None
        with self.unfinished.held(), MetricsLog.beside(self.work) as log:
            if loaded is None and not self._source.exists():
                save(self.model.cpu(), self._source)
            run_job(
                self.described(placement),
                self.out,
                self.work,
                data=data,
                placement=placement,
                log=log,
                provenance={**self.metadata, "data": data.info.fingerprint, "versions": versions()},
                loaded=loaded,
                name=f"{self.out.name}-{digest({'format': FORMAT, **self.facts})}",
                reports=Reports(on_step, on_epoch, on_note),
            )
        return self.saved_models()

    @property
    def _source(self) -> Path:
        """Folder where Ray Train's workers find the source."""
        return self.work / "source"

    def described(self, placement: Placement) -> TrainingJob:
        """Return the run in the JSON-ready form that its workers get."""
        return TrainingJob(
            model=str(self._source),
            data=absolute_name(self.data_name),  # workers may run in another folder
            recipe=self.recipe.model_dump(mode="json"),
            teacher_cache=None if placement.here else str(self.work / "teacher_logits"),
            seed=self.seed,
            data_options=dict(self.data_options),
            prune=asdict(self._job),
        )

    def saved_models(self) -> list[SavedModel]:
        """Return the models saved so far, the largest budget first; a budget that was not reached has none."""
        folders = [self._folder(budget) for budget in sorted(set(self.budgets), reverse=True)]
        found = [(folder, load_provenance(folder)) for folder in folders if (folder / "config.json").is_file()]
        return [
            SavedModel(f["budget"], folder, cost(read_arch(folder)), f["top1"], f.get("spent", {}))
            for folder, f in found
        ]

    def _folder(self, budget: float) -> Path:
        return self.out / f"{budget:.4g}" if len(set(self.budgets)) > 1 else self.out

    def check(self) -> Data:
        """Open the data. Raises UserError if the settings, the source or the data do not fit together."""
        settings = get_method(self.method, TrainedMethod).for_budgets(self.budgets, self.options)
        check_decides(self.model, self.opened, self.recipe, self.method, settings)
        return self.opened

    @property
    def _job(self) -> PruneJob:
        settings = get_method(self.method, TrainedMethod).for_budgets(self.budgets, self.options)
        return PruneJob(self.method, settings.model_dump(mode="json"), **asdict(self.calibration))
