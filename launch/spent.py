"""What a decision was asked to cost and what it costs, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["spent_lines"]

NAMES = {"macs": "MACs", "params": "params", "latency_ms": "latency"}


def spent_lines(facts: Mapping[str, Any]) -> list[str]:
    """Say what a report of exact MACs and parameters lacks: predicted latency, and why a budget is not met.

    Args:
        facts: as ``pruners.spent`` gives them; none where nothing was asked for.
    """
    if not facts:
        return []
    lines, name = [], NAMES[facts["measure"]]
    if facts["measure"] == "latency_ms":
        whole = facts["cost"] / facts["cost_share"]
        lines.append(
            f"predicted {facts['cost']:.4g} ms per batch ({facts['cost_share']:.3f} of the source's {whole:.4g} ms)"
        )
    if "hindrance" in facts:
        lines.append(
            f"the budget, {facts['limit_share']:.3g} of the source's {name}, is not met, {facts['cost_share']:.3f} are "
            f"spent: {facts['hindrance']}"
        )
    return lines
