from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
import timm
import torch

from prunesweep.models import Arch, Block, BlockCut, Cut, UserError, cost, cut, cut_arch
from prunesweep.models.cutting import joint_values
from prunesweep.models.latency.building import macs_table
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import (
    GROUP_SIZES,
    MACS,
    PARAMS,
    Measure,
    Scores,
    kind_of,
    latency,
    unit_counts,
    vector_sizes,
    width_path,
)
from prunesweep.pruners.fill import fill
from prunesweep.pruners.narrowing import Narrowing
from prunesweep.pruners.ranked import Ranked
from tests.generate import FAMILIES, random_arch, random_images, random_model

GROUPS = {"embed": 2, "heads": 1, "qk": 2, "v": 2, "dim": 2, "mlp": 3, "sr": 2, "tail": 2}
ALIGNED = ("embed", "heads", "qk", "v", "mlp", "sr")
COUPLED = ("embed", "attn", "mlp", "sr")


def random_scores(arch: Arch, seed: int, kinds: tuple[str, ...] = ALIGNED) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    sizes = vector_sizes(arch, kinds)
    return Scores({name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()})


def equal_widths(arch: Arch) -> Arch:
    """``arch`` with value widths equal to query/key widths."""

    def equal(block: Block) -> Block:
        return dataclasses.replace(block, v=block.qk * arch.qk_rows) if block.mixer == "attn" else block

    stages = tuple(
        dataclasses.replace(stage, blocks=tuple(equal(block) for block in stage.blocks)) for stage in arch.stages
    )
    return dataclasses.replace(arch, stages=stages)


def sources() -> list[tuple[Arch, Scores, tuple[int, ...]]]:
    """Records of all families with scores of both layouts and blocks that can be dropped."""
    found = []
    for seed in range(36):
        random = Random(seed)
        arch = random_arch(random, FAMILIES[seed // 2 % 4], ragged=False)
        kinds = ALIGNED
        if seed % 2:
            arch, kinds = equal_widths(arch), COUPLED
        spare = [len(stage.blocks) - 1 for stage in arch.stages]
        starts = [sum(len(s.blocks) for s in arch.stages[:k]) for k in range(len(arch.stages))]
        dropped = tuple(s for s, n in zip(starts, spare, strict=True) if n and random.random() < 0.5)
        found.append((arch, random_scores(arch, seed, kinds), dropped))
    return found


@pytest.mark.parametrize("measure", [MACS, PARAMS], ids=lambda m: m.name)
@pytest.mark.parametrize(("arch", "scores", "dropped"), sources())
def test_every_step_is_a_real_architecture_with_exactly_its_cost(
    arch: Arch, scores: Scores, dropped: tuple[int, ...], measure: Measure
) -> None:
    path = width_path(arch, scores, dropped=dropped, groups=GROUPS, measure=measure)
    assert len(path.costs) == len(path.steps) + 1
    assert all(b < a for a, b in zip(path.costs, path.costs[1:], strict=False))
    for step in range(0, len(path.costs), 3):
        assert getattr(cost(cut_arch(arch, path.cut(step))), measure.name) == path.costs[step]
    narrowest = cut_arch(arch, path.cut(len(path.steps)))
    left = {name: len(own.order) for name, own in path.ranked.items()}
    for name, units in path.steps:
        left[name] -= units
    for name, count in left.items():  # the last group of every vector stays
        if kind_of(name) == "embed" or int(name.split(".")[1]) not in dropped:
            assert count == 1 + (len(path.ranked[name].order) - 1) % GROUPS[kind_of(name)]
    assert narrowest.depth == arch.depth - len(dropped)


@pytest.mark.parametrize("measure", [MACS, PARAMS], ids=lambda m: m.name)
@pytest.mark.parametrize("kinds", [ALIGNED, COUPLED])
@pytest.mark.parametrize("seed", range(12))
def test_what_else_is_decided_counts_as_decided(seed: int, kinds: tuple[str, ...], measure: Measure) -> None:
    """New mixers and token plans: every step costs exactly what its record costs, and the cut can be made."""
    random = Random(seed)
    arch = equal_widths(random_arch(random, ("vit", "swin")[seed % 2], ragged=False, missing=False, extras=False))
    new = {i: random.choice(["conv1x1", "conv3x3", "none", "norm", None]) for i in range(arch.depth)}
    mixers = {i: mixer for i, mixer in new.items() if mixer}
    kept = arch.prefix_tokens + 2
    rows = [*range(kept), *([kept - 1] * (arch.tokens - kept))]
    plan = TokenPlan(kept, tuple(rows), (1.0,) * arch.tokens)
    tokens = {i: plan for i in range(arch.depth) if arch.family == "vit" and not mixers.get(i, "").startswith("conv")}
    settings = {"groups": GROUPS, "measure": measure, "mixers": mixers, "tokens": tokens}
    scores = random_scores(arch, seed, kinds)
    path = width_path(arch, scores, **settings)
    for step in range(len(path.costs)):
        small = cut_arch(arch, path.cut(step))
        assert getattr(cost(small), measure.name) == path.costs[step]
        assert all(small.blocks[i].mixer == mixer.replace("norm", "none") for i, mixer in mixers.items())
        assert all(small.blocks[i].tokens == kept for i in tokens)
    convs = [i for i, mixer in mixers.items() if mixer.startswith("conv")]
    assert all(small.blocks[i].total_v <= 2 for i in convs)  # the bottleneck narrows too
    budget = path.costs[len(path.costs) // 2]
    short = width_path(arch, scores, **settings, least=budget)
    assert short.steps == path.steps[: len(short.steps)]
    assert short.step_for(budget) == path.step_for(budget) == len(short.steps)
    model = random_model(arch, seed)
    assert cut(model, path.cut(path.step_for(budget)))(random_images(arch, seed)).isfinite().all()


@pytest.mark.parametrize(("arch", "scores", "dropped"), sources()[:12])
def test_a_step_is_the_first_within_its_budget(arch: Arch, scores: Scores, dropped: tuple[int, ...]) -> None:
    path = width_path(arch, scores, dropped=dropped, groups=GROUPS)
    random = Random(0)
    for _ in range(20):
        budget = random.uniform(path.costs[-1], cost(arch).macs)
        step = path.step_for(budget)
        assert path.costs[step] <= budget
        assert step == 0 or path.costs[step - 1] > budget
    with pytest.raises(UserError, match="macs cannot be reached with"):
        path.step_for(path.costs[-1] - 1)


def digits(width: int = 96, depth: int = 6, heads: int = 6) -> Arch:
    """A small model, of which a group of the residual stream is a sixth."""
    return Arch.from_timm(
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=2,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=10,
        )
    )


@pytest.mark.parametrize("measure", [MACS, PARAMS], ids=lambda m: m.name)
@pytest.mark.parametrize("kinds", [ALIGNED, COUPLED])
@pytest.mark.parametrize("arch", [digits(), digits(32, 3, 4), Arch.from_timm("deit_tiny_patch16_224")])
def test_budgets_of_real_models_are_met(arch: Arch, kinds: tuple[str, ...], measure: Measure) -> None:
    """Within half a per cent, where whole groups alone miss by many."""
    path, total = width_path(arch, random_scores(arch, 0, kinds), measure=measure), measure(arch)
    missed = 0
    for share in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3):
        found = path.reach(share * total)
        assert found.met
        assert not found.hindrance
        assert 0.995 * share * total <= found.cost <= share * total
        assert getattr(cost(cut_arch(arch, found.cut)), measure.name) == found.cost
        missed += path.costs[path.step_for(share * total)] < 0.97 * share * total
    assert missed > 1


@pytest.mark.parametrize(("arch", "scores", "dropped"), sources())
def test_what_fills_a_budget_is_taken_from_the_last_model_above_it(
    arch: Arch, scores: Scores, dropped: tuple[int, ...]
) -> None:
    """So a smaller budget keeps no unit that was already gone there, and is met or says what is in the way."""
    path, random = width_path(arch, scores, dropped=dropped, groups=GROUPS), Random(1)
    for _ in range(20):
        budget = random.uniform(path.costs[-1], path.costs[0])
        found, step = path.reach(budget), path.step_for(budget)
        small = cut_arch(arch, found.cut)
        assert path.costs[step] <= found.cost == cost(small).macs <= budget
        assert found.met or "is" in found.hindrance
        above, inside = path.cut(step - 1), found.cut
        assert all(
            set(b or ()) <= set(a or b or ()) for a, b in zip(above.embed or (), inside.embed or (), strict=True)
        )
        for outer, inner in zip(above.blocks, inside.blocks, strict=True):
            assert set(inner.mlp or ()) <= set(outer.mlp or inner.mlp or ())


def test_groups_stay_whole_where_they_fit() -> None:
    """Widths of a model of usual size stay multiples of their groups; only where that misses are groups split."""
    arch = Arch.from_timm("deit_small_patch16_224")
    path = width_path(arch, random_scores(arch, 0, COUPLED))
    for share in (0.85, 0.6, 0.35):
        small = cut_arch(arch, path.reach(share * cost(arch).macs).cut)
        assert small.stages[0].width % 16 == 0
        assert all(block.mlp % 16 == 0 and block.v % 8 == 0 for block in small.blocks)
    arch = digits(32, 3, 4)
    small = cut_arch(arch, width_path(arch, random_scores(arch, 0)).reach(0.5 * cost(arch).macs).cut)
    assert small.stages[0].width % 16 == 0
    assert any(block.mlp % 16 for block in small.blocks)


def test_a_hindrance_is_named() -> None:
    arch = digits()
    scores, total = random_scores(arch, 0, COUPLED), cost(arch).macs
    only_embed = width_path(arch, scores, groups={**dict.fromkeys(GROUP_SIZES, 0), "embed": 16})
    found = only_embed.reach(0.5 * total)
    assert not found.met
    expected = "the smallest step left, 1 channel of the residual stream of stage 0, is 2.0% of the budget"
    assert found.hindrance == f"{expected} (at their floors or kept whole: dim, heads, mlp)"
    without = width_path(arch, scores, dropped=[0, 1, 2])
    little = without.reach(0.9 * total)
    assert little.cost == without.costs[0]
    assert f"with dropped blocks, has {without.costs[0]:,.6g}" in little.hindrance


def test_several_units_that_are_one_step_are_named_in_the_plural() -> None:
    arch = digits()
    hidden = Ranked.of(np.ones(arch.blocks[0].mlp), 64, finest=64)
    filled = fill(Narrowing(arch, MACS), {"blocks.0.mlp": hidden}, {}, cost(arch).macs - 1)
    assert filled.hindrance.startswith("the smallest step left, 64 hidden units of block 0, is")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", [ALIGNED, COUPLED])
def test_each_step_removes_the_least_saliency_per_mac(family: str, kinds: tuple[str, ...]) -> None:
    """Every alternative of every step is counted anew, on the record that it would give."""
    arch = equal_widths(random_arch(Random(5), family, ragged=False, missing=False, extras=False))
    scores = random_scores(arch, 4, kinds)
    path = width_path(arch, scores, groups=GROUPS)
    vectors = dict(scores.vectors)
    for i, block in enumerate(arch.blocks):
        if (attn := vectors.pop(f"blocks.{i}.attn", None)) is not None:
            per_head = attn.view(block.heads, -1)
            vectors |= {f"blocks.{i}.heads": per_head.sum(1), f"blocks.{i}.dim": per_head.sum(0)}
    gone = dict.fromkeys(vectors, 0)
    for (name, units), before in zip(path.steps, path.costs, strict=False):
        prices = {}
        for other, vector in vectors.items():
            group = GROUPS[kind_of(other)]
            if len(vector) - gone[other] > group:
                ordered = vector.sort().values
                saliency = ordered[gone[other] : gone[other] + group].sum().item()
                left = {n: tuple(v.argsort(stable=True)[gone[n] + (n == other) * group :]) for n, v in vectors.items()}
                prices[other] = saliency / (before - cost(cut_arch(arch, decision(arch, left))).macs)
        assert prices[name] == pytest.approx(min(prices.values()), rel=1e-9)
        gone[name] += units


def decision(arch: Arch, left: dict[str, tuple]) -> Cut:
    """The cut that keeps the units in ``left``."""
    kept = {name: tuple(sorted(int(u) for u in units)) for name, units in left.items()}
    choices = []
    for i, block in enumerate(arch.blocks):
        own = {kind: kept.get(f"blocks.{i}.{kind}") for kind in GROUP_SIZES}
        qk, v = own["dim"] or own["qk"], joint_values(block, own["dim"]) if own["dim"] else own["v"]
        choice = BlockCut(mlp=own["mlp"])  # of attention that stays whole
        if block.mixer == "xca":
            qk = v = range(block.qk)
        if block.convolves:
            choice = BlockCut(v=(v,), mlp=own["mlp"])
        elif qk is not None:
            choice = BlockCut.aligned(block, heads=own["heads"], qk=qk, v=v, mlp=own["mlp"])
        choices.append(dataclasses.replace(choice, sr=own["sr"]))
    return Cut(embed=tuple(kept[f"stages.{s}.embed"] for s in range(len(arch.stages))), blocks=tuple(choices))


def test_least_important_units_go_first_and_budgets_are_nested() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    scores = random_scores(arch, 0)
    path = width_path(arch, scores)
    total = cost(arch).macs
    vector = scores.vectors["stages.0.embed"]
    embeds = []
    for budget in (0.8, 0.5, 0.3):
        kept = set(path.cut(path.step_for(budget * total)).embed[0] or ())
        worst_kept = vector[sorted(kept)].min()
        assert all(vector[u] <= worst_kept for u in set(range(192)) - kept)
        embeds.append(kept)
    assert embeds[0] >= embeds[1] >= embeds[2]


def test_widths_of_a_usual_backbone_stay_multiples_of_eight() -> None:
    """Kernels read eight numbers of half precision at once; single units go where a small model needs it."""
    arch = Arch.from_timm("deit_small_patch16_224")
    path = width_path(arch, random_scores(arch, 0))
    for budget in (0.75, 0.5, 0.3):
        small = cut_arch(arch, path.reach(budget * cost(arch).macs).cut)
        widths = [w for block in small.blocks for w in (block.mlp, block.heads * block.qk, block.total_v)]
        assert [w % 8 for w in (small.stages[0].width, *widths)] == [0] * (1 + len(widths))


def test_the_cut_can_be_made() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(1, 2), num_heads=(2, 4)
    )
    arch = Arch.from_timm(model)
    path = width_path(arch, random_scores(arch, 1, COUPLED), groups=GROUPS)
    small = cut(model, path.cut(path.step_for(0.5 * cost(arch).macs)))
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_latency_from_a_table() -> None:
    """A table of MACs gives what MACs give, and what it does not cover is not chosen."""
    arch = Arch.from_timm("deit_tiny_patch16_224")
    table = macs_table(arch, ms_per_gmac=3.0)
    measure = latency(table, arch)
    share = cost(arch).macs / measure(arch)
    scores = random_scores(arch, 3)
    by_macs, by_table = (width_path(arch, scores, measure=m) for m in (MACS, measure))
    found = by_table.reach(0.4321 * measure(arch))
    assert found.met
    assert table.predict(cut_arch(arch, found.cut)) == pytest.approx(found.cost)
    step = by_table.step_for(0.5 * measure(arch))
    assert cost(cut_arch(arch, by_table.cut(step))).macs == pytest.approx(share * by_table.costs[step])
    common = min(len(by_macs.steps), len(by_table.steps), 200)
    assert by_macs.steps[:common] == by_table.steps[:common]
    narrowest = cut_arch(arch, by_table.cut(len(by_table.steps)))
    assert table.predict(narrowest) == pytest.approx(by_table.costs[-1])
    with pytest.raises(UserError, match="the latency table was measured with"):
        latency(table, Arch.from_timm("deit_tiny_distilled_patch16_224"))


def test_floors_and_kinds_left_whole() -> None:
    arch = random_arch(Random(9), ragged=False, missing=False, extras=False)
    path = width_path(arch, random_scores(arch, 9), groups={**GROUPS, "embed": 0, "heads": 0}, floors={"mlp": 0.5})
    assert {kind_of(name) for name, _ in path.steps} <= {"qk", "v", "mlp"}
    narrowest = cut_arch(arch, path.cut(len(path.steps)))
    assert narrowest.stages[0].width == arch.stages[0].width
    assert all(small.mlp >= 0.5 * whole.mlp for small, whole in zip(narrowest.blocks, arch.blocks, strict=True))
    assert any(small.mlp < whole.mlp for small, whole in zip(narrowest.blocks, arch.blocks, strict=True))


def test_kinds_that_are_not_scored_stay_whole() -> None:
    arch = random_arch(Random(9), ragged=False, missing=False, extras=False)
    path = width_path(arch, random_scores(arch, 9, ("mlp",)), groups=GROUPS)
    narrowest = cut_arch(arch, path.cut(len(path.steps)))
    assert [b.heads for b in narrowest.blocks] == [b.heads for b in arch.blocks]
    assert sum(b.mlp for b in narrowest.blocks) < sum(b.mlp for b in arch.blocks)


def test_errors_say_what_is_wrong() -> None:
    arch = random_arch(Random(2), ragged=False, missing=False, extras=False)
    scores = random_scores(arch, 2)
    with pytest.raises(UserError, match="dropped block 99"):
        width_path(arch, scores, dropped=[99])
    with pytest.raises(UserError, match="at least one must be kept"):
        width_path(arch, scores, dropped=range(arch.depth))
    with pytest.raises(UserError, match="give a size of at least 0 for each of embed, heads, qk, v, dim, mlp, sr"):
        width_path(arch, scores, groups={"embed": 1})
    with pytest.raises(UserError, match="give shares in 0..1"):
        width_path(arch, scores, floors={"mlp": 2})
    name = "stages.0.embed"
    with pytest.raises(UserError, match=r"embed has 1 entries, the model needs"):
        width_path(arch, Scores({**scores.vectors, name: torch.ones(1)}))
    broken = {**scores.vectors, name: scores.vectors[name].index_fill(0, torch.tensor(1), torch.nan)}
    with pytest.raises(UserError, match=r"scores are not finite in stages.0.embed: the model's outputs"):
        width_path(arch, Scores(broken))
    with pytest.raises(UserError, match=r"stages.3.embed does not exist in random"):
        width_path(arch, Scores({**scores.vectors, "stages.3.embed": torch.ones(1)}))
    with pytest.raises(UserError, match=r"blocks.0.mlp is missing"):
        width_path(Arch.from_timm("deit_tiny_patch16_224"), Scores({"blocks.1.mlp": torch.ones(768)}))
    swin = next(a for a in (random_arch(Random(s), "swin") for s in range(9)) if len(a.stages) > 1)
    with pytest.raises(UserError, match="of stage 0 are dropped"):
        width_path(swin, Scores({}), dropped=range(len(swin.stages[0].blocks)))


def test_default_groups_are_nvits() -> None:
    assert dict(GROUP_SIZES) == {"embed": 16, "heads": 2, "qk": 8, "v": 8, "dim": 8, "mlp": 16, "sr": 16, "tail": 8}


def test_units_of_a_pvt() -> None:
    counts = unit_counts(Arch.from_timm("pvt_v2_b0"))
    assert counts["stages.1.embed"] == counts["blocks.2.sr"] == counts["blocks.2.attn"] == 64
    assert "blocks.7.sr" not in counts
