"""A variable of a search space as samplers see it: its name, its range or choices, and Optuna's form of it.

Which variables there are follows from the axes (``search.space.axes``). Encoding ``compact`` has a handful of ordinal
variables, whatever the depth of the source; ``full`` has a bit and a mixer of its own for every block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from prunesweep.models import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["MODEL", "Params", "Variable"]

Params = Mapping[str, float | int | str]
# in a point to start from: the folder of a saved model, or the file of a decision, in the place of what the point means
MODEL = "model"


@dataclass(frozen=True)
class Variable:
    """A range of numbers, or some ``choices``. Samplers do not see one that has a single value."""

    name: str
    meaning: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether there is only one value."""
        return len(self.choices) == 1 if self.choices else self.low == self.high

    @property
    def first(self) -> float | int | str:
        """The lowest value, which is that of a fixed variable; the source's own mixer."""
        return self.choices[0] if self.choices else int(self.low) if self.whole else self.low

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's form."""
        # here and not above: a configuration is read without Optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.log)

    def draw(self, random: Random) -> float | int | str:
        """A value drawn uniformly, on the scale that samplers see."""
        if self.choices:
            return random.choice(self.choices)
        if self.whole:
            return random.randint(int(self.low), int(self.high))
        if self.log:
            return math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        return random.uniform(self.low, self.high)

    def nearest(self, wanted: float | str | None) -> float | int | str:
        """The allowed value nearest to ``wanted``; without one, the middle of the range, or the first choice."""
        if self.choices:
            return wanted if wanted in self.choices else self.first
        if wanted is None:
            wanted = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        value = min(max(float(wanted), self.low), self.high)
        return round(value) if self.whole else value

    def at(self, share: float) -> float:
        """The value at a share of a range of numbers, on the scale that samplers see."""
        found = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        return min(max(found, self.low), self.high)

    def check(self, value: Any) -> None:
        """Raise UserError where a point that the user named cannot have this value."""
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{self.name} = {value!r}: must be one of {', '.join(self.choices)}")
        elif isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise UserError(f"{self.name} = {value!r}: must be a {'whole ' * self.whole}number")
        elif not self.low <= value <= self.high:
            raise UserError(f"{self.name} = {value!r}: must lie in [{self.low:g}, {self.high:g}]")
