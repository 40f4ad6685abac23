"""What to run next, and what became of it: the search as a small state machine, without processes or clocks.

Candidates start on rung 0; the best of a rung go on to the next one (``promotion``). The study is only told what a
unit's ``result.json`` says. A unit that was handed out and has no result is handed out again, first, under its own
name; so killing anything at any moment loses no finished result and repeats none. Results that are damaged, or of
another candidate than their task, are set aside, and their tasks are done again.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prunesweep.models import Cut, UserError
from prunesweep.models.io.files import make_folder
from prunesweep.search.config import SearchTable
from prunesweep.search.space.space import Candidate, Space, candidate_key, candidate_names
from prunesweep.search.space.variables import MODEL
from prunesweep.search.store.front import QUALITIES, latest
from prunesweep.search.store.progress import planned
from prunesweep.search.store.run import Result, Run, Task, place_of, set_aside, task_id
from prunesweep.search.store.study import Study
from prunesweep.training.jobs.proposal import is_proposal

from .rungs import MultiObjectiveASHA

__all__ = ["BANDS", "Coordinator", "RunBroken", "SearchFailed"]

MAX_REJECTED = 1000  # proposals in a row that are no new candidate
LOOK = 1.05  # growth of the number of results after which it is asked which models are of no use any more
BANDS = 5  # of the budget window, on its scale, over which promotions are spread


class SearchFailed(RuntimeError):
    """So many units failed that going on makes no sense; carries the last error."""


class RunBroken(SearchFailed):
    """What every unit needs cannot be had: no candidate is to blame, so none is recorded as failed."""


class Coordinator:
    """Hands out units until ``search.trials`` candidates have finished or failed, and none is left to promote."""

    def __init__(
        self, run: Run, study: Study, space: Space, search: SearchTable, *, max_concurrent: int, seed: int
    ) -> None:
        self.run, self.search, self.max_concurrent = run, search, max_concurrent
        self.space, self._study, self._seed, self._ranking = space, study, seed, study.ranking
        self._live: dict[str, Task] = {}
        self._decisions: dict[int, Cut] = {}  # of candidates that are to be handed out for the first time
        self._stopping = self._exhausted = False
        self.notes: list[str] = []  # lines for people: what of the run was damaged, and what was done about it
        self.results, self.failures = self._read()
        self._rungs = self._make_rungs()
        self._candidates: dict[str, int] = {}  # numbers by ``candidate_names``
        self._remember(*(self._task_of(r) for r in self.results if r.rung == 0))
        self._at = {(r.trial, r.rung): r for r in self.results}
        self._waiting = deque(sorted(self._unfinished(), key=lambda unit: (not unit.rung, unit.rung, unit.number)))
        self._remember(*(unit for unit in self._waiting if unit.rung == 0))
        self._waiting.extend(self._adopt())
        for unit in self._waiting:
            run.waits(unit.id)  # who did it, did so for a driver that is gone
        begun = {r.trial for r in self.results} | {number for rung, number in map(place_of, self.failures) if rung == 0}
        self._begun = len(begun | {u.number for u in self._waiting if u.rung == 0})
        self.duplicates = 0  # proposals of this driver that were candidates already
        self.seconds = 0.0  # that this driver spent on deciding and keeping, all units together
        self._models = run.models() & {r.id for r in self.results}
        self._latest: dict[int, Result] = {}  # by candidate
        # units that cannot be promoted and are beaten by one of the last rung, for good; results at the last look
        self._beaten, self._looked = set[str](), 0
        self.best: list[Result] = []  # the members of the front
        self.front: list[dict[str, Any]] = []
        self.front = self._update_front(self.results)

    @property
    def requested(self) -> int:
        """Candidates that were asked for."""
        return self.search.trials

    def _make_rungs(self) -> MultiObjectiveASHA:
        objectives = self.search.objectives
        cost = next(name for name in objectives if name not in QUALITIES)
        budget = next(v for v in self.space.variables if v.name == "budget")
        edges = [] if budget.fixed else [budget.at(i / BANDS) for i in range(1, BANDS)]
        whole = self.space.source_value(cost)
        asha = MultiObjectiveASHA(
            max(len(self.search.rungs), 1),
            self.search.reduction_factor,
            self._ranking.directions,
            bands=[edge * whole for edge in edges],
            banded=objectives.index(cost),
        )
        for r in self.results:
            asha.add(r.rung, r.trial, self._ranking.comparable(r))
        for rung, number in [(r.rung, r.trial) for r in self.results] + [place_of(name) for name in self.failures]:
            if rung:
                asha.promoted(rung, number)
        return asha

    def _read(self) -> tuple[list[Result], dict[str, str]]:
        """Read what tasks gave, set aside what cannot be used, and make the study agree with the rest."""
        run, (results, failures, damaged) = self.run, self.run.outcomes()
        tasks = dict[str, Task]()
        for path in sorted(run.path.glob("trials/*/spec.json")):
            unit = path.parent.name
            try:
                tasks[unit] = run.read_task(unit)
            except UserError as error:
                self.notes.append(f"{error}: kept as {set_aside(path).name}")
        for result in results:
            file = run.trial(result.id) / "result.json"
            if (task := tasks.get(result.id)) is not None:
                if (result.key, result.point) != (task.key, task.point):
                    damaged[result.id] = f"{file} is the result of another candidate"
                continue
            try:
                self.space.complete(result.point)
            except UserError as error:
                damaged[result.id] = f"{file} is damaged: its point is not in the space: {error}"
            else:
                tasks[result.id] = self._task_of(result)
                run.write_task(tasks[result.id])
        for result, reason in run.lost_models(latest(r for r in results if r.id not in damaged)):
            if run.model(result).is_dir():
                self.notes.append(f"{reason}; kept as {set_aside(run.model(result)).name}")
            if (above := task_id(result.trial, result.rung + 1)) not in tasks or above in failures:
                damaged[result.id] = f"{run.model(result)} is gone, so its result.json is of no use"
        for unit, reason in damaged.items():
            kept = set_aside(run.trial(unit) / "result.json")
            again = "; the trial is done again" if unit in tasks else ""
            self.notes.append(f"{reason}: kept as {kept.name}{again}")
        results = [r for r in results if r.id not in damaged]
        first = {task.number: task for task in tasks.values() if task.rung == 0}
        failed = {number for rung, number in map(place_of, failures) if rung == 0}
        self._study.follow(first, results, failed, run.next_number())
        self.notes += self._study.notes
        return results, failures

    def _task_of(self, result: Result) -> Task:
        """The task that gave a result."""
        seed = self._seed_of(result.rung, result.trial)
        return Task(result.trial, result.point, result.arch_hash, result.key, seed, result.rung, result.given)

    def _unfinished(self) -> Iterator[Task]:
        """Tasks that were handed out and have no result. Where its decision is lost, a point is decoded again."""
        for task in self.run.unfinished():
            if task.rung:
                self._rungs.promoted(task.rung, task.number)
            given = None if task.given is None else self.run / task.given
            if (given is not None and not is_proposal(given)) or self._decided(task):
                yield task
                continue
            point = task.point if task.given is None else {**task.point, MODEL: task.given}
            candidate = self._decode(point)
            if candidate is not None and candidate.key == task.key:
                assert isinstance(candidate.decision, Cut)
                self.run.write_cut(task.number, candidate.decision)
                yield task
                continue
            self.notes.append(f"trial {task.number}: its decision, cut.json, is lost, and its point means another one")
            if task.rung == 0:
                shutil.rmtree(self.run.trial(task.id))  # its training's state is of the other one
                if candidate is None:
                    self._study.prune(task.number)
                else:
                    again = self._unit(task.number, point, candidate)
                    make_folder(self.run.trial(again.id))
                    self.run.write_task(again)
                    yield again

    def _decided(self, task: Task) -> bool:
        """Whether the decision of a task is there, and is that of its candidate."""
        try:
            decision = self.run.read_cut(task.number)
        except UserError:
            return False
        return decision is not None and candidate_key(decision, task.point) == task.key

    def _adopt(self) -> Iterator[Task]:
        """Settle what a dead driver left in the study: tell what was done but not told; hand out what was only asked.

        Its own tasks are ``_unfinished``.
        """
        for number, point in self._study.running().items():
            name = task_id(number)
            if found := self.run.read_result(name):
                self._tell(number, found)
            elif (self.run.trial(name) / "spec.json").is_file():
                continue
            elif point is None or (candidate := self._decode(point)) is None:
                self._study.prune(number)  # the driver died while it asked
            elif (first := self._first(unit := self._unit(number, point, candidate))) is not None:
                self._settle_duplicate(number, first)
            else:
                self._remember(unit)
                yield unit

    def _decode(self, point: Mapping[str, Any]) -> Candidate | None:
        """The candidate of a point, or None where no architecture meets its budget."""
        if MODEL in point:
            point = {**point, MODEL: str(self.run / str(point[MODEL]))}
        try:
            return self.space.decode(point)
        except UserError:
            return None

    def _unit(self, number: int, point: Mapping[str, Any], candidate: Candidate) -> Task:
        if isinstance(candidate.decision, Cut):
            self._decisions[number] = candidate.decision
        full, seed, given = self.space.complete(point), self._seed_of(0, number), point.get(MODEL)
        return Task(number, full, candidate.arch.hash, candidate.key, seed, given=None if given is None else str(given))

    def _seed_of(self, rung: int, number: int) -> int:
        return int(np.random.SeedSequence([self._seed, rung, number]).generate_state(1)[0])

    @property
    def current(self) -> list[Result]:
        """The latest result of every candidate, by which it is judged."""
        return list(self._latest.values())

    @property
    def measured(self) -> bool:
        """Whether any result is a finite number in every objective."""
        return any(all(map(math.isfinite, self._ranking.values(r))) for r in self.results)

    @property
    def live(self) -> int:
        return len(self._live)

    @property
    def handed_out(self) -> list[str]:
        """Names of the tasks that were handed out and have not ended, in that order."""
        return list(self._live)

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def settled(self) -> int:
        """Units that have finished or failed."""
        return len(self.results) + len(self.failures)

    @property
    def expected(self) -> int:
        """Units that there will be, should all proposals be found and none fail."""
        whole = planned(self.requested, max(len(self.search.rungs), 1), self.search.reduction_factor)
        return max(sum(whole), self.settled)

    @property
    def finished(self) -> bool:
        """All that was asked for is settled."""
        return not self._live and not self._waiting and not self._proposing() and self._rungs.next() is None

    @property
    def done(self) -> bool:
        """Nothing is running and nothing more will be handed out."""
        return (self._stopping and not self._live) or self.finished

    @property
    def exhausted(self) -> bool:
        """Nothing more will be handed out, whatever the units that run will give; a stopped search may go on later."""
        last = len(self.search.rungs) - 1
        if self.done:
            return True
        over = not self._waiting and not self._proposing() and self._rungs.next() is None
        return over and not self._stopping and all(unit.rung >= last for unit in self._live.values())

    def _proposing(self) -> bool:
        return self._begun < self.requested and not self._exhausted

    def next(self) -> Task | None:
        """The next unit to run, or None where there is none now."""
        if self._stopping or len(self._live) >= self.max_concurrent:
            return None
        with self._clocked():
            return self._hand_out()

    @contextlib.contextmanager
    def _clocked(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def _hand_out(self) -> Task | None:
        unit = self._waiting.popleft() if self._waiting else self._promotion() or self._proposal()
        if unit is None:
            return None
        folder = self.run.trial(unit.id)
        make_folder(folder, within=self.run.path)
        if (decision := self._decisions.pop(unit.number, None)) is not None:
            self.run.write_cut(unit.number, decision)
        self.run.write_task(unit)
        self._live[unit.id] = unit
        return unit

    def _promotion(self) -> Task | None:
        found = self._rungs.next()
        if found is None:
            return None
        rung, number = found
        self._rungs.promoted(rung, number)
        below = self._at[number, rung - 1]
        return Task(number, below.point, below.arch_hash, below.key, self._seed_of(rung, number), rung, below.given)

    def _proposal(self) -> Task | None:
        """A new candidate, or None where enough are found, or no more can be.

        Raises:
            UserError: none of very many proposals could be built.
        """
        if not self._proposing():
            return None
        known = self.duplicates
        for _ in range(MAX_REJECTED):
            number, point = self._study.ask()
            candidate = self._decode(point)
            if candidate is None:
                self._study.prune(number)
            elif (first := self._first(unit := self._unit(number, point, candidate))) is not None:
                self._settle_duplicate(number, first)
                self.duplicates += 1
            else:
                self._remember(unit)
                self._begun += 1
                return unit
        if self.duplicates == known:
            raise UserError(
                f"{MAX_REJECTED} proposals in a row cannot be built: raise space.budget or space.skip, or widen the "
                "windows"
            )
        self._exhausted = True
        return None

    def _remember(self, *units: Task) -> None:
        for unit in units:
            for name in self._names(unit):
                self._candidates.setdefault(name, unit.number)

    @staticmethod
    def _names(unit: Task) -> tuple[str, ...]:
        """Names that units of one and the same candidate share; a model or decision that was given is like no other."""
        return candidate_names(unit.key, unit.arch_hash, unit.point) if unit.given is None else (unit.key,)

    def _first(self, unit: Task) -> int | None:
        """The number of an earlier candidate that is the same model, trained alike."""
        return next((self._candidates[name] for name in self._names(unit) if name in self._candidates), None)

    def _settle_duplicate(self, number: int, first: int) -> None:
        """Tell the study what the same candidate gave under its first number, where it is known already."""
        self._decisions.pop(number, None)
        result = self._at.get((first, 0))
        if result is None:
            self._study.prune(number)
        else:
            self._study.tell(number, self._ranking.values(result))

    def complete(self, task_id: str, *, error: str | None = None) -> None:
        """A unit ended: with the result in its folder; stopped, without one; or by ``error``, its process lost.

        Raises:
            SearchFailed: more than a quarter of the requested units, and more than two, have failed.
        """
        with self._clocked():
            self._complete(task_id, error)

    def _complete(self, task_id: str, error: str | None) -> None:
        unit = self._live.pop(task_id)
        self.run.waits(task_id)
        found = self.run.read_result(task_id)
        if found is None and error is None:
            self._waiting.append(unit)
            return
        found = found or self.run.write_result(task_id, error=error)
        if unit.rung == 0:  # the study knows of no other
            self._tell(unit.number, found)
        if found["state"] == "finished":
            result = Result(**found["result"])
            self.results.append(result)
            self._at[result.trial, result.rung] = result
            self._rungs.add(result.rung, result.trial, self._ranking.comparable(result))
            self._study.record([result])
            self._models |= {result.id} if result.has_model else set()
            self.front = self._update_front([result])
            return
        self.failures[task_id] = found["error"]
        if len(self.failures) > max(2, self.requested // 4):
            raise SearchFailed(
                f"{len(self.failures)} of {self.expected} trials failed; the last one with:\n{found['error']}"
            )

    def _update_front(self, new: Sequence[Result]) -> list[dict[str, Any]]:
        """The front with ``new`` results. Only its members are compared, unless a result replaces one of theirs."""
        # a rung below may come last, where its result was damaged
        new = latest([*(self._latest[r.trial] for r in new if r.trial in self._latest), *new])
        self._latest |= {r.trial: r for r in new}
        replaced = {r.trial for r in new} & {r.trial for r in self.best}
        compared = self._holding() if replaced else [*self.best, *new]
        if self.front and not replaced:
            members = [r.id for r in self._ranking.front(r for r in compared if r.has_model)]
            if members == [r.id for r in self.best]:  # as for most results of a long search
                self.run.drop_models(self._models, members, self._wanted_models())
                return self.front
        front = self.run.update_front(compared, self._models, self._wanted_models())
        self.best = [self._at[point["trial"], point["rung"]] for point in front]
        return front

    def _holding(self) -> list[Result]:
        """The latest results whose models are there, in the order of their candidates' first ones."""
        return [r for r in self._latest.values() if r.has_model and r.id in self._models]

    def _wanted_models(self) -> set[str]:
        """Models that a promotion may start from, or that come back to the front if a better result is replaced."""
        top = len(self.search.rungs) - 1
        if self.search.keep_models == "all":
            return set(self._models)
        if top < 1:
            return set()
        kept = self._holding()
        unbeaten = self._ranking.front(r for r in kept if r.rung == top)
        below = [r for r in kept if r.rung < top and r.id not in self._beaten]
        if self.finished:  # more trials may be asked for later, and then promotions go on
            below = [r for r in below if r in self._ranking.front([*unbeaten, r])]
        elif len(self.results) >= LOOK * self._looked:
            self._looked, hopeless = len(self.results), self._hopeless()
            self._beaten |= {r.id for r in below if r.id in hopeless and r not in self._ranking.front([*unbeaten, r])}
            below = [r for r in below if r.id not in self._beaten]
        return {r.id for r in [*unbeaten, *below]}

    def _hopeless(self) -> set[str]:
        """Units whose candidates can never be promoted any more."""
        found, most = set[str](), self.requested
        for rung in range(1, len(self.search.rungs)):
            found |= {task_id(number, rung - 1) for number in self._rungs.hopeless(rung, most)}
            most = int(most // self.search.reduction_factor)
        return found

    def _tell(self, number: int, found: Mapping[str, Any]) -> None:
        if found["state"] == "finished":
            self._study.tell(number, self._ranking.values(Result(**found["result"])))
        else:
            self._study.fail(number)

    def stop(self) -> None:
        """Hand out nothing more, and ask what is running to save its state and end."""
        self._stopping = True
        with contextlib.suppress(OSError):  # a full disk: what is running finds that out by itself
            self.run.stop_file.touch()
