"""UVC's primal-dual step on plain float64 tensors: no model, no random numbers of its own.

    minimise  l(W, g)   subject to   R(s, r, g) <= B,
              S(heads_l; s_l0) = 0,   S(units_l; s_l1) = 0,   S(channels_lh; r_lh) = 0   for all blocks l, heads h

with S(a; k) the sum of the ceil(k) smallest entries of a. Its Lagrangian is

    l + sum_l [ y_l0 S(heads_l; s_l0) + y_l1 S(units_l; s_l1) + sum_h p_lh S(channels_lh; r_lh) ] + z (R - B)

    l             training loss                          W            weights
    g             gates (L, 2), logits of skip and keep  R, B         share of MACs, and its budget
    q             token gates (P,), logits of keeping    N            prefix tokens + sum of sigmoid(q)
    s             heads and MLP units to go (L, 2)       y            multipliers of s (L, 2)
    r             value channels to go (L, H)            p            multipliers of r (L, H)
    z             multiplier of R                        heads, units, channels   squared norms (``Norms``)

After a step of the weights down the gradient of l, one step of the other variables is

    column of W  <-  column / (1 + 2 eta p) / (1 + 2 eta y)         where it is to go
    s            <-  clip(s - slr (y S'(norms; s) + decay of s + z dR/ds), 0, s_max)
    r            <-  clip(r - rlr (p S'(channels; r) + decay of r + z dR/dr), 0, r_max)
    g            <-  momentum SGD on dl/dg + gating_weight z dR/dg
    q            <-  q - token_lr (dl/dq + (token_weight z dR/dN + token_l1) dN/dq)         with token gates
    y            <-  y + ylr S(norms; s),      p  <-  p + plr S(channels; r)
    z            <-  clip(z + zlr (R - B), 0, z_max)

The first line is the exact proximal map of eta p |column|^2, then that of eta y |column|^2. A count is a real number
that every use rounds up, with gradient 1; S'(a; k), the gradient of S in k, is the next smallest entry. The gradients
of s and r are scaled so that their largest entry is at most 1.

Source: UVC, ICLR 2022 (openreview 9jsZiUgkCZP); order and form of the steps are the released code's, which
``PrimalDual`` follows. ``pruners.uvc.control`` moves the same variables by other steps. Token gates are an extension:
the released code has gates of patches, but R does not know them and nothing is removed. Here a patch leaves all blocks
once its sigmoid(q) is below a half.

Shapes: L blocks, H heads, d channels of a head, D MLP width, P patches. Where blocks differ, tensors have the
largest H, d and D of all, and ``Norms`` says which entries a block has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .resource import Resource, Usage
from .settings import UVCSettings

__all__ = ["TAU", "TOKEN_START", "Norms", "PrimalDual", "keep_weight", "least_sum", "next_least", "there", "weakest"]

TAU = 0.5  # temperature of the gates
TOKEN_START = 3.0  # of token gates: a keep weight of 95 %
MARGIN = 1e-8  # by which s and r stay below the integer that would leave nothing


@dataclass(frozen=True, eq=False)
class Norms:
    """Squared norms of the columns of attention projections (L, H, d) and of second MLP layers (L, D).

    What a block does not have, where blocks differ, is infinite: it is never among the weakest.
    """

    columns: torch.Tensor
    mlp: torch.Tensor

    @classmethod
    def of(cls, columns: Sequence[torch.Tensor], mlp: Sequence[torch.Tensor]) -> Norms:
        """Join the norms of blocks, (H, d) and (D,) of each."""
        heads, width = (max(own.shape[axis] for own in columns) for axis in (0, 1))
        units = max(len(own) for own in mlp)

        def padded(own: torch.Tensor, *sizes: int) -> torch.Tensor:
            ends = [(0, size - have) for size, have in zip(sizes, own.shape, strict=True)]
            return F.pad(own, [end for pair in reversed(ends) for end in pair], value=math.inf)

        joined = torch.stack([padded(own, heads, width) for own in columns])
        return cls(joined, torch.stack([padded(own, units) for own in mlp]))

    @property
    def heads(self) -> torch.Tensor:
        """Squared norms of heads, (L, H)."""
        return torch.where(self.have, there(self.columns).sum(2), math.inf)

    @property
    def have(self) -> torch.Tensor:
        """The heads that a block has, bool (L, H)."""
        return self.columns[..., 0].isfinite()

    def going(self, count: torch.Tensor) -> torch.Tensor:
        """Mark the ``ceil(count)`` weakest heads of every block, and those that it does not have, (L, H) bool."""
        return weakest(self.heads, count) | ~self.have

    def scaled(self, columns: torch.Tensor, mlp: torch.Tensor) -> Norms:
        """Return the norms after the columns are multiplied by these factors, of (L, H, d) and (L, D)."""
        return Norms(self.columns * columns**2, self.mlp * mlp**2)


def there(values: torch.Tensor) -> torch.Tensor:
    """Replace what is not there by 0, for sums."""
    return torch.where(values == math.inf, 0.0, values)


def weakest(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mark the ``ceil(count)`` smallest entries along the last axis; of equal ones the first.

    Args:
        values: (..., n).
        count: (...,), real numbers of at least 0.

    Returns:
        Bool mask (..., n).
    """
    rank = values.argsort(dim=-1, stable=True).argsort(-1)
    return rank < count.ceil()[..., None]


def least_sum(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Compute S(values; count), the sum of the ``ceil(count)`` smallest entries along the last axis.

    Args:
        values: (..., n); what is infinite is not there.
        count: (...,), real numbers; clamped to 0..n.

    Returns:
        (...,).
    """
    below = torch.cat([torch.zeros_like(values[..., :1]), there(values.sort(-1).values).cumsum(-1)], -1)
    return below.gather(-1, _index(count, values.shape[-1]))[..., 0]


def next_least(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Compute S'(values; count), the smallest entry that is not among the ``ceil(count)`` smallest.

    Args:
        values: (..., n); what is infinite is not there.
        count: (...,), real numbers; clamped so that the largest entry is returned where all are among them.

    Returns:
        (...,); 0 of entries of which none is there.
    """
    last = (values != math.inf).sum(-1) - 1
    index = torch.minimum(count.ceil().long().clamp(min=0), last).clamp(min=0)
    return there(values.sort(-1).values.gather(-1, index[..., None])[..., 0])


def _index(count: torch.Tensor, last: int) -> torch.Tensor:
    return count.ceil().long().clamp(0, last)[..., None]


def keep_weight(
    gates: torch.Tensor, noise: torch.Tensor, kind: str, eps: float, *, hard: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the keep weight w of every block's gate, and its derivatives.

        gumbel     w = softmax((g + noise) / TAU)[keep]
        soft_l0    w = g_keep^2 / (g_keep^2 + eps)

    Args:
        gates: g (L, 2), logits of skipping and of keeping.
        noise: Gumbel noise (L, 2); not used by ``soft_l0``.
        kind: ``soft_l0``; any other kind is the softmax.
        eps: smoothing of ``soft_l0``.
        hard: round the softmax's w to 0 or 1, and leave the derivatives as they are (straight through).

    Returns:
        (w (L,), dw/dg (L, 2)).
    """
    if kind == "soft_l0":
        keep = gates[:, 1]
        slope = 2 * keep * eps / (keep**2 + eps) ** 2
        return keep**2 / (keep**2 + eps), torch.stack([torch.zeros_like(slope), slope], 1)
    weight = ((gates + noise) / TAU).softmax(1)[:, 1]
    slope = weight * (1 - weight) / TAU
    return (weight > 0.5).double() if hard else weight, torch.stack([-slope, slope], 1)


class PrimalDual:
    """The variables of the problem, and the released code's steps.

    ``s`` (L, 2) heads and MLP units to go, ``r`` (L, H) value channels to go, ``gates`` (L, 2) logits of skipping and
    of keeping, multipliers ``y`` (L, 2), ``p`` (L, H) and ``z``; ``step`` counts updates of weights. ``token_gates``
    (P,) are logits of keeping a patch, none where tokens are not gated. All are float64 on the CPU.
    """

    TENSORS: tuple[str, ...] = ("s", "r", "gates", "y", "p", "z", "momentum", "pending")
    TOKEN_TENSORS: tuple[str, ...] = ("token_gates",)  # of runs with token gates, besides

    def __init__(self, resource: Resource, settings: UVCSettings, runs: torch.Tensor | None = None) -> None:
        """Start with nothing to go. ``runs`` (L,) bool, if given, fixes which blocks run, and gates do not move."""
        L, H = len(resource.heads), resource.num_heads
        self.resource, self.settings, self.runs = resource, settings, runs
        self.s = torch.zeros(L, 2, dtype=torch.float64)
        self.r = torch.zeros(L, H, dtype=torch.float64)
        self.y, self.p = torch.full_like(self.s, settings.y_init), torch.full_like(self.r, settings.p_init)
        self.z = torch.tensor(settings.z_init, dtype=torch.float64)
        self.gates = torch.tensor([[-1.0, 1.0]], dtype=torch.float64).repeat(L, 1)
        self.momentum, self.pending = torch.zeros_like(self.gates), torch.zeros_like(self.gates)
        self.token_gates = torch.full((resource.patches,), TOKEN_START, dtype=torch.float64)
        self.collected = 0  # gradients in pending
        self.eps, self.step, self.epoch = settings.eps, 0, 0
        self.s_max = resource.ends - 1 - MARGIN  # (L, 2)
        if resource.whole_heads:
            self.s_max[:, 0] = 0
        self.r_max = resource.shape[:, 1:2].double() - 1 - MARGIN  # (L, 1)
        self.resource_used = 1.0  # R at the last step

    @property
    def settled(self) -> bool:
        """Whether all decisions are final."""
        return False

    @property
    def decided(self) -> torch.Tensor:
        """Blocks that run (L,) bool, by their gates."""
        if self.runs is not None:
            return self.runs
        if self.settings.gates == "soft_l0":  # its skip logit never moves
            return keep_weight(self.gates, self.gates, "soft_l0", self.eps)[0] >= 0.5
        return self.gates[:, 1] > self.gates[:, 0]

    @property
    def patches(self) -> torch.Tensor:
        """Patches that stay (P,) bool, at least one; none where tokens are not gated."""
        stays = self.token_gates >= 0
        if len(stays) and not stays.any():
            stays[self.token_gates.argmax()] = True
        return stays

    @property
    def tokens(self) -> int | None:
        """Tokens in blocks, by the patches that stay; None where tokens are not gated."""
        return self.resource.prefix + int(self.patches.sum()) if self.resource.patches else None

    @property
    def _tokens_in_resource(self) -> float | None:
        """N of R."""
        return self.resource.prefix + float(self.token_gates.sigmoid().sum()) if self.resource.patches else None

    @property
    def eta(self) -> float:
        """Step size eta of the shrinking."""
        return 1e-4 if self.settings.eta is None else self.settings.eta

    @property
    def zlr(self) -> float:
        """Step size of z in this epoch."""
        rates = self.settings.zlr or (1.0,)
        return rates[min(max(self.epoch - 1, 0) // self.settings.zlr_epochs, len(rates) - 1)]

    def start_epoch(self) -> None:
        """Begin an epoch: drop gate gradients of an unfinished interval and, after the warm-up, reduce eps."""
        self.epoch += 1
        self.pending.zero_()
        self.collected = 0
        if self.epoch > self.settings.warmup_epochs:
            self.eps *= self.settings.eps_decay

    def shrink(self, norms: Norms, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the factors that shrink what is to go: (L, H, d) for attention columns, (L, D) for MLP columns.

        A factor is 1 / ((1 + 2 eta p) (1 + 2 eta y)): the exact proximal map of eta p |column|^2, then of
        eta y |column|^2, p and y being 0 where a column is not to go.
        """
        channels = torch.where(weakest(norms.columns, self.r), 1 + 2 * eta * self.p[..., None], 1.0)
        heads = torch.where(weakest(norms.heads, self.s[:, 0]), 1 + 2 * eta * self.y[:, :1], 1.0)
        units = torch.where(weakest(norms.mlp, self.s[:, 1]), 1 + 2 * eta * self.y[:, 1:], 1.0)
        return 1 / (channels * heads[..., None]), 1 / units

    def update(
        self,
        norms: Norms,
        gate_gradient: torch.Tensor,
        noise: torch.Tensor,
        token_gradient: torch.Tensor | None = None,
    ) -> None:
        """Move counts, gates and multipliers by one step, after the weights have been updated and shrunk.

        Args:
            norms: of the weights as they are now.
            gate_gradient: (L, 2), of the task alone.
            noise: (3, L, 2) Gumbel noise of the forward pass and of two evaluations of R.
            token_gradient: (P,), of the task alone, where tokens are gated.
        """
        used, slopes = self._usage(norms, noise[1])
        self.resource_used = used.value
        band = self.settings.resource_band
        push = self.z if band is None or abs(used.value - self.settings.budget) <= band else torch.zeros_like(self.z)
        least = torch.stack([next_least(norms.heads, self.s[:, 0]), next_least(norms.mlp, self.s[:, 1])], 1)
        decay, ends = self.settings.sl2wd, self.s_max.round() + 1
        s_gradient = self.y * least + decay * self.s / ends + push * used.s
        r_gradient = self.p * next_least(norms.columns, self.r) + decay * self.r / (self.r_max.round() + 1)
        self._move_gates(gate_gradient + push * self.settings.gating_weight * used.pi[:, None] * slopes)
        self.s = self._moved(self.s, s_gradient, self.settings.slr, self.s_max)
        self.r = self._moved(self.r, r_gradient + push * used.r, self.settings.rlr, self.r_max)
        if token_gradient is not None:
            self._step_tokens(token_gradient, float(push) * used.tokens)
        self._ascend(norms, noise[2])

    def _step_tokens(self, gradient: torch.Tensor, price: float) -> None:
        """Move token gates down the gradient; ``price`` is the loss that a token's MACs are worth."""
        keep = self.token_gates.sigmoid()
        cost = self.settings.token_weight * price + self.settings.token_l1
        lr = 0.01 if self.settings.token_lr is None else self.settings.token_lr
        self.token_gates = self.token_gates - lr * (gradient + cost * keep * (1 - keep))

    def _usage(self, norms: Norms, noise: torch.Tensor) -> tuple[Usage, torch.Tensor]:
        """Compute R at a sample of the gates, and the derivatives of the keep weights."""
        if self.runs is not None:
            pi, slopes = self.runs.double(), torch.zeros_like(self.gates)
        else:
            pi, slopes = keep_weight(self.gates, noise, self.settings.gates, self.eps)
        going = norms.going(self.s[:, 0])
        return self.resource(self.s, self.r, pi, going, self._tokens_in_resource), slopes

    def _moved(self, x: torch.Tensor, gradient: torch.Tensor, lr: float | None, top: torch.Tensor) -> torch.Tensor:
        """Take a projected gradient step of s or r; the whole tensor's largest entry scales it."""
        over, under = x >= top, x <= 0
        gradient = torch.where(over, gradient.clamp(min=0), torch.where(under, gradient.clamp(max=0), gradient))
        gradient = torch.where(top > 0, gradient, 0.0)  # what stays whole scales no other
        gradient = gradient * min(1.0, 1 / (float(gradient.abs().max()) + 1e-6))
        x = x - (0.02 if lr is None else lr) * gradient
        if self.settings.sticky_upper_bound:
            return torch.where(over, top, x.clamp(min=0))
        return torch.minimum(x.clamp(min=0), top)

    def _move_gates(self, gradient: torch.Tensor) -> None:
        interval = self.settings.gating_interval
        rising = self.settings.gate_weighting == "rising"
        self.pending += gradient * (self.step % interval if rising else 1)
        self.collected += 1
        if self.runs is None and (self.step + 1) % interval == 0:
            self._step_gates(self.pending / self.collected)
            self.pending.zero_()
            self.collected = 0

    def _step_gates(self, gradient: torch.Tensor) -> None:
        self.momentum = 0.9 * self.momentum + gradient + 1e-4 * self.gates
        self.gates = self.gates - (0.1 if self.settings.glr is None else self.settings.glr) * self.momentum

    def _ascend(self, norms: Norms, noise: torch.Tensor) -> None:
        """Raise the multipliers by what is violated now."""
        ylr, plr = (1e-4 if rate is None else rate for rate in (self.settings.ylr, self.settings.plr))
        least = torch.stack([least_sum(norms.heads, self.s[:, 0]), least_sum(norms.mlp, self.s[:, 1])], 1)
        self.y = self.y + ylr * least
        self.p = self.p + plr * least_sum(norms.columns, self.r)
        excess = self._usage(norms, noise)[0].value - self.settings.budget
        self.z = (self.z + self.zlr * excess).clamp(0, self.settings.z_max)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: tensors and numbers."""
        numbers = {name: getattr(self, name) for name in self._numbers()}
        return {name: getattr(self, name).clone() for name in self._tensors()} | numbers

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s form."""
        for name in self._tensors():
            setattr(self, name, state[name].clone())
        for name in self._numbers():
            setattr(self, name, state[name])

    def _tensors(self) -> tuple[str, ...]:
        return self.TENSORS + (self.TOKEN_TENSORS if self.resource.patches else ())

    def _numbers(self) -> tuple[str, ...]:
        return ("collected", "eps", "step", "epoch", "resource_used")
