"""Names for things that took long to make: hashes of content, and versions of what made them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

__all__ = ["digest", "versions"]


def digest(facts: Mapping[str, Any]) -> str:
    """16 hex digits of JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = {name: version(name) for name in ("prunesweep", "torch", "timm", "optuna", "ray")}
    return {"python": platform.python_version(), **packages}
