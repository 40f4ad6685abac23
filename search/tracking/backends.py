"""What a search tells MLflow and Weights & Biases: a run for it, one within for every result, the front as a table.

Both are imported when they are used: neither is needed otherwise (extras ``mlflow`` and ``wandb``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prunesweep.models import UserError
from prunesweep.search.config import LoggingTable
from prunesweep.search.store.run import Result, Run

__all__ = ["Backend", "MLflow", "WandB", "backends", "check_backends"]

EXPERIMENT = "prunesweep"  # MLflow's, of all searches
QUALITIES = ("top1", "balanced", "ppl", "agreement", "quality", "error")
FIGURES = (*QUALITIES, "loss", "kl", "zero_shot", "macs", "params", "latency_ms", "seconds")
DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")  # schemes of stores that are no servers
OFFLINE = ("offline", "disabled", "dryrun")


class Backend(Protocol):
    """One of the tools. Whatever it raises ends its part, and nothing else."""

    name: str

    def open(self) -> None:
        """Begin, or go on with, the run of the search."""

    def result(self, result: Result) -> None:
        """Tell of a result, unless an earlier driver has."""

    def state(self, step: int, values: Mapping[str, float]) -> None:
        """Tell how far the search is, after ``step`` units."""

    def close(self, front: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
        """Leave the front as a table, and end."""


def check_backends(table: LoggingTable) -> None:
    """Check that what ``[logging]`` names can be used here, without reaching for it.

    Raises:
        UserError: a package is missing, or Weights & Biases has no key.
    """
    for name, wanted in (("mlflow", table.mlflow), ("wandb", table.wandb)):
        if wanted is not None and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.{name} = {wanted!r}: the package {name} is not installed where the search's driver runs: "
                f"pip install 'prunesweep[{name}]', or leave the key out"
            )
    if table.wandb is not None and os.environ.get("WANDB_MODE", "online") not in OFFLINE:
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                f"logging.wandb = {table.wandb!r}: no key of Weights & Biases is here: log in with `wandb login`, "
                "set WANDB_API_KEY, or WANDB_MODE=offline"
            )


def backends(table: LoggingTable, run: Run, name: str, settings: Mapping[str, Any]) -> list[Backend]:
    """Return what ``[logging]`` names, not opened yet.

    Args:
        table: the configuration's ``[logging]``.
        run: the search's run.
        name: of the search.
        settings: the configuration.
    """
    found = list[Backend]()
    if table.mlflow is not None:
        found.append(MLflow(table.mlflow, run.path, name, settings))
    if table.wandb is not None:
        found.append(WandB(table.wandb, run.path, name, settings))
    return found


def _identity(path: Path) -> str:
    """A name that follows from a run's folder, by which a resumed search goes on with what it has begun."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]


def figures(result: Result) -> dict[str, float]:
    """The numbers of a result that are known."""
    known = {name: getattr(result, name) for name in FIGURES}
    return {name: float(value) for name, value in known.items() if value is not None}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A table by columns, of those values that are no tables themselves."""
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list)))
    return {name: [row.get(name) for row in rows] for name in names}


class MLflow:
    """Runs of the experiment ``prunesweep``: one of the search, its results below it.

    Args:
        uri: of a tracking server or store.
        path: the run's folder, by which a resumed search finds its MLflow run.
        name: of the search.
        settings: the configuration.
    """

    name = "mlflow"

    def __init__(self, uri: str, path: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._uri, self._path, self._name, self._settings = uri, path, name, settings

    def open(self) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            self._experiment = client.create_experiment(EXPERIMENT, artifact_location=self._artifacts())
        else:
            self._experiment = experiment.experiment_id
        ours = f"tags.`prunesweep.run` = '{_identity(self._path)}'"
        earlier = client.search_runs([self._experiment], f"{ours} and tags.`prunesweep.unit` = ''")
        if earlier:
            self._run = earlier[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            below = self._all(f"tags.`mlflow.parentRunId` = '{self._run}'")
            self._told = {found.data.tags["prunesweep.unit"] for found in below}
            return
        self._told = set[str]()
        self._run = self._create(self._name, "")
        params = [Param(name, value[:500]) for name, value in sorted(flat(self._settings).items())]
        for begin in range(0, len(params), 100):  # as many as a server takes at once
            client.log_batch(self._run, params=params[begin : begin + 100])

    def _artifacts(self) -> str | None:
        """Where files lie: with a database beside the run, as MLflow would take the current folder; else its choice."""
        return (self._path.absolute().parent / "mlruns").as_uri() if self._uri.startswith(DATABASES) else None

    def _all(self, condition: str) -> list[Any]:
        found, page = list[Any](), None
        while True:
            rows = self._client.search_runs([self._experiment], condition, page_token=page)
            found += rows
            page = rows.token
            if not page:
                return found

    def _create(self, name: str, unit: str, **tags: str) -> str:
        own = {"mlflow.runName": name, "prunesweep.run": _identity(self._path), "prunesweep.unit": unit}
        run = self._client.create_run(self._experiment, tags={**own, "prunesweep.folder": str(self._path), **tags})
        return str(run.info.run_id)

    def result(self, result: Result) -> None:
        from mlflow.entities import Metric, Param

        if result.id in self._told:
            return
        run, now = self._create(result.id, result.id, **{"mlflow.parentRunId": self._run}), int(time.time() * 1000)
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, now, result.epochs) for name, value in figures(result).items()],
            params=[Param(name, str(value)) for name, value in {**result.point, "rung": result.rung}.items()],
        )
        self._client.set_terminated(run)
        self._told.add(result.id)

    def state(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, front: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
        if front:
            self._client.log_dict(
                self._run, {"columns": list(table := columns(front)), "data": _rows(table)}, "front.json"
            )
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class WandB:
    """Runs of a project: one of the search, and one of every result in its group.

    Args:
        project: of Weights & Biases.
        path: the run's folder, in which its own files lie.
        name: of the search.
        settings: the configuration.
    """

    name = "wandb"

    def __init__(self, project: str, path: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._project, self._path, self._name, self._settings = project, path, name, settings
        self._id = _identity(path)
        self._group = f"{name}-{self._id[:6]}"

    def _begin(self, kind: str, name: str, unit: str, config: Mapping[str, Any]) -> Any:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
        return wandb.init(
            project=self._project,
            name=name,
            id=f"{self._id}{unit}",
            group=self._group,
            job_type=kind,
            dir=str(self._path),
            config=dict(config),
            resume="allow",
            reinit="create_new",
            settings=quiet,
        )

    def open(self) -> None:
        self._run = self._begin("search", self._name, "", self._settings)

    def result(self, result: Result) -> None:
        run = self._begin("candidate", result.id, f"-{result.id}", {**result.point, "rung": result.rung})
        run.log(figures(result), step=result.epochs)
        run.finish()

    def state(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, front: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
        import wandb

        if front:
            table = columns(front)
            self._run.log({"front": wandb.Table(columns=list(table), data=_rows(table))})
        self._run.finish(exit_code=0 if finished else 1)


def _rows(table: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*table.values(), strict=True)]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as texts by dotted names."""
    found = dict[str, str]()
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return found
