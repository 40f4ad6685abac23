"""What papers print about models that were made from a search's source, to stand beside its front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunesweep.models import Arch, cost

__all__ = ["published_rows"]

CLASSES = 1000  # of ImageNet-1K, which the papers' figures are of


def published_rows(source: Arch, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Return the published compressed forms of a source: name, paper, exact MACs and parameters, top-1 as printed.

    Args:
        source: the source's record.
        objectives: of the search; others than top-1 have no printed figures.

    Returns:
        None of them for a source that has not as many classes as ImageNet-1K: figures of other data do not compare.
    """
    if source.text is not None or source.num_classes != CLASSES or "top1" not in objectives:
        return []
    from prunesweep.models.published import PUBLISHED

    found = []
    for name, row in PUBLISHED.items():
        top1, arch = row.top1 if row.top1 is not None else row.top1_distilled, row.arch
        if row.method == "dense" or arch is None or top1 is None or _bare(arch.source) != _bare(source.source):
            continue
        spent = cost(arch)
        found.append({"name": name, "paper": row.paper, "top1": top1, "macs": spent.macs, "params": spent.params})
    return found


def _bare(name: str) -> str:
    """A timm name without the tag of its weights."""
    return name.split(".")[0]
