"""A method that decides while it trains, once: from a source to cut, and finetuned, models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from models import Cost, UserError, arch_of, cost, cut, save, weights_digest
from models.recalibrate import recalibrate
from pruners.trained import Decided, trained_pruner
from training import EVAL_BATCH, Data, Epoch, Recipe, evaluate, fit, open_data

from .finetune import logged
from .provenance import digest, versions
from .prune import to_device
from .scoring import Calibration

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
    """One run of a method of ``pruners.trained.TRAINED``.

    ``work`` is a folder beside ``out``, named by the run's content: training state and logs. The same run goes on from
    what is there.

    Args:
        model: the source, ours or one that ``Arch.from_timm`` accepts; also the teacher. It is not changed.
        data_name: as for ``training.open_data``.
        method: a name in ``TRAINED``.
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
        *,
        on_step: Callable[[int, int, float], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> list[Candidate]:
        """Train, decide, cut and save.

        Raises:
            UserError: a setting does not fit, the budget cannot be met, or the search collapsed or diverged.
        """
        method, arch = trained_pruner(self.method), arch_of(self.model)
        settings = method.configure(self.method, self.budgets, self.options)
        source = to_device(self.model)
        model = copy.deepcopy(source)
        data = open_data(self.data_name, source.pretrained_cfg, loader_workers=self.loader_workers)  # type: ignore[arg-type]
        hook = method.make(settings, arch)
        state = self.work / "state.safetensors"
        with logged(self.work) as log:

            def report(epoch: Epoch) -> None:
                log(epoch)
                if on_epoch:
                    on_epoch(epoch)

            fit(
                model,
                data,
                self.recipe,
                teacher=source,
                hook=hook,
                seed=self.seed,
                state=state,
                on_step=on_step,
                on_epoch=report,
                on_note=on_note,
            )
        decided = method.decided(settings, arch, hook.finish())
        if not decided:
            raise UserError(
                f"method {self.method!r}: no budget of {list(self.budgets)} was reached in {self.recipe.epochs} "
                "epochs; train longer or raise the budget"
            )
        found = [self._save(one, source, data, len(self.budgets) > 1) for one in decided]
        state.unlink(missing_ok=True)
        return found

    def _save(self, one: Decided, source: nn.Module, data: Data, several: bool) -> Candidate:
        model = one.model
        if model is None:
            model = cut(source, one.cut)
            own = self.calibration
            recalibrate(model, data.calibration(own.images, own.batch_size, own.seed))
        model = to_device(model)
        top1 = evaluate(model, data.val_loader(EVAL_BATCH))["top1"]
        folder = self.out / f"{one.budget:.4g}" if several else self.out
        facts = {**self.facts, "data": data.info.fingerprint, "budget": one.budget, "versions": versions()}
        save(model.cpu(), folder, {**facts, "top1": top1})
        return Candidate(one.budget, folder, cost(arch_of(model)), top1)
