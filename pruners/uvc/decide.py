"""From UVC's variables to a cut that meets a budget of exact MACs and stays within one unit of it.

Norms are shares of a layer's squared norm. Above the budget, the unit with the least norm per MAC is removed; below,
the unit with the most norm per MAC comes back while it fits. A block that its gate skips comes back, or another one is
dropped, only where widths alone cannot do it; every stage keeps a block. Patches, where they are gated, come back, or
more of them go, likewise. A model's cost is linear in kept heads, value channels and MLP units, so a unit's price
changes with its own block and the number of patches alone.

Shapes: L blocks, H heads, d channels of a head, D MLP width, N tokens, C residual width; where blocks differ, the
largest of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError
from prunesweep.models.counting import outside_cost
from prunesweep.models.layers.token_merging import TokenPlan

from .primal_dual import Norms, PrimalDual, weakest
from .resource import keeps_heads, unit_macs

__all__ = ["Counts", "Decider", "Widths"]


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of units that stay: heads (L,), value channels (L, H), also of heads that go, and MLP units (L,)."""

    heads: torch.Tensor
    v: torch.Tensor
    mlp: torch.Tensor
    head_keep: torch.Tensor  # (L, H) bool
    tokens: int | None = None  # in blocks, prefix included, where they are gated

    @classmethod
    def of(cls, machine: PrimalDual, norms: Norms, *, r_mode: str, mlp_align: int) -> Counts:
        """Read the counts from the variables.

        Args:
            machine: the variables.
            norms: of the weights as they are; the weakest units go.
            r_mode: ``off`` keeps all value channels, ``uniform`` the same number in every head of a block; otherwise
                each head has its own.
            mlp_align: MLP widths are rounded up to multiples of this.
        """
        resource = machine.resource
        stays = ~norms.going(machine.s[:, 0])
        full, hidden = resource.shape[:, 1:2], resource.shape[:, 2]
        v = full - machine.r.ceil().long()
        if r_mode == "off":
            v = full.expand_as(v)
        elif r_mode == "uniform":
            v = torch.where(stays, v, 0).amax(1, keepdim=True).expand_as(v)
        units = hidden - machine.s[:, 1].ceil().long()
        units = torch.minimum(-(-units // mlp_align) * mlp_align, hidden)
        return cls(stays.sum(1), v, units, stays, machine.tokens)

    def macs(self, arch: Arch, runs: torch.Tensor) -> int:
        """Count exact MACs of the whole model with the blocks ``runs`` (L,) bool."""
        per_head, per_channel, per_unit, rest = torch.tensor(unit_macs(arch, self.tokens)).unbind(1)
        block = rest + self.heads * per_head + (self.v * self.head_keep).sum(1) * per_channel + self.mlp * per_unit
        return outside_cost(arch).macs + int((block * runs).sum())

    def masks(self, norms: Norms) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return bool masks of the columns that stay: of every block's attention projection and second MLP layer."""
        have, units = norms.columns != math.inf, norms.mlp != math.inf
        columns = ~weakest(norms.columns, have.sum(2) - self.v) & self.head_keep[..., None]
        rows = ~weakest(norms.mlp, units.sum(1) - self.mlp)
        return (
            [own[there] for own, there in zip(columns, have, strict=True)],
            [own[there] for own, there in zip(rows, units, strict=True)],
        )


@dataclass(frozen=True)
class Widths:
    """Widths of one block: the number of its strongest heads that stay, value channels of all H heads, MLP units."""

    heads: int
    v: tuple[int, ...]
    mlp: int


class Decider:
    """Turns variables and norms of a model into cuts.

    ``patches`` is how many patches stay in blocks, which ``fit`` may change.

    Args:
        arch: the record, whose blocks have attention with heads of one width, and an MLP.
        norms: of the weights as they are.
        r_mode: as for ``Counts.of``.
        mlp_align: kept MLP widths are multiples of this.
        token_gates: (P,) of patches, which may go, the lowest first; None or empty where they are not gated.
        patches: how many of them stay.
    """

    def __init__(
        self,
        arch: Arch,
        norms: Norms,
        *,
        r_mode: str,
        mlp_align: int,
        token_gates: torch.Tensor | None = None,
        patches: int = 0,
    ) -> None:
        self.arch, self.r_mode = arch, r_mode
        self.whole = [Widths(block.heads, block.v_widths, block.mlp) for block in arch.blocks]
        self.whole_heads = keeps_heads(arch)
        self.align = [min(mlp_align, block.mlp) for block in arch.blocks]
        gated = token_gates is not None and len(token_gates) > 0
        self.patch_order = _strongest(token_gates) if gated and token_gates is not None else []
        self._keep_patches(patches)
        self.stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
        self.outside = outside_cost(arch).macs
        # strongest first; of equal ones the last, because primal_dual.weakest marks the first
        self.head_order, self.dim_order, self.unit_order = [], [], []
        self.dim_norm, self.unit_norm = [], []
        for whole, padded, padded_units in zip(self.whole, norms.columns, norms.mlp, strict=True):
            columns, units = padded[: whole.heads, : whole.v[0]], padded_units[: whole.mlp]
            self.head_order.append(_strongest(columns.sum(1)))
            self.dim_order.append([_strongest(head) for head in columns])
            self.unit_order.append(_strongest(units))
            shares = columns.sort(-1, descending=True).values.cumsum(-1) / (columns.sum() + 1e-30)
            self.dim_norm.append([[0.0, *head] for head in shares.tolist()])
            own = units.sort(descending=True).values.cumsum(0) / (units.sum() + 1e-30)
            self.unit_norm.append([0.0, *own.tolist()])

    def _keep_patches(self, patches: int) -> None:
        """Count with this number of patches in blocks, where patches are gated."""
        self.patches = patches
        self.prices = unit_macs(self.arch, self.arch.prefix_tokens + patches if self.patch_order else None)

    @property
    def kept_patches(self) -> list[int]:
        """The patches that stay, where they are gated."""
        return sorted(self.patch_order[: self.patches])

    def widths(self, counts: Counts) -> list[Widths]:
        """Read the widths of every block from counts."""
        every = zip(counts.heads.tolist(), counts.v.tolist(), counts.mlp.tolist(), strict=True)
        return [
            Widths(heads, tuple(v[: whole.heads]), mlp)
            for whole, (heads, v, mlp) in zip(self.whole, every, strict=True)
        ]

    def macs(self, widths: Sequence[Widths], runs: Sequence[bool]) -> int:
        """Count exact MACs of the whole model."""
        return self.outside + sum(self._macs(b, w) for b, w in enumerate(widths) if runs[b])

    def least(self, runs: Sequence[bool]) -> int:
        """Count MACs with one head, where heads may go, one channel and one (aligned) unit per block that runs."""
        heads = [whole.heads if self.whole_heads else 1 for whole in self.whole]
        return self.macs([Widths(heads[b], self._v(b, 1), align) for b, align in enumerate(self.align)], runs)

    def fit(
        self, widths: Sequence[Widths], runs: Sequence[bool], budget: float, order: Sequence[int] = ()
    ) -> tuple[list[Widths], list[bool]]:
        """Choose widths and blocks within ``budget`` MACs.

        Args:
            widths, runs: what is decided so far.
            budget: in MACs.
            order: blocks that may go or come back, the first to go first; none where the blocks are given.

        Raises:
            UserError: even one channel, head and unit per block is too much.
        """
        found, alive = list(widths), list(runs)
        for block in reversed(order):
            if not self._running(alive, block):
                alive[block] = True
        for block in order:
            if self._running(alive, block) > 1 and alive[block] and self.least(alive) > budget:
                alive[block] = False
        while self.patch_order and self.patches > 1 and self.least(alive) > budget:
            self._keep_patches(self.patches - 1)
        while self.patches < len(self.patch_order) and self.macs(self.whole, alive) < budget:
            self._keep_patches(self.patches + 1)
        for block in reversed(order):
            if not alive[block] and self.macs(self.whole, alive) < budget:
                alive[block] = True
        self._walk(found, alive, budget, up=False)
        self._walk(found, alive, budget, up=True)
        total = self.macs(found, alive)
        if total > budget:
            raise UserError(
                f"{budget:,.0f} MACs cannot be reached with {sum(alive)} blocks: at their narrowest they have {total:,}"
                ". Raise the budget, or skip more blocks"
            )
        return found, alive

    def _running(self, runs: Sequence[bool], block: int) -> int:
        """Count the blocks that run in a block's stage."""
        return sum(on for on, stage in zip(runs, self.stage_of, strict=True) if stage == self.stage_of[block])

    def cut(self, widths: Sequence[Widths], runs: Sequence[bool]) -> Cut:
        """Make the cut to the strongest heads, channels and units of every block that runs."""
        return Cut(blocks=tuple(self._choice(b, w) if runs[b] else BlockCut(keep=False) for b, w in enumerate(widths)))

    def _choice(self, block: int, own: Widths) -> BlockCut:
        heads = sorted(self.head_order[block][: own.heads])
        qk, d = self.arch.blocks[block].qk, self.whole[block].v[0]  # qk units: channels, or pairs that are turned
        return BlockCut(
            qk=tuple(tuple(range(h * qk, (h + 1) * qk)) for h in heads),
            v=tuple(tuple(h * d + j for j in sorted(self.dim_order[block][h][: own.v[h]])) for h in heads),
            mlp=tuple(sorted(self.unit_order[block][: own.mlp])),
            tokens=self._plan(),
        )

    def _plan(self) -> TokenPlan | None:
        """Make the plan in which patches that are gone pass the block by; None where all stay."""
        if self.patches == len(self.patch_order):
            return None
        prefix, total = self.arch.prefix_tokens, self.arch.tokens
        kept = [*range(prefix), *(prefix + patch for patch in self.kept_patches)]
        row = {token: i for i, token in enumerate(kept)}
        assign = tuple(row.get(token, -1) for token in range(total))
        return TokenPlan(len(kept), assign, tuple(float(i >= 0) for i in assign))

    def _walk(self, widths: list[Widths], runs: Sequence[bool], budget: float, *, up: bool) -> None:
        """Remove units one by one while the total is above the budget; with ``up``, add them while it is below."""
        total = self.macs(widths, runs)
        moves = {b: list(self.moves(b, widths[b], up)) for b, on in enumerate(runs) if on}
        while up or total > budget:
            best: tuple[float, int, Widths, int] | None = None
            for block, own in moves.items():
                for price, changed, macs in own:
                    fits = not up or total + macs <= budget
                    if fits and (best is None or (price > best[0] if up else price < best[0])):
                        best = price, block, changed, macs
            if best is None:
                return
            _, block, widths[block], macs = best
            total += macs
            moves[block] = list(self.moves(block, widths[block], up))

    def moves(self, block: int, own: Widths, up: bool) -> Iterator[tuple[float, Widths, int]]:
        """List (norm per MAC, the block afterwards, MACs gained) of every unit that may come or go."""
        norm, macs = self._norm(block, own), self._macs(block, own)
        for changed in self._neighbours(block, own, 1 if up else -1):
            gained = self._macs(block, changed) - macs
            yield (self._norm(block, changed) - norm) / gained, changed, gained

    def _neighbours(self, block: int, own: Widths, by: int) -> Iterator[Widths]:
        whole, align = self.whole[block], self.align[block]
        if 1 <= own.heads + by <= whole.heads and not self.whole_heads:
            yield Widths(own.heads + by, own.v, own.mlp)
        units = own.mlp + by * align
        if by < 0:  # from a full width that is no multiple, to the next one below
            units = math.ceil(own.mlp / align - 1) * align
        if units >= align and own.mlp < whole.mlp if by > 0 else units >= align:
            yield Widths(own.heads, own.v, min(units, whole.mlp))
        if self.r_mode == "uniform" and 1 <= own.v[0] + by <= whole.v[0]:
            yield Widths(own.heads, self._v(block, own.v[0] + by), own.mlp)
        if self.r_mode == "ragged":
            for h in self.head_order[block][: own.heads]:
                if 1 <= own.v[h] + by <= whole.v[0]:
                    yield Widths(own.heads, (*own.v[:h], own.v[h] + by, *own.v[h + 1 :]), own.mlp)

    def _v(self, block: int, width: int) -> tuple[int, ...]:
        whole = self.whole[block]
        return whole.v if self.r_mode == "off" else (width,) * whole.heads

    def _macs(self, block: int, own: Widths) -> int:
        v = sum(own.v[h] for h in self.head_order[block][: own.heads])
        per_head, per_channel, per_unit, rest = self.prices[block]
        return rest + own.heads * per_head + v * per_channel + own.mlp * per_unit

    def _norm(self, block: int, own: Widths) -> float:
        kept = self.head_order[block][: own.heads]
        return sum(self.dim_norm[block][h][own.v[h]] for h in kept) + self.unit_norm[block][own.mlp]


def _strongest(values: torch.Tensor) -> list[int]:
    """Return indices, largest value first; of equal values the last first."""
    return values.argsort(stable=True).flip(0).tolist()
