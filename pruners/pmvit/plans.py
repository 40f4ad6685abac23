"""Prune-and-Merge: from scores of patches to a fixed token plan for every block.

Source: Mao et al., "Prune and Merge: Efficient Token Compression for Vision Transformer with Spatial Information
Preserved", IEEE TMM 2025 (arXiv 2503.23455), in the form of its released code ("merge to centre", the method of record;
``mode="gap"`` is its other one). Per block, the least important patches pass by; the most important ones, the centres,
stay apart; every other patch is merged into a centre's group, which is a run of patches in raster order. Scores are
normalised per block and fall with its depth, so that one threshold over all blocks gives each its own number of tokens.

Plans are made from ``pmvit.scores.score`` without the model, in milliseconds. Different from the released code: ties
are broken by (score, block, patch), so that counts are exact; a block that no centre fell to keeps its best patch; a
patch of score 0 passes by, where it would be lost; prefix tokens are never scored; grids need not be square.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from prunesweep.models import Arch, BlockCut, Cut, UserError, cut_arch
from prunesweep.models.errors import explain
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners.measures import MACS, Measure
from prunesweep.pruners.reached import Reached, meets
from prunesweep.pruners.scores import Scores, kind_of

from .scores import FAMILIES, KINDS, score, served

__all__ = ["FAMILIES", "KINDS", "PlanSettings", "importance", "plan", "plan_for_budget", "score", "select"]

EPS = {"center": 1e-8, "gap": 1e-10}  # added to what a score is divided by, as in the released code
Rate = Annotated[float, Field(gt=0, le=1)]


class PlanSettings(SettingsTable):
    """Rules for turning scores into plans.

    ``keep_rate`` sets the cost; ``prune_rate`` moves patches from merged to passing by.
    """

    keep_rate: float = Field(
        default=0.6, gt=0, le=1, description="Share of patches that are centres, mean over blocks."
    )
    prune_rate: float = Field(
        default=0.1, ge=0, lt=1, description="Share of patches that pass a block by, mean over blocks."
    )
    scope: Literal["global", "layer"] = Field(
        default="global", description="One pair of thresholds for all blocks, or a pair for each."
    )
    mode: Literal["center", "gap"] = Field(
        default="center",
        description="Merge every patch into a centre's group, or all patches between two centres into one.",
    )
    row_rule: Literal["reference", "fixed"] = Field(
        default="reference",
        description="End a group with its centre's row; reference is off by one in the last column.",
    )
    depth_decay: float = Field(
        default=0.025, ge=0, description="Scores of block l are multiplied by 1 - depth_decay * l."
    )
    merge_list: tuple[int, ...] | None = Field(
        default=None, description="Blocks that merge, of those that can: with attention. Null: all."
    )
    weights: Literal["ratio", "uniform", "normalised"] = Field(
        default="ratio",
        description="Of a group's patches: score over the centre's, equal with sum 1, or the ratio with sum 1.",
    )
    keep_per_layer: tuple[Rate, ...] | None = Field(
        default=None,
        description="A keep_rate for every merging block, in place of keep_rate; thresholds are then per block.",
    )
    form: Literal["sparse", "dense"] = Field(
        default="sparse",
        description="Matrices that keep their support in training and are fast, or full ones (the paper's).",
    )
    empty_rows: bool = Field(
        default=False,
        description="gap: keep merged tokens of gaps that all patches pass by, as zeros (the paper's code).",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        rates = {f"keep_per_layer[{i}]": rate for i, rate in enumerate(self.keep_per_layer or ())}
        for name, rate in (rates or {"keep_rate": self.keep_rate}).items():
            if rate + self.prune_rate > 1 + 1e-9:
                raise ValueError(f"{name} = {rate} and prune_rate = {self.prune_rate}: the sum must not exceed 1")
        return self


def plan(arch: Arch, scores: Scores, keep_rate: float = 0.6, **settings: Any) -> Cut:
    """Make a token plan for every block that merges; everything else stays whole.

    Args:
        arch: the record that was scored.
        scores: what ``pmvit.scores.score`` gave.
        keep_rate: int(P * keep_rate) centres per merging block, on average over blocks where the scope is ``global``.
        settings: other fields of ``PlanSettings``.

    Raises:
        UserError: an unknown or impossible setting, scores of another model, or no block that can merge.
    """
    rule = _rule(keep_rate=keep_rate, **settings)
    blocks = _merging(arch, rule)
    if rule.keep_per_layer is not None and len(rule.keep_per_layer) != len(blocks):
        raise UserError(
            f"keep_per_layer has {len(rule.keep_per_layer)} rates for {len(blocks)} merging blocks {list(blocks)}"
        )
    patches = arch.tokens - arch.prefix_tokens
    rates = rule.keep_per_layer or (rule.keep_rate,) * len(blocks)
    return _plan(arch, scores, rule, blocks, [int(patches * rate) for rate in rates])


def plan_for_budget(arch: Arch, scores: Scores, budget: float, *, measure: Measure = MACS, **settings: Any) -> Reached:
    """Make the plan with the most centres whose cost is at most ``budget``; with one centre more it costs more.

    All blocks count on equally many centres, but for one more in the first of them.

    Args:
        arch, scores: as for ``plan``.
        budget: in the unit of ``measure``; MACs count the products with full matrices where the form is ``dense``.
        measure: what is counted.
        settings: fields of ``PlanSettings``, without ``keep_rate`` and ``keep_per_layer``.

    Raises:
        UserError: as ``plan``; or the plan with one centre per block costs more than ``budget``.
    """
    given = sorted({"keep_rate", "keep_per_layer"} & set(settings))
    if given:
        raise UserError(f"{' and '.join(given)}: the budget decides how many patches are kept; leave it out")
    rule = _rule(keep_rate=1e-6, **settings)  # the smallest: any prune_rate goes with it
    blocks = _merging(arch, rule)
    patches = arch.tokens - arch.prefix_tokens

    def at(centres: int) -> tuple[Cut, float]:
        each, more = divmod(centres, len(blocks))
        found = _plan(arch, scores, rule, blocks, [each + (i < more) for i in range(len(blocks))])
        return found, measure(cut_arch(arch, found))

    low, high = len(blocks), (patches - int(patches * rule.prune_rate)) * len(blocks)
    (best, below), (largest, most) = at(low), at(high)
    if below > budget:
        raise UserError(
            f"{budget:,.6g} {measure.name} cannot be reached: one centre in each of blocks {list(blocks)} leaves "
            f"{below:,.6g}. Raise the budget, let more blocks merge, or cut widths first"
        )
    if most <= budget:
        hindrance = "" if meets(most, budget) else f"with all patches kept the model has {most:,.6g}"
        return Reached(largest, most, budget, hindrance)
    above = most
    while high - low > 1:  # the plan of low is within the budget, that of high is not
        middle = (low + high) // 2
        found, cost = at(middle)
        if cost <= budget:
            best, below, low = found, cost, middle
        else:
            above, high = cost, middle
    step = f"with one patch more kept in one block the model has {above / budget:.2%} of the budget"
    return Reached(best, below, budget, "" if meets(below, budget) else step)


def importance(
    raw: torch.Tensor, blocks: Sequence[int], depth_decay: float, eps: float = EPS["center"]
) -> torch.Tensor:
    """Normalise raw scores per block and let them fall with depth.

        I_l = (1 - depth_decay * l) S_l / (|S_l| + eps)

        S_l    raw scores of block l, (P,)              I_l    its importance, (P,)

    Args:
        raw: scores (L, P) of P patches in L blocks.
        blocks: number l of every row's block.
        depth_decay: how much of the importance every block further back loses.
        eps: keeps the division finite.

    Returns:
        (L, P), comparable over blocks.
    """
    factor = 1 - depth_decay * torch.tensor(blocks, dtype=raw.dtype)
    return raw / (raw.norm(dim=1, keepdim=True) + eps) * factor[:, None]


def select(scores: torch.Tensor, n_prune: int, n_keep: Sequence[int], scope: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make bool masks (L, P) of the patches that pass by and of the centres.

    Args:
        scores: (L, P), comparable between blocks.
        n_prune: patches per block that pass by, the lowest.
        n_keep: centres per block, the highest.
        scope: ``global``: counts are means over blocks, and scores of all blocks are sorted together.
    """
    rows = scores.flatten()[None] if scope == "global" else scores
    prune = [n_prune * len(n_keep)] if scope == "global" else [n_prune] * len(n_keep)
    keep = [sum(n_keep)] if scope == "global" else n_keep
    pruned, centres = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
    for i, order in enumerate(rows.argsort(stable=True)):
        pruned[i, order[: prune[i]]] = True
        centres[i, order[len(order) - keep[i] :]] = True
    pruned, centres = pruned.view_as(scores), centres.view_as(scores)
    for i in torch.nonzero(~centres.any(1))[:, 0].tolist():
        best = scores[i].argsort(stable=True)[-1]
        pruned[i, best], centres[i, best] = False, True
    return pruned, centres


def _rule(**settings: Any) -> PlanSettings:
    try:
        return PlanSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(explain(problem, PlanSettings.model_fields) for problem in error.errors())) from error


def _merging(arch: Arch, rule: PlanSettings) -> tuple[int, ...]:
    """List the blocks that get a plan. Raises UserError where there are none, or one does not exist."""
    if arch.family not in FAMILIES:
        raise UserError(f"{arch.source} is of family {arch.family!r}: Prune-and-Merge plans tokens of {served()}")
    wanted = range(arch.depth) if rule.merge_list is None else sorted(rule.merge_list)
    if len(set(wanted)) != len(wanted) or any(not 0 <= i < arch.depth for i in wanted):
        raise UserError(f"merge_list = {list(wanted)}: must be different blocks of 0..{arch.depth - 1}")
    able = {i for i, b in enumerate(arch.blocks) if b.mixer == "attn" and b.tokens is None and not b.token_scale}
    blocks = tuple(i for i in wanted if i in able)
    if not blocks:
        raise UserError(
            f"no block of {list(wanted)} can merge tokens: it takes attention, no plan yet and no factors per token; "
            f"blocks that can: {sorted(able) or 'none'}"
        )
    if rule.depth_decay * (arch.depth - 1) >= 1:
        raise UserError(f"depth_decay = {rule.depth_decay}: must be below 1 / {arch.depth - 1} for {arch.depth} blocks")
    return blocks


def _plan(arch: Arch, scores: Scores, rule: PlanSettings, blocks: Sequence[int], n_keep: Sequence[int]) -> Cut:
    patches = arch.tokens - arch.prefix_tokens
    by_layer = rule.keep_per_layer is not None or rule.scope == "layer"
    rows = importance(_raw(arch, scores, blocks), blocks, rule.depth_decay, EPS[rule.mode])
    pruned, centres = select(rows, int(patches * rule.prune_rate), n_keep, "layer" if by_layer else "global")
    plans = {}
    for i, row, passes, chosen in zip(blocks, rows, pruned, centres, strict=True):
        live = torch.where(passes, 0.0, row).tolist()
        at = torch.nonzero(chosen)[:, 0].tolist()
        groups = (_centre_groups if rule.mode == "center" else _gap_groups)(arch, rule, live, at)
        plans[i] = BlockCut(tokens=_token_plan(arch.prefix_tokens, rule, groups, patches))
    return Cut(blocks=tuple(plans.get(i, BlockCut()) for i in range(arch.depth)))


def _raw(arch: Arch, scores: Scores, blocks: Sequence[int]) -> torch.Tensor:
    """Stack the raw scores (L, P) of ``blocks``."""
    patches = arch.tokens - arch.prefix_tokens
    foreign = [n for n in scores.vectors if kind_of(n) != "tokens" or not 0 <= int(n.split(".")[1]) < arch.depth]
    for name in [f"blocks.{i}.tokens" for i in blocks]:
        vector = scores.vectors.get(name)
        found = "missing" if vector is None else f"of {vector.numel()} patches"
        if foreign or vector is None or vector.shape != (patches,):
            what = f"{foreign[0]} is no score of its patches" if foreign else f"{name} is {found}"
            raise UserError(
                f"scores: {what}; {arch.source} has {arch.depth} blocks and {patches} patches. Score it anew"
            )
    return torch.stack([scores.vectors[f"blocks.{i}.tokens"].double() for i in blocks])


Group = dict[int, float]  # weights of a merged token's patches


def _centre_groups(arch: Arch, rule: PlanSettings, live: Sequence[float], centres: Sequence[int]) -> list[Group]:
    """Make one group per centre: the patches up to half way to the next one, not beyond the end of the centre's row."""
    columns = arch.stages[0].grid[1]
    ends = []
    for centre, following in pairwise(centres):
        end = -(-(centre + following) // 2)
        row = (centre + (rule.row_rule == "reference")) // columns
        ends.append((row + 1) * columns if row < end // columns else end)
    groups = []
    for centre, start, end in zip(centres, [0, *ends], [*ends, len(live)], strict=True):
        ratios = {j: live[j] / (live[centre] + EPS["center"]) for j in range(start, end)}
        groups.append(ratios if live[centre] else {centre: 1.0})
    return groups


def _gap_groups(arch: Arch, rule: PlanSettings, live: Sequence[float], centres: Sequence[int]) -> list[Group]:
    """Make a group of every centre alone, and one of all patches between two centres, weighted by score / mean."""
    groups: list[Group] = []
    start = 0
    for end in (*centres, len(live)):
        gap = {j: live[j] for j in range(start, end)}
        positive = [s for s in gap.values() if s > 0]
        if positive or (gap and rule.empty_rows):
            mean = sum(positive) / (len(positive) + EPS["gap"]) + EPS["gap"]
            groups.append({j: s / mean for j, s in gap.items()})
        if end < len(live):
            groups.append({end: 1.0})
        start = end + 1
    return groups


def _token_plan(prefix: int, rule: PlanSettings, groups: Sequence[Group], patches: int) -> TokenPlan:
    """Make a plan: prefix tokens alone, then one merged token per group; patches of weight 0 pass by."""
    assign, weight = [*range(prefix), *[-1] * patches], [*[1.0] * prefix, *[0.0] * patches]
    for row, group in enumerate(groups, prefix):
        members = {j: w for j, w in group.items() if w > 0}
        total = sum(members.values()) if rule.weights == "normalised" else 1.0
        for j, w in members.items():
            assign[prefix + j] = row
            weight[prefix + j] = 1 / len(members) if rule.weights == "uniform" else w / total
    return TokenPlan(prefix + len(groups), tuple(assign), tuple(weight), rule.form)
