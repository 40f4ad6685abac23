from __future__ import annotations

from random import Random

import pytest
import torch

from models import Arch, UserError, cost, cut_arch
from pruners import GROUP_SIZES, Scores, vector_sizes, width_path
from tests.generate import random_arch

GROUPS = {"embed": 2, "heads": 1, "qk": 2, "v": 2, "mlp": 3}


def random_scores(arch: Arch, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in vector_sizes(arch).items()}
    )


def sources() -> list[tuple[Arch, Scores, tuple[int, ...]]]:
    found = []
    for seed in range(25):
        random = Random(seed)
        arch = random_arch(random, ragged=False, extras=False)
        dropped = tuple(random.sample(range(arch.depth), random.randint(0, arch.depth - 1)))
        found.append((arch, random_scores(arch, seed), dropped))
    return found


@pytest.mark.parametrize(("arch", "scores", "dropped"), sources())
def test_every_step_is_a_real_architecture_with_exactly_its_macs(
    arch: Arch, scores: Scores, dropped: tuple[int, ...]
) -> None:
    path = width_path(arch, scores, dropped=dropped, groups=GROUPS)
    assert len(path.macs) == len(path.steps) + 1
    assert all(b < a for a, b in zip(path.macs, path.macs[1:], strict=False))
    for step in range(len(path.macs)):
        assert cost(cut_arch(arch, path.cut(step))).macs == path.macs[step]
    narrowest = cut_arch(arch, path.cut(len(path.steps)))
    sizes = vector_sizes(arch)
    for name, left in vector_sizes(narrowest).items():  # the last group of every vector stays
        kind = name.rpartition(".")[2]
        assert 1 <= left <= GROUPS[kind]
        assert left == 1 + (sizes[rename(name, narrowest)] - 1) % GROUPS[kind]


def rename(name: str, arch: Arch) -> str:
    """A vector's name in the source."""
    if name == "embed":
        return name
    _, index, kind = name.split(".")
    return f"blocks.{arch.stages[0].blocks[int(index)].src}.{kind}"


@pytest.mark.parametrize(("arch", "scores", "dropped"), sources())
def test_a_budget_is_met_from_below_within_one_group(arch: Arch, scores: Scores, dropped: tuple[int, ...]) -> None:
    path = width_path(arch, scores, dropped=dropped, groups=GROUPS)
    random = Random(0)
    for _ in range(20):
        budget = random.uniform(path.macs[-1], cost(arch).macs)
        step = path.step_for(budget)
        assert path.macs[step] <= budget
        assert step == 0 or path.macs[step - 1] > budget
    with pytest.raises(UserError, match="cannot be reached with"):
        path.step_for(path.macs[-1] - 1)


def test_each_step_removes_the_least_saliency_per_mac() -> None:
    arch = random_arch(Random(4), ragged=False, missing=False, extras=False)
    scores = random_scores(arch, 4)
    path = width_path(arch, scores, groups=GROUPS)
    gone = dict.fromkeys(vector_sizes(arch), 0)
    for (name, units), before in zip(path.steps, path.macs, strict=False):
        prices = {}
        for other, size in vector_sizes(arch).items():
            group = GROUPS[other.rpartition(".")[2]]
            if size - gone[other] > group:
                ordered = scores.vectors[other].sort().values
                saliency = ordered[gone[other] : gone[other] + group].sum().item()
                prices[other] = saliency / (before - macs_without(arch, scores, gone, other, group))
        assert prices[name] == pytest.approx(min(prices.values()), rel=1e-9)
        gone[name] += units


def macs_without(arch: Arch, scores: Scores, gone: dict[str, int], name: str, group: int) -> int:
    """MACs after one more group of ``name``, counted on the record."""
    from models import BlockCut, Cut

    left = {
        n: tuple(sorted(scores.vectors[n].argsort(stable=True)[k + (group if n == name else 0) :].tolist()))
        for n, k in gone.items()
    }
    blocks = tuple(
        BlockCut.aligned(block, **{kind: left[f"blocks.{i}.{kind}"] for kind in ("heads", "qk", "v", "mlp")})
        for i, block in enumerate(arch.stages[0].blocks)
    )
    return cost(cut_arch(arch, Cut(embed=(left["embed"],), blocks=blocks))).macs


def test_least_important_units_go_first_and_budgets_are_nested() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    scores = random_scores(arch, 0)
    path = width_path(arch, scores)
    total = cost(arch).macs
    embeds = []
    for budget in (0.8, 0.5, 0.3):
        decision = path.cut(path.step_for(budget * total))
        kept = set(decision.embed[0] or ())
        worst_kept = scores.vectors["embed"][sorted(kept)].min()
        assert all(scores.vectors["embed"][u] <= worst_kept for u in set(range(192)) - kept)
        embeds.append(kept)
    assert embeds[0] >= embeds[1] >= embeds[2]


def test_a_kind_can_be_left_whole() -> None:
    arch = random_arch(Random(9), ragged=False, missing=False, extras=False)
    path = width_path(arch, random_scores(arch, 9), groups={**GROUPS, "embed": 0, "heads": 0})
    assert {name.rpartition(".")[2] for name, _ in path.steps} <= {"qk", "v", "mlp"}
    narrowest = cut_arch(arch, path.cut(len(path.steps)))
    assert narrowest.stages[0].width == arch.stages[0].width


def test_errors_say_what_is_wrong() -> None:
    arch = random_arch(Random(2), ragged=False, missing=False, extras=False)
    scores = random_scores(arch, 2)
    with pytest.raises(UserError, match="dropped block 99"):
        width_path(arch, scores, dropped=[99])
    with pytest.raises(UserError, match="at least one must be kept"):
        width_path(arch, scores, dropped=range(arch.depth))
    with pytest.raises(UserError, match="give a size of at least 0 for each of embed, heads, qk, v, mlp"):
        width_path(arch, scores, groups={"embed": 1})
    short = Scores({**scores.vectors, "embed": torch.ones(1)})
    with pytest.raises(UserError, match=r"embed has 1 entries, the model needs"):
        width_path(arch, short)
    with pytest.raises(UserError, match="embed is missing"):
        width_path(arch, Scores({}))


def test_default_groups_are_nvits() -> None:
    assert dict(GROUP_SIZES) == {"embed": 16, "heads": 2, "qk": 8, "v": 8, "mlp": 16}
