"""What a compressed model saved of its source's MACs, by what, and what is left of every block: exact, by formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from prunesweep.models import Arch, Block, cost
from prunesweep.models.counting import block_cost

__all__ = ["CAUSES", "picture", "savings"]

# in the order in which they are counted
CAUSES = ("blocks dropped", "attention replaced", "tokens merged", "narrower stream", "fewer ranks", "fewer units")
MIXER = ("mixer", "heads", "qk", "v", "scale", "norm_residual")
PLAN = ("tokens", "merge")


def savings(arch: Arch, source: Arch) -> list[float]:
    """Return the shares of the source's MACs that each of ``CAUSES`` saved, and last what is kept; they sum to 1.

    The source is changed into the model step by step, and every step's difference is its cause's. What two causes save
    together belongs to the first: of a block that is dropped, nothing is left to be narrower.

    Args:
        arch: record of a compressed form.
        source: record of its source.
    """
    whole = cost(source).macs
    macs = [whole, *(cost(step).macs for step in _steps(arch, source))]
    return [(before - after) / whole for before, after in pairwise(macs)] + [macs[-1] / whole]


def _steps(arch: Arch, source: Arch) -> Iterator[Arch]:
    """The records between the source and the model, one for every cause, the model last."""
    full = {block.src: block for block in source.blocks}
    own = [list(stage.blocks) for stage in arch.stages]
    # whole blocks, and halves of blocks
    blocks = [[_half(full[b.src], b) for b in stage] for stage in own]
    yield _with_blocks(source, blocks)
    blocks = [
        [_take(now, b, MIXER) if b.mixer not in (now.mixer, "none") else now for now, b in zip(*pair, strict=True)]
        for pair in zip(blocks, own, strict=True)
    ]
    yield _with_blocks(source, blocks)
    blocks = [[_take(now, b, PLAN) for now, b in zip(*pair, strict=True)] for pair in zip(blocks, own, strict=True)]
    yield _with_blocks(source, blocks)
    yield _with_blocks(arch, blocks)  # what is outside of blocks belongs to the stream
    blocks = [[replace(b, mlp=now.mlp) for now, b in zip(*pair, strict=True)] for pair in zip(blocks, own, strict=True)]
    yield _with_blocks(arch, blocks)
    yield arch


def _half(full: Block, own: Block) -> Block:
    """A block of the source without the halves that are left out."""
    left = _take(full, own, MIXER) if own.mixer == "none" else full
    return left if own.mlp else replace(left, mlp=0)


def _take(block: Block, other: Block, names: tuple[str, ...]) -> Block:
    changes: dict[str, Any] = {name: getattr(other, name) for name in names}
    return replace(block, **changes)


def _with_blocks(arch: Arch, blocks: list[list[Block]]) -> Arch:
    stages = (replace(stage, blocks=tuple(own)) for stage, own in zip(arch.stages, blocks, strict=True))
    return replace(arch, stages=tuple(stages))


def picture(arch: Arch, source: Arch) -> dict[str, Any]:
    """Return what is left of every block of the source, in all stages, as numbers; None for a dropped block.

    ``macs`` of a block is its share of the MACs of the source's block; ``widths`` are those of the residual streams,
    one for every stage.

    Args:
        arch: record of a compressed form.
        source: record of its source.
    """
    kept = {block.src: (place, block) for place in arch.stages for block in place.blocks}
    blocks: list[dict[str, Any] | None] = []
    for stage, whole in [(own, block) for own in source.stages for block in own.blocks]:
        if whole.src not in kept:
            blocks.append(None)
            continue
        place, left = kept[whole.src]
        before, after = block_cost(source, stage, whole).macs, block_cost(arch, place, left).macs
        widths = {"mixer": left.mixer, "heads": left.heads, "qk": left.qk, "v": left.v, "mlp": left.mlp}
        plan = {} if left.tokens is None else {"tokens": left.tokens}
        blocks.append({**widths, **plan, "macs": round(after / before, 4) if before else 0.0})
    return {
        "widths": [stage.width for stage in arch.stages],
        "depth": arch.depth,
        "stages": [len(stage.blocks) for stage in source.stages],
        "blocks": blocks,
    }
