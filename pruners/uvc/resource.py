"""MACs of a UVC decision as a function of its variables, with gradients in closed form.

    R = fixed + sum_l pi_l [ heads_l (1 - ceil(s_l0)/H) + values_l rho_l + mlp_l (1 - ceil(s_l1)/D) ]
    rho_l = 1 - (d ceil(s_l0) + sum over heads that stay of ceil(r_lh)) / (H d)

    R           share of the source's MACs               fixed      share outside the blocks
    s_l0, s_l1  heads and MLP units that go, block l     heads_l    share that falls with heads
    r_lh        value channels that go from head h       values_l   share that falls with value channels
    pi_l        keep weight of block l                   mlp_l      share that falls with MLP units

Source: UVC, ICLR 2022 (openreview 9jsZiUgkCZP), in the form of the released code's later version, with rho, not rho^2.
ceil has gradient 1 there, so the gradients are those of the pieces. They are written out because autograd's clamp has,
from torch 2.15 on, gradient 0 at a bound, which is where s = r = 0 starts: nothing would ever be pruned.

Shapes: L blocks, H heads, d channels of a head, D MLP width, N tokens, C residual width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from prunesweep.models import Arch, cost
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.families.stem import stem_cost

__all__ = ["Resource", "Usage", "paper_macs", "unit_macs"]


def paper_macs(arch: Arch) -> tuple[int, torch.Tensor]:
    """Count MACs as UVC does, without the classifier.

    Returns:
        MACs of the patch embedding, and (L, 6) of qkv, q·k, attention·v, proj, fc1, fc2 in every block.
    """
    (stage,) = arch.stages
    N, C, patches = arch.tokens, stage.width, stage.grid[0] * stage.grid[1]
    embed = patches * C * arch.in_chans * arch.patch_size[0] * arch.patch_size[1]
    if arch.stem is not None:
        embed = stem_cost(arch).macs
    rows = []
    for block in stage.blocks:
        qk, v, hidden = block.heads * block.qk * arch.qk_rows, block.total_v, N * C * block.mlp
        rows.append([N * C * (2 * qk + v), N * N * qk, N * N * v, N * C * v, hidden * (1 + arch.glu), hidden])
    return embed, torch.tensor(rows, dtype=torch.float64)


def unit_macs(arch: Arch) -> tuple[int, int, int, int]:
    """Count MACs of a head without its values, of a value channel, of an MLP unit, and of a block without any of these.

    Blocks have one shape.
    """
    (stage,), block = arch.stages, arch.blocks[0]

    def macs(heads: int, v: int, mlp: int) -> int:
        return block_cost(arch, stage, dataclasses.replace(block, heads=heads, v=v, mlp=mlp)).macs

    one = macs(1, 1, 1)
    channel = macs(1, 2, 1) - one
    head, unit = macs(2, 1, 1) - one - channel, macs(1, 1, 2) - one
    return head, channel, unit, one - head - channel - unit


@dataclass(frozen=True, eq=False)
class Usage:
    """R (``value``) and its gradients for s (L, 2), r (L, H) and pi (L,)."""

    value: float
    s: torch.Tensor
    r: torch.Tensor
    pi: torch.Tensor


@dataclass(frozen=True, eq=False)
class Resource:
    """Shares of a model's MACs: ``fixed`` and, (L,) each, those that fall with heads, value channels and MLP units."""

    fixed: float
    heads: torch.Tensor
    values: torch.Tensor
    mlp: torch.Tensor
    num_heads: int
    head_dim: int
    hidden: int

    @classmethod
    def of(cls, arch: Arch, count: str) -> Resource:
        """Compute the shares of a ViT whose blocks all have the same shape.

        Args:
            arch: the record.
            count: ``paper`` leaves out the classifier, and lets the rows of the value projection fall with heads
                alone; ``exact`` is ``models.cost``.
        """
        block, L = arch.blocks[0], arch.depth
        if count == "exact":
            fixed, total = outside_cost(arch).macs, float(cost(arch).macs)
            head, channel, unit, rest = unit_macs(arch)  # what is left of a block goes with it, as its heads do
            per_block = (block.heads * head + rest, block.total_v * channel, block.mlp * unit)
            heads, values, mlp = (torch.full((L,), float(macs), dtype=torch.float64) for macs in per_block)
        else:
            fixed, parts = paper_macs(arch)
            total = fixed + float(parts.sum())
            qkv, qk, av, proj, fc1, fc2 = parts.unbind(1)
            heads, values, mlp = qkv + qk, av + proj, fc1 + fc2
        shares = heads / total, values / total, mlp / total
        return cls(fixed / total, *shares, num_heads=block.heads, head_dim=block.v_widths[0], hidden=block.mlp)

    def kept(self, s: torch.Tensor, r: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the shares (L,) of heads, value channels and MLP units that stay, not clamped.

        ``gone`` (L, H) bool marks the heads that go.
        """
        heads, units = s.ceil().unbind(1)
        channels = self.head_dim * heads + (r.ceil() * ~gone).sum(1)
        width = self.num_heads * self.head_dim
        return 1 - heads / self.num_heads, (width - channels) / width, 1 - units / self.hidden

    def __call__(self, s: torch.Tensor, r: torch.Tensor, pi: torch.Tensor, gone: torch.Tensor) -> Usage:
        """Compute R and its gradients at s (L, 2), r (L, H), pi (L,); ``gone`` (L, H) bool marks the heads that go."""
        shares = self.kept(s, r, gone)
        heads, values, mlp = (share.clamp(0, 1) for share in shares)
        # at the bounds themselves the gradient is that of the inside
        d_heads, d_values, d_mlp = ((share >= 0) & (share <= 1) for share in shares)
        block = self.heads * heads + self.values * values + self.mlp * mlp
        by_heads = (self.heads * d_heads + self.values * d_values) / self.num_heads
        by_channel = pi * self.values * d_values / (self.num_heads * self.head_dim)
        return Usage(
            value=self.fixed + float((pi * block).sum()),
            s=-torch.stack([pi * by_heads, pi * self.mlp * d_mlp / self.hidden], 1),
            r=-by_channel[:, None] * ~gone,
            pi=block,
        )
