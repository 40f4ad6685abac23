"""Where to look next: an Optuna sampler that knows what candidates cost."""

from .budget_gp import BudgetGPSampler

__all__ = ["BudgetGPSampler"]
