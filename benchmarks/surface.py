"""A made-up response surface of a compressed DeiT-S whose true Pareto front is known, to measure searches against.

Costs are exact (``models.cost`` of real records); accuracies are a formula with the shapes of published results:

- Narrower blocks cost accuracy with diminishing returns; the first channels are nearly free. Blocks differ in how much
  they matter; losses of widths, dropped blocks and merged tokens amplify each other.
- A prefix of convolutions helps up to some length and hurts after it, 3x3 ones only just before the first attention
  (SPViT, arXiv 2111.11802: the searched DeiTs). Untrained they ruin the model, and finetuning repairs them fully: who
  judges before training never finds them.
- Finetuning closes a gap in two parts, exp(-E / T) and (1 + E)^-p over E epochs, fitted to the recovery of Isomorphic
  Pruning's DeiT-4.2G: from 0.3 % untrained to 74.9 % after a complete schedule of 4 epochs and 82.4 % after 300.

Every seed is another surface: other sensitivities, interactions, best prefix, best learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from prunesweep.models import Arch, Block, Stage, UserError, cost
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.layers.token_merging import TokenPlan, default_groups
from prunesweep.models.replace import replace_block
from prunesweep.search.store.pareto import non_dominated

__all__ = ["BUDGET", "Choice", "Surface", "effective_epochs"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVELS = 64  # of the ladder of widths
MAX_SKIP, MAX_CONV, MAX_CONV3 = 4, 4, 2
KEEP = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # keep rates
MAX_START = 8  # first block with merged tokens
BUDGET = (0.25, 0.9)
LR = (1e-5, 1e-2)
ABSENT, CONV1, CONV3, ATTN = 0, 1, 2, 3  # states of a block; ATTN + k: attention on a share KEEP[k] of the tokens
WARM_RESTART = 0.7  # an epoch before a warm restart counts as so many of an uninterrupted schedule


def deit_small() -> Arch:
    """DeiT-S for 224 x 224 images."""
    block = {"heads": 6, "qk": 64, "v": 64, "scale": 64**-0.5, "mlp": 1536}
    stage = Stage(width=384, grid=(14, 14), blocks=tuple(Block(src=i, **block) for i in range(12)))  # type: ignore[arg-type]
    sizes = {"img_size": (224, 224), "patch_size": (16, 16), "in_chans": 3, "num_classes": 1000}
    return Arch(family="vit", source="surface", stages=(stage,), **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Choice:
    """A decoded point: step on the ladder of widths, and what each block becomes."""

    level: int
    skip: int = 0
    conv: int = 0  # blocks 0..conv-1 have a convolution for attention
    conv3: int = 0  # the last so many of them 3x3
    keep: int = 0  # index in KEEP
    start: int = 0  # first block with merged tokens; never one with a convolution

    def __post_init__(self) -> None:
        assert self.conv3 <= self.conv
        assert self.keep or not self.start


class Surface:
    """Top-1 accuracy (percent) and MACs of every choice, before and after any number of epochs."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.source = seed, deit_small()
        self.source_macs = cost(self.source).macs
        rng = np.random.default_rng([seed, 2026])
        depth = self.source.depth
        position = np.linspace(0, 1, depth)
        uneven = rng.uniform(0.7, 1.3, (2, depth))  # how fast the ladder cuts attention and MLP of each block
        self._rates = np.clip(uneven * [1.2 - 0.4 * position, 0.8 + 0.4 * position], 0.5, 1.3)
        tail = rng.permutation(np.arange(MAX_CONV, depth - 1))
        self.drop_order = tuple(int(i) for i in tail[np.argsort(-tail + rng.normal(0, 2, len(tail)))][:MAX_SKIP])
        self._sensitivity = rng.dirichlet(np.full(2 * depth, 3.0)).reshape(2, depth) * rng.uniform(2.2, 3.2)
        self._embed_sensitivity, self._width_power = rng.uniform(0.6, 1.2), rng.uniform(0.9, 1.3)
        self._drop_loss = np.concatenate(([0.0], np.cumsum([0.12, 0.3, 0.6, 1.0] * rng.uniform(0.5, 1.6, MAX_SKIP))))
        self.best_conv = int(rng.integers(1, MAX_CONV))
        self.best_conv3 = int(rng.integers(0, min(self.best_conv, MAX_CONV3) + 1))
        gain = rng.uniform(0.15, 0.3, 2)
        self._conv_loss = _valley(MAX_CONV, self.best_conv, gain[0], rng.uniform(0.3, 0.6))
        self._conv3_loss = _valley(MAX_CONV3, self.best_conv3, gain[1] / 2, rng.uniform(0.1, 0.3))
        self._token_weight = np.exp(-np.arange(depth) / rng.uniform(3, 8))
        self._token_weight *= rng.uniform(0.7, 1.4) / self._token_weight.sum()
        self._interaction = rng.uniform(0.2, 0.8, 3)  # widths and skips, widths and tokens, skips and tokens
        self._best_lr, self._lr_curvature = np.log(rng.uniform(1e-4, 1e-3)), rng.uniform(0.2, 0.4)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the variables that a point has."""
        return {
            "budget": FloatDistribution(*BUDGET),
            "skip": IntDistribution(0, MAX_SKIP),
            "conv": IntDistribution(0, MAX_CONV),
            "conv3": IntDistribution(0, MAX_CONV3),
            "keep": FloatDistribution(KEEP[-1], 1.0),
            "start": IntDistribution(0, MAX_START),
            "lr": FloatDistribution(*LR, log=True),
        }

    def decode(self, point: Mapping[str, float]) -> Choice:
        """The widest choice within the point's budget. Raises UserError where even the narrowest is above it."""
        conv, keep = int(point["conv"]), min(range(len(KEEP)), key=lambda k: abs(KEEP[k] - point["keep"]))
        start = max(int(point["start"]), conv) if keep else 0
        rest = (int(point["skip"]), conv, min(int(point["conv3"]), conv), keep, start)
        macs = self.macs(np.array([(level, *rest) for level in range(LEVELS)]))
        fits = np.flatnonzero(macs <= point["budget"] * self.source_macs)
        if not len(fits):
            raise UserError(f"budget = {point['budget']}: no widths meet it with {rest}; raise it")
        return Choice(int(fits[0]), *rest)

    def arch(self, choice: Choice) -> Arch:
        """The record of a choice; its tokens are merged in equal runs."""
        stage, states = self.source.stages[0], self.states(_rows(choice))[0]
        pairs = zip(self._ladder(choice.level)[1], states, strict=True)
        blocks = tuple(self._block(block, state) for block, state in pairs if state != ABSENT)
        narrow = dataclasses.replace(stage, width=self._ladder(choice.level)[0], blocks=blocks)
        return dataclasses.replace(self.source, stages=(narrow,))

    def macs(self, rows: Ints) -> Ints:
        """(n,) exact MACs of choices, (n, 6) in the order of ``Choice``'s fields."""
        outside, inside = self._costs
        blocks = np.arange(self.source.depth)
        return np.asarray(outside[rows[:, 0]] + inside[blocks, rows[:, :1], self.states(rows)].sum(1))

    def top1(self, rows: Ints, epochs: float, lr: float | None = None) -> Floats:
        """(n,) accuracy without noise after ``epochs`` of one uninterrupted schedule; at the best rate where None."""
        final, gap = self._trained(rows, epochs, lr)
        return _squash(final - gap)

    def best_lr(self, conv: Any) -> Any:
        """The learning rate that is best for so many convolutions."""
        return np.exp(self._best_lr + 0.1 * conv)

    def _trained(self, rows: Ints, epochs: float, lr: float | None) -> tuple[Floats, Floats]:
        """Accuracy after endless training at this rate, and the gap that is left; (n,) each."""
        final, slow, fast = self._response(rows)
        if lr is not None and epochs > 0:
            final = final - self._lr_curvature * np.log(lr / self.best_lr(rows[:, 2])) ** 2
        return final, _gap(rows[:, 2], slow, fast, epochs)

    def measure(self, choice: Choice, lr: float, schedules: tuple[float, ...], number: int) -> float:
        """What a search sees of trial ``number`` after finetuning for ``schedules``, one complete schedule each.

        A proxy's own error is the same on every rung but shrinks with training; on top of it every run differs.
        """
        own, run = (np.random.default_rng([self.seed, number, k]).normal() for k in (0, 1 + len(schedules)))
        epochs = effective_epochs(schedules)
        final, gap = self._trained(_rows(choice), epochs, lr)
        noise = own * (0.15 + (9 if epochs == 0 else 2) * (1 + epochs) ** -0.6) + 0.12 * run
        return float(_squash(final - gap + noise * np.minimum(1, 0.3 + gap / 20))[0])

    def value(self, choice: Choice, lr: float, schedules: tuple[float, ...]) -> float:
        """What ``measure`` would say without noise."""
        return float(self.top1(_rows(choice), effective_epochs(schedules), lr)[0])

    def front(self, epochs: float) -> tuple[Floats, Ints, Ints]:
        """The true Pareto front after ``epochs``, by enumeration: top-1, MACs (ascending) and choices as rows.

        From the most accurate choice of at most the window's lower end to its upper end.
        """
        rows, (low, high) = self._all_rows, BUDGET
        macs = self.macs(rows)
        rows, macs = rows[macs <= high * self.source_macs], macs[macs <= high * self.source_macs]
        top1 = self.top1(rows, epochs)
        best = non_dominated(np.column_stack([np.maximum(macs, low * self.source_macs), -top1]))
        order = np.argsort(macs[best], kind="stable")
        return top1[best][order], macs[best][order], rows[best][order]

    @cached_property
    def _all_rows(self) -> Ints:
        rest = [
            (skip, conv, conv3, keep, start)
            for skip in range(MAX_SKIP + 1)
            for conv in range(MAX_CONV + 1)
            for conv3 in range(min(conv, MAX_CONV3) + 1)
            for keep in range(len(KEEP))
            for start in (range(conv, MAX_START + 1) if keep else (0,))
        ]
        levels = np.repeat(np.arange(LEVELS), len(rest))
        return np.column_stack([levels, np.tile(np.array(rest), (LEVELS, 1))])

    def _ladder(self, level: int) -> tuple[int, tuple[Block, ...]]:
        """Residual width and blocks, all with attention, of a step of the ladder of widths."""
        t = level / (LEVELS - 1)
        blocks = []
        for block, attn, mlp in zip(self.source.blocks, *self._rates, strict=True):
            width = 2 * round(block.qk * (1 - 0.4 * t * attn) / 2)
            heads = max(1, round(block.heads * (1 - 0.5 * t * attn)))
            hidden = max(8, 8 * round(block.mlp * (1 - 0.75 * t * mlp) / 8))
            blocks.append(dataclasses.replace(block, heads=heads, qk=width, v=width, mlp=hidden))
        return 8 * round(self.source.stages[0].width * (1 - 0.5 * t) / 8), tuple(blocks)

    def _block(self, block: Block, state: int) -> Block:
        if state in (CONV1, CONV3):
            return replace_block(self.source, block, {CONV1: "conv1x1", CONV3: "conv3x3"}[state], None, "surface")
        if state == ATTN:
            return block
        return replace_block(self.source, block, None, self._plans[state - ATTN], "surface")

    @cached_property
    def _plans(self) -> tuple[TokenPlan, ...]:
        """A plan per keep rate, of equal runs of patches."""
        tokens, prefix = self.source.tokens, self.source.prefix_tokens
        kept = [prefix + int(rate * (tokens - prefix)) for rate in KEEP]
        groups = [default_groups(tokens, k, prefix).tolist() for k in kept]
        return tuple(TokenPlan(k, tuple(g), (1.0,) * tokens) for k, g in zip(kept, groups, strict=True))

    def states(self, rows: Ints) -> Ints:
        """(n, L) what every block is."""
        _, skip, conv, conv3, keep, start = (column[:, None] for column in rows.T)
        block = np.arange(self.source.depth)
        dropped_at = np.full(self.source.depth, MAX_SKIP)
        dropped_at[list(self.drop_order)] = np.arange(MAX_SKIP)
        states = np.where(block >= start, ATTN + keep, ATTN)
        states = np.where(block < conv, np.where(block >= conv - conv3, CONV3, CONV1), states)
        return np.asarray(np.where(dropped_at < skip, ABSENT, states))

    @cached_property
    def _costs(self) -> tuple[Ints, Ints]:
        """MACs outside the blocks by level, and of every block by level and state."""
        outside = np.zeros(LEVELS, dtype=np.int64)
        inside = np.zeros((self.source.depth, LEVELS, ATTN + len(KEEP)), dtype=np.int64)
        for level in range(LEVELS):
            width, blocks = self._ladder(level)
            stage = dataclasses.replace(self.source.stages[0], width=width, blocks=blocks)
            arch = dataclasses.replace(self.source, stages=(stage,))
            outside[level] = outside_cost(arch).macs
            for i, block in enumerate(blocks):
                for state in range(ABSENT + 1, inside.shape[2]):
                    inside[i, level, state] = block_cost(arch, stage, self._block(block, state)).macs
        return outside, inside

    @cached_property
    def _width_losses(self) -> tuple[Floats, Floats]:
        """Accuracy lost to narrow residual channels by level, and to narrow blocks by block, level and conv or not."""
        outside = np.zeros(LEVELS)
        inside = np.zeros((self.source.depth, LEVELS, 2))
        for level in range(LEVELS):
            width, blocks = self._ladder(level)
            outside[level] = self._embed_sensitivity * self._lost(width / 384)
            for i, block in enumerate(blocks):
                attn = self._sensitivity[0, i] * self._lost(block.heads * block.qk / 384)
                mlp = self._sensitivity[1, i] * self._lost(block.mlp / 1536)
                inside[i, level] = attn + mlp, 0.3 * attn + mlp
        return outside, inside

    def _lost(self, kept: float) -> float:
        """Diminishing returns: of the share of channels that is kept."""
        return float(kept**-self._width_power - 1)

    def _response(self, rows: Ints) -> tuple[Floats, Floats, Floats]:
        """Accuracy after endless training, and the slow and the fast part of the gap before it; all (n,)."""
        level, skip, conv, conv3, keep, _ = rows.T
        states, blocks = self.states(rows), np.arange(self.source.depth)
        is_conv = ((states == CONV1) | (states == CONV3)).astype(int)
        outside, inside = self._width_losses
        widths = outside[level] + (inside[blocks, rows[:, :1], is_conv] * (states != ABSENT)).sum(1)
        drops = self._drop_loss[skip]
        per_token = (1 / np.array(KEEP)[keep] - 1) ** 2
        tokens = per_token * ((states > ATTN) * self._token_weight).sum(1)
        pairs = np.sqrt(np.column_stack([widths * drops, widths * tokens, drops * tokens]))
        final = 80.8 - widths - drops - tokens - pairs @ self._interaction
        final = final - self._conv_loss[conv] - self._conv3_loss[conv3]
        slow = 2.6 * widths**0.9 + 2 * drops + 1.5 * tokens + 0.5 * conv
        fast = 22 * widths**0.9 + 14 * drops**0.8 + 10 * tokens + 18 * conv**0.8
        return final, slow, fast


def effective_epochs(schedules: tuple[float, ...]) -> float:
    """Epochs of one uninterrupted schedule that are worth as much as several, each going on from the one before."""
    total = 0.0
    for epochs in schedules:
        total = epochs + WARM_RESTART * total
    return total


def _valley(size: int, best: int, gain: float, slope: float) -> Floats:
    """Loss by count: falls by ``gain`` per unit down to ``best``, rises ever steeper after it."""
    count = np.arange(size + 1)
    return np.asarray(-gain * np.minimum(count, best) + slope * np.maximum(0, count - best) ** 1.5)


def _gap(conv: Ints, slow: Floats, fast: Floats, epochs: float) -> Floats:
    """What training still has to close; convolutions take longer than narrow layers."""
    return np.asarray(slow * (1 + epochs) ** -0.6 + fast * np.exp(-epochs / (0.35 + 0.05 * conv)))


def _squash(top1: Floats) -> Floats:
    """Accuracy in (0.1, 100): as it is where it is high, towards chance of 1000 classes below."""
    return np.asarray(0.1 + 6 * np.logaddexp(0, (top1 - 0.1) / 6))


def _rows(choice: Choice) -> Ints:
    return np.array([dataclasses.astuple(choice)])
