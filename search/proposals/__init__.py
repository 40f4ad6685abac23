"""Propose the points to evaluate next: an Optuna sampler for searches that know the cost of a candidate beforehand."""

from .budget_gp import BudgetGPSampler

__all__ = ["BudgetGPSampler"]
