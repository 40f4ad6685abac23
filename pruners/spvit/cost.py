"""Cost of SPViT's gates: a block's mixer by its choice, an MLP by its open units; in integers and differentiable.

MACs are linear in the cumulated gates of a mixer and in the gates of hidden units (arXiv 2111.11802, section 3.4):

    F = fixed + sum over blocks of  g0 c1 + g1 (c3 - c1) + g2 (cm - c3)  +  m cu

    F            MACs of the model                  fixed    MACs without gated mixers and without MLPs
    g0, g1, g2   cumulated gates of the mixer       m        number of open hidden units of the MLP
    c1, c3, cm   MACs of the 1x1 and the 3x3 convolution and of attention
    cu           MACs of one hidden unit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prunesweep.models import Arch, cost
from prunesweep.models.arch import Block
from prunesweep.models.published.counts import SPVIT
from prunesweep.models.replace import replace_block

from .gates import CHOICES

__all__ = ["COUNTS", "GateCosts", "complexity_loss", "gate_costs", "has_mixer_gates"]

COUNTS: dict[str, Callable[[Arch], int]] = {"exact": lambda arch: cost(arch).macs, "reference": SPVIT.macs}

Gates = Sequence[torch.Tensor | None]


def has_mixer_gates(block: Block) -> bool:
    """Whether a convolution can share this block's weights: attention with heads of equal widths, on all tokens."""
    return block.mixer == "attn" and isinstance(block.v, int) and block.tokens is None


@dataclass(frozen=True)
class GateCosts:
    """MACs per image: ``mixers`` has (c1, c3, cm) of every block, None without mixer gates; ``units`` has cu."""

    fixed: int
    mixers: tuple[tuple[int, int, int] | None, ...]
    units: tuple[int, ...]

    def total(self, choices: Sequence[str], units: Sequence[int]) -> int:
        """Count MACs with these mixers and numbers of hidden units.

        ``choices`` has one of ``CHOICES`` per block, which is ignored for a block without mixer gates.
        """
        chosen = [(0, *own)[CHOICES.index(c)] for own, c in zip(self.mixers, choices, strict=True) if own is not None]
        return self.fixed + sum(chosen) + sum(m * own for m, own in zip(units, self.units, strict=True))

    def parts(self, mixers: Gates, units: Gates) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute MACs of all gated mixers, and of all MLPs, as float64 scalars.

        Args:
            mixers: cumulated gates (3,) per block, None where there are none.
            units: gates of the hidden units (M,) per block, None where there is no MLP.
        """
        attention, mlp = torch.zeros((2,), dtype=torch.float64)
        for own, gates in zip(self.mixers, mixers, strict=True):
            if own is not None and gates is not None:
                c1, c3, cm = own
                steps = torch.tensor((c1, c3 - c1, cm - c3), dtype=torch.float64, device=gates.device)
                attention = attention.to(gates.device) + (gates.double() * steps).sum()
        for unit, gates in zip(self.units, units, strict=True):
            if gates is not None:
                mlp = mlp.to(gates.device) + gates.double().sum() * unit
        return attention, mlp

    def estimate(self, mixers: Gates, units: Gates) -> torch.Tensor:
        """Compute F, a float64 scalar; the same number as ``total`` where all gates are 0 or 1."""
        attention, mlp = self.parts(mixers, units)
        return self.fixed + attention + mlp


def gate_costs(arch: Arch, count: Callable[[Arch], int] = COUNTS["exact"]) -> GateCosts:
    """Compute the costs of a ViT's or Swin's gates.

    Args:
        arch: the model's record.
        count: any count of MACs that is linear in the gates, one of ``COUNTS``.
    """
    bare = [dataclasses.replace(block, mlp=0) for block in arch.blocks]
    bare = [replace_block(arch, block, "none", None, "") if has_mixer_gates(block) else block for block in bare]
    fixed = count(_with_blocks(arch, bare))

    def added(i: int, block: Block) -> int:
        return count(_with_blocks(arch, [*bare[:i], block, *bare[i + 1 :]])) - fixed

    mixers: list[tuple[int, int, int] | None] = []
    for i, block in enumerate(arch.blocks):
        if not has_mixer_gates(block):
            mixers.append(None)
            continue
        alone = dataclasses.replace(block, mlp=0)
        one, three = (added(i, replace_block(arch, alone, conv, None, "")) for conv in ("conv1x1", "conv3x3"))
        mixers.append((one, three, added(i, alone)))
    units = (added(i, dataclasses.replace(own, mlp=1)) if arch.blocks[i].mlp else 0 for i, own in enumerate(bare))
    return GateCosts(fixed, tuple(mixers), tuple(units))


def _with_blocks(arch: Arch, blocks: Sequence[Block]) -> Arch:
    """Return ``arch`` with other blocks, as many as before in every stage."""
    rest = iter(blocks)
    stages = (dataclasses.replace(stage, blocks=tuple(next(rest) for _ in stage.blocks)) for stage in arch.stages)
    return dataclasses.replace(arch, stages=tuple(stages))


def complexity_loss(spent: torch.Tensor, target: float, weight: float, form: str) -> torch.Tensor:
    """Compute weight * (spent - target)^2 (arXiv 2111.11802, section 3.4).

    Args:
        spent: the cost, a scalar; here a share of the source's MACs. SPViT counts in 10^9 MACs, and its lambda times
            the square of the dense model's 10^9 MACs is ``weight``.
        target: the budget, in the same unit.
        weight: factor of the loss.
        form: ``hinge``, 0 below the target; or ``two_sided``, SPViT's own.
    """
    excess = spent - target
    return weight * (excess.clamp(min=0) if form == "hinge" else excess) ** 2
