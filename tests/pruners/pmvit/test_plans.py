from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    Stage,
    UserError,
    arch_of,
    cost,
    cut,
    cut_arch,
    load,
    num_params,
    save,
)
from prunesweep.models.io.export import export
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import Measure, Scores, pmvit
from tests.generate import random_arch, random_cut, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.models.test_fuse import planned
from tests.pruners.pmvit import test_scores as test_pmvit_scores
from tests.pruners.pmvit.test_scores import labelled


def mergeable(arch: Arch) -> list[int]:
    return [i for i, block in enumerate(arch.blocks) if block.mixer == "attn" and not block.token_scale]


def source(seed: int) -> Arch:
    """Any ViT with a block that can merge."""
    arch = test_pmvit_scores.source(seed)
    return arch if mergeable(arch) else source(seed + 2000)


def square(side: int, depth: int = 1, **changes: object) -> Arch:
    arch = planned(*[None] * depth, img_size=(2 * side, 2 * side), **changes)
    return dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], grid=(side, side)),))


def scores_of(*rows: list[float]) -> Scores:
    return Scores({f"blocks.{i}.tokens": torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)})


def random_scores(arch: Arch, seed: int = 0) -> Scores:
    return pmvit.score(random_model(arch, 0), [], importance="random", seed=seed)


def plans_of(decision: Cut) -> list[TokenPlan | None]:
    return [block.tokens for block in decision.blocks]


def rows_of(plan: TokenPlan, prefix: int = 1) -> list[dict[int, float]]:
    """Patches and weights of every merged token but the prefix's."""
    rows: list[dict[int, float]] = [{} for _ in range(plan.kept - prefix)]
    for j, (row, weight) in enumerate(zip(plan.assign, plan.weight, strict=True)):
        if row >= prefix:
            rows[row - prefix][j - prefix] = weight
    return rows


EXAMPLE = scores_of([5, 1, 4, 2, 8, 3, 7, 6, 0.5])


def test_an_example_by_hand() -> None:
    (plan,) = plans_of(pmvit.plan(square(3), EXAMPLE, 0.45, prune_rate=0.12))
    want = [{0: 1, 1: 0.2}, {2: 0.5, 3: 0.25, 4: 1}, {5: 3 / 7, 6: 1}, {7: 1}]
    assert plan.assign == (0, 1, 1, 2, 2, 2, 3, 3, 4, -1)
    for row, members in zip(rows_of(plan), want, strict=True):
        assert row == pytest.approx(members, rel=1e-6)
    recover = dataclasses.replace(plan, form="dense").tensors()["recover"]
    assert recover[3:6, 2].tolist() == pytest.approx([0.381, 0.190, 0.762], abs=1e-3)


@pytest.mark.parametrize(
    ("best", "row_rule", "first"),
    [((0, 7), "reference", 3), ((0, 7), "fixed", 3), ((2, 7), "reference", 5), ((2, 7), "fixed", 3)],
)
def test_a_group_ends_with_its_centres_row(best: tuple[int, int], row_rule: str, first: int) -> None:
    raw = [9.0 if j in best else 1.0 for j in range(9)]
    (plan,) = plans_of(pmvit.plan(square(3), scores_of(raw), 0.23, prune_rate=0, row_rule=row_rule))
    assert [len(row) for row in rows_of(plan)] == [first, 9 - first]


def test_rows_are_those_of_the_grid() -> None:
    """3 rows of 4 patches."""
    raw = [9.0 if j in (1, 10) else 1.0 for j in range(12)]
    (plan,) = plans_of(pmvit.plan(planned(None), scores_of(raw), 0.17, prune_rate=0))
    assert [list(row) for row in rows_of(plan)] == [[0, 1, 2, 3], list(range(4, 12))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["center", "gap"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_counts_and_groups(seed: int, mode: str, scope: str) -> None:
    """Whatever the model: the highest are centres, the lowest pass, all else is in the group of its place."""
    random, arch = Random(seed), source(seed)
    patches, prefix = arch.tokens - arch.prefix_tokens, arch.prefix_tokens
    prune_rate, keep_rate, decay = random.uniform(0, 0.4), random.uniform(0.3, 0.6), random.choice([0.0, 0.2])
    scores = random_scores(arch, seed)
    settings = {"prune_rate": prune_rate, "depth_decay": decay, "mode": mode, "scope": scope}
    plans = plans_of(pmvit.plan(arch, scores, keep_rate, **settings))
    merged = mergeable(arch)
    assert [i for i, plan in enumerate(plans) if plan is not None] == merged
    n_prune, n_keep, value = int(patches * prune_rate), int(patches * keep_rate), {}
    for i in merged:
        raw = scores.vectors[f"blocks.{i}.tokens"]
        value |= {(i, j): float(s / raw.norm() * (1 - decay * i)) for j, s in enumerate(raw)}
    order = sorted(value, key=value.__getitem__)
    own = [order] if scope == "global" else [[at for at in order if at[0] == i] for i in merged]
    share = len(merged) if scope == "global" else 1
    pruned = {at for places in own for at in places[: share * n_prune]}
    centres = {at for places in own for at in places[len(places) - share * n_keep :]}
    for i in merged:
        plan, chosen = plans[i], [j for j in range(patches) if (i, j) in centres]
        plan.check(arch.tokens, prefix)
        if not chosen:
            continue
        groups = rows_of(plan, prefix)
        assert {j for row in groups for j in row} == {j for j in range(patches) if (i, j) not in pruned}
        assert all(row for row in groups)
        if mode == "center":
            assert [j for row in groups for j in row if j in chosen] == chosen
            assert all(sum(j in chosen for j in row) == 1 for row in groups)
            for row in groups:
                (centre,) = (j for j in row if j in chosen)
                assert all(w == pytest.approx(value[i, j] / value[i, centre], rel=1e-5) for j, w in row.items())
        else:
            alone = [row for row in groups if next(iter(row)) in chosen]
            assert alone == [{j: 1.0} for j in chosen]
            assert all(sum(row.values()) == pytest.approx(len(row)) for row in groups)
    if mode == "center" and all(any((i, j) in centres for j in range(patches)) for i in merged):
        assert sum(plans[i].kept - prefix for i in merged) == len(merged) * n_keep


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_plan_that_keeps_everything_changes_nothing(seed: int, form: str) -> None:
    arch = source(seed)
    model, x = random_model(arch, seed), random_images(arch, seed)
    whole = cut(model, pmvit.plan(arch, random_scores(arch), 1.0, prune_rate=0, form=form))
    with torch.no_grad():
        torch.testing.assert_close(whole(x), model(x), rtol=0, atol=1e-5)


def test_what_passes_is_not_touched() -> None:
    arch = square(3)
    small = cut(random_model(arch, 0), pmvit.plan(arch, EXAMPLE, 0.4, prune_rate=0.5, scope="layer"))
    x = torch.randn(2, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = (small.blocks[0](x) == x).all(-1).all(0)
    assert torch.nonzero(same)[:, 0].tolist() == [2, 4, 6, 9]  # patches 1, 3, 5, 8, the lowest


def test_prune_rate_costs_and_saves_nothing() -> None:
    arch = square(4, 3)
    scores = random_scores(arch)
    costs = {cost(cut_arch(arch, pmvit.plan(arch, scores, 0.5, prune_rate=p))) for p in (0.0, 0.2, 0.5)}
    assert len(costs) == 1


def test_equal_scores_do_not_blur_the_counts() -> None:
    """A reference threshold would take all or none of them."""
    plans = plans_of(pmvit.plan(square(3, 2), scores_of([1.0] * 9, [1.0] * 9), 0.34, prune_rate=0.34, depth_decay=0))
    assert [plan.assign.count(-1) for plan in plans] == [6, 0]  # the lowest block and patch first
    assert [plan.kept for plan in plans] == [2, 7]


def test_a_block_without_a_centre_keeps_its_best_patch() -> None:
    low, high = [1.0, 1.0, 5.0, *[1.0] * 6], [1.0] * 9
    plans = plans_of(pmvit.plan(square(3, 2), scores_of(high, low), 0.23, prune_rate=0.45, depth_decay=0.9))
    assert [plan.kept for plan in plans] == [5, 2]
    assert [list(row) for row in rows_of(plans[1])] == [[2]]  # all others pass


def test_patches_of_score_zero_pass() -> None:
    (plan,) = plans_of(pmvit.plan(square(3), scores_of([0.0] * 8 + [1.0]), 0.23, prune_rate=0))
    assert [list(row) for row in rows_of(plan)] == [[7], [8]]
    (plan,) = plans_of(pmvit.plan(square(3), scores_of([0.0] * 9), 0.23, prune_rate=0))
    assert [list(row) for row in rows_of(plan)] == [[7], [8]]
    plan.check(10, 1)


def test_weights() -> None:
    def weights(rule: str) -> list[list[float]]:
        (plan,) = plans_of(pmvit.plan(square(3), EXAMPLE, 0.45, prune_rate=0.12, weights=rule))
        return [list(row.values()) for row in rows_of(plan)]

    assert weights("uniform")[1] == pytest.approx([1 / 3] * 3)
    assert weights("normalised")[1] == pytest.approx([0.5 / 1.75, 0.25 / 1.75, 1 / 1.75])
    assert weights("ratio")[1] == pytest.approx([0.5, 0.25, 1])


def test_a_rate_for_every_block() -> None:
    arch = square(4, 3)
    decision = pmvit.plan(arch, random_scores(arch), prune_rate=0.1, keep_per_layer=(0.9, 0.5), merge_list=[2, 0])
    plans = plans_of(decision)
    assert plans[1] is None
    assert [plans[0].kept, plans[2].kept] == [1 + 14, 1 + 8]
    with pytest.raises(UserError, match=r"keep_per_layer has 2 rates for 3 merging blocks \[0, 1, 2\]"):
        pmvit.plan(arch, random_scores(arch), keep_per_layer=(0.9, 0.5))


def test_gaps_that_pass_make_no_token_unless_asked() -> None:
    raw = scores_of([9, 1, 8, 7, 3, 6, 5, 2, 4])
    kept = {}
    for empty_rows in (False, True):
        settings = {"mode": "gap", "scope": "layer", "empty_rows": empty_rows}
        (plan,) = plans_of(pmvit.plan(square(3), raw, 0.67, prune_rate=0.12, **settings))
        kept[empty_rows] = plan.kept
        assert plan.assign[2] == -1
    assert kept == {False: 1 + 6 + 2, True: 1 + 6 + 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, "keep_rate = 0.0"),
        ({"keep_rate": 1.1}, "keep_rate = 1.1"),
        ({"keep_rate": 0.7, "prune_rate": 0.4}, "keep_rate = 0.7 and prune_rate = 0.4: the sum must not exceed 1"),
        ({"keep_per_layer": (0.5, 0.95), "prune_rate": 0.1}, r"keep_per_layer\[1\] = 0.95 and prune_rate = 0.1"),
        ({"keep": 0.5}, "keep: unknown field; known: keep_rate, .* did you mean 'keep_rate'"),
        ({"scope": "block"}, "scope = 'block'"),
        ({"depth_decay": 1.0}, "depth_decay = 1.0: must be below 1 / 1 for 2 blocks"),
        ({"merge_list": (0, 2)}, r"merge_list = \[0, 2\]: must be different blocks of 0..1"),
        ({"merge_list": (1, 1)}, r"merge_list = \[1, 1\]"),
        ({"merge_list": ()}, r"no block of \[\] can merge tokens.*blocks that can: \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    arch = square(3, 2)
    with pytest.raises(UserError, match=message):
        pmvit.plan(arch, random_scores(arch), **settings)


def test_scores_of_another_model_are_refused() -> None:
    arch = square(3, 2)
    for other, message in (
        (square(4, 2), "blocks.0.tokens is of 16 patches"),
        (square(3, 1), "blocks.1.tokens is missing"),
        (square(3, 3), "blocks.2.tokens is no score of its patches"),
    ):
        with pytest.raises(UserError, match=f"{message}; test has 2 blocks and 9 patches"):
            pmvit.plan(arch, random_scores(other))
    with pytest.raises(UserError, match="of family 'swin'"):
        pmvit.plan(random_arch(Random(0), "swin"), EXAMPLE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"mode": "gap"}, {"scope": "layer", "form": "dense"}], ids=str)
def test_budgets_are_met_tightly(seed: int, settings: dict[str, Any]) -> None:
    arch = source(seed)
    scores, patches = random_scores(arch, seed), arch.tokens - arch.prefix_tokens
    most = patches - int(patches * 0.1)
    ladder = []
    for n in range(1, most + 1):
        rates = {"keep_rate": min((n + 1e-9) / patches, 1.0), "prune_rate": (patches - most + 1e-9) / patches}
        found = pmvit.plan(arch, scores, **rates, **settings)
        ladder.append(cost(cut_arch(arch, found)).macs)
    assert ladder == sorted(ladder)
    for limit in {ladder[0], (ladder[0] + ladder[-1]) // 2, ladder[-1] - 1, ladder[-1] + 1} - {ladder[0] - 1}:
        found = pmvit.plan_for_budget(arch, scores, limit, **settings)
        assert cost(cut_arch(arch, found.cut)).macs == found.cost <= limit
        assert found.cost >= max(macs for macs in ladder if macs <= limit)  # whose blocks count on equally many centres
        assert found.met or "the model has" in found.hindrance
    with pytest.raises(UserError, match=f"{ladder[0] - 1:,.6g} macs cannot be reached: one centre in each"):
        pmvit.plan_for_budget(arch, scores, ladder[0] - 1, **settings)


def test_budgets_in_another_measure() -> None:
    arch = square(4, 3)
    tokens = Measure("tokens", lambda _: 0.0, lambda _, __, block: block.tokens or 17)
    found = pmvit.plan_for_budget(arch, random_scores(arch), 25, measure=tokens)
    assert sum(plan.kept for plan in plans_of(found.cut)) == found.cost == 25
    between = pmvit.plan_for_budget(arch, random_scores(arch), 25.5, measure=tokens)
    assert between.cut == found.cut
    assert between.hindrance == "with one patch more kept in one block the model has 101.96% of the budget"
    with pytest.raises(UserError, match="keep_rate: the budget decides"):
        pmvit.plan_for_budget(arch, random_scores(arch), 25, measure=tokens, keep_rate=0.5)


def replaced(random: Random, arch: Arch) -> Cut:
    """Some of the attention becomes a convolution or goes, but not all of it."""
    able = mergeable(arch)
    chosen = random.sample(able, random.randint(0, len(able) - 1))
    mixers = {i: random.choice(["conv1x1", "conv3x3", "none", "norm"]) for i in chosen}
    return Cut(blocks=tuple(BlockCut(mixer=mixers.get(i)) for i in range(arch.depth)))


def composed(seed: int, form: str) -> nn.Module:
    """A model with blocks dropped, widths cut, mixers replaced, and then planned on scores of its own."""
    random = Random(seed)
    arch = source(seed)
    narrow = cut(random_model(arch, seed), random_cut(random, arch))
    if not mergeable(arch_of(narrow)):
        return composed(seed + 1000, form)
    mixed = cut(narrow, replaced(random, arch_of(narrow)))
    small_arch = arch_of(mixed)
    scores = pmvit.score(mixed, labelled(small_arch))
    return cut(mixed, pmvit.plan(small_arch, scores, 0.5, prune_rate=0.2, form=form))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_plans_go_with_everything_else(seed: int, form: str, tmp_path: Path) -> None:
    model = composed(seed, form)
    arch = arch_of(model)
    assert any(block.tokens is not None for block in arch.blocks)
    assert cost(arch).macs == counted_macs(model.float(), arch)
    assert cost(arch).params == num_params(model)
    x = random_images(arch, seed, batch=4, dtype=torch.float32)
    again = load(save(model, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = F.cross_entropy(model(x), torch.arange(4) % arch.num_classes)
    before.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "token_merge" in name)
    optimizer.step()
    assert F.cross_entropy(model(x), torch.arange(4) % arch.num_classes) < before


def test_a_planned_model_is_exported(tmp_path: Path) -> None:
    arch = square(3, 2)
    small = cut(random_model(arch, 0, torch.float32), pmvit.plan(arch, random_scores(arch), 0.4, prune_rate=0.2))
    assert export(small, tmp_path / "small.pt2", "torch-export") < 1e-4


def test_a_planned_stage_keeps_its_grid() -> None:
    arch = square(3, 2)
    small = cut_arch(arch, pmvit.plan(arch, random_scores(arch), 0.4))
    assert small.stages[0] == Stage(width=8, grid=(3, 3), blocks=small.blocks)
    assert small.tokens == arch.tokens
