"""The variables of a search space: what each of them is, its range, and Optuna's form of it.

Encoding ``compact`` has a handful of ordinal variables, whatever the depth of the source. ``full`` has a bit and a
mixer of its own for every block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from prunesweep.models import UserError
from prunesweep.search.config import SpaceTable

__all__ = ["MIXERS", "Params", "Variable", "variables"]

Params = Mapping[str, float | int | str]
MIXERS = ("attn", "conv1x1", "conv3x3", "none")  # of a block, in the full encoding


@dataclass(frozen=True)
class Variable:
    """A range of numbers, or some ``choices``. One with a single value is no variable to a sampler."""

    name: str
    meaning: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        return len(self.choices) == 1 if self.choices else self.low == self.high

    @property
    def first(self) -> float | int | str:
        """The lowest value, which is that of a fixed variable; the source's own mixer."""
        return self.choices[0] if self.choices else int(self.low) if self.whole else self.low

    @property
    def distribution(self) -> BaseDistribution:
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

    def check(self, value: Any) -> None:
        """Raise UserError where a point that the user named cannot have this value."""
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{self.name} = {value!r}: must be one of {', '.join(self.choices)}")
        elif isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise UserError(f"{self.name} = {value!r}: must be a {'whole ' * self.whole}number")
        elif not self.low <= value <= self.high:
            raise UserError(f"{self.name} = {value!r}: must lie in [{self.low:g}, {self.high:g}]")


def variables(table: SpaceTable, methods: tuple[str, ...], depth: int) -> tuple[Variable, ...]:
    """Every variable of a table, fixed ones too, for a source of ``depth`` blocks."""

    def numbers(name: str, meaning: str, **options: Any) -> Variable:
        low, high = getattr(table, name)
        return Variable(name, meaning, low, high, **options)

    common = [
        numbers("budget", "MACs of the result / MACs of the source"),
        Variable("method", "how widths are scored", choices=methods),
        numbers("keep_rate", "share of patches kept inside merging blocks; 1 plans no tokens"),
        numbers("merge_start", "first block that merges tokens", whole=True),
        numbers("mlp_weight", "factor on the saliency of MLP units (log scale)", log=True),
        numbers("lr", "finetuning learning rate (log scale)", log=True),
        numbers("distill_weight", "factor on the weights of distillation"),
    ]
    if table.encoding == "full":
        blocks = [Variable(f"skip.{i}", f"block {i} is dropped", 0, 1, whole=True) for i in range(depth)]
        blocks += [Variable(f"mixer.{i}", f"mixer of block {i}", choices=MIXERS) for i in range(depth)]
        return (*common, *blocks)
    return (
        *common,
        numbers("skip", "blocks dropped, least important first", whole=True),
        numbers("conv", "blocks whose attention becomes a convolution, from the first on", whole=True),
        numbers("conv3", "of these, 3x3 ones, the last ones", whole=True),
    )
