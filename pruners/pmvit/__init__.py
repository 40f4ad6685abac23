"""Prune-and-Merge: fixed plans that give blocks fewer tokens (arXiv 2503.23455)."""

from .plans import FAMILIES, KINDS, PlanSettings, importance, plan, plan_for_budget, score, select

__all__ = ["FAMILIES", "KINDS", "PlanSettings", "importance", "plan", "plan_for_budget", "score", "select"]
