"""The default steps of UVC's variables, which solve the same problem but end at its budget.

With the released code's steps nearly all compression is skipped blocks, the budget's multiplier z winds up to a
thousand and R falls far below the budget and swings (its own logs: 41 %, 9 % for a budget of 50 %). What differs here:

- z acts on the distance to a target that falls from the whole model to the budget in ``ramp_steps``, and its sum is
  joined by an immediate push ``z_gain * (R - target)``, so that it does not wind up.
- s and r are measured in shares of their vectors, and every push is divided by what the vector costs. The released
  code scales heads and MLP units by one largest entry: an MLP unit, 150 times cheaper, hardly ever moves.
- What resists is the norm of the next unit as a share of its layer's, without y and p, which remember for how long a
  constraint was violated and not what a unit is worth. y and p shrink what is to go, as in the original.
- A count rises where the next unit is cheaper than the push, and falls where the last one that went is dearer; between
  the two it rests. With the next unit alone it would swing around every whole number.
- R counts the blocks that run by their gates, not a random sample of them. Gates move by their gradient over its
  running size, shared by all blocks.
- Token gates move as block gates do: by their gradient over its running size, against what a patch's MACs are worth. A
  patch that is gone does not come back.
- Whole units go only as far as R does not pass the target, and a block only if R stays above the budget.
- Once R is within ``tolerance`` of the budget, or a while after the ramp, all decisions stand; training goes on with
  them.

Shapes as in ``pruners.uvc.primal_dual``.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from .primal_dual import TOKEN_START, Norms, PrimalDual, keep_weight, least_sum, next_least, there
from .resource import Resource, Usage
from .settings import UVCSettings

__all__ = ["NormalizedPrimalDual"]

# Rates per update times ramp_steps, where a setting is None. At full push a count crosses its vector in a fifth of the
# ramp, so R can follow the target; z gains what z_gain gives at once in a fifth of the ramp, which is overdamped.
SLR, RLR, GLR, ZLR, YLR, ETA, TOKEN_LR = 5.0, 5.0, 10.0, 100.0, 100.0, 1.0, 15.0
SLR_MAX = 0.05  # with z_gain, what one update can still answer without swinging
PATIENCE = 1.25  # ramps after which decisions stand in any case; what is missing is then decided at once
GATE_BOUND = 2.0  # of a logit and its opposite: a keep probability of 98 %
GATE_FLOOR = 0.05  # of a block that has to stay


class NormalizedPrimalDual(PrimalDual):
    """``PrimalDual`` with the normalised steps that this module describes."""

    TENSORS = (*PrimalDual.TENSORS, "gains", "slopes")
    TOKEN_TENSORS = (*PrimalDual.TOKEN_TENSORS, "token_gains")

    def __init__(self, resource: Resource, settings: UVCSettings, runs: torch.Tensor | None = None) -> None:
        super().__init__(resource, settings, runs)
        self.since = 0  # updates since the warm-up
        self.gains = torch.zeros(len(resource.heads), dtype=torch.float64)  # running mean of -dL/dg
        self.slopes = torch.zeros_like(self.gains)  # running mean of dw/dg
        self.token_gains = torch.zeros_like(self.token_gates)  # running mean of -dL/d sigmoid(q)
        self._settled = False
        self._typical = (1 - resource.fixed) / (2 * len(resource.heads))  # half a block's MACs: unit of price

    @property
    def settled(self) -> bool:
        return self._settled

    @property
    def eta(self) -> float:
        return ETA / self.settings.ramp_steps if self.settings.eta is None else self.settings.eta

    @property
    def zlr(self) -> float:
        return super().zlr if self.settings.zlr else ZLR / self.settings.ramp_steps

    @property
    def target(self) -> float:
        """The share of MACs to be at now; in the end the middle of what counts as reached."""
        end = self.settings.budget - self.settings.tolerance / 2
        return 1 - (1 - end) * min(1.0, self.since / self.settings.ramp_steps)

    def _rate(self, given: float | None, default: float) -> float:
        return min(default / self.settings.ramp_steps, SLR_MAX) if given is None else given

    def update(
        self,
        norms: Norms,
        gate_gradient: torch.Tensor,
        noise: torch.Tensor,
        token_gradient: torch.Tensor | None = None,
    ) -> None:
        """Move counts, gates and multipliers by one step, as ``PrimalDual.update`` does; R takes no noise."""
        self.since += 1
        if not self._settled:
            used = self.usage(norms)
            excess = used.value - self.target
            band = self.settings.resource_band
            inside = band is None or abs(used.value - self.settings.budget) <= band
            push = max(0.0, float(self.z) + self.settings.z_gain * excess) if inside else 0.0
            self._weigh_gates(gate_gradient, noise[0], used, push)
            if token_gradient is not None:
                self._weigh_tokens(token_gradient, self.usage(norms), push)
            self._move_counts(norms, push)
            self.z = (self.z + self.zlr * excess).clamp(0, self.settings.z_max)
            self._look(norms)
        self._ascend(norms, noise)

    def usage(self, norms: Norms) -> Usage:
        """Compute R of the current decision."""
        return self.resource(self.s, self.r, self.decided.double(), norms.going(self.s[:, 0]), self.tokens)

    @property
    def _tokens_in_resource(self) -> float | None:
        return self.tokens

    def _look(self, norms: Norms) -> None:
        """Check whether the budget is reached, by the variables as they are now."""
        self.resource_used = self.usage(norms).value
        budget = self.settings.budget
        within = budget - self.settings.tolerance <= self.resource_used <= budget
        ramp = self.settings.ramp_steps
        self._settled = self.since >= (ramp if within else PATIENCE * ramp)

    def settle(self, s: torch.Tensor, r: torch.Tensor, runs: torch.Tensor, patches: torch.Tensor | None = None) -> None:
        """Set the variables to exactly this decision; called once it is final.

        ``patches`` (P,) bool are those that stay, where tokens are gated.
        """
        if patches is not None:
            self.token_gates = torch.where(patches, TOKEN_START, -TOKEN_START).double()
        self.s, self.r = s.double(), r.double()
        keep = torch.where(runs, GATE_BOUND, self._gate_ends()[1]).double()
        self.gates = torch.stack([-keep, keep], 1)

    def _weigh_gates(self, gradient: torch.Tensor, noise: torch.Tensor, used: Usage, push: float) -> None:
        """Move gates by how much a block lowers the loss, less what its MACs are worth."""
        if self.runs is not None:
            return
        kept, window = 1 - 1 / self.settings.gating_interval, self.settings.gating_interval
        slopes = keep_weight(self.gates, noise, self.settings.gates, self.eps)[1][:, 1]
        self.gains = kept * self.gains - (1 - kept) * gradient[:, 1]
        self.slopes = kept * self.slopes + (1 - kept) * slopes
        on = self.decided
        gains = self.gains / (self.slopes + 1e-12)  # by which the loss falls per unit of keep weight
        if self.since < window or not on.any():
            return
        shares = gains / (gains[on].clamp(min=0).mean() + 1e-12)
        costs = used.pi / (2 * self._typical)
        glr = GLR / self.settings.ramp_steps if self.settings.glr is None else self.settings.glr
        move = glr * (shares - self.settings.gating_weight * push * costs).clamp(-1, 1)
        self._open(on, self.gates[:, 1] + move, used)

    def _open(self, on: torch.Tensor, keep: torch.Tensor, used: Usage) -> None:
        """Set the keep logits of blocks that run; a block that no longer runs stays off, if the budget allows it."""
        left, stages = used.value, self.resource.stage_of
        counts = Counter(stage for stage, runs in zip(stages, on.tolist(), strict=True) if runs)
        edge, off = self._gate_ends()
        for block in keep.argsort(stable=True).tolist():
            if not on[block]:
                continue
            logit = min(float(keep[block]), GATE_BOUND)
            if logit <= edge:
                if counts[stages[block]] > 1 and left - float(used.pi[block]) >= self.settings.budget:
                    left, logit = left - float(used.pi[block]), off
                    counts[stages[block]] -= 1
                else:
                    logit = edge + GATE_FLOOR
            self.gates[block, 0], self.gates[block, 1] = -logit, logit

    def _weigh_tokens(self, gradient: torch.Tensor, used: Usage, push: float) -> None:
        """Move token gates by how much a patch lowers the loss, less what its MACs are worth."""
        keep, window = self.token_gates.sigmoid(), self.settings.gating_interval
        kept = 1 - 1 / window
        self.token_gains = kept * self.token_gains - (1 - kept) * gradient / (keep * (1 - keep))
        on, number = self.patches, int(self.patches.sum())
        if self.since < window or number == 1:
            return
        shares = self.token_gains / (self.token_gains[on].clamp(min=0).mean() + 1e-12)
        cost = used.tokens * self.resource.patches / (1 - self.resource.fixed)
        price = self.settings.token_weight * push * cost + self.settings.token_l1
        lr = TOKEN_LR / self.settings.ramp_steps if self.settings.token_lr is None else self.settings.token_lr
        wanted = self.token_gates + lr * (shares - price).clamp(-1, 1)
        left, low = used.value, self.target - self.settings.tolerance / 2
        for patch in wanted.argsort(stable=True).tolist():
            if not on[patch]:
                continue
            logit = min(float(wanted[patch]), TOKEN_START)
            if logit < 0:
                goes = number > 1 and left - used.tokens >= low  # R is convex in N: it falls by no more
                left, number = left - goes * used.tokens, number - goes
                logit = -TOKEN_START if goes else GATE_FLOOR
            self.token_gates[patch] = logit

    def _gate_ends(self) -> tuple[float, float]:
        """Return the keep logit up to which a block does not run, and that of a block which has been dropped."""
        return (self.eps**0.5, 0.0) if self.settings.gates == "soft_l0" else (0.0, -GATE_BOUND)

    def _move_counts(self, norms: Norms, push: float) -> None:
        """Move the counts of heads, MLP units and value channels of the blocks that run."""
        resource, runs = self.resource, self.decided
        ends = resource.ends
        heads, values, units, _ = resource.shares(self.tokens)[0]
        costs = torch.stack([heads + values, units], 1)
        prices = [
            torch.stack([_next(norms.heads, count[:, 0]), _next(norms.mlp, count[:, 1])], 1) * ends / costs
            for count in (self.s, self.s.ceil() - 1)
        ]
        used = self.usage(norms)
        move = self._wanted(self.s, push, prices) * runs[:, None]
        step = self._rate(self.settings.slr, SLR) * ends
        self.s = self._moved_to(self.s, move, step, self.s_max, -used.s, used.value)
        if self.settings.r_mode != "off":
            self._move_channels(norms, push)

    def _move_channels(self, norms: Norms, push: float) -> None:
        resource, uniform = self.resource, self.settings.r_mode == "uniform"
        stays = ~norms.going(self.s[:, 0])
        width, values = resource.shape[:, :2].double().prod(1), resource.shares(self.tokens)[0][1]
        total = there(norms.columns).sum((1, 2))[:, None] + 1e-30
        prices = [
            next_least(norms.columns, count.clamp(min=0)) / total * (width / values)[:, None]
            for count in (self.r, self.r.ceil() - 1)
        ]
        used, r = self.usage(norms), self.r
        costs = -used.r
        if uniform:  # one width for all heads that stay: their mean price decides
            prices = [(price * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True) for price in prices]
            r, costs, stays = r[:, :1], costs.sum(1, keepdim=True), stays.any(1, keepdim=True)
        move = self._wanted(r, push, prices) * self.decided[:, None] * stays
        step = self._rate(self.settings.rlr, RLR) * resource.shape[:, 1:2].double()
        self.r = self._moved_to(r, move, step, self.r_max, costs, used.value).expand_as(self.r).clone()

    def _wanted(self, x: torch.Tensor, push: float, prices: list[torch.Tensor]) -> torch.Tensor:
        """Return the direction of a count, in -1..1.

        It is positive by how far the push exceeds the next unit's price, negative by how far the last unit's price
        exceeds the push.
        """
        to_go, gone = (push - self._typical * price for price in prices)
        return to_go.clamp(0, 1) + torch.where(x > 0, gone.clamp(-1, 0), 0.0)

    def _moved_to(
        self,
        x: torch.Tensor,
        move: torch.Tensor,
        step: torch.Tensor,
        top: torch.Tensor,
        costs: torch.Tensor,
        used: float,
    ) -> torch.Tensor:
        """Move x by one step; whole units go or come back only as far as R does not pass the target then.

        Equal blocks would otherwise lose a head each in the same step. What moves most has the first choice.
        """
        moved = torch.minimum((x + step * move).clamp(min=0), top)
        change = ((moved.ceil() - x.ceil()) * costs).flatten().tolist()
        left, low, high = used, self.target - self.settings.tolerance / 2, self.target + self.settings.tolerance / 2
        new, old, cost = (values.flatten().tolist() for values in (moved, x.ceil(), costs))
        for i in move.abs().flatten().argsort(descending=True, stable=True).tolist():
            if change[i] > 0:
                units = max(0, math.floor(min(change[i], left - low) / cost[i] + 1e-6))
                new[i] = min(new[i], old[i] + units)
            elif change[i] < 0:
                units = max(0, math.floor(min(-change[i], high - left) / cost[i] + 1e-6))
                new[i] = max(new[i], old[i] - units - 1 + 1e-6)
                units = -units
            else:
                continue
            left -= units * cost[i]
        return torch.tensor(new, dtype=torch.float64).view_as(x)

    def _ascend(self, norms: Norms, noise: torch.Tensor) -> None:
        """Raise the multipliers of the norms that are to vanish, in shares of their layer."""
        default = YLR / self.settings.ramp_steps
        ylr, plr = (default if rate is None else rate for rate in (self.settings.ylr, self.settings.plr))
        heads, mlp = norms.heads, norms.mlp
        least = [least_sum(v, self.s[:, i]) / (there(v).sum(1) + 1e-30) for i, v in enumerate((heads, mlp))]
        self.y = self.y + ylr * torch.stack(least, 1)
        self.p = self.p + plr * least_sum(norms.columns, self.r) / (heads + 1e-30)

    def _numbers(self) -> tuple[str, ...]:
        return (*super()._numbers(), "since", "_settled")


def _next(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the norm of the unit after the first ``count``, as a share of all."""
    return next_least(values, count.clamp(min=0)) / (there(values).sum(1) + 1e-30)
