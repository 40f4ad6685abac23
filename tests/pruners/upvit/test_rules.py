from __future__ import annotations

import dataclasses

import pytest
import torch

from prunesweep.models import Arch, Block, Stage, UserError, cut_arch
from prunesweep.pruners import Scores, upvit, vector_sizes
from prunesweep.pruners.upvit.rules import Target, select


def deit(heads: int = 12, **options: bool) -> tuple[Arch, Scores]:
    """DeiT-B's shape but for its depth, with random scores."""
    block = {"heads": heads, "qk": 64, "v": 64, "scale": 0.125, "mlp": 3072}
    arch = Arch(
        family="vit",
        source="deit",
        img_size=(224, 224),
        patch_size=(16, 16),
        in_chans=3,
        num_classes=10,
        stages=(Stage(width=768, grid=(14, 14), blocks=tuple(Block(src=i, **block) for i in range(3))),),
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    sizes = vector_sizes(arch, upvit.KINDS)
    return arch, Scores({n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()})


def test_deit_tiny_from_deit_base() -> None:
    """Three groups of 256 channels, the best 64 of each; 576 of 768 residual channels go."""
    arch, scores = deit()
    found = select(arch, scores, Target(embed=192, heads=3, head_width=64, mlp=768))
    small = cut_arch(arch, found)
    assert small.stages[0].width == 192
    assert {(b.heads, b.qk, b.v, b.mlp, b.scale) for b in small.blocks} == {(3, 64, 64, 768, 0.125)}
    vector = scores.vectors["blocks.1.attn"]
    for g, head in enumerate(found.blocks[1].qk or ()):
        group = vector[256 * g : 256 * (g + 1)]
        assert set(head) == {256 * g + int(c) for c in group.topk(64).indices}


def test_whole_heads_keep_their_channels_together() -> None:
    arch, scores = deit()
    found = select(arch, scores, Target(heads=5, head_width=32), attn_group="whole_heads").blocks[0]
    per_head = scores.vectors["blocks.0.attn"].view(12, 64)
    best = sorted(per_head.sum(1).topk(5).indices.tolist())
    assert [{c // 64 for c in head} for head in found.qk or ()] == [{h} for h in best]
    assert set((found.v or ())[0]) == {64 * best[0] + int(c) for c in per_head[best[0]].topk(32).indices}


def test_heads_that_share_a_norm_keep_the_same_channels() -> None:
    arch, scores = deit(qk_norm=True)
    small = cut_arch(arch, select(arch, scores, Target(heads=4, head_width=16), attn_group="whole_heads"))
    assert {(b.heads, b.qk) for b in small.blocks} == {(4, 16)}
    with pytest.raises(UserError, match="with q/k norm a head cannot mix others"):
        select(arch, scores, Target(heads=4))


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    arch, scores = deit()
    equal = Scores({name: torch.ones_like(v) for name, v in scores.vectors.items()})
    found = select(arch, equal, Target(embed=2, mlp_total=3 * 308 + 1))
    assert found.embed == ((766, 767),)
    assert [len(choice.mlp or ()) for choice in found.blocks] == [308, 308, 309]


def test_one_budget_of_mlp_units_for_all_blocks() -> None:
    arch, scores = deit()
    vectors = {**scores.vectors, "blocks.1.mlp": scores.vectors["blocks.1.mlp"] * 0.01}
    found = select(arch, Scores(vectors), Target(mlp_total=3000), mlp_floor=0.05)
    kept = [choice.mlp or () for choice in found.blocks]
    assert sum(map(len, kept)) == 3000
    assert len(kept[1]) == 154  # the floor; its units are worth least
    assert set(kept[1]) == set(vectors["blocks.1.mlp"].topk(154).indices.tolist())
    others = torch.cat([vectors["blocks.0.mlp"], vectors["blocks.2.mlp"]]).topk(3000 - 154).indices.tolist()
    assert set(kept[0]) | {3072 + j for j in kept[2]} == set(others)


def test_blocks_that_go_have_no_share_of_the_budget() -> None:
    arch, scores = deit()
    blocks = Scores({"skip": torch.tensor([3.0, 0.0, 1.0, 0.0, 2.0, 0.0])})
    found = select(arch, scores, Target(mlp_total=1000, depth=2), blocks=blocks)
    assert [choice.keep for choice in found.blocks] == [True, False, True]
    assert sum(b.mlp for b in cut_arch(arch, found).blocks) == 1000
    progressive = Scores({"depth": torch.tensor([1.0, torch.inf, 2.0])})
    found = select(arch, scores, Target(depth=1), blocks=progressive)
    assert [choice.keep for choice in found.blocks] == [False, True, False]


def test_stages_lose_blocks_of_their_own() -> None:
    arch = Arch.from_timm("pvt_v2_b1")
    importance = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 5.0, 9.0, 8.0])
    found = select(arch, Scores({}), Target(depth=(1, 1, 1, 2)), blocks=Scores({"depth": importance}))
    assert [choice.keep for choice in found.blocks] == [False, True, True, False, False, True, True, True]


@pytest.mark.parametrize("rule", ["own", "neck"])
def test_pvt_v2_b0_from_b1(rule: str) -> None:
    arch = Arch.from_timm("pvt_v2_b1")
    generator = torch.Generator().manual_seed(0)
    sizes = vector_sizes(arch, upvit.KINDS)
    scores = Scores({n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()})
    target = Target(embed=(32, 64, 160, 256), head_width=32, mlp=(256, 512, 640, 1024))
    found = select(arch, scores, target, sr=rule)
    small, b0 = cut_arch(arch, found), Arch.from_timm("pvt_v2_b0")
    assert [s.width for s in small.stages] == [s.width for s in b0.stages]
    for block, wanted in zip(small.blocks, b0.blocks, strict=True):
        assert dataclasses.replace(block, scale=wanted.scale) == wanted
        assert block.scale == 64**-0.5  # the source's
    assert (found.blocks[0].sr == (found.embed or ())[0]) == (rule == "neck")


def test_impossible_targets_are_named() -> None:
    arch, scores = deit()
    for target, options, message in (
        (Target(embed=769), {}, "target.embed of stage 0 = 769: must lie in 1..768"),
        (Target(embed=(2, 3)), {}, "target.embed has 2 entries for 1 stages"),
        (Target(heads=5), {}, "target.heads = 5: .* equal contiguous groups for 1, 2, 3, 4, 6, 8, 12 heads"),
        (Target(heads=0), {}, "target.heads = 0: "),
        (Target(heads=13), {"attn_group": "whole_heads"}, "target.heads of block 0 = 13: must lie in 1..12"),
        (Target(head_width=65), {}, "target.head_width of block 0 = 65: must lie in 1..64"),
        (Target(mlp=0), {}, "target.mlp of block 0 = 0: must lie in 1..3072"),
        (Target(mlp=1, mlp_total=3), {}, "target.mlp and target.mlp_total are both given"),
        (Target(mlp_total=100), {}, "target.mlp_total = 100: must lie in 924..9216, with mlp_floor = 0.1"),
        (Target(mlp_total=100), {"mlp_floor": 2}, r"mlp_floor = 2: must lie in \[0, 1\]"),
        (Target(depth=2), {}, "target.depth needs scores of blocks"),
        (Target(depth=2), {"blocks": Scores({"skip": torch.ones(4)})}, "scores of 2 blocks, but deit has 3"),
        (Target(depth=0), {"blocks": Scores({"skip": torch.ones(6)})}, "target.depth of stage 0 = 0: must lie in 1..3"),
        (Target(), {"attn_group": "whole"}, "attn_group = 'whole': must be one of contiguous, whole_heads"),
        (Target(), {"sr": "none"}, "sr = 'none': must be one of own, neck"),
    ):
        with pytest.raises(UserError, match=message):
            select(arch, scores, target, **options)  # type: ignore[arg-type]
    swin = Arch.from_timm("swin_tiny_patch4_window7_224")
    sizes = vector_sizes(swin, upvit.KINDS)
    with pytest.raises(UserError, match="'contiguous': a Swin head has position biases of its own; use 'whole_heads'"):
        select(swin, Scores({name: torch.ones(size) for name, size in sizes.items()}), Target(heads=1))
    with pytest.raises(UserError, match="scores: stages.0.embed is missing"):
        select(arch, Scores({}), Target(embed=5))
    with pytest.raises(UserError, match="scores have 3 entries for blocks.7.mlp, deit has 0"):
        select(arch, Scores({"blocks.7.mlp": torch.ones(3)}), Target())
