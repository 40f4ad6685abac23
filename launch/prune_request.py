"""The parsed options of ``prunesweep prune``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from prunesweep.models import LatencyTable, UserError, arch_of
from prunesweep.models.errors import nearest
from prunesweep.pruners import MACS, PARAMS, Measure, Method, ScoredMethod, Scores, TrainedMethod, WidthMethod, latency
from prunesweep.pruners.subspaces import can_recover
from prunesweep.search.config import read_overrides
from prunesweep.search.report.display import Display
from prunesweep.training import Data, absolute_name, check_features, check_labels, load_recipe, open_fitting
from prunesweep.training.jobs.one_shot import Budget, check_source, open_source
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.recovery import Recovery
from prunesweep.training.jobs.scoring import Calibration, given_scores
from prunesweep.training.jobs.work import Work, model_facts
from prunesweep.training.second_stage import SecondStageJob
from prunesweep.training.settling import settled

__all__ = ["STAGE", "Request"]

STAGE = "second_stage"  # prefix of --set for settings of a method's own finetuning


@dataclass(frozen=True)
class Request:
    """The parsed options of the command."""

    source: str
    method: Method
    data: str
    data_options: Mapping[str, Any]
    out: Path | None
    budgets: Sequence[float]
    keep_rate: float | None
    r: int | None
    measure: str
    table: Path | None
    drop: int
    groups: Mapping[str, int]
    floors: Mapping[str, float]
    protect: Sequence[str]
    scores: Path | None
    settings: Sequence[str]
    recipe: str | None
    finetune: str | None
    second_stage: bool
    calibration: Calibration
    recover: bool | None
    recover_images: int
    project: bool
    cache: Path
    seed: int
    placement: Placement
    as_json: bool
    console: Console

    def model(self) -> Any:
        """Open the source, once its record says that the method serves it: weights may have to be fetched.

        Raises:
            UserError: the method does not serve its family, or as for ``open_source``.
        """
        self.method.check(check_source(self.source))
        return open_source(self.source)

    def budget(self, model: Any) -> Budget:
        """Return the only budget, in its measure.

        Args:
            model: the source; a latency table is read for its architecture.

        Raises:
            UserError: there are several budgets.
        """
        if len(self.budgets) > 1:
            raise UserError(f"--budget: method {self.method.name!r} serves one in a run, got {len(self.budgets)}")
        measures: dict[str, Measure] = {"macs": MACS, "params": PARAMS}
        if self.table is not None:
            measures["latency_ms"] = latency(LatencyTable.load(self.table), arch_of(model))
        return Budget(self.budgets[0], measures[self.measure])

    def given(self, model: Any, options: Mapping[str, Any]) -> Scores | None:
        """Return the scores of ``--scores``; None without it.

        Args:
            model: the source, opened.
            options: settings of the method.

        Raises:
            UserError: as for ``given_scores``.
        """
        if self.scores is None:
            return None
        assert isinstance(self.method, ScoredMethod)
        return given_scores(self.scores, model, self.method.name, self.method.split(options)[0])

    def recovery(self, model: Any) -> Recovery | None:
        """Return how a cut of the source is recovered, None where that is not wanted.

        Args:
            model: the source, opened.

        Raises:
            UserError: ``--recover`` or ``--project`` is given, and this source cannot be recovered; or ``--project``
                or a method that needs it comes with ``--no-recover``.
        """
        projected = isinstance(self.method, WidthMethod) and self.method.projected
        asked = f"--method {self.method.name}" if projected else "--project" if self.project else "--recover"
        if self.recover is False:
            if self.project or projected:
                raise UserError(f"{asked}: projects, which is a way to recover, so it does not go with --no-recover")
            return None
        if (self.recover or self.project or projected) and (reason := can_recover(arch_of(model))):
            raise UserError(f"{asked}: {reason}")
        return Recovery(self.recover_images, self.calibration.seed, self.project or projected)

    def opened(self, model: Any) -> Data:
        """Open the data, check that the source and the recipe of finetuning fit them, and say what they are.

        Args:
            model: the source, opened.

        Raises:
            UserError: they are not there, or do not fit.
        """
        data = open_fitting(self.data, model, **self.data_options)
        Display(self.console).data(data.describe())
        if self.after != "none" and not isinstance(self.method, TrainedMethod):  # those train on labels in any case
            arch = arch_of(model)
            recipe = settled(load_recipe(self.after, self.options()[2]), data, arch, arch)
            if arch.headless:
                check_features(recipe, arch.source)
            check_labels(data, recipe)
        return data

    @property
    def folder(self) -> Path:
        """Absolute path of the result."""
        assert self.out is not None
        return self.out.absolute()

    def options(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the settings of the method, the fields of ``recipe`` and those of ``finetune`` that ``--set`` gives.

        Raises:
            UserError: ``recipe`` or ``finetune`` is set to a value instead of fields.
        """
        found = read_overrides(self.settings)
        found.pop(STAGE, None)
        tables = [found.pop(name, {}) for name in ("recipe", "finetune")]
        for name, table in zip(("recipe", "finetune"), tables, strict=True):
            if not isinstance(table, dict):
                raise UserError(f"--set {name}={table}: give --{name} {table}, or fields: --set {name}.epochs=3")
        return found, *tables

    @property
    def stage(self) -> SecondStageJob | None:
        """The method's own way of finetuning if ``--second-stage`` is given, otherwise None."""
        table = read_overrides(self.settings).get(STAGE, {})
        if not isinstance(table, dict) or (table and not self.second_stage):
            raise UserError(f"--set {STAGE}...: these settings go with --second-stage, as {STAGE}.NAME=VALUE")
        return SecondStageJob(self.method.name, table) if self.second_stage else None

    def work(self, model: Any, fingerprint: str) -> Work:
        """The hidden folder of what the command has not finished, found by all that its result depends on.

        Args:
            model: the source, opened.
            fingerprint: of the data.
        """
        _, recipe, finetune = self.options()
        facts = {
            "command": "prune",
            "method": self.method.name,
            "source": {"name": arch_of(model).source, **model_facts(model)},
            "data": {"name": absolute_name(self.data), "fingerprint": fingerprint},
            "budgets": list(self.budgets),
            "keep_rate": self.keep_rate,
            "measure": self.measure,
            "table": self.table and hashlib.sha256(self.table.read_bytes()).hexdigest(),
            "drop": self.drop,
            "groups": dict(self.groups),
            "floors": dict(self.floors),
            **({"protect": list(self.protect)} if self.protect else {}),
            **({} if self.scores is None else {"scores": hashlib.sha256(self.scores.read_bytes()).hexdigest()}),
            "settings": list(self.settings),
            "recipe": None if self.deciding is None else _recipe(self.deciding, recipe),
            "finetune": None if self.after == "none" else _recipe(self.after, finetune),
            "second_stage": self.second_stage,
            "calibration": asdict(self.calibration),
            "recovery": [self.recover is not False, self.recover_images, self.project],
            "seed": self.seed,
        }
        return Work.beside(self.folder, facts)

    def check_names(self) -> None:
        """Check the recipes, their fields and the method's settings by their names, before anything is opened.

        Raises:
            UserError: one of them is unknown or not allowed, or fields are set of a training that does not happen.
        """
        settings, recipe, finetune = self.options()
        known = self.method.option_names
        for name in settings:
            if name not in known:
                hint = nearest(name, known)
                raise UserError(f"method {self.method.name!r}: unknown setting {name!r}. {hint}".rstrip())
        if self.deciding is not None:
            load_recipe(self.deciding, recipe)
        if self.after != "none":
            load_recipe(self.after, finetune)
        elif finetune:
            fields = ", ".join(f"finetune.{name}" for name in finetune)
            raise UserError(f"--set {fields}: nothing is finetuned; give a recipe, for example --finetune quick")

    @property
    def deciding(self) -> str | None:
        """Name of the recipe of the training in which the method decides; None where it decides without."""
        return self.recipe or self.method.recipe if isinstance(self.method, TrainedMethod) else None

    @property
    def after(self) -> str:
        """Name of the recipe of finetuning, or none."""
        return self.finetune or self.method.finetune or "none"

    def check_stage(self) -> None:
        """Raise UserError if a setting of the second stage is not allowed, or nothing is finetuned."""
        stage = self.stage
        if stage is None:
            return
        stage.configure()
        if self.after == "none":
            raise UserError(f"--second-stage: is finetuning; give a recipe, for example --finetune {self.method.name}")


def _recipe(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return load_recipe(name, fields).model_dump(mode="json")
