"""Spaces, Optuna's study, Ray Tune's driver, units of work, the front and the report.

The names below are loaded when they are first used: ``status`` and ``front`` of a run need neither Ray nor Optuna.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunesweep.search.execution.coordinator import SearchFailed
    from prunesweep.search.execution.driver import SearchResult, resume_search, run_search
    from prunesweep.search.store.run import Run

    from .config import SearchConfig, load_config

_HOME = {
    "Run": "store.run",
    "SearchConfig": "config",
    "SearchFailed": "execution.coordinator",
    "SearchResult": "execution.driver",
    "load_config": "config",
    "resume_search": "execution.driver",
    "run_search": "execution.driver",
}

__all__ = ["Run", "SearchConfig", "SearchFailed", "SearchResult", "load_config", "resume_search", "run_search"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunesweep.search' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
