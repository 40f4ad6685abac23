"""A run's folder: what is where, who may write, and what its trials have given.

    search.toml      the resolved configuration
    run.json         facts fixed when the run was made: the source's accuracy and cost, the scores in use
    source/          the source model          scores/    cached scores
    given/           saved models and decisions that the search started from
    teacher_logits/, latency_table.json        where the search uses them
    front/01, ...    links to the models of the front's members, ascending in cost
    study.journal    Optuna's journal, or study.json where the study is in a database
    front.json, report.html, tb/
    advice.json, speed.json                    once the search has ended
    workers/         of trials of several workers, while the search runs
    trials/r0-0007/  spec.json, cut.json, arch.json, metrics.jsonl, begun and state.safetensors (in flight), model/,
                     result.json, validation.json, test.json (of members of the front, once the search has ended)

The files are the truth: a unit of work is finished exactly when its ``result.json`` is there. ``r0-0007`` is trial 7
on rung 0; a trial that was promoted has a folder on every rung that it reached, and its ``cut.json`` on rung 0 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from prunesweep.models import UserError
from prunesweep.models.io import reading
from prunesweep.models.io.files import disk_full, sync, write_text
from prunesweep.models.io.folder import check_files, load_provenance
from prunesweep.models.io.lock import Lock, Lost
from prunesweep.models.io.objects import is_url, url_of
from prunesweep.models.io.provenance import digest
from prunesweep.training import EvalMetrics, quality_name
from prunesweep.training.jobs.proposal import Proposal, is_proposal

from .front import COSTS, OBJECTIVES, TWO, RankBy, Ranking, hypervolume, latest
from .mirror import belongs_to
from .progress import BEGUN, REDUCTION_FACTOR, progress
from .records import (
    FOLDER,
    FORMAT,
    Ending,
    Result,
    RunFacts,
    Speed,
    Speeds,
    Task,
    Validation,
    place_of,
    read_json,
    read_sealed,
    sealed,
    task_id,
)

if TYPE_CHECKING:
    from prunesweep.models import Cut

__all__ = [
    "Outcomes",
    "Result",
    "Run",
    "Task",
    "failure_reasons",
    "place_of",
    "read_json",
    "reason_of",
    "set_aside",
    "task_id",
]

MAIN = ("search.toml", "run.json")  # one of them says that a folder is a run
PLACE = re.compile(r"\d{2,}")  # of a member in ``front/``
MODULES = re.compile(r"(?:\w+\.)+(?=\w+(?:: |$))")  # before an exception's name
LATER = ("balanced", "weights", "quality", "error")  # fields of results that earlier versions did not have
SHOWN = 4  # names of tasks that failed, or were damaged, by one reason


def _facts(result: Result) -> dict[str, Any]:
    """A result's fields, without one that results of earlier versions lack, so that their digests stay."""
    return {name: value for name, value in vars(result).items() if name not in LATER or value is not None}


def _run_near(path: Path) -> str:
    """Say which run a path is in, or which runs are in it; otherwise what makes one."""
    if inside := sorted(one for one in path.glob("*") if Run.is_one(one)):
        return f"Runs in it: {', '.join(map(str, inside[:SHOWN]))}{', ...' if len(inside) > SHOWN else ''}"
    if around := [one for one in path.parents if Run.is_one(one)]:
        return f"It is in the run {around[0]}"
    return "A run is made by 'prunesweep search'"


def _digest(result: Result) -> str:
    return digest(_facts(result))


class Run:
    """Paths and files of one run; creates nothing by itself.

    Args:
        path: its folder.
        fence: called before the files that others read are written; raises Lost where another process has taken over.
    """

    def __init__(self, path: str | Path, fence: Callable[[], object] = lambda: None) -> None:
        self.path, self.fence = Path(path).absolute(), fence

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def existing(cls, path: str | Path) -> Run:
        """Raises UserError where ``path`` is not a run. One of its two main files may be lost."""
        if is_url(path):
            raise UserError(
                f"{url_of(path)} is on an object store: 'prunesweep fetch {url_of(path)}' brings it to a folder, and "
                "that is what this takes"
            )
        run = cls(path)
        if not cls.is_one(run.path):
            if (run / "front.json").is_file():
                raise UserError(
                    f"{path} is no run, but a front of 'prunesweep instant': 'prunesweep front {path}' shows it, and "
                    "'prunesweep verify' checks it; its report.html is there already"
                )
            raise UserError(f"{path} is not a run: {' and '.join(MAIN)} are missing. {_run_near(Path(path))}")
        return run

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder is a run's: one of its two main files is there."""
        return any((path / name).is_file() for name in MAIN)

    @property
    def shown(self) -> str:
        """The run as a user would type it: its URL, or its folder, relative where it lies below the current one."""
        if (url := belongs_to(self.path)) is not None:
            return url
        try:
            here = Path.cwd()
        except FileNotFoundError:  # it was removed, as Ray does with a job's where nodes share a temporary folder
            return str(self.path)
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    @property
    def latency_table(self) -> Path:
        """The run's own copy of ``space.latency_table``."""
        return self.path / "latency_table.json"

    @property
    def teacher_logits(self) -> Path:
        """Made before the first trial where the recipe asks for them: one computation, however many units wait."""
        return self.path / "teacher_logits"

    def trial(self, task_id: str) -> Path:
        return self.path / "trials" / task_id

    def board(self, number: int) -> Path:
        """TensorBoard's folder of a candidate, whose rungs follow each other in it."""
        return self.path / "tb" / f"trial-{number:04d}"

    @property
    def leases(self) -> Path:
        """Of the drivers that have worked on the run; see ``lock``."""
        return self.path / ".leases"

    def lock(self, on_lost: Callable[[Lost], object] | None = None) -> Lock:
        """The right to write to the run: one driver at a time, across hosts that share the folder."""
        return Lock(self.leases, self.shown, keep=True, on_lost=on_lost)

    @property
    def workers(self) -> Path:
        """Folder of what Ray Train keeps while trials of several workers are trained."""
        return self / "workers"

    @property
    def stop_file(self) -> Path:
        """Units look for it after every epoch; where it is, they save their state and end."""
        return self.path / ".stop"

    def metadata(self) -> dict[str, Any]:
        """``run.json``. Raises UserError where it is damaged, or of a later version."""
        path = self / "run.json"
        try:
            facts = self.read(path, RunFacts)
        except UserError as error:
            raise self.unusable(error) from error
        if facts.get("format", 0) > FORMAT:
            raise UserError(
                f"{path}: format = {facts['format']}: a later version of prunesweep made the run, use that one; "
                f"this one reads formats up to {FORMAT}"
            )
        return facts

    def known_facts(self) -> dict[str, Any]:
        """``run.json`` for commands that only show; where it is damaged, what the source's folder knows, and a warning.

        Raises:
            UserError: it is damaged and the source does not know its own figures, or it is of a later version.
        """
        try:
            self.read(self / "run.json", RunFacts)
        except UserError as error:
            # torch, which commands that only show do without
            from prunesweep.models import LatencyTable, cost, read_arch

            try:
                arch, told = read_arch(self / "source"), load_provenance(self / "source")
                figures = EvalMetrics.of(told).as_dict()
                searched = EvalMetrics.of(told.get("search", {})).as_dict()
                if not figures:
                    raise UserError("the source's folder has no figures of it")
                if "agreement" in self.objectives:  # of the source with itself
                    figures["agreement"] = searched["agreement"] = 100.0
                predicted = LatencyTable.load(self.latency_table).predict(arch) if self.latency_table.exists() else None
            except UserError:
                raise self.unusable(error) from error
            warnings.warn(f"{error}; what is shown of the source is from {self / 'source'}", stacklevel=1)
            spent = cost(arch)
            costs: dict[str, float] = {"macs": spent.macs, "params": spent.params}
            costs |= {} if predicted is None else {"latency_ms": predicted}
            source = {"name": arch.source, **figures, "search": searched, **costs}
            return {"source": source, "scores": {}, "versions": told.get("versions", {}), "settings": {}}
        return self.metadata()

    def read(self, path: Path, form: type) -> dict[str, Any]:
        """Read a file that ``sealed`` wrote; one without a digest is believed in a run of before format 1.

        Raises:
            UserError: it is damaged; the message names the field if one is wrong.
        """
        return read_sealed(path, form, unsealed=self._unsealed)

    @cached_property
    def _unsealed(self) -> str | None:
        """What is said of a file without a digest; None where every file must have one."""
        with contextlib.suppress(UserError):
            if read_json(self / "run.json").get("format"):
                return None
        return f"{self.shown}: an earlier version made it, without digests of some files: they are believed as they are"

    def unusable(self, reason: object) -> UserError:
        """The error of a run whose ``run.json`` cannot be used, with what can be done."""
        return UserError(
            f"{reason}\nResults and models in {self / 'trials'} do not need it: 'prunesweep eval' takes each "
            f"trials/*/model. All else does: 'prunesweep resume {self.shown}' writes it again where source/, scores/ "
            "and search.toml are whole; else put the file back from a copy of the run, or start a new search"
        )

    def _trial_files(self, name: str) -> Iterator[Path]:
        return iter(sorted((self.path / "trials").glob(f"*/{name}")))

    def outcomes(self) -> Outcomes:
        """What all tasks that have ended gave, and which of their files cannot be read."""
        results, failures, damaged = list[Result](), dict[str, str](), dict[str, str]()
        for path in self._trial_files("result.json"):
            unit = path.parent.name
            try:
                found = self.read_result(unit)
            except UserError as error:
                damaged[unit] = str(error)
                continue
            if found is not None and found["state"] == "failed":
                failures[unit] = found["error"]
            elif found is not None:
                results.append(Result(**found["result"]))
        return Outcomes(sorted(results, key=lambda r: (r.trial, r.rung)), failures, damaged)

    def results(self) -> list[Result]:
        """Every finished unit's result, by trial number and rung; without those that are damaged, with a warning."""
        results, _, damaged = self.outcomes()
        self._warn(damaged)
        return results

    def _warn(self, damaged: Mapping[str, str]) -> None:
        for reason in damaged.values():
            warnings.warn(f"{reason}; left out, 'prunesweep resume {self.shown}' does the trial again", stacklevel=3)

    def failures(self) -> dict[str, str]:
        """Unit and error of every unit that failed."""
        return self.outcomes().failures

    def forget_failures(self) -> None:
        """Set the results of failed tasks aside, so that they are done again."""
        for unit in self.failures():
            set_aside(self.trial(unit) / "result.json", "failed")

    def read_result(self, task_id: str) -> dict[str, Any] | None:
        """What ``write_result`` wrote; None where the task has not ended. Raises UserError for a damaged file."""
        path = self.trial(task_id) / "result.json"
        if not path.is_file():
            return None
        data = self.read(path, Ending)
        if data["state"] == "finished" and (found := Result(**data["result"])).id != task_id:
            raise UserError(f"{path} is damaged: it is the result of {found.id}")
        return data

    def write_result(self, task_id: str, *, result: Result | None = None, error: str | None = None) -> dict[str, Any]:
        """Finish a unit, for good: with a result, or with the error that it failed by."""
        data: dict[str, Any] = {"state": "failed", "error": error}
        if result is not None:
            data = {"state": "finished", "result": _facts(result)}
        self._write(self.trial(task_id) / "result.json", sealed(data))
        return data

    def _write(self, path: Path, text: str) -> None:
        self.fence()
        write_text(path, text)

    def write_validation(self, result: Result, figures: EvalMetrics) -> None:
        """Keep what the model of a result gives on the validation split."""
        kept = {"result": _digest(result), "figures": figures.as_dict()}
        self._write(self.trial(result.id) / "validation.json", sealed(kept))

    def write_test(self, result: Result, figures: EvalMetrics) -> None:
        """Keep what the model of a result gives on the data ``data.test``."""
        kept = {"result": self._tested(result), "figures": figures.as_dict()}
        self._write(self.trial(result.id) / "test.json", sealed(kept))

    def _tested(self, result: Result) -> str:
        return digest({**_facts(result), "test": self.test_data})

    def validation(self, result: Result) -> EvalMetrics | None:
        """What ``write_validation`` wrote of this very result; None where it did not, or the file is damaged."""
        return self._measured(result, "validation.json", _digest(result))

    def test(self, result: Result) -> EvalMetrics | None:
        """What ``write_test`` wrote of this very result and these data; None where it did not, or it is damaged."""
        return self._measured(result, "test.json", self._tested(result)) if self.test_data else None

    def _measured(self, result: Result, name: str, of: str) -> EvalMetrics | None:
        path = self.trial(result.id) / name
        try:
            kept = self.read(path, Validation) if path.is_file() else {}
        except UserError as error:
            warnings.warn(f"{error}; left out, 'prunesweep resume {self.shown}' makes it again", stacklevel=2)
            return None
        return EvalMetrics.of(kept["figures"]) if kept.get("result") == of else None

    def write_speed(self, rows: Sequence[Speed]) -> None:
        """Keep what was measured of the speed of the front's members."""
        self._write(self / "speed.json", sealed({"rows": [asdict(row) for row in rows]}))

    def read_speed(self) -> list[Speed]:
        """What ``write_speed`` wrote; nothing where it did not. Raises UserError where the file is damaged."""
        path = self / "speed.json"
        return [Speed(**row) for row in self.read(path, Speeds)["rows"]] if path.is_file() else []

    def speed(self) -> list[Speed]:
        """``read_speed``; nothing where the file is damaged, with a warning."""
        try:
            return self.read_speed()
        except UserError as error:
            warnings.warn(f"{error}; left out, 'prunesweep resume {self.shown}' makes it again", stacklevel=2)
            return []

    def write_advice(self, lines: Sequence[str]) -> None:
        """Keep what the end of the search said about its settings."""
        write_text(self / "advice.json", json.dumps(list(lines), indent=1))

    def advice(self) -> list[str]:
        """What ``write_advice`` wrote; nothing where the search has not ended, or the file is damaged."""
        try:
            return [str(line) for line in reading.read_json(self / "advice.json")]
        except (UserError, TypeError):
            return []

    def read_task(self, task_id: str) -> Task:
        """The task that was handed out under a name. Raises UserError where its file is missing or damaged."""
        path = self.trial(task_id) / "spec.json"
        task = Task(**self.read(path, Task))
        if task.id != task_id:
            raise UserError(f"{path} is damaged: it is task {task.id}")
        return task

    def write_task(self, task: Task) -> None:
        """Keep a task, before it is handed out."""
        self._write(self.trial(task.id) / "spec.json", sealed(asdict(task)))

    def begins(self, task_id: str) -> None:
        """Note that a process does a task that was handed out, from now on."""
        self.fence()
        (self.trial(task_id) / BEGUN).touch()

    def waits(self, task_id: str) -> None:
        """Note that no process does a task: it has ended, or waits for one."""
        self.fence()
        (self.trial(task_id) / BEGUN).unlink(missing_ok=True)

    def write_cut(self, number: int, decision: Cut) -> None:
        """Keep what a candidate keeps of the source, as its point was decoded: for all of its units."""
        # no indent: it has an index for every unit that is kept
        self._write(self.trial(task_id(number)) / "cut.json", json.dumps(decision.to_dict(), separators=(",", ":")))

    def read_cut(self, number: int) -> Cut | None:
        """What ``write_cut`` wrote; None in runs of before it was written. Raises UserError for a damaged file."""
        from prunesweep.models import Cut

        path = self.trial(task_id(number)) / "cut.json"
        try:
            return Cut.from_dict(read_json(path)) if path.is_file() else None
        except UserError as error:
            raise error if str(path) in str(error) else UserError(f"{path} is damaged: {error}") from error

    def made_by(self, given: str) -> str | None:
        """The method of a saved model or a decision that the search started from; None where that is not known.

        Args:
            given: its path in the run's folder.
        """
        path = self / given
        try:
            return Proposal.load(path).method if is_proposal(path) else load_provenance(path).get("method")
        except UserError:
            return None

    def status(self) -> dict[str, Any]:
        """The stable form for scripts: what is finished, running and pending, hypervolume, the source, and advice.

        ``trials`` counts finished candidates, those of rung 0, and the running, pending and failed tasks of all rungs;
        those that wait for a worker or were interrupted are pending. ``rungs`` has the finished tasks of
        each rung. The rest of how far the search is, is as ``progress`` says.
        """
        facts, outcomes = self.known_facts(), self.outcomes()
        self._warn(outcomes.damaged)
        found = progress(self, outcomes.results, outcomes.failures)
        tasks = found["tasks"]
        of_all = Counter[str]()
        for level in tasks:
            of_all.update({name: level[name] for name in ("running", "waiting", "interrupted", "pending", "failed")})
        return {
            **found,
            "trials": {
                "finished": tasks[0]["finished"],
                "running": of_all["running"],
                "pending": of_all["pending"] + of_all["waiting"] + of_all["interrupted"],
                "failed": of_all["failed"],
            },
            "rungs": [level["finished"] for level in tasks],
            "objectives": list(self.objectives),
            "hypervolume": hypervolume(self.members(outcomes.current), self.searched_source(), self.objectives),
            **({} if self.measure is None else {"measure": self.measure}),
            "source": {k: v for k, v in facts["source"].items() if k in (*EvalMetrics._fields, "macs", "params")},
            "advice": self.advice(),
        }

    def search_table(self) -> dict[str, Any]:
        """``trials``, ``rungs``, ``reduction_factor``, ``objectives``, ``rank_by``, ``quality`` of the configuration.

        Raises:
            UserError: it is damaged.
        """
        path = self / "search.toml"
        found: dict[str, Any] = {"rungs": [], "objectives": list(TWO), "rank_by": "objective"}  # as of earlier versions
        found |= {"reduction_factor": REDUCTION_FACTOR, "quality": None}
        try:
            found |= self._settings(path)["search"]
            if type(found["trials"]) is not int or not all(type(epochs) is int for epochs in found["rungs"]):
                raise ValueError("search.trials or search.rungs are no numbers")
            if type(found["reduction_factor"]) not in (int, float) or not found["reduction_factor"] > 1:
                raise ValueError("search.reduction_factor is no number above 1")
            if unknown := [name for name in found["objectives"] if name not in OBJECTIVES]:
                raise ValueError(f"search.objectives has {unknown[0]!r}")
            if found["quality"] is not None and not isinstance(found["quality"], str):
                raise ValueError(f"search.quality is {found['quality']!r}")
            if found["rank_by"] not in get_args(RankBy):
                raise ValueError(f"search.rank_by is {found['rank_by']!r}")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{path} is damaged: {f'{error} is missing' if isinstance(error, KeyError) else error}"
            reason = str(error) if isinstance(error, UserError) else reason
            raise UserError(
                f"{reason}\nResults and models in {self / 'trials'} do not need it. Where the file "
                f"is torn, empty or lost, 'prunesweep resume {self.shown}' writes it again as it was at first"
            ) from error
        return found

    def _settings(self, path: Path) -> dict[str, Any]:
        """The tables of ``search.toml``; where it is torn or lost, those that ``run.json`` keeps, with a warning."""
        try:
            found, reason = reading.read_toml(path), f"{path} is damaged: search is missing"
        except UserError as error:
            found, reason = {}, str(error)
        if "search" in found:
            return found
        with contextlib.suppress(UserError):
            if kept := self.read(self / "run.json", RunFacts).get("settings"):
                again = f"'prunesweep resume {self.shown}' writes it again"
                warnings.warn(f"{reason}; read as it was when the run was made, and {again}", stacklevel=1)
                return dict(kept)
        raise UserError(reason)

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.search_table()["objectives"])

    @cached_property
    def measure(self) -> str | None:
        """The name of the search's own measure of quality, if it has one."""
        spec = self.search_table()["quality"]
        return None if spec is None else quality_name(spec)

    @cached_property
    def ranking(self) -> Ranking:
        """What candidates are compared by."""
        return Ranking(self.objectives, self.search_table()["rank_by"])

    @cached_property
    def search_split(self) -> float:
        """``data.search_split``: the share of the training images by which candidates are compared."""
        try:
            return float(self._data_table.get("search_split", 0.0))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self / 'search.toml'} is damaged: data.search_split: {error}") from error

    @cached_property
    def test_data(self) -> str | None:
        """``data.test``: the name of the data that the front is tested on, if any."""
        name = self._data_table.get("test")
        return None if name is None else str(name)

    @cached_property
    def _data_table(self) -> dict[str, Any]:
        path = self / "search.toml"
        try:
            return dict(self._settings(path).get("data", {}))
        except (AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged: data: {error}") from error

    def searched_source(self) -> dict[str, Any]:
        """The source's costs and figures, those on the images by which candidates are compared."""
        facts: dict[str, Any] = self.known_facts()["source"]
        return {**facts, **facts.get("search", {})}

    def unfinished(self) -> Iterator[Task]:
        """Tasks that were handed out and have no result, on any rung; without those whose file is damaged."""
        for path in self._trial_files("spec.json"):
            if not (path.parent / "result.json").is_file():
                with contextlib.suppress(UserError):
                    yield self.read_task(path.parent.name)

    def next_number(self) -> int:
        """The smallest number above those of all candidates that have a folder."""
        found = (FOLDER.fullmatch(path.name) for path in (self.path / "trials").glob("r*-*"))
        return max((int(match[2]) + 1 for match in found if match), default=0)

    def current(self) -> list[Result]:
        """What every candidate is worth, its latest result; without those whose latest is damaged, with a warning."""
        outcomes = self.outcomes()
        self._warn(outcomes.damaged)
        return outcomes.current

    def members(self, results: Sequence[Result] | None = None) -> list[Result]:
        """The Pareto set of the candidates that have a model, each with its latest result, ascending in cost.

        Args:
            results: by default ``current``; then there is a warning for a member whose model is gone.
        """
        found = self.current() if results is None else latest(results)
        lost = set[str]()
        for result, reason in () if results is not None else self.lost_models(found):
            lost.add(result.id)
            warnings.warn(
                f"{reason}: trial {result.trial} is not shown, 'prunesweep resume {self.shown}' does it again",
                stacklevel=2,
            )
        found = [r for r in found if r.has_model and r.id not in lost]
        while True:  # a look at the folders of the best is enough, unless one is gone
            front = self.ranking.front(found)
            gone = {r.id for r in front if not self.model(r).is_dir()}
            if not gone:
                return front
            found = [r for r in found if r.id not in gone]

    def why_empty(self) -> str | None:
        """Say that damage is why the front is empty; None where it has members, or nothing that it had is missing."""
        outcomes = self.outcomes()
        current = outcomes.current
        if any(not self._loss(r) for r in self.members(current)):  # reads one intact model, not all of them
            return None
        gone = {r.id for r, _ in self.lost_models(current)}
        known = {r.id for r in current} | outcomes.damaged.keys()
        lost = {
            "damaged results": sorted(outcomes.damaged),
            "models that are gone or damaged": sorted(gone),
            "lost results": sorted({task_id(*member) for member in self.listed()} - known),
        }
        said = [f"{what}: {_listed(units)}" for what, units in lost.items() if units]
        if not said:
            return None
        return (
            f"{self.shown}: nothing of its front is left ({'; '.join(said)}): 'prunesweep resume {self.shown}' does "
            "them again"
        )

    def lost_models(self, results: Sequence[Result]) -> list[tuple[Result, str]]:
        """Those of some results that ``front.json`` has and whose models are gone or damaged, each with what is wrong.

        Other models are deleted by purpose.
        """
        front = set(self.listed())
        members = [r for r in results if (r.trial, r.rung) in front]
        return [(r, reason) for r in members if (reason := self._loss(r))]

    def _loss(self, result: Result) -> str:
        """What is wrong with the model of a result; empty where nothing is."""
        model = self.model(result)
        if not model.is_dir():
            return f"{model} is gone"
        try:
            check_files(model, weights=result.weights)
        except UserError as error:
            return str(error)
        return ""

    def listed(self) -> list[tuple[int, int]]:
        """Trials and rungs of the members that ``front.json`` has, in its order; none where it is damaged."""
        try:
            return [(point["trial"], point["rung"]) for point in reading.read_json(self / "front.json")]
        except (UserError, TypeError, KeyError):
            return []

    def front(self, results: Sequence[Result] | None = None, *, absolute: bool = False) -> list[dict[str, Any]]:
        """The entries of ``front.json`` for ``members``; paths of models are relative by default.

        Figures are those of the validation split where a member was measured on it. ``split`` says of which images they
        are, and then those by which candidates are compared are ``searched_...``. ``test_...`` are of ``data.test``.
        """
        base = self.path if absolute else Path()
        return [
            {
                "trial": r.trial,
                "rung": r.rung,
                "epochs": r.epochs,
                **self._figures(r),
                "macs": r.macs,
                "params": r.params,
                **({} if r.latency_ms is None else {"latency_ms": r.latency_ms}),
                "arch_hash": r.arch_hash,
                **({} if r.given is None else {"proposed_by": self.made_by(r.given)}),
                "model": str(base / "trials" / r.id / "model"),
            }
            for r in self.members(results)
        ]

    def _figures(self, result: Result) -> dict[str, Any]:
        measure = next(name for name in self.ranking.names(result.epochs) if name not in COSTS)
        found = self.validation(result) if self.search_split else None
        split = "search" if self.search_split and found is None else "val"
        facts = {**(found or result.figures).with_interval(), "split": split, "ranked_by": measure}
        facts |= {} if self.measure is None else {"measure": self.measure}
        if found is not None:
            facts |= {f"searched_{name}": value for name, value in result.figures.with_interval().items()}
        if (tested := self.test(result)) is not None:
            facts |= {"test": self.test_data, **{f"test_{name}": v for name, v in tested.with_interval().items()}}
        return facts

    def front_points(self) -> list[dict[str, Any]]:
        """The points of the front's members, whose models may be gone."""
        return [r.point for r in self.ranking.front(r for r in self.current() if r.has_model)]

    def model(self, result: Result) -> Path:
        """The folder of a result's model."""
        return self.trial(result.id) / "model"

    def models(self) -> set[str]:
        """The units that have a model."""
        return {path.parent.name for path in (self.path / "trials").glob("*/model")}

    def write_front(self, results: Sequence[Result] | None = None) -> list[dict[str, Any]]:
        """Write ``front.json``, link its models as ``front/01`` and so on, and return what it says."""
        front = self.front(results)
        self._write(self / "front.json", json.dumps(front, indent=1))
        self.link_front([task_id(point["trial"], point["rung"]) for point in front])
        return front

    def link_front(self, units: Sequence[str]) -> None:
        """Make ``front/01``, ``front/02``, ... lead to models in the run's folder; remove those of members that left.

        Each changes in one step, so that whoever opens it finds one model or another. File systems without links have
        none.

        Args:
            units: names of the members' tasks; one whose model is not there has no link, and keeps its place.
        """
        folder, digits, changed = self / "front", max(len(str(len(units))), 2), False
        links = {
            f"{place:0{digits}d}": Path("..") / "trials" / unit / "model"
            for place, unit in enumerate(units, 1)
            if (self.trial(unit) / "model").is_dir()
        }
        try:
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name not in links and PLACE.fullmatch(path.name):
                    _remove(path)
            for name, target in links.items():
                path, scratch = folder / name, folder / f".{name}.tmp"
                if path.is_symlink() and path.readlink() == target:
                    continue
                if not path.is_symlink():  # a copy of a run may have folders in the place of links
                    _remove(path)
                scratch.unlink(missing_ok=True)
                scratch.symlink_to(target, target_is_directory=True)
                os.replace(scratch, path)
                changed = True
            if changed:
                sync(folder)
        except OSError as error:
            if disk_full(error):
                raise

    def update_front(
        self, results: Sequence[Result], told: set[str], wanted: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Rewrite ``front.json``, then delete the models of those units that are neither in it nor ``wanted``.

        ``results`` need not have those that are beaten by others of them. ``told`` are units that have a model; those
        whose model is deleted are taken out.
        """
        front = self.write_front(results)
        self.drop_models(told, {task_id(point["trial"], point["rung"]) for point in front}, wanted)
        return front

    def drop_models(self, told: set[str], members: Collection[str], wanted: Collection[str] = ()) -> None:
        """Delete the models of units that are neither members of the front nor wanted. Arguments as above."""
        for unit in told - set(members) - set(wanted):
            shutil.rmtree(self.trial(unit) / "model", ignore_errors=True)
            told.remove(unit)


def _remove(path: Path) -> None:
    """Remove a link, or a folder that stands in its place; what is not there is left alone."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


class Outcomes(NamedTuple):
    """What a run's tasks gave; ``failures`` and ``damaged`` are errors by the tasks' names."""

    results: list[Result]
    failures: dict[str, str]
    damaged: dict[str, str]

    @property
    def current(self) -> list[Result]:
        """The latest result of every candidate; of none whose latest one is damaged: one below is not its worth."""
        lost = {(number, rung) for rung, number in map(place_of, self.damaged)}
        return [r for r in latest(self.results) if all(n != r.trial or rung < r.rung for n, rung in lost)]


def set_aside(path: Path, word: str = "damaged") -> Path:
    """Rename a file or a folder to a free name, ``NAME.WORD-1`` or the next one, and return that."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    os.replace(path, kept)
    return kept


def failure_reasons(failures: Mapping[str, str]) -> list[str]:
    """Return a line for every distinct reason, the most frequent first: how many tasks failed by it, and which.

    Args:
        failures: errors by the tasks' names, as in ``Run.failures``.
    """
    by_reason: dict[str, list[str]] = {}
    for unit, error in sorted(failures.items()):
        by_reason.setdefault(reason_of(error), []).append(unit)
    return [
        f"{len(units)} x {reason} ({_listed(units)})"
        for reason, units in sorted(by_reason.items(), key=lambda found: -len(found[1]))
    ]


def _listed(units: Sequence[str]) -> str:
    return f"{', '.join(units[:SHOWN])}{', ...' if len(units) > SHOWN else ''}"


def reason_of(error: str) -> str:
    """Return the line that says what happened, of an error's text or of its traceback."""
    *_, last = error.strip().split("Traceback (most recent call last):\n")
    line = next((line for line in last.splitlines() if line and not line[0].isspace()), "no reason is known")
    bare = MODULES.match(line)
    return line[bare.end() if bare else 0 :].removeprefix("UserError: ")
