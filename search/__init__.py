"""Spaces, Optuna's study, Ray Tune's driver, units of work, the front and the report.

The names below are loaded when they are first used: ``status`` and ``front`` of a run need neither Ray nor Optuna.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SearchConfig, load_config
    from .coordinator import SearchFailed
    from .driver import SearchResult, resume_search, run_search
    from .run import Run

_HOME = {
    "Run": "run",
    "SearchConfig": "config",
    "SearchFailed": "coordinator",
    "SearchResult": "driver",
    "load_config": "config",
    "resume_search": "driver",
    "run_search": "driver",
}

__all__ = ["Run", "SearchConfig", "SearchFailed", "SearchResult", "load_config", "resume_search", "run_search"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
