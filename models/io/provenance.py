"""Identifying results that took long to make: hashes of content, and versions of the software that made them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

__all__ = ["digest", "versions"]


def digest(facts: Mapping[str, Any]) -> str:
    """Return 16 hex digits of SHA-256 over JSON-ready facts, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, by name."""
    packages = {name: version(name) for name in ("prunesweep", "torch", "timm", "optuna", "ray")}
    return {"python": platform.python_version(), **packages}
