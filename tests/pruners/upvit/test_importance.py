from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from prunesweep.models import Arch, BlockCut, Cut, UserError, arch_of, blocks_of, cut
from prunesweep.models.cutting import joint_values
from prunesweep.pruners import Scores, kind_of, kl_divergence, upvit, vector_sizes
from prunesweep.pruners.drawn_targets import draw_labels
from prunesweep.pruners.upvit.forward import Forward
from prunesweep.pruners.upvit.maps import MapForward
from prunesweep.pruners.upvit.windows import WindowForward
from tests.generate import random_arch, random_images, random_model
from tests.oracle import masked

IMAGES = ("vit", "eva", "beit", "swin", "swin_v2", "pvt_v2", "sam")  # test_upvit_lm has language models
SEEDS = {"swin": 6, "swin_v2": 6, "beit": 6, "sam": 6}  # of others twice as many
FAMILIES = [(family, seed) for family in IMAGES for seed in range(SEEDS.get(family, 12))]
FAMILIES.append(("eva", 12))  # two norms in front of its MLPs
by_family = pytest.mark.parametrize(("family", "seed"), FAMILIES)


def coupled(family: str, seed: int, **options: bool) -> nn.Module:
    """Any record whose heads have one width for queries, keys and values: what can be scored."""
    arch = random_arch(Random(seed), family, ragged=False, **options)
    stages = tuple(
        dataclasses.replace(
            s,
            blocks=tuple(dataclasses.replace(b, v=b.qk * arch.qk_rows) if b.mixer == "attn" else b for b in s.blocks),
        )
        for s in arch.stages
    )
    return random_model(dataclasses.replace(arch, stages=stages, parallel=False), seed)


def batches_of(model: nn.Module, *sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    arch = arch_of(model)
    return [(random_images(arch, 50 + i, batch=n), torch.zeros(n)) for i, n in enumerate(sizes)]


def without(arch: Arch, name: str, unit: int) -> Cut:
    """The cut that lacks one unit."""
    _, place, kind = name.split(".")
    count = vector_sizes(arch, upvit.KINDS)[name]
    kept = tuple(c for c in range(count) if c != unit)
    if kind == "embed":
        embed = tuple(kept if s == int(place) else None for s in range(len(arch.stages)))
        return Cut(embed=embed, blocks=(BlockCut(),) * arch.depth)
    block = arch.blocks[int(place)]
    choice = BlockCut(qk=(kept,), v=(joint_values(block, kept),)) if kind == "attn" else BlockCut(**{kind: kept})
    return Cut(blocks=tuple(choice if i == int(place) else BlockCut() for i in range(arch.depth)))


def pieces(model: nn.Module) -> Forward:
    kinds = {"swin": WindowForward, "swin_v2": WindowForward, "sam": MapForward}
    return kinds.get(arch_of(model).family, Forward)(model)


def gated(model: nn.Module, x: torch.Tensor, name: str, unit: int) -> torch.Tensor:
    size = vector_sizes(arch_of(model), upvit.KINDS)[name]
    gate = torch.ones(len(x), 1, size, dtype=x.dtype)
    gate[..., unit] = 0
    return pieces(model)(x, {name: gate})


@by_family
@torch.no_grad()
def test_the_pieces_are_the_model(family: str, seed: int) -> None:
    """Ragged values, convolutions, token plans, missing halves and all."""
    model = random_model(random_arch(Random(seed), family), seed)
    x = random_images(arch_of(model), seed)
    torch.testing.assert_close(pieces(model)(x), model(x), rtol=1e-10, atol=1e-12)


@by_family
@torch.no_grad()
def test_a_gate_of_zero_is_the_unit_removed(family: str, seed: int) -> None:
    model, random = coupled(family, seed), Random(seed)
    arch = arch_of(model)
    x = random_images(arch, seed)
    for name, count in vector_sizes(arch, upvit.KINDS).items():
        unit = random.randrange(count)
        if count > 1 and not (arch.qk_norm and kind_of(name) == "attn"):
            with masked(model, without(arch, name, unit)) as small:
                torch.testing.assert_close(gated(model, x, name, unit), small(x), rtol=1e-9, atol=1e-11, msg=name)


def test_a_gated_channel_leaves_its_heads_norm() -> None:
    """With q/k norm, the same channel gone from all heads is what a cut can say."""
    model = next(m for s in range(99) if arch_of(m := coupled("vit", s, missing=False, extras=False)).qk_norm)
    arch = arch_of(model)
    x, block = random_images(arch, 0), arch.blocks[0]
    gate = torch.ones(len(x), 1, block.total_v, dtype=x.dtype)
    gate[..., [h * block.qk for h in range(block.heads)]] = 0
    kept = range(1, block.qk)
    choice = BlockCut.aligned(block, heads=range(block.heads), qk=kept, v=kept, mlp=None)
    with torch.no_grad():
        small = cut(model, Cut(blocks=(choice,) + (BlockCut(),) * (arch.depth - 1)))
        torch.testing.assert_close(pieces(model)(x, {"blocks.0.attn": gate}), small(x), rtol=1e-9, atol=1e-11)


@by_family
@torch.no_grad()
def test_exact_scores_are_what_removal_costs(family: str, seed: int) -> None:
    """Against whole forward passes, of some units of some vectors."""
    model, random = coupled(family, seed), Random(seed)
    batches, sizes = batches_of(model, 2, 3), vector_sizes(arch_of(model), upvit.KINDS)
    names = random.sample(list(sizes), min(6, len(sizes)))
    vectors = upvit.score(model, batches, importance="exact", vectors=names).vectors
    assert {name: len(v) for name, v in vectors.items()} == {name: sizes[name] for name in vectors}
    sources = [model(x) for x, _ in batches]
    for name, vector in vectors.items():
        for unit in random.sample(range(len(vector)), min(3, len(vector))):
            changed = [gated(model, x, name, unit) for x, _ in batches]
            want = sum(float(kl_divergence(z, y).sum()) for z, y in zip(sources, changed, strict=True))
            assert vector[unit].item() == pytest.approx(want, rel=1e-7, abs=1e-13), f"{name}[{unit}]"


@pytest.mark.parametrize("family", IMAGES)
def test_memory_changes_nothing_but_the_stacks(family: str) -> None:
    model = coupled(family, 1, missing=False, extras=False)
    batches = batches_of(model, 2)
    one_by_one, stacked = (upvit.score(model, batches, importance="exact", memory_mb=m).vectors for m in (0, 1024))
    for name, vector in stacked.items():
        torch.testing.assert_close(one_by_one[name], vector, rtol=1e-9, atol=1e-14)


@torch.no_grad()
def test_the_shortcut_to_the_class_token_is_taken() -> None:
    """And not where the last block needs, or the classifier reads, all tokens."""
    models = [coupled("vit", s, missing=False, extras=False) for s in range(30)]
    found = {(arch_of(m).pool, arch_of(m).dist_token): Forward(m).rows for m in models}
    assert found == {("avg", False): None, ("token", False): 1, ("token", True): 2}


def silenced(model: nn.Module, *, mlp: int, mixer: int | None) -> nn.Module:
    """A copy whose MLP ``mlp`` and token mixer ``mixer`` add nothing."""
    model = copy.deepcopy(model)
    blocks = blocks_of(model)
    layers = [blocks[mlp].mlp.fc2] if arch_of(model).blocks[mlp].mlp else []
    if layers and arch_of(model).post_norm:  # whose bias would be left
        layers.append(blocks[mlp].norm2)
    if mixer is not None and hasattr(blocks[mixer], "norm1"):
        attn = getattr(blocks[mixer], "attn", None)
        last = getattr(attn, "proj", None) or (attn.bconv[3] if hasattr(attn, "bconv") else None)
        layers += [layer for layer in (blocks[mixer].norm1, last) if layer is not None]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return model


@by_family
@torch.no_grad()
def test_block_scores(family: str, seed: int) -> None:
    """Even entries: a block gone; odd ones: its MLP, and the next mixer of the same stage."""
    model = coupled(family, seed)
    arch, batches = arch_of(model), batches_of(model, 4)
    x, z = batches[0][0], model(batches[0][0])
    entries = upvit.score_blocks(model, batches).vectors["skip"]
    stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks] + [None]
    want = []
    for i in range(arch.depth):
        with masked(model, Cut(blocks=tuple(BlockCut(keep=j != i) for j in range(arch.depth)))) as small:
            want.append(float(kl_divergence(z, small(x)).sum()))
        changed = silenced(model, mlp=i, mixer=i + 1 if stage_of[i + 1] == stage_of[i] else None)
        want.append(float(kl_divergence(z, changed(x)).sum()))
    torch.testing.assert_close(entries, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("family", IMAGES)
@torch.no_grad()
def test_a_cut_of_one_unit_costs_its_score(family: str) -> None:
    model = coupled(family, 3, missing=False, extras=False)
    batches = batches_of(model, 3)
    vectors = upvit.score(model, batches, importance="exact").vectors
    x = batches[0][0]
    for name in ("stages.0.embed", "blocks.0.mlp"):
        small = cut(model, without(arch_of(model), name, 2))
        assert vectors[name][2].item() == pytest.approx(float(kl_divergence(model(x), small(x)).sum()), rel=1e-7)


@by_family
def test_second_order_scores_are_exact_for_small_changes(family: str, seed: int) -> None:
    """Where a unit's output weights are small, KL and its second-order form agree."""
    model = coupled(family, seed)
    small = 1e-5
    with torch.no_grad():
        for block in blocks_of(model):
            if hasattr(block, "mlp"):
                block.mlp.fc2.weight *= small
            if hasattr(getattr(block, "attn", None), "proj"):
                block.attn.proj.weight *= small
                layers = (getattr(block.attn, name, None) for name in ("qkv", "q", "q_proj"))
                queries = next(layer for layer in layers if layer is not None)
                queries.weight[: block.attn.proj.in_features] *= small
                if queries.bias is not None:
                    queries.bias[: block.attn.proj.in_features] *= small
    arch = arch_of(model)
    normed = {"attn": arch.qk_norm or arch.attn_norm, "mlp": arch.mlp_norm}
    bent = {kind: own or arch.post_norm for kind, own in normed.items()}  # a norm is not linear in a gate
    names = [n for n in vector_sizes(arch, upvit.KINDS) if not bent.get(kind_of(n), True)]
    if names:
        batches = batches_of(model, 3)
        exact = upvit.score(model, batches, importance="exact", vectors=names).vectors
        fisher = upvit.score(model, batches, importance="fisher", labels_per_image="all", vectors=names).vectors
        for name in names:
            torch.testing.assert_close(
                fisher[name], exact[name], rtol=1e-3, atol=1e-22, msg=lambda m, n=name: f"{n}\n{m}"
            )


def test_hybrid_is_exact_for_residual_channels_only() -> None:
    model = coupled("pvt_v2", 3, missing=False, extras=False)
    batches = batches_of(model, 3)
    hybrid, exact, fisher = (
        upvit.score(model, batches, importance=how).vectors for how in ("hybrid", "exact", "fisher")
    )
    for name, vector in hybrid.items():
        want, other = (exact, fisher) if kind_of(name) == "embed" else (fisher, exact)
        torch.testing.assert_close(vector, want[name], rtol=1e-9, atol=1e-14)
        assert not torch.allclose(vector, other[name], rtol=1e-6, atol=0)


def test_labels_follow_the_models_distribution() -> None:
    p = torch.tensor([[0.1, 0.6, 0.0, 0.3]], dtype=torch.float64)
    starts = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = draw_labels(p.expand(1000, -1), 3, starts)
    share = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    torch.testing.assert_close(share.double(), p[0], rtol=0, atol=1e-3)
    assert draw_labels(p, 2, [1 - 2**-53]).max() == 3


def test_more_labels_come_closer_to_all_of_them() -> None:
    model = coupled("vit", 9, missing=False, extras=False)
    batches = batches_of(model, 40)
    every = upvit.score(model, batches, importance="fisher", labels_per_image="all").vectors

    def error(labels: int, seed: int) -> float:
        some = upvit.score(model, batches, importance="fisher", labels_per_image=labels, seed=seed).vectors
        return sum(float((some[n] / v - 1).abs().mean()) for n, v in every.items()) / len(every)

    errors = [sum(error(labels, seed) for seed in range(3)) / 3 for labels in (1, 4, 64)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("family", IMAGES)
def test_shards_add_up(family: str, tmp_path: Path) -> None:
    """Of images and of layers, through files, in any order; with sampled labels too."""
    model = coupled(family, 3, missing=False, extras=False)
    x = torch.cat([x for x, _ in batches_of(model, 7)])
    whole = upvit.score(model, [(x, torch.zeros(7))])
    names = list(whole.vectors)
    paths = []
    for images, vectors in itertools.product((x[:3], x[3:4], x[4:]), (names[:2], names[2:])):
        part = upvit.score(model, [(images, torch.zeros(len(images)))], vectors=vectors)
        assert set(part.vectors) == set(vectors)
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        part.save(paths[-1])
    merged = upvit.merge(Scores.load(path) for path in paths)
    assert merged.provenance == whole.provenance
    for name, vector in whole.vectors.items():
        torch.testing.assert_close(merged.vectors[name], vector, rtol=1e-10, atol=1e-14)
    Random(0).shuffle(paths)
    again = upvit.merge(Scores.load(path) for path in paths)
    assert all(torch.equal(again.vectors[name], merged.vectors[name]) for name in names)
    reverse = upvit.score(model, [(x.flip(0)[:2], torch.zeros(2)), (x.flip(0)[2:], torch.zeros(5))])
    assert reverse.provenance == whole.provenance
    for name, vector in whole.vectors.items():
        torch.testing.assert_close(reverse.vectors[name], vector, rtol=1e-10, atol=1e-14)


def test_block_scores_add_up() -> None:
    model = coupled("pvt_v2", 3)
    one, two = batches_of(model, 2, 3)
    whole = upvit.score_blocks(model, [one, two])
    merged = upvit.merge([upvit.score_blocks(model, [two]), upvit.score_blocks(model, [one])])
    torch.testing.assert_close(merged.vectors["skip"], whole.vectors["skip"], rtol=1e-10, atol=1e-14)
    assert merged.provenance == whole.provenance


def test_parts_that_do_not_fit_are_named() -> None:
    model, other = (coupled("vit", 4, missing=False, extras=False) for _ in range(2))
    with torch.no_grad():
        other.head.bias += 1
    one, two = batches_of(model, 2, 3)
    first, second = upvit.score(model, [one]), upvit.score(model, [two])
    name = "blocks.0.mlp"
    with pytest.raises(UserError, match=r"stages.0.embed of image shard \w{16} \(2 images\) is given twice"):
        upvit.merge([first, second, first])
    with pytest.raises(UserError, match="of image shard .* is missing: score that part too"):
        upvit.merge([first, upvit.score(model, [two], vectors=[name])])
    with pytest.raises(UserError, match="parts of scores differ in seed: 0 and 1"):
        upvit.merge([first, upvit.score(model, [two], seed=1)])
    with pytest.raises(UserError, match="parts of scores differ in weights"):
        upvit.merge([first, upvit.score(other, [two])])
    with pytest.raises(UserError, match="method 'nvit' do not add up over images"):
        upvit.merge([Scores({name: first.vectors[name]}, {"method": "nvit"})])
    with pytest.raises(UserError, match="no parts"):
        upvit.merge([])


def test_the_model_is_left_as_it_was() -> None:
    model = coupled("vit", 4, missing=False, extras=False).train()
    model.blocks[0].norm1.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError):
        upvit.score(model, [(batches_of(model, 2)[0][0].float(), torch.zeros(2))])  # the model is float64
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags


def test_wrong_settings_are_named() -> None:
    model = coupled("vit", 4, missing=False, extras=False)
    batches = batches_of(model, 2)
    for settings, message in (
        (
            {"importance": "fischer"},
            "importance = 'fischer': must be one of exact, fisher, hybrid. did you mean 'fisher'",
        ),
        ({"labels_per_image": 0}, "labels_per_image = 0: must be a whole number of at least 1, or 'all'"),
        ({"labels_per_image": "every"}, "labels_per_image = 'every': must be"),
        ({"vectors": ["blocks.0.mpl"]}, "unknown vector 'blocks.0.mpl': .* did you mean 'blocks.0.mlp'"),
    ):
        with pytest.raises(UserError, match=message):
            upvit.score(model, batches, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="images of shape .*: random is built for"):
        upvit.score(model, [(batches[0][0][..., 1:], batches[0][1])])
