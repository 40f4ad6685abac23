"""UVC's joint training as a hook: heads, value channels, MLP units and whole blocks go under one budget.

Source: Yu et al., "Unified Visual Transformer Compression", ICLR 2022 (openreview 9jsZiUgkCZP), first stage; the
second is ordinary finetuning of the cut model (recipe ``uvc_stage2``). Weights train on behind random block gates;
after every update the units to go are shrunk, and the counts, gates and multipliers make a step
(``pruners.uvc.primal_dual``, ``pruners.uvc.control``). At the end the decision is brought within its budget, by exact
MACs (``pruners.uvc.decide``).

With ``token_gates`` patches go, too. The released code has gates of patches that it never removes; here those whose
gates close leave every block, from then on and in what comes out, as a token plan. They still pass blocks by, and are
still embedded, which is counted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import PatchDropout
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, block_views, cost, cut
from prunesweep.models.families import FamiliesWith, family_of
from prunesweep.pruners.hook import Collapsed, Hook
from prunesweep.pruners.served import UVC as FAMILIES
from prunesweep.pruners.snapshot import Snapshot

from .control import NormalizedPrimalDual
from .decide import Counts, Decider, Widths
from .gate import CONTROL, GatedBlock, TokenGates
from .primal_dual import Norms, PrimalDual
from .resource import Resource
from .settings import UVCSettings

__all__ = ["FAMILIES", "UVC", "UVCSettings"]

TOKEN_FAMILIES = FamiliesWith("tokens", "global_attention")  # of those, with ``token_gates``


class UVC(Hook):
    """Prunes a model while it trains; ``finish`` returns one ``Snapshot`` per budget, in MACs, the largest first.

    The run aims at the smallest budget, whose snapshot is its end. A larger one is taken where the decision first comes
    within it. With ``skip`` or ``skip_count`` the blocks that run are given, and widths are solved for what is left.

    Where blocks differ, as those of Swin and PVTv2, which the paper does not have, a unit's price is that of its own
    block, and every stage keeps a block. Blocks of any family are gated, shrunk and cut alike.

    Where attention maps of heads are mixed (CaiT), heads stay whole: one whose own output has gone still gives to
    others. Value channels, MLP units and blocks go as elsewhere.

    Every rank of a process group takes the decisions of the first; gates have the same noise on all of them.

    Args:
        settings: see ``UVCSettings``.
    """

    def __init__(self, settings: UVCSettings | None = None) -> None:
        self.settings = settings or UVCSettings()
        self.budgets = tuple(sorted(set(self.settings.budgets), reverse=True))
        self.snapshots: list[Snapshot] = []
        self._tokens: TokenGates | None = None
        self._facts: dict[str, float | str] = {}

    @property
    def facts(self) -> Mapping[str, float | str]:
        """Facts about the decision: R, exact share of MACs, blocks that run, heads and units; tokens, if gated.

        ``uvc_R`` is by the paper's count; of models of several stages or with windows, which it does not know, by the
        exact one.
        """
        return self._facts

    def wrap(self, model: nn.Module) -> None:
        """Put every block behind a gate.

        Raises:
            UserError: of another family, blocks without attention or MLP, a budget that no widths can meet.
        """
        self.model, self.arch = model, arch_of(model)
        _check_served(self.arch)
        if self.settings.token_gates:
            _check_tokens(self.arch, model)
        runs = _explicit_skip(self.settings, self.arch)
        self._check_budgets(runs)
        gated = self.settings.token_gates
        resource = Resource.of(self.arch, self.settings.resource, tokens=gated)
        paper = "paper" if family_of(self.arch).supports("isotropic") else "exact"
        self._paper = Resource.of(self.arch, paper, tokens=gated)
        kind = NormalizedPrimalDual if self.settings.steps == "normalized" else PrimalDual
        self.machine = kind(resource, self.settings, None if runs is None else torch.tensor(runs))
        like, depth = next(model.parameters()), self.arch.depth
        self._control = like.new_zeros(depth, len(CONTROL)).detach()
        frozen = [None] * depth if runs is None else runs
        if gated:
            self._tokens = TokenGates(model.get_submodule("patch_embed"), resource.patches, resource.prefix)
        self._gated, self._projections = [], []
        for view, row, own in zip(block_views(model, self.arch), self._control, frozen, strict=True):
            assert view.attention is not None, "see _check_served"
            assert view.mlp is not None
            self._projections.append((view.attention.out.layer, view.mlp.out.layer))
            self._gated.append(
                GatedBlock(
                    view.module,
                    view.attention,
                    view.mlp,
                    row,
                    self.settings.gates,
                    frozen_as=own,
                    tokens=self._tokens,
                )
            )
        self._place(self._gated)
        if self._tokens is not None:
            model.add_module("token_gates", self._tokens)
        self._record(self.norms())
        self._set_control()

    def _place(self, blocks: Sequence[nn.Module]) -> None:
        """Put blocks where the model has its own."""
        left, name = iter(blocks), family_of(self.arch).stages_name
        stages: Any = getattr(self.model, name) if name else [self.model]
        for stage, record in zip(stages, self.arch.stages, strict=True):
            own = list(islice(left, len(record.blocks)))
            stage.blocks = nn.ModuleList(own) if isinstance(stage.blocks, nn.ModuleList) else nn.Sequential(*own)

    def _check_budgets(self, runs: list[bool] | None) -> None:
        total = cost(self.arch).macs
        ones = Norms.of(
            [torch.ones(block.heads, block.v_widths[0]) for block in self.arch.blocks],
            [torch.ones(block.mlp) for block in self.arch.blocks],
        )
        gates = torch.zeros(self.arch.tokens - self.arch.prefix_tokens) if self.settings.token_gates else None
        decider = self._decider(ones, gates, patches=1)
        alive = _cheapest(decider, self.arch) if runs is None else runs
        least = decider.least(alive)
        if least > self.budgets[-1] * total:
            blocks, own = sum(alive), least - decider.outside
            raise UserError(
                f"budget = {self.budgets[-1]:g} of {total:,} MACs is {self.budgets[-1] * total:,.0f}, but {blocks} "
                f"blocks at their narrowest have {least:,}: {decider.outside:,} outside of the blocks and {blocks} x "
                f"{own // blocks:,} on average. Raise the budget above {least / total:.4f}, skip more blocks, or let "
                "widths become smaller (r_mode, mlp_align)"
            )

    def check_length(self, epochs: int, updates: int) -> None:
        """Warn where the target is still on its way when training ends: the rest is then cut at once."""
        ramp, deciding = self.settings.ramp_steps, max(epochs - self.settings.warmup_epochs, 0) * updates
        if deciding < ramp:
            warnings.warn(
                f"ramp_steps = {ramp:,}: so many updates lead down to the budget, and {deciding:,} of this training "
                f"decide ({epochs} epochs of {updates:,}, warmup_epochs = {self.settings.warmup_epochs}); the rest is "
                f"cut at once at the end. Set ramp_steps to half of them, {max(deciding // 2, 1):,}, or train longer",
                stacklevel=2,
            )

    def start_epoch(self) -> None:
        self.machine.start_epoch()
        self._set_control()

    @property
    def _warm(self) -> bool:
        return self.machine.epoch <= self.settings.warmup_epochs

    @torch.no_grad()
    def after_step(self) -> None:
        """Shrink the units to go, then move counts, gates and multipliers."""
        machine, noise = self.machine, self._noise()
        machine.step += 1
        if not self._warm:
            norms, gradient, tokens = self._agreed()
            if self.settings.gates_in_weight_optimizer and machine.runs is None:
                machine.gates = torch.stack([g.gate.detach() for g in self._gated]).double().cpu()
            whole = self._finite(norms) and gradient.isfinite().all() and tokens.isfinite().all()
            if whole:  # else the loop finds the loss diverged
                norms, settled = self._shrink(norms), machine.settled
                machine.update(norms, gradient, noise, tokens if len(tokens) else None)
                if machine.settled and not settled:
                    self._settle(norms)
            self._record(norms)
            self._watch(norms)
        self._set_control()

    def finish(self) -> tuple[Snapshot, ...]:
        """Return the snapshots, largest budget first; the model has its own blocks again, unmasked."""
        norms = self.norms()
        while len(self.snapshots) < len(self.budgets):
            self.snapshots.append(self._snapshot(self.budgets[len(self.snapshots)], norms))
        self._place([gated.release() for gated in self._gated])
        if self._tokens is not None:
            self._tokens.release()
            del self.model.token_gates
        return tuple(self.snapshots)

    def _agreed(self) -> tuple[Norms, torch.Tensor, torch.Tensor]:
        """Return norms and the clipped gradients of block gates (L, 2) and token gates (P,), none where there are none.

        They are the first rank's on every rank, to the last bit.
        """
        norms = self.norms()
        grads = [g.gate.new_zeros(2) if g.gate.grad is None else g.gate.grad for g in self._gated]
        gradient, tokens = torch.stack(grads).double().cpu(), torch.zeros(0, dtype=torch.float64)
        if self._tokens is not None:
            own = self._tokens.gate
            tokens = (torch.zeros_like(own) if own.grad is None else own.grad).double().cpu()
        if dist.is_available() and dist.is_initialized():
            parts = [norms.columns, norms.mlp, gradient, tokens]
            device = next(self.model.parameters()).device
            flat = torch.cat([part.flatten() for part in parts]).to(device)
            dist.broadcast(flat, src=0)
            split = torch.split(flat.cpu(), [part.numel() for part in parts])
            columns, mlp, gradient, tokens = (own.view_as(part) for own, part in zip(split, parts, strict=True))
            norms = Norms(columns, mlp)
        return norms, gradient, tokens

    @torch.no_grad()
    def norms(self) -> Norms:
        """Compute the norms of the weights as they are, with one transfer."""
        proj, fc2 = self._weights()
        sums = [w.double().square().sum(0) for w in (*proj, *fc2)]
        parts = torch.split(torch.cat(sums).cpu(), [len(own) for own in sums])
        columns = [own.view(block.heads, -1) for own, block in zip(parts, self.arch.blocks, strict=False)]
        return Norms.of(columns, parts[len(columns) :])

    def _finite(self, norms: Norms) -> bool:
        """Whether all norms are numbers; what a block does not have is infinite."""
        have = [sum(block.total_v for block in self.arch.blocks), sum(block.mlp for block in self.arch.blocks)]
        return [int(part.isfinite().sum()) for part in (norms.columns, norms.mlp)] == have

    def _weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """List the weights of all attention projections and of all second MLP layers."""
        return [proj.weight for proj, _ in self._projections], [fc2.weight for _, fc2 in self._projections]

    def _shrink(self, norms: Norms) -> Norms:
        columns, units = self.machine.shrink(norms, self.machine.eta)
        proj, fc2 = self._weights()
        for block, into, out, own_columns, own_units in zip(self.arch.blocks, proj, fc2, columns, units, strict=True):
            into.mul_(own_columns[: block.heads, : block.v_widths[0]].flatten().to(into))
            out.mul_(own_units[: block.mlp].to(out))
        return norms.scaled(columns, units)

    def _noise(self) -> torch.Tensor:
        """Draw (3, L, 2) Gumbel noise of the next update, for forward pass, R and R, from seed and step alone."""
        generator = np.random.default_rng([self.settings.seed, self.machine.step])
        return torch.from_numpy(generator.gumbel(size=(3, self.arch.depth, 2)))

    @torch.no_grad()
    def _set_control(self) -> None:
        """Set how gates act in the next forward pass."""
        machine = self.machine
        control = torch.zeros(self._control.shape, dtype=torch.float64)
        control[:, :2] = self._noise()[0]
        control[:, 2] = float(not (self._warm or machine.settled))
        control[:, 3] = 0.5 if self._warm else machine.decided.double()
        control[:, 4] = machine.eps
        self._control.copy_(control)
        for gated, gate in zip(self._gated, machine.gates.to(self._control), strict=True):
            gated.gate.copy_(gate)
        if self._tokens is not None:
            self._tokens.gate.copy_(machine.token_gates)
            self._tokens.soft.fill_(float(not machine.settled))
            self._tokens.keep[self.arch.prefix_tokens :].copy_(machine.patches)

    def _counts(self, norms: Norms) -> Counts:
        return Counts.of(self.machine, norms, r_mode=self.settings.r_mode, mlp_align=self.settings.mlp_align)

    def _record(self, norms: Norms) -> None:
        """Show the current decision to evaluation and to ``facts``."""
        machine, runs = self.machine, self.machine.decided
        counts = self._counts(norms)
        masks = counts.masks(norms)
        for gated, run, v, mlp in zip(self._gated, runs, *masks, strict=True):
            gated.runs.copy_(run)
            gated.v_keep.copy_(v)
            gated.mlp_keep.copy_(mlp)
        decided = self._paper(machine.s, machine.r, runs.double(), norms.going(machine.s[:, 0]), machine.tokens).value
        self._facts = {
            "uvc_R": decided,
            "macs": counts.macs(self.arch, runs) / cost(self.arch).macs,
            "skip": "".join("01"[int(run)] for run in runs),
            "heads": int((counts.heads * runs).sum()),
            "mlp": int((counts.mlp * runs).sum()),
        }
        if machine.tokens is not None:
            self._facts["tokens"] = machine.tokens

    def _watch(self, norms: Norms) -> None:
        """Take snapshots on the way down; stop a run that has fallen through."""
        share = float(self._facts["macs"])
        while len(self.snapshots) < len(self.budgets) - 1 and share <= self.budgets[len(self.snapshots)]:
            self.snapshots.append(self._snapshot(self.budgets[len(self.snapshots)], norms))
        if share < self.settings.collapse * self.budgets[-1] and self.machine.runs is None:
            raise Collapsed(
                f"the decision has {share:.3f} of the source's MACs at update {self.machine.step}, below "
                f"{self.settings.collapse:g} x budget {self.budgets[-1]:g} (blocks {self._facts['skip']}): lower "
                "gating_weight, glr or zlr, or raise ramp_steps; the state of the last whole epoch is kept"
            )

    def _settle(self, norms: Norms) -> None:
        """Fix a decision within the smallest budget to the unit; the rest of the run trains just that."""
        assert isinstance(self.machine, NormalizedPrimalDual)
        widths, runs, decider = self._fit(self.budgets[-1], norms)
        pairs = list(zip(self.arch.blocks, widths, strict=True))
        s = torch.tensor([[block.heads - own.heads, block.mlp - own.mlp] for block, own in pairs])
        r = torch.zeros_like(self.machine.r)
        for row, (block, own) in zip(r, pairs, strict=True):
            row[: block.heads] = block.v_widths[0] - torch.tensor(own.v)
        patches = None
        if self._tokens is not None:
            patches = torch.zeros_like(self.machine.patches)
            patches[decider.kept_patches] = True
        self.machine.settle(s, r, torch.tensor(runs), patches)

    def _fit(self, budget: float, norms: Norms) -> tuple[list[Widths], list[bool], Decider]:
        """Bring the current decision within ``budget``, a share of the source's MACs."""
        gates, learned = self.machine.gates, self.machine.runs is None
        decider = self._decider(norms, self.machine.token_gates, int(self.machine.patches.sum()))
        order = (gates[:, 1] - gates[:, 0]).argsort(stable=True).tolist() if learned else ()
        widths, runs = decider.widths(self._counts(norms)), self.machine.decided.tolist()
        return *decider.fit(widths, runs, budget * cost(self.arch).macs, order), decider

    def _decider(self, norms: Norms, token_gates: torch.Tensor | None, patches: int) -> Decider:
        return Decider(
            self.arch,
            norms,
            r_mode=self.settings.r_mode,
            mlp_align=self.settings.mlp_align,
            token_gates=token_gates,
            patches=patches,
        )

    def _snapshot(self, budget: float, norms: Norms) -> Snapshot:
        widths, runs, decider = self._fit(budget, norms)
        decision = decider.cut(widths, runs)
        with self._stock_blocks():
            small = cut(self.model, decision)
        return Snapshot(
            budget * cost(self.arch).macs, cost(arch_of(small)).macs, self.machine.step, decision, small.cpu().eval()
        )

    @contextlib.contextmanager
    def _stock_blocks(self) -> Iterator[None]:
        """Take the gates out of the model within the context."""
        self._place([own.block for own in self._gated])
        if self._tokens is not None:
            del self.model.token_gates
        try:
            yield
        finally:
            self._place(self._gated)
            if self._tokens is not None:
                self.model.add_module("token_gates", self._tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump_json(),
            "machine": self.machine.state_dict(),
            "facts": dict(self._facts),
            "snapshots": [snapshot.state_dict() for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume a run. Raises UserError where the state is of a run with other settings."""
        if UVCSettings.model_validate_json(state["settings"]) != self.settings:
            raise UserError(
                f"uvc: the run to go on with has the settings {state['settings']}; use these, or start a run of its own"
            )
        self.machine.load_state_dict(state["machine"])
        self._facts = dict(state["facts"])
        cfg, whole = getattr(self.model, "pretrained_cfg", None), cost(self.arch).macs
        self.snapshots = [
            Snapshot.restore(saved, budget * whole, self.arch, cfg)
            for budget, saved in zip(self.budgets, state["snapshots"], strict=False)
        ]
        self._set_control()


def _check_served(arch: Arch) -> None:
    if arch.family not in FAMILIES:
        why = FAMILIES.why_not(arch.family)
        raise UserError(f"{arch.source} is of family {arch.family!r}: UVC prunes families {', '.join(FAMILIES)}; {why}")
    for i, block in enumerate(arch.blocks):
        wide = block.v == block.qk * arch.qk_rows
        if block.mixer != "attn" or not wide or not block.mlp or block.tokens is not None:
            raise UserError(
                f"blocks[{i}] of {arch.source}: UVC needs blocks with attention whose values are as wide as its "
                "queries, an MLP, and all tokens"
            )
    if arch.attn_norm or arch.mlp_norm:
        where = "value channels" if arch.attn_norm else "hidden units"
        raise UserError(
            f"{arch.source} has a norm over the {where} of a block: those that UVC shrinks to nothing still count in "
            "it, so what is cut would be another function. Use a method that scores once, as subspaces or taylor"
        )


def _check_tokens(arch: Arch, model: nn.Module) -> None:
    given = "token_gates = True"
    if arch.family not in TOKEN_FAMILIES:
        able = ", ".join(name for name in FAMILIES if name in TOKEN_FAMILIES)
        raise UserError(
            f"{given}: {arch.source} is of family {arch.family!r}, and tokens leave blocks of families {able} alone; "
            f"{TOKEN_FAMILIES.why_not(arch.family)}. Leave it out"
        )
    if isinstance(getattr(model, "patch_drop", None), PatchDropout):
        raise UserError(f"{given}: {arch.source} leaves patches out at random; create it without patch_drop_rate")
    if getattr(model, "dynamic_img_size", False):
        raise UserError(f"{given}: patches of one grid are gated; create {arch.source} without dynamic_img_size")


def _explicit_skip(settings: UVCSettings, arch: Arch) -> list[bool] | None:
    """Return which blocks run, where that is given."""
    if settings.skip is not None:
        if len(settings.skip) != arch.depth:
            raise UserError(f"skip = {settings.skip!r}: has {len(settings.skip)} digits for {arch.depth} blocks")
        return _every_stage([digit == "1" for digit in settings.skip], arch, f"skip = {settings.skip!r}")
    if settings.skip_count is None or settings.skip_order is None:
        return None
    order = settings.skip_order
    if len(set(order)) != len(order) or not all(0 <= b < arch.depth for b in order):
        raise UserError(f"skip_order = {list(order)}: must name some of the blocks 0..{arch.depth - 1}, each once")
    if settings.skip_count >= arch.depth:
        raise UserError(f"skip_count = {settings.skip_count}: at least one of {arch.depth} blocks must run")
    runs = [b not in order[: settings.skip_count] for b in range(arch.depth)]
    return _every_stage(runs, arch, f"skip_count = {settings.skip_count}, skip_order = {list(order)}")


def _every_stage(runs: list[bool], arch: Arch, given: str) -> list[bool]:
    """Return ``runs``. Raises UserError where a stage would have no block."""
    left = iter(runs)
    for s, stage in enumerate(arch.stages):
        if not any(list(islice(left, len(stage.blocks)))):
            raise UserError(f"{given}: leaves no block of stage {s}; every stage of {arch.source} needs one")
    return runs


def _cheapest(decider: Decider, arch: Arch) -> list[bool]:
    """Return which blocks run where every stage has the one alone that is cheapest at its narrowest."""
    alone = [decider.least([b == own for b in range(arch.depth)]) for own in range(arch.depth)]
    best = {
        min((alone[b], b) for b, own in enumerate(decider.stage_of) if own == s)[1] for s in range(len(arch.stages))
    }
    return [b in best for b in range(arch.depth)]
