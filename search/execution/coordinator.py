"""What to run next, and what became of it: the search as a small state machine, without processes or clocks.

Candidates start on rung 0; the best of a rung go on to the next one (``promotion``). The study is only told what a
unit's ``result.json`` says. A unit that was handed out and has no result is handed out again, first, under its own
name; so killing anything at any moment loses no finished result and repeats none.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prunesweep.models import Cut, UserError
from prunesweep.models.io.files import write_text
from prunesweep.search.config import SearchTable
from prunesweep.search.space.space import Candidate, Space
from prunesweep.search.store.front import QUALITIES, comparable, directions, values
from prunesweep.search.store.run import Result, Run, Task
from prunesweep.search.store.study import Study

from .rungs import MultiObjectiveASHA

__all__ = ["BANDS", "Coordinator", "SearchFailed"]

MAX_REJECTED = 1000  # proposals in a row that are no new candidate
BANDS = 5  # of the budget window, over which promotions are spread


class SearchFailed(RuntimeError):
    """So many units failed that going on makes no sense; carries the last error."""


class Coordinator:
    """Hands out units until ``search.trials`` candidates have finished or failed, and none is left to promote."""

    def __init__(
        self, run: Run, study: Study, space: Space, search: SearchTable, *, max_concurrent: int, seed: int
    ) -> None:
        self.run, self.search, self.max_concurrent = run, search, max_concurrent
        self.space, self._study, self._seed = space, study, seed
        self._live: dict[str, Task] = {}
        self._decisions: dict[int, Cut] = {}  # of candidates that are to be handed out for the first time
        self._stopping = self._exhausted = False
        self.results, self.failures = run.results(), run.failures()
        study.record(self.results)
        self._rungs = self._make_rungs()
        self._candidates = {r.key: r.trial for r in self.results if r.rung == 0}
        self._at = {(r.trial, r.rung): r for r in self.results}
        above = list(run.unfinished())
        for unit in above:
            self._rungs.promoted(unit.rung, unit.number)
        self._waiting = deque([*above, *self._adopt()])
        self._candidates |= {u.key: u.number for u in self._waiting if u.rung == 0}
        begun = {r.trial for r in self.results} | {number for rung, number in map(_place, self.failures) if rung == 0}
        self._begun = len(begun | {u.number for u in self._waiting if u.rung == 0})
        self.duplicates = 0  # proposals of this driver that were candidates already
        self.seconds = 0.0  # that this driver spent on deciding and keeping, all units together
        self._models = run.models() & {r.id for r in self.results}
        self.best: list[Result] = []  # the members of the front
        self.front = self._update_front(self.results)

    @property
    def requested(self) -> int:
        """Candidates that were asked for."""
        return self.search.trials

    def _make_rungs(self) -> MultiObjectiveASHA:
        objectives = self.search.objectives
        cost = next(name for name in objectives if name not in QUALITIES)
        low, high = self.space.table.budget
        edges = [low + (high - low) * i / BANDS for i in range(1, BANDS)] if low < high else []
        whole = self.space.source_value(cost)
        asha = MultiObjectiveASHA(
            max(len(self.search.rungs), 1),
            self.search.reduction_factor,
            directions(objectives),
            bands=[edge * whole for edge in edges],
            banded=objectives.index(cost),
        )
        for r in self.results:
            asha.add(r.rung, r.trial, comparable(values(r, objectives), objectives))
        for rung, number in [(r.rung, r.trial) for r in self.results] + [_place(name) for name in self.failures]:
            if rung:
                asha.promoted(rung, number)
        return asha

    def _adopt(self) -> Iterator[Task]:
        """Settle what a dead driver left: tell what was done but not told; the units that were begun but not done."""
        for number, point in self._study.running().items():
            candidate = self._decode(point) if point is not None else None
            if point is None or candidate is None:
                self._study.prune(number)  # the driver died while it asked
                continue
            unit = self._unit(number, point, candidate)
            if found := self.run.read_result(unit.id):
                self._tell(unit, found)
            elif self._candidates.get(candidate.key, number) != number:
                self._settle_duplicate(number, candidate)
            else:
                yield unit

    def _decode(self, point: Mapping[str, Any]) -> Candidate | None:
        """The candidate of a point, or None where no architecture meets its budget."""
        try:
            return self.space.decode(point)
        except UserError:
            return None

    def _unit(self, number: int, point: Mapping[str, Any], candidate: Candidate) -> Task:
        full = self.space.complete(point)
        self._decisions[number] = candidate.decision
        return Task(number, full, candidate.arch.hash, candidate.key, self._seed_of(0, number))

    def _seed_of(self, rung: int, number: int) -> int:
        return int(np.random.SeedSequence([self._seed, rung, number]).generate_state(1)[0])

    @property
    def live(self) -> int:
        return len(self._live)

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
        total = level = self.requested
        for _ in self.search.rungs[1:]:
            level = int(level // self.search.reduction_factor)
            total += level
        return max(total, self.settled)

    @property
    def finished(self) -> bool:
        """All that was asked for is settled."""
        return not self._live and not self._waiting and not self._proposing() and self._rungs.next() is None

    @property
    def done(self) -> bool:
        """Nothing is running and nothing more will be handed out."""
        return (self._stopping and not self._live) or self.finished

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
        folder.mkdir(parents=True, exist_ok=True)
        if (decision := self._decisions.pop(unit.number, None)) is not None:
            self.run.write_cut(unit.number, decision)
        write_text(folder / "spec.json", json.dumps(asdict(unit), indent=1))
        self._live[unit.id] = unit
        return unit

    def _promotion(self) -> Task | None:
        found = self._rungs.next()
        if found is None:
            return None
        rung, number = found
        self._rungs.promoted(rung, number)
        below = self._at[number, rung - 1]
        return Task(number, below.point, below.arch_hash, below.key, self._seed_of(rung, number), rung)

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
            elif candidate.key in self._candidates:
                self._settle_duplicate(number, candidate)
                self.duplicates += 1
            else:
                self._candidates[candidate.key] = number
                self._begun += 1
                return self._unit(number, point, candidate)
        if self.duplicates == known:
            raise UserError(
                f"{MAX_REJECTED} proposals in a row cannot be built: raise space.budget or space.skip, or widen the "
                "windows"
            )
        self._exhausted = True
        return None

    def _settle_duplicate(self, number: int, candidate: Candidate) -> None:
        """Tell the study what the same candidate gave under its first number, where it is known already."""
        first = self._at.get((self._candidates[candidate.key], 0))
        if first is None:
            self._study.prune(number)
        else:
            self._study.tell(number, values(first, self.search.objectives))

    def complete(self, task_id: str, *, error: str | None = None) -> None:
        """A unit ended: with the result in its folder; stopped, without one; or by ``error``, its process lost.

        Raises:
            SearchFailed: more than a quarter of the requested units, and more than two, have failed.
        """
        with self._clocked():
            self._complete(task_id, error)

    def _complete(self, task_id: str, error: str | None) -> None:
        unit = self._live.pop(task_id)
        found = self.run.read_result(task_id)
        if found is None and error is None:
            self._waiting.append(unit)
            return
        found = found or self.run.write_result(task_id, error=error)
        self._tell(unit, found)
        if found["state"] == "finished":
            result = Result(**found["result"])
            self.results.append(result)
            self._at[result.trial, result.rung] = result
            objectives = self.search.objectives
            self._rungs.add(result.rung, result.trial, comparable(values(result, objectives), objectives))
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
        """The front with ``new`` results: what was beaten before stays beaten, so only its members are compared."""
        front = self.run.update_front([*self.best, *new], self._models, self._wanted_models())
        self.best = [self._at[point["trial"], point["rung"]] for point in front]
        return front

    def _wanted_models(self) -> set[str]:
        """Models that a promotion may still start from."""
        if len(self.search.rungs) < 2 or self.finished:
            return set()
        top = len(self.search.rungs) - 1
        return {r.id for r in self.results if r.rung < top and (r.trial, r.rung + 1) not in self._at}

    def _tell(self, unit: Task, found: Mapping[str, Any]) -> None:
        if unit.rung:
            return  # the study knows of rung 0
        if found["state"] == "finished":
            self._study.tell(unit.number, values(Result(**found["result"]), self.search.objectives))
        else:
            self._study.fail(unit.number)

    def stop(self) -> None:
        """Hand out nothing more, and ask what is running to save its state and end."""
        self._stopping = True
        with contextlib.suppress(OSError):  # a full disk: what is running finds that out by itself
            self.run.stop_file.touch()


def _place(task_id: str) -> tuple[int, int]:
    """Rung and number of a unit, from its name."""
    rung, number = task_id.removeprefix("r").split("-")
    return int(rung), int(number)
