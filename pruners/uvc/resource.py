"""MACs of a UVC decision as a function of its variables, with gradients in closed form.

    R = fixed + sum_l pi_l [ rest_l + heads_l (1 - ceil(s_l0)/H) + values_l rho_l + mlp_l (1 - ceil(s_l1)/D) ]
    rho_l = 1 - (d ceil(s_l0) + sum over heads that stay of ceil(r_lh)) / (H d)

    R           share of the source's MACs               fixed      share outside the blocks
    s_l0, s_l1  heads and MLP units that go, block l     heads_l    share that falls with heads
    r_lh        value channels that go from head h       values_l   share that falls with value channels
    pi_l        keep weight of block l                   mlp_l      share that falls with MLP units
    rest_l      share of block l that no width lowers

With token gates N, the number of tokens in blocks, is a variable too: the shares of a block are polynomials of N of
degree two. ``fixed`` does not fall with N, because all patches are still embedded.

Source: UVC, ICLR 2022 (openreview 9jsZiUgkCZP), in the form of the released code's later version, with rho, not rho^2.
ceil has gradient 1 there, so the gradients are those of the pieces. They are written out because autograd's clamp has,
from torch 2.15 on, gradient 0 at a bound, which is where s = r = 0 starts: nothing would ever be pruned.

Shapes: L blocks, H heads, d channels of a head, D MLP width, N tokens, C residual width. Where blocks differ, tensors
have the largest H, d and D of all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from prunesweep.models import Arch, Block, Stage, UserError, cost
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.families import family_of
from prunesweep.models.families.stem import stem_cost

__all__ = ["Resource", "Usage", "keeps_heads", "paper_macs", "unit_macs"]


def paper_macs(arch: Arch, tokens: int | None = None) -> tuple[int, torch.Tensor]:
    """Count MACs as UVC does, without the classifier.

    Args:
        arch: the record.
        tokens: N inside the blocks; all of them where it is None.

    Returns:
        MACs of the patch embedding, and (L, 6) of qkv, q·k, attention·v, proj, fc1, fc2 in every block.

    Raises:
        UserError: the model has several stages, windows or a reduced map, which the paper's count does not know.
    """
    if not family_of(arch).supports("isotropic"):
        raise UserError(
            f"resource = 'paper': UVC's paper counts models whose blocks attend over all tokens of one stage, and "
            f"{arch.source} is a {arch.family!r}; use resource = 'exact'"
        )
    (stage,) = arch.stages
    N, C, patches = tokens or arch.tokens, stage.width, stage.grid[0] * stage.grid[1]
    embed = patches * C * arch.in_chans * arch.patch_size[0] * arch.patch_size[1]
    if arch.stem is not None:
        embed = stem_cost(arch).macs
    rows = []
    for block in stage.blocks:
        qk, v, hidden = block.heads * block.qk * arch.qk_rows, block.total_v, N * C * block.mlp
        rows.append([N * C * (2 * qk + v), N * N * qk, N * N * v, N * C * v, hidden * (1 + arch.glu), hidden])
    return embed, torch.tensor(rows, dtype=torch.float64)


def keeps_heads(arch: Arch) -> bool:
    """Whether heads stay whole: their maps are mixed, and one whose own output is nothing still gives to the others."""
    return family_of(arch).supports("mixed_maps")


@lru_cache(maxsize=1024)
def unit_macs(arch: Arch, tokens: int | None = None) -> tuple[tuple[int, int, int, int], ...]:
    """Count MACs of a head without its values, of a value channel, of an MLP unit, and of a block without any of these.

    Args:
        arch: the record.
        tokens: inside the blocks, prefix included; all of them where it is None.

    Returns:
        One entry per block. A block's cost is linear in these numbers; a head costs nothing where heads stay whole.
    """
    return tuple(_unit_macs(arch, stage, block, tokens) for stage in arch.stages for block in stage.blocks)


def _unit_macs(arch: Arch, stage: Stage, block: Block, tokens: int | None) -> tuple[int, int, int, int]:
    def macs(heads: int, v: int, mlp: int) -> int:
        return block_cost(arch, stage, dataclasses.replace(block, heads=heads, v=v, mlp=mlp, tokens=tokens)).macs

    if keeps_heads(arch):
        one, H = macs(block.heads, 1, 1), block.heads
        channel, unit = (macs(H, 2, 1) - one) // H, macs(H, 1, 2) - one
        return 0, channel, unit, one - H * channel - unit
    one = macs(1, 1, 1)
    channel = macs(1, 2, 1) - one
    head, unit = macs(2, 1, 1) - one - channel, macs(1, 1, 2) - one
    return head, channel, unit, one - head - channel - unit


@dataclass(frozen=True, eq=False)
class Usage:
    """R (``value``) and its gradients for s (L, 2), r (L, H), pi (L,) and N, the tokens in blocks."""

    value: float
    s: torch.Tensor
    r: torch.Tensor
    pi: torch.Tensor
    tokens: float = 0.0


@dataclass(frozen=True, eq=False)
class Resource:
    """Shares of a model's MACs: ``fixed`` and, (L,) each, those that fall with heads, value channels and MLP units.

    ``rest`` (L,) is what a block has without any of these; ``shape`` (L, 3) are H, d and D of every block, and
    ``stage_of`` its stage. Where tokens are gated, ``patches`` of them can go, ``prefix`` cannot, and ``curve``
    (3, 4, L) holds what 1, N and N^2 add to heads, values, mlp and rest. With ``whole_heads`` none of them goes.
    """

    fixed: float
    heads: torch.Tensor
    values: torch.Tensor
    mlp: torch.Tensor
    rest: torch.Tensor
    shape: torch.Tensor
    stage_of: tuple[int, ...]
    patches: int = 0
    prefix: int = 0
    curve: torch.Tensor | None = None
    whole_heads: bool = False

    @property
    def num_heads(self) -> int:
        """The most heads that a block has."""
        return int(self.shape[:, 0].max())

    @property
    def head_dim(self) -> int:
        """The most channels that a head has."""
        return int(self.shape[:, 1].max())

    @property
    def hidden(self) -> int:
        """The most MLP units that a block has."""
        return int(self.shape[:, 2].max())

    @property
    def ends(self) -> torch.Tensor:
        """Heads and MLP units of every block, (L, 2) in float64: the ends of s."""
        return self.shape[:, ::2].double()

    @classmethod
    def of(cls, arch: Arch, count: str, *, tokens: bool = False) -> Resource:
        """Compute the shares of a model whose blocks have attention with heads of one width, and an MLP.

        Args:
            arch: the record.
            count: ``paper`` leaves out the classifier, and lets the rows of the value projection fall with heads
                alone; ``exact`` is ``models.cost``.
            tokens: tokens may go, too.

        Raises:
            UserError: the paper has no count of such a model.
        """
        shape = _shape(arch)
        stage_of = tuple(s for s, stage in enumerate(arch.stages) for _ in stage.blocks)
        fixed = outside_cost(arch).macs if count == "exact" else paper_macs(arch)[0]
        parts = _block_macs(arch, count, None)
        total = float(cost(arch).macs) if count == "exact" else fixed + float(parts[:3].sum())
        heads, values, mlp, rest = parts / total
        own: dict[str, Any] = {"whole_heads": keeps_heads(arch)}
        if tokens:
            own |= {"patches": arch.tokens - arch.prefix_tokens, "prefix": arch.prefix_tokens}
            one, two, three = (_block_macs(arch, count, n) for n in (1, 2, 3))
            square = (three - 2 * two + one) / 2
            linear = two - one - 3 * square
            own["curve"] = torch.stack([one - linear - square, linear, square]) / total
        return cls(
            fixed=fixed / total, heads=heads, values=values, mlp=mlp, rest=rest, shape=shape, stage_of=stage_of, **own
        )

    def kept(self, s: torch.Tensor, r: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the shares (L,) of heads, value channels and MLP units that stay, not clamped.

        ``gone`` (L, H) bool marks the heads that go, and those that a block does not have.
        """
        heads, units = s.ceil().unbind(1)
        H, d, D = self.shape.double().unbind(1)
        channels = d * heads + (r.ceil() * ~gone).sum(1)
        return 1 - heads / H, (H * d - channels) / (H * d), 1 - units / D

    def __call__(
        self, s: torch.Tensor, r: torch.Tensor, pi: torch.Tensor, gone: torch.Tensor, tokens: float | None = None
    ) -> Usage:
        """Compute R and its gradients at s (L, 2), r (L, H), pi (L,); ``gone`` (L, H) bool as for ``kept``.

        ``tokens`` is N in the blocks, a real number; None is all of them.
        """
        macs, slopes = self.shares(tokens)
        H, d, D = self.shape.double().unbind(1)
        shares = self.kept(s, r, gone)
        heads, values, mlp = (share.clamp(0, 1) for share in shares)
        # at the bounds themselves the gradient is that of the inside
        d_heads, d_values, d_mlp = ((share >= 0) & (share <= 1) for share in shares)
        kept = torch.stack([heads, values, mlp, torch.ones_like(mlp)])
        block = macs[3] + macs[0] * heads + macs[1] * values + macs[2] * mlp
        by_heads = (macs[0] * d_heads + macs[1] * d_values) / H
        by_channel = pi * macs[1] * d_values / (H * d)
        return Usage(
            value=self.fixed + float((pi * block).sum()),
            s=-torch.stack([pi * by_heads, pi * macs[2] * d_mlp / D], 1),
            r=-by_channel[:, None] * ~gone,
            pi=block,
            tokens=float((pi * (slopes * kept).sum(0)).sum()),
        )

    def shares(self, tokens: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shares (4, L) of heads, values, mlp and rest at N tokens, and their derivatives for N."""
        if tokens is None or self.curve is None:
            whole = torch.stack([self.heads, self.values, self.mlp, self.rest])
            return whole, torch.zeros_like(whole)
        constant, linear, square = self.curve
        return constant + linear * tokens + square * tokens**2, linear + 2 * square * tokens


def _shape(arch: Arch) -> torch.Tensor:
    return torch.tensor([[block.heads, block.v_widths[0], block.mlp] for block in arch.blocks])


def _block_macs(arch: Arch, count: str, tokens: int | None) -> torch.Tensor:
    """Count MACs (4, L) of all heads, value channels and MLP units of every block, and of the rest of it."""
    if count == "exact":
        head, channel, unit, rest = torch.tensor(unit_macs(arch, tokens), dtype=torch.float64).unbind(1)
        H, d, D = _shape(arch).double().unbind(1)
        return torch.stack([H * head, H * d * channel, D * unit, rest])
    qkv, qk, av, proj, fc1, fc2 = paper_macs(arch, tokens)[1].unbind(1)
    return torch.stack([qkv + qk, av + proj, fc1 + fc2, torch.zeros_like(qkv)])
