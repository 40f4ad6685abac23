"""NViT's iterative pruning as a training hook: one run gives a series of ever smaller models.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
sections 3 and 4, and the code that its published models were made with. Weights train on while groups of units go:
saliency is gathered at every optimizer step, and every ``interval`` steps the lowest groups of the whole network are
zeroed for good. Where the cost passes a budget, what is left is cut out and kept; of the groups of that step, only as
much goes as the budget asks for (``fill``).

Different from that code: the average starts from the first saliency instead of zero, weights enter as they are when the
gradient is taken, LayerNorms average over kept channels, the cost that ends the run is that of the current widths, and
no step removes more than its share (``schedule``). ``layer_norm="full"`` and ``schedule="reference"`` give two of these
back. There a snapshot has lost all groups of its step, which ``exact=False`` gives back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, cut
from prunesweep.models.latency.table import LatencyTable
from prunesweep.pruners.fill import fill
from prunesweep.pruners.hook import Hook
from prunesweep.pruners.masking import Masking
from prunesweep.pruners.measures import MACS, Measure, latency
from prunesweep.pruners.narrowing import Narrowing
from prunesweep.pruners.ranked import Ranked
from prunesweep.pruners.reached import meets
from prunesweep.pruners.scores import kind_of, vector_sizes
from prunesweep.pruners.snapshot import Snapshot

from .saliency import divisors, raw_saliency
from .schedule import (
    FAMILIES,
    KINDS,
    NVIT_GROUPS,
    Grouping,
    Step,
    adjust,
    cut_of,
    dims_of,
    live_step,
    narrow,
    reference_step,
    total_cost,
    unit_gains,
)

__all__ = ["NViTPruning"]


class NViTPruning(Hook):
    """Prunes a ViT or Swin while it trains; ``finish`` returns one ``Snapshot`` per budget that was reached.

    Training ends with the last budget. Where it is too short for that, the snapshots are fewer than the budgets.

    Args:
        budgets: costs to reach, in the unit of ``measure``, in any order.
        measure: ``MACS``, ``PARAMS``, or a latency table, whose unit is milliseconds per batch.
        eta: how much a unit's cost weighs against its saliency; 0 prunes by saliency alone.
        eta_unit: ``relative``: saliency in shares of all units' at the first pruning step, cost in shares of the
            source's; ``absolute``: as they are, so that loss, batch size and measure set the scale (NViT: 5e-4 with
            seconds per batch of 256, which is 5e-7 with milliseconds).
        interval: optimizer steps between pruning steps.
        groups_per_step: groups that one pruning step removes.
        schedule: ``live`` ranks what is left; ``reference`` ranks, cumulatively, all there was.
        groups: units per group of every kind; 0 leaves the kind whole.
        floors: share of every vector of a kind that stays; one group always does.
        momentum: of the average of saliency over pruning steps; 0 takes the last interval's alone.
        divide: D of some kinds in place of ``nvit.divisors``; a larger one makes a kind go sooner.
        layer_norm: ``kept`` averages over kept channels, which makes the masked model and its cut the same function;
            ``full`` averages over all, so that a snapshot is another function than the model that was trained.
        distill_first: distil in the first interval too, in which the student is (nearly) its own teacher.
        exact: a snapshot loses only as much of its step's groups as its budget asks for; otherwise all of them.
        eval_once_pruned: keep the model in eval mode (no stochastic depth) from the first pruning step on.

    Raises:
        UserError: a setting is impossible.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        *,
        measure: Measure | LatencyTable = MACS,
        eta: float = 1.0,
        eta_unit: str = "relative",
        interval: int = 100,
        groups_per_step: int = 2,
        schedule: str = "live",
        groups: Mapping[str, int] = NVIT_GROUPS,
        floors: Mapping[str, float] = MappingProxyType({}),
        momentum: float = 0.9,
        divide: Mapping[str, float] = MappingProxyType({}),
        layer_norm: str = "kept",
        distill_first: bool = False,
        exact: bool = True,
        eval_once_pruned: bool = True,
    ) -> None:
        _among("eta_unit", eta_unit, ("relative", "absolute"))
        _among("schedule", schedule, ("live", "reference"))
        _among("layer_norm", layer_norm, ("kept", "full"))
        _check("budgets", list(budgets), bool(budgets) and min(budgets) > 0, "at least one, all above 0")
        _check("eta", eta, 0 <= eta < math.inf, "at least 0")
        _check("interval", interval, interval >= 1, "at least 1 optimizer step")
        _check("groups_per_step", groups_per_step, groups_per_step >= 1, "at least 1")
        _check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        right = set(divide) <= set(KINDS) and all(d > 0 for d in divide.values())
        _check("divide", dict(divide), right, f"numbers above 0 for some of {', '.join(KINDS)}")
        self.budgets = tuple(sorted(set(budgets), reverse=True))
        self.measure, self.eta, self.eta_unit = measure, eta, eta_unit
        self.interval, self.groups_per_step, self.schedule = interval, groups_per_step, schedule
        self.grouping, self.momentum, self.divide = Grouping(groups, floors), momentum, divide
        self.layer_norm, self.distill_first, self.eval_once_pruned = layer_norm, distill_first, eval_once_pruned
        self.exact = exact
        self.keep: dict[str, torch.Tensor] = {}  # bool masks by vector
        self.scores: dict[str, torch.Tensor] = {}  # the average over pruning steps; empty before the first
        self.snapshots: list[Snapshot] = []
        self.last_step: Step | None = None
        self._rate: float | None = eta if eta_unit == "absolute" else None
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = self._prunings = 0

    @property
    def done(self) -> bool:
        """Whether the last budget is reached."""
        return len(self.snapshots) == len(self.budgets)

    def wrap(self, model: nn.Module) -> None:
        """Take the model, with all of its units.

        Raises:
            UserError: of another family, with ragged heads, within the first budget already, or never within the last.
        """
        self.model, self.arch = model, arch_of(model)
        if self.arch.family not in FAMILIES:
            able = ", ".join(FAMILIES)
            raise UserError(f"{self.arch.source} is of family {self.arch.family!r}: NViT prunes families {able}")
        self._full = vector_sizes(self.arch, KINDS)
        whole = total_cost(self.measure, self.arch)
        least = total_cost(self.measure, narrow(self.arch, self.grouping.narrowest(self._full)))
        if not least <= self.budgets[-1] or not self.budgets[0] < whole:
            raise UserError(
                f"budgets = {list(self.budgets)}: must lie below {whole:.6g}, the cost of {self.arch.source}, and not "
                f"below {least:.6g}, that of its narrowest form with these groups and floors"
            )
        self._divisors = divisors(self.arch) | dict(self.divide)
        self.keep = {name: torch.ones(size, dtype=torch.bool) for name, size in self._full.items()}
        self._masking = Masking(model, self.arch, kept_norms=self.layer_norm == "kept")

    def start_epoch(self) -> None:
        if self.eval_once_pruned and self._prunings:
            self.model.eval()

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        undistilled = "kd_loss" in terms and not self._prunings and not self.distill_first
        return terms["task_loss"] if undistilled else terms["loss"]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add (raw / D)^2 of w and dL/dw as they are now; what is pruned gets no gradient."""
        for name, raw in raw_saliency(self.model, self.arch).items():
            squared = (raw.double() / self._divisors[kind_of(name)]) ** 2
            self._sums[name] = self._sums[name] + squared if name in self._sums else squared
        self._masking.zero_gradients()

    def after_step(self) -> None:
        """Zero again what is pruned; at the end of an interval, prune and look at the budgets."""
        self._masking.zero_weights()
        self._steps += 1
        if self._steps % self.interval or self.done:
            return
        self._average()
        before = self.keep
        self._choose()
        cost = total_cost(self.measure, self._narrowed(self.keep))
        for budget in self.budgets[len(self.snapshots) :]:
            if cost <= budget:
                self.snapshots.append(self._snapshot(budget, cost, before))
        self._masking.set(self.keep)
        if self.eval_once_pruned:
            self.model.eval()

    def finish(self) -> tuple[Snapshot, ...]:
        """Return the snapshots, largest budget first.

        The model keeps its full size, and its zeros, with stock LayerNorms.
        """
        self._masking.remove()
        return tuple(self.snapshots)

    def check_length(self, epochs: int, updates: int) -> None:
        """Raise UserError where even the costliest groups of all do not reach the last budget in time."""
        if self.schedule != "live":
            return  # a step may remove many more groups than its share
        needed = self.fewest_updates
        if epochs * updates >= needed:
            return
        longer, share = -(-needed // max(updates, 1)), self.budgets[-1] / total_cost(self.measure, self.arch)
        raise UserError(
            f"budget = {share:.3g} of the source's cost: takes at least {needed:,} updates, {self.groups_per_step} "
            f"groups every {self.interval}; {epochs} epochs have {epochs * updates:,}. Train at least {longer} epochs, "
            "or set a smaller interval or more groups_per_step"
        )

    @property
    def fewest_updates(self) -> int:
        """Count the optimizer steps to the last budget if the groups that save most go first."""
        model = Narrowing(self.arch, self._cost)
        left = {name: self.grouping.removable(name, n, n) for name, n in self._full.items()}
        gains = {name: model.gain(name, self.grouping.size(name)) for name, many in left.items() if many}
        count = 0
        while model.total > self.budgets[-1] and gains:
            name = max(gains, key=gains.__getitem__)
            model.remove(name, self.grouping.size(name))
            left[name] -= 1
            count += 1
            for other in (name, *model.affected(name)):
                if other in gains:
                    gains[other] = model.gain(other, self.grouping.size(other)) if left[other] else -math.inf
        return -(-count // self.groups_per_step) * self.interval

    @property
    def _cost(self) -> Measure:
        return latency(self.measure, self.arch) if isinstance(self.measure, LatencyTable) else self.measure

    def _narrowed(self, keep: Mapping[str, torch.Tensor]) -> Arch:
        return narrow(self.arch, dims_of(keep))

    def _average(self) -> None:
        """Fold the interval's mean saliency into the average, and start a new interval."""
        mean = torch.cat([self._sums[name] for name in self.keep]) / self.interval
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(mean, src=0)  # gradients are averaged over ranks, but decisions must agree to the last bit
        for name, own in zip(self.keep, torch.split(mean.cpu(), list(self._full.values())), strict=True):
            before = self.scores.get(name)
            self.scores[name] = own if before is None else self.momentum * before + (1 - self.momentum) * own
        self._sums = {}

    def _choose(self) -> None:
        """Take the next step's groups out of ``keep``."""
        if self._rate is None:
            everything = float(torch.cat(list(self.scores.values())).sum())
            self._rate = self.eta * everything / total_cost(self.measure, self.arch)
        gains = unit_gains(self.measure, self._narrowed(self.keep), self._full, self.grouping)
        adjusted = adjust(self.scores, self.keep, gains, self._rate)
        if self.schedule == "live":
            step = live_step(adjusted, self.keep, self.grouping, self.groups_per_step)
        else:
            step = reference_step(adjusted, self.keep, self.grouping, self.groups_per_step, self._prunings)
        self.keep = {name: mask.clone() for name, mask in self.keep.items()}
        for group in step.removed:
            self.keep[group.vector][list(group.units)] = False
        self._prunings, self.last_step = self._prunings + 1, step

    def _snapshot(self, budget: float, cost: float, before: Mapping[str, torch.Tensor]) -> Snapshot:
        """Cut out what a budget leaves of ``before``, whose weights the model still has."""
        keep: Mapping[str, torch.Tensor] = self.keep
        hindrance = ""
        if self.exact and not meets(cost, budget):
            keep, cost, hindrance = self._filled(budget, cost, before)
        decision = cut_of(self.arch, keep)
        with self._masking.stock_norms():
            small = cut(self.model, decision)
        return Snapshot(budget, cost, self._steps, decision, small.cpu().eval(), hindrance)

    def _filled(
        self, budget: float, cost: float, before: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], float, str]:
        """Return masks that meet a budget, starting from ``before``, with their cost and what keeps that from it."""
        live = {name: torch.nonzero(mask)[:, 0] for name, mask in before.items()}
        ranked = {}
        for name, units in live.items():
            floor = self.grouping.floor(name, self._full[name])
            ranked[name] = Ranked.of(self.scores[name][units].numpy(), self.grouping.size(name), floor=floor)
        filled = fill(Narrowing(self._narrowed(before), self._cost), ranked, {}, budget)
        if not cost < filled.cost < math.inf:
            return self.keep, cost, filled.hindrance
        keep = {name: mask.clone() for name, mask in before.items()}
        for name, gone in filled.gone.items():
            keep[name][live[name][list(ranked[name].order[:gone])]] = False
        return keep, filled.cost, filled.hindrance

    def state_dict(self) -> dict[str, Any]:
        return {
            "budgets": list(self.budgets),
            "steps": self._steps,
            "prunings": self._prunings,
            "rate": self._rate,
            "keep": self.keep,
            "scores": self.scores,
            "sums": self._sums,
            "snapshots": [snapshot.state_dict() for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume a run. Raises UserError where the state is of another ladder of budgets."""
        if list(state["budgets"]) != list(self.budgets):
            raise UserError(
                f"budgets = {list(self.budgets)}: the run to go on with has {list(state['budgets'])}; use these, or "
                "start a run of its own"
            )
        device = next(self.model.parameters()).device
        self._steps, self._prunings, self._rate = state["steps"], state["prunings"], state["rate"]
        self.keep, self.scores = dict(state["keep"]), dict(state["scores"])
        self._sums = {name: own.to(device) for name, own in state["sums"].items()}
        self._masking.set(self.keep)
        cfg = getattr(self.model, "pretrained_cfg", None)
        self.snapshots = [
            Snapshot.restore(saved, budget, self.arch, cfg)
            for budget, saved in zip(self.budgets, state["snapshots"], strict=False)
        ]


def _among(name: str, value: str, known: Sequence[str]) -> None:
    _check(name, repr(value), value in known, f"one of {', '.join(known)}")


def _check(name: str, value: Any, right: bool, allowed: str) -> None:
    if not right:
        raise UserError(f"{name} = {value}: must be {allowed}")
