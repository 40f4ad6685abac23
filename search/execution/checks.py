"""What a configuration asks for in vain, told before anything is made: it is right by itself and would waste a search.

A run that was made is resumed as it is, so none of this is a rule of the configuration itself.
"""

from __future__ import annotations

import math

from prunesweep.models import UserError
from prunesweep.search.config import SearchConfig
from prunesweep.search.space.axes import AXES
from prunesweep.search.space.space import Space
from prunesweep.search.space.warm_start import given_points

__all__ = ["check_not_in_vain", "check_space"]

WITHIN = 32  # points that are tried where a window might leave none


def check_not_in_vain(config: SearchConfig) -> None:
    """Check what a configuration alone can tell.

    Args:
        config: the search's configuration.

    Raises:
        UserError: nobody would be promoted to a rung, a range does nothing, a method decides for a budget outside of
            the search, or an objective cannot be measured.
    """
    _check_rungs(config)
    for axis in AXES.values():
        if reason := axis.idle(config.space):
            raise UserError(f"space.{axis.name} = {list(getattr(config.space, axis.name))}: {reason}")
    low, high = config.space.budget
    for name, table in config.start.items():
        for share in table.budgets:
            if not low <= share <= high:
                raise UserError(
                    f"start.{name}.budgets = {list(table.budgets)}: {share:g} is outside of space.budget = "
                    f"{[low, high]}, so what is decided for it would be left out"
                )
    if config.source.train is not None and not config.source.train.epochs:
        raise UserError("source.train.epochs = 0: the source would stay untrained; train it, or drop [source.train]")
    if "latency_ms" in config.search.objectives and config.space.latency_table is None:
        raise UserError("search.objectives has latency_ms: set space.latency_table, the file of `prunesweep latency`")


def _check_rungs(config: SearchConfig) -> None:
    search = config.search
    left = search.trials
    for number, epochs in enumerate(search.rungs[1:], start=1):
        left = int(left // search.reduction_factor)
        if not left:
            needed = 1
            for _ in search.rungs[1:]:
                needed = math.ceil(needed * search.reduction_factor)
            raise UserError(
                f"search.rungs = {list(search.rungs)}: of search.trials = {search.trials} candidates, of which one in "
                f"search.reduction_factor = {search.reduction_factor:g} goes on, none reaches rung {number} ({epochs} "
                f"epochs): set trials to {needed} or more, or give fewer rungs or a smaller reduction_factor"
            )


def check_space(config: SearchConfig, space: Space) -> None:
    """Check the points that a search starts from, and that there is something to search.

    Args:
        config: the search's configuration.
        space: of its source; its scores do not matter.

    Raises:
        UserError: a point is not in the space, what the search starts from is not there, or the space has one point.
    """
    search = config.search
    if config.space.params is not None or config.space.latency_ms is not None:
        space.summarise(WITHIN, config.seed)  # raises where none of these points lies within the windows
    given = given_points(config, space)
    others = given or search.start_published or search.start_methods
    if not space.distributions and not others and search.trials > 1:
        raise UserError(
            f"space: every axis is fixed, so there is one candidate and not search.trials = {search.trials}: give "
            "space.budget or another axis a range, or set trials = 1"
        )
