"""What to run next, and what became of it: the search as a small state machine, without processes or clocks.

The study is only told what a unit's ``result.json`` says. A trial that was asked for and has no result is handed out
again, first, under its own number; so killing anything at any moment loses no finished result and repeats none.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from models import UserError
from models.files import write_text

from .run import Result, Run, Unit
from .space import Space
from .study import Study

__all__ = ["Coordinator", "SearchFailed"]

MAX_REJECTED = 1000  # proposals in a row that no architecture meets


class SearchFailed(RuntimeError):
    """So many units failed that going on makes no sense; carries the last error."""


class Coordinator:
    """Hands out units until ``requested`` of them have finished or failed."""

    def __init__(self, run: Run, study: Study, space: Space, *, requested: int, slots: int, seed: int) -> None:
        self.run, self.requested, self.slots = run, requested, slots
        self._study, self._space, self._seed = study, space, seed
        self._live: dict[str, Unit] = {}
        self._stopping = False
        self._waiting = deque(self._adopt())
        self.results = run.results()
        self.failures = run.failures()
        self.front = run.update_front(self.results)

    def _adopt(self) -> Iterator[Unit]:
        """Settle what a dead driver left: tell what was done but not told; the units that were begun but not done."""
        for number, point in self._study.running().items():
            unit = self._unit(number, point) if point else None
            if unit is None:
                self._study.prune(number)  # the driver died while it asked
            elif found := self.run.read_result(unit.id):
                self._tell(unit, found)
            else:
                yield unit

    def _unit(self, number: int, point: dict[str, float]) -> Unit | None:
        """The unit of a point, or None where no architecture meets its budget."""
        try:
            arch_hash = self._space.decode(point).arch.hash
        except UserError:
            return None
        seed = int(np.random.SeedSequence([self._seed, 0, number]).generate_state(1)[0])
        return Unit(number, point, arch_hash, seed)

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
    def finished(self) -> bool:
        """All that was asked for is settled."""
        return not self._live and not self._wanted()

    @property
    def done(self) -> bool:
        """Nothing is running and nothing more will be handed out."""
        return self.finished or (self._stopping and not self._live)

    def _wanted(self) -> bool:
        return bool(self._waiting) or self.settled + len(self._live) < self.requested

    def next(self) -> Unit | None:
        """The next unit to run, or None where there is none now."""
        if self._stopping or len(self._live) >= self.slots or not self._wanted():
            return None
        unit = self._waiting.popleft() if self._waiting else self._propose()
        folder = self.run.trial(unit.id)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "spec.json", json.dumps(asdict(unit), indent=1))
        self._live[unit.id] = unit
        return unit

    def _propose(self) -> Unit:
        for _ in range(MAX_REJECTED):
            number, point = self._study.ask()
            unit = self._unit(number, point)
            if unit is not None:
                return unit
            self._study.prune(number)
        raise UserError(f"{MAX_REJECTED} proposals in a row cannot meet their budget: raise space.budget or space.skip")

    def complete(self, unit_id: str, *, error: str | None = None) -> None:
        """A unit ended: with the result in its folder; stopped, without one; or by ``error``, its process lost.

        Raises:
            SearchFailed: more than a quarter of the requested units, and more than two, have failed.
        """
        unit = self._live.pop(unit_id)
        found = self.run.read_result(unit_id)
        if found is None and error is None:
            self._waiting.append(unit)
            return
        found = found or self.run.write_result(unit_id, error=error)
        self._tell(unit, found)
        if found["state"] == "finished":
            self.results.append(Result(**found["result"]))
            self.front = self.run.update_front(self.results)
            return
        self.failures[unit_id] = found["error"]
        if len(self.failures) > max(2, self.requested // 4):
            raise SearchFailed(
                f"{len(self.failures)} of {self.requested} trials failed; the last one with:\n{found['error']}"
            )

    def _tell(self, unit: Unit, found: Mapping[str, Any]) -> None:
        if found["state"] == "finished":
            self._study.tell(unit.number, found["result"]["top1"], found["result"]["macs"])
        else:
            self._study.fail(unit.number)

    def stop(self) -> None:
        """Hand out nothing more, and ask what is running to save its state and end."""
        self._stopping = True
        self.run.stop_file.touch()
