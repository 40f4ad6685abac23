"""What every width method must do, whatever it measures; ``tests/pruners/test_contract.py`` runs it for all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import nn

from prunesweep.models import Arch, Cut, arch_of, cost, cut
from prunesweep.pruners import MACS, TOLERANCE, Reached, Scores, WidthMethod, vector_sizes
from prunesweep.pruners.subspaces.widths import can_narrow
from tests.generate import random_arch, random_images, random_model
from tests.oracle import hooks_of

GROUPS = {"embed": 2, "heads": 1, "qk": 2, "v": 2, "dim": 2, "mlp": 3, "sr": 2, "tail": 1}


def source(family: str, seed: int, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """A small model of a family whose heads have one width for queries, keys and values (two channels for a pair)."""
    arch = random_arch(Random(seed), family, ragged=False, missing=False, extras=False)
    stages = tuple(
        dataclasses.replace(
            s, blocks=tuple(dataclasses.replace(b, v=b.qk * arch.qk_rows) if b.heads else b for b in s.blocks)
        )
        for s in arch.stages
    )
    return random_model(dataclasses.replace(arch, stages=stages, **fields), seed, dtype)


def labelled(arch: Arch, seed: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(random_images(arch, seed + i, batch=4, dtype=dtype), torch.arange(4) % arch.num_classes) for i in range(2)]


def kept_units(arch: Arch, decision: Cut) -> dict[str, set[int]]:
    """The units that a decision keeps, by what they are: residual channels, blocks, and each block's own units.

    Channels of heads are counted within a head: all heads of a block keep the same.
    """

    def all_of(size: int, kept: Sequence[int] | None) -> set[int]:
        return set(range(size) if kept is None else kept)

    found = {"blocks": {i for i, choice in enumerate(decision.blocks) if choice.keep}}
    for s, stage in enumerate(arch.stages):
        found[f"stages.{s}.embed"] = all_of(stage.width, decision.embed and decision.embed[s])
    if arch.text is not None:
        for b, width in enumerate(arch.text.tails):
            found[f"bands.{b + 1}.tail"] = all_of(width, decision.tails and decision.tails[b])
    for i, (block, choice) in enumerate(zip(arch.blocks, decision.blocks, strict=True)):
        own: dict[str, set[int]] = {kind: all_of(getattr(block, kind), getattr(choice, kind)) for kind in ("mlp", "sr")}
        for kind in ("qk", "v") if block.mixer == "attn" else ():
            width = getattr(block, kind)
            flat = all_of(block.heads * width, getattr(choice, kind) and itertools.chain(*getattr(choice, kind)))
            own |= {kind: {c % width for c in flat}, "heads": {c // width for c in flat}}
        if block.mixer == "sepconv":
            own["v"] = all_of(block.total_v, choice.v and choice.v[0])
        found |= {f"blocks.{i}.{kind}": units if choice.keep else set() for kind, units in own.items()}
    return found


class PrunerContract:
    """Checks of one pruner on one family, whose record may have other ``fields``."""

    def __init__(self, pruner: WidthMethod, family: str, **fields: Any) -> None:
        self.pruner, self.family = pruner, family
        # most of what the seventh Swin V2 costs are position biases, which subspaces leave as they are
        self.model = source(family, 5 if pruner.projected and family == "swin_v2" else 7, **fields)
        self.arch = arch_of(self.model)
        self.batches = labelled(self.arch, 1)

    def score(self, model: nn.Module | None = None) -> Scores:
        return self.pruner.score(self.model if model is None else model, self.batches)

    @cached_property
    def scores(self) -> Scores:
        """Of the source, made once: that scoring is a pure function is checked by itself."""
        return self.score()

    def decide(self, arch: Arch, scores: Scores, budget: float) -> Reached:
        """The method's decision; small models need groups smaller than the usual ones, where a rule has groups."""
        settings = {"groups": GROUPS} if self.pruner.along_path else {}
        return self.pruner.decide(arch, scores, budget, measure=MACS, **settings)

    def check_every_unit_is_scored(self) -> None:
        scores = self.scores
        expected = vector_sizes(self.arch, self.pruner.kinds)
        if self.pruner.projected:  # queries and keys whose cosines count have no subspaces, nor have values with a norm
            spaces = {"qk": "q", "v": "v"}

            def narrows(name: str) -> bool:
                where, _, kind = name.rpartition(".")
                return kind not in spaces or can_narrow(self.arch, f"{where}.{spaces[kind]}")

            expected = {name: size for name, size in expected.items() if narrows(name)}
        assert {name: len(v) for name, v in scores.vectors.items()} == expected
        for name, vector in scores.vectors.items():
            assert vector.dtype == torch.float64, name
            assert torch.isfinite(vector).all(), name
            assert (vector >= 0).all(), name
        assert scores.provenance["arch"] == self.arch.hash
        assert scores.provenance["method"]

    def check_scoring_is_a_pure_function(self) -> None:
        self.model.train()
        before = {name: t.clone() for name, t in self.model.state_dict().items()}
        torch.manual_seed(0)
        first = self.score()
        torch.manual_seed(1)  # no global random numbers
        second = self.score()
        assert all(torch.equal(first.vectors[name], second.vectors[name]) for name in first.vectors)
        assert self.model.training
        assert all(p.grad is None for p in self.model.parameters())
        assert all(torch.equal(before[name], t) for name, t in self.model.state_dict().items())
        assert hooks_of(self.model) == []

    def check_progress_counts_to_the_end(self) -> None:
        calls: list[tuple[int, int]] = []
        self.pruner.score(self.model, self.batches, progress=lambda done, total: calls.append((done, total)))
        assert calls
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][0] == calls[-1][1]

    def check_budgets_are_met_or_the_hindrance_is_named(self) -> None:
        scores, total = self.scores, cost(self.arch).macs
        for share in (0.95, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5):
            found = self.decide(self.arch, scores, share * total)
            small = cut(self.model, found.cut)
            assert cost(arch_of(small)).macs == found.cost <= found.budget == share * total
            assert found.met == (found.cost >= (1 - TOLERANCE) * share * total)
            assert found.met or found.hindrance, f"{found.cost / total:.4f} of the MACs for {share}, without a word"
            assert torch.isfinite(small(self.batches[0][0])).all()

    def check_budgets_choose_alike(self) -> None:
        """Of the units of one kind in one place, what a budget keeps is part of what another keeps, or holds it."""
        scores, total = self.scores, cost(self.arch).macs
        kept = [kept_units(self.arch, self.decide(self.arch, scores, b * total).cut) for b in (0.9, 0.7, 0.5)]
        for larger, smaller in itertools.pairwise(kept):
            for name, units in larger.items():
                nested = units <= smaller[name] or smaller[name] <= units
                assert nested, f"{name}: one budget keeps {sorted(units)}, another {sorted(smaller[name])}"

    def check_a_cut_model_can_be_scored_and_cut_again(self) -> None:
        total = cost(self.arch).macs
        small = cut(self.model, self.decide(self.arch, self.scores, 0.8 * total).cut)
        again = self.decide(arch_of(small), self.score(small), 0.6 * total).cut
        assert cost(arch_of(cut(small, again))).macs <= 0.6 * total
