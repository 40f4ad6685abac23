"""Exact cost of a record by closed formula, without building anything.

1 MAC is one multiply-add of a convolution, a linear layer or a matrix product; the count is half of what
``torch.utils.flop_counter.FlopCounterMode`` gives. Norms, softmax, activations, biases and the sums of a sparse token
plan are not MACs. A language model's MACs are those of one word: every word attends to a whole context and is
predicted by the whole softmax. Parameters are what ``sum(p.numel())`` counts; buffers are not parameters.

The formulas are the families' (``models.families``).
"""

from __future__ import annotations

from .arch import Arch, Block, Stage
from .families import family_of
from .families.block_costs import Cost

__all__ = ["Cost", "block_cost", "cost", "outside_cost"]


def cost(arch: Arch) -> Cost:
    """Count MACs per image (of a language model, per word) and parameters of ``build(arch)``."""
    family = family_of(arch)
    parts = [family.outside_cost(arch)]
    parts += [family.block_cost(arch, stage, block) for stage in arch.stages for block in stage.blocks]
    return Cost(sum(part.macs for part in parts), sum(part.params for part in parts))


def block_cost(arch: Arch, stage: Stage, block: Block) -> Cost:
    """Count what one block adds to the cost of a model.

    Args:
        arch: the model's record, for the features that all of its blocks share.
        stage: the block's stage, with its width and grid.
        block: the block; it need not be one of ``stage``'s.
    """
    return family_of(arch).block_cost(arch, stage, block)


def outside_cost(arch: Arch) -> Cost:
    """Count everything outside the blocks: embedding, layers between stages, norms and classifiers."""
    return family_of(arch).outside_cost(arch)
