"""A sampler whose proposals are moved to points that can be built, before a trial has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from prunesweep.search.space.variables import Params

__all__ = ["PlacingSampler"]


class PlacingSampler(BaseSampler):
    """Any sampler, of points that are then moved; trials have, and samplers learn from, the points as moved.

    Args:
        sampler: proposes.
        search_space: all variables, which are moved together.
        place: gives the point that takes a proposal's place.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        search_space: Mapping[str, BaseDistribution],
        place: Callable[[Params], Params],
    ) -> None:
        self._sampler, self._search_space, self._place = sampler, dict(search_space), place

    def reseed_rng(self) -> None:
        """Draw another seed."""
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all variables.

        Args:
            study: the study that asks.
            trial: the new trial.
        """
        return dict(self._search_space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the moved point of a trial: what the sampler proposes together, and the rest one by one.

        Args:
            study: the study that asks.
            trial: the new trial.
            search_space: all variables.
        """
        together = self._sampler.infer_relative_search_space(study, trial)
        point = dict(self._sampler.sample_relative(study, trial, together))
        for name, distribution in search_space.items():
            if name not in point:
                point[name] = self._sampler.sample_independent(study, trial, name, distribution)
        return dict(self._place(point))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a value of a variable that is not among those of the search space.

        Args:
            study: the study that asks.
            trial: the new trial.
            param_name: the variable.
            param_distribution: its range.
        """
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the sampler.

        Args:
            study: the study that asks.
            trial: the new trial.
        """
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the sampler.

        Args:
            study: the study.
            trial: one that ends.
            state: how it ends.
            values: its objectives.
        """
        self._sampler.after_trial(study, trial, state, values)
