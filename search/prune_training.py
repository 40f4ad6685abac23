"""A method that decides while it trains, once: from a source to cut, and finetuned, models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunesweep.models import Cost, arch_of, cost, load_provenance, read_arch, save, weights_digest
from prunesweep.models.io.provenance import digest, versions
from prunesweep.pruners import TrainedMethod, get_method
from prunesweep.training import Data, Epoch, Recipe, open_data
from prunesweep.training.prune import PruneJob, prune_while_training

from .finetune import Place, logged, on_ray
from .prune import to_device
from .scoring import Calibration

if TYPE_CHECKING:
    from prunesweep.training.ray_train import FinetuneJob

__all__ = ["Candidate", "TrainedPruning"]


@dataclass(frozen=True)
class Candidate:
    """A model that was saved: for which budget, its exact cost, and top-1 in percent without finetuning."""

    budget: float
    folder: Path
    cost: Cost
    top1: float


@dataclass(frozen=True)
class TrainedPruning:
    """One run of a method that decides while it trains.

    ``work`` is a folder beside ``out``, named by the run's content: training state and logs. The same run goes on from
    what is there.

    Args:
        model: the source, ours or one that ``Arch.from_timm`` accepts; also the teacher. It is not changed.
        data_name: as for ``training.open_data``.
        method: its name in ``pruners.METHODS``.
        budgets: shares of the source's MACs.
        recipe: the training during which the method decides.
        out: folder of the result; of several, each in a folder of its own inside, named by its budget.
        options: the method's settings, but for the budgets.
        calibration: images that BatchNorms of new convolutions are estimated on.
        seed: of training.
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
    loader_workers: int = 0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the run depends on, JSON-ready."""
        return {
            "method": self.method,
            "source": {"name": arch_of(self.model).source, "weights": weights_digest(self.model)},
            "data": self.data_name,
            "budgets": sorted(self.budgets, reverse=True),
            "settings": dict(self.options),
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
        }

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}-{digest(self.facts)}"

    def run(
        self,
        place: Place = Place(),  # noqa: B008 (frozen)
        *,
        on_step: Callable[[int, int, float], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> list[Candidate]:
        """Train, decide, cut and save. The callables are as for ``fit``.

        Raises:
            UserError: a setting does not fit, the budget cannot be met, the search collapsed, or training failed.
        """
        data = self._open()
        facts = {**self.facts, "data": data.info.fingerprint, "versions": versions()}
        reports: Any = {"on_step": on_step, "on_note": on_note}
        if place.here:
            state = self.work / "state.safetensors"
            with logged(self.work, on_epoch) as log:
                made = prune_while_training(
                    to_device(self.model),
                    data,
                    self.recipe,
                    self._job,
                    seed=self.seed,
                    state=state,
                    on_epoch=log,
                    **reports,
                )
            assert made is not None, "nothing asked it to stop"
            for one in made:
                save(one.model.cpu(), self._folder(one.budget), {**facts, **one.facts})
            state.unlink(missing_ok=True)
        else:
            on_ray(self._described(), place, self.out, self.work, data, facts, on_epoch=on_epoch, **reports)
        return self.candidates()

    def _described(self) -> FinetuneJob:
        """For Ray Train's workers, who find the source in a folder."""
        from prunesweep.training.ray_train import FinetuneJob

        source = self.work / "source"
        if not source.exists():
            save(self.model.cpu(), source)
        return FinetuneJob(
            model=str(source),
            data=self.data_name,
            recipe=self.recipe.model_dump(mode="json"),
            teacher_cache=str(self.out.parent / ".teacher_logits"),
            seed=self.seed,
            loader_workers=self.loader_workers,
            prune=asdict(self._job),
        )

    def candidates(self) -> list[Candidate]:
        """What this run has saved, the largest budget first; of several budgets not all need have been reached."""
        folders = [self._folder(budget) for budget in sorted(set(self.budgets), reverse=True)]
        found = [(folder, load_provenance(folder)) for folder in folders if (folder / "config.json").is_file()]
        return [Candidate(f["budget"], folder, cost(read_arch(folder)), f["top1"]) for folder, f in found]

    def _folder(self, budget: float) -> Path:
        return self.out / f"{budget:.4g}" if len(set(self.budgets)) > 1 else self.out

    def _open(self) -> Data:
        """The data. Raises UserError where the settings, the source or the data do not go together."""
        method, arch = get_method(self.method, TrainedMethod), arch_of(self.model)
        settings = method.for_budgets(self.budgets, self.options)
        method.hook(settings, arch).wrap(copy.deepcopy(self.model))
        return open_data(self.data_name, self.model.pretrained_cfg, loader_workers=self.loader_workers)  # type: ignore[arg-type]

    @property
    def _job(self) -> PruneJob:
        settings = get_method(self.method, TrainedMethod).for_budgets(self.budgets, self.options)
        return PruneJob(self.method, settings.model_dump(mode="json"), **asdict(self.calibration))
