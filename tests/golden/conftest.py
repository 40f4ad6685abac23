"""Golden cases: ``PRUNESWEEP_GOLDEN=DIR pytest tests/golden`` runs every case found under ``DIR/METHOD/``."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("PRUNESWEEP_GOLDEN", Path(__file__).parent / "data"))


def cases(method: str, suffix: str) -> list[Path]:
    """Paths without ``suffix`` of all cases of a method, sorted by name."""
    found = sorted((ROOT / method).glob(f"*{suffix}"))
    return [path.with_name(path.name.removesuffix(suffix)) for path in found]
