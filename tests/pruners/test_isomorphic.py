from __future__ import annotations

import pytest
import timm
import torch

from prunesweep.models import Arch, UserError, arch_of, cost, cut, cut_arch
from prunesweep.pruners import TOLERANCE, Scores, WidthMethod, get_method, vector_sizes
from prunesweep.pruners.baselines import score_magnitude, score_random
from prunesweep.pruners.coupled import KINDS, coupled_sums
from prunesweep.pruners.isomorphic import Ratios, decide, isomorphic_cut, normalised
from prunesweep.pruners.taylor import score
from tests.contract_pruner import labelled, source


def random_scores(arch: Arch, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    sizes = vector_sizes(arch, KINDS)
    return Scores({name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()})


def test_the_papers_setting_gives_the_papers_shape() -> None:
    """DeiT-4.2G: half of the channels and heads, a quarter of the head channels, of distilled DeiT-B."""
    arch = Arch.from_timm("deit_base_distilled_patch16_224")
    small = cut_arch(arch, isomorphic_cut(arch, random_scores(arch), Ratios(0.5, 0.5, 0.5, 0.25)))
    assert small.stages[0].width == 384
    assert sum(block.heads for block in small.blocks) == 72
    assert 18420 <= sum(block.mlp for block in small.blocks) <= 18432
    assert 564 <= sum(block.qk for block in small.blocks) <= 576


def test_no_layer_is_cut_below_its_floor() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    scores = random_scores(arch)
    weak = {**scores.vectors, "blocks.3.mlp": torch.full((768,), 1.0, dtype=torch.float64)}
    weak["blocks.3.mlp"][0] = 1e6  # all the other units of this layer lie far below its mean
    small = cut_arch(arch, isomorphic_cut(arch, Scores(weak), Ratios(0.5, 0.5, 0.95, 0.25)))
    assert min(block.heads for block in small.blocks) == 1
    assert small.blocks[3].mlp == 2


def test_a_layer_without_gradients_is_no_number_problem() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    dead = {**random_scores(arch).vectors, "blocks.0.attn": torch.zeros(192, dtype=torch.float64)}
    found = normalised(arch, Scores(dead))
    assert all(torch.isfinite(vector).all() for vector in found.values())
    assert cut_arch(arch, isomorphic_cut(arch, Scores(dead), Ratios(0.3, 0.3, 0.3, 0.3))).blocks[0].heads == 1


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
def test_budgets_are_met_in_even_widths(share: float) -> None:
    arch = Arch.from_timm("deit_small_patch16_224")
    total = cost(arch).macs
    found = decide(arch, random_scores(arch), share * total)
    small = cut_arch(arch, found.cut)
    assert found.met
    assert (1 - TOLERANCE) * share * total <= cost(small).macs == found.cost <= share * total
    assert all(width % 2 == 0 for b in small.blocks for width in (small.stages[0].width, b.mlp, b.qk, b.v))
    assert decide(arch, random_scores(arch), total).cut.embed[0] == tuple(range(384))  # type: ignore[index]
    with pytest.raises(UserError, match="macs cannot be reached: the narrowest model has"):
        decide(arch, random_scores(arch), 1e-4 * total)


def test_ratios_are_checked() -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"ratios.head = 1: must lie in \[0, 1\)"):
        isomorphic_cut(arch, random_scores(arch), Ratios(0.5, 0.5, 1, 0.2))


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
def test_coupled_weights_are_those_that_a_cut_removes(family: str) -> None:
    """Removing a unit removes exactly the weights that its sum counts."""
    model = source(family, 7)
    arch = arch_of(model)
    names = {name for name, _ in model.named_parameters()}
    counts = coupled_sums(arch, {n: torch.ones_like(t) for n, t in model.state_dict().items() if n in names})
    total = sum(p.numel() for p in model.parameters())
    for name in [n for n in counts if not n.endswith("attn")]:
        place, kind = name.rsplit(".", 1)
        kept = tuple(range(1, len(counts[name])))
        small = cut(model, one_unit_less(arch, place, kind, kept))
        assert total - sum(p.numel() for p in small.parameters()) == counts[name][0]


def one_unit_less(arch: Arch, place: str, kind: str, kept: tuple[int, ...]):
    from prunesweep.models import BlockCut, Cut

    index = int(place.split(".")[1])
    if kind == "embed":
        embed = tuple(kept if s == index else None for s in range(len(arch.stages)))
        return Cut(embed=embed, blocks=(BlockCut(),) * arch.depth)
    return Cut(blocks=tuple(BlockCut(**({kind: kept} if i == index else {})) for i in range(arch.depth)))


def test_magnitude_is_a_mean_over_the_coupled_weights() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=5).double()
    mlp = model.blocks[0].mlp
    want = (mlp.fc1.weight[7].abs().sum() + mlp.fc2.weight[:, 7].abs().sum()) / (2 * 192)
    assert score_magnitude(model).vectors["blocks.0.mlp"][7].item() == pytest.approx(want.item())


def test_random_scores_follow_the_seed() -> None:
    model = source("vit", 7)
    first, same, other = (score_random(model, seed=seed).vectors["blocks.0.mlp"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_dead_unit_scores_nothing() -> None:
    model = source("pvt_v2", 7)
    block = next(m for name, m in model.named_modules() if name.endswith("blocks.0"))
    with torch.no_grad():
        for p in (
            block.mlp.fc1.weight[2],
            block.mlp.fc1.bias[2:3],
            block.mlp.dwconv.weight[2],
            block.mlp.fc2.weight[:, 2],
        ):
            p.zero_()
    vector = score(model, labelled(arch_of(model), 3)).vectors["blocks.0.mlp"]
    assert vector[2] == 0
    assert vector[3] > 0


def test_isomorphic_and_taylor_share_their_scores() -> None:
    assert get_method("isomorphic", WidthMethod).score is get_method("taylor", WidthMethod).score
