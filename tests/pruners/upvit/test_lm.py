from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from prunesweep.models import BlockCut, Cut, UserError, arch_of, cost, cut
from prunesweep.models.families.lm import lm_arch
from prunesweep.pruners import (
    PARAMS,
    Scores,
    Target,
    WidthMethod,
    get_method,
    kl_divergence,
    select,
    upvit,
    vector_sizes,
)
from prunesweep.pruners.upvit.lm import TextForward, text_kl
from tests.generate import random_arch, random_images, random_model
from tests.oracle import masked

SEEDS = pytest.mark.parametrize("seed", range(10))


def coupled(seed: int, **options: bool) -> nn.Module:
    """Any record whose heads have one width for queries, keys and values: what can be scored."""
    arch = random_arch(Random(seed), "lm", ragged=False, **options)
    (stage,) = arch.stages
    blocks = tuple(dataclasses.replace(b, v=b.qk) if b.mixer == "attn" else b for b in stage.blocks)
    return random_model(dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks),)), seed)


def uniform(seed: int = 0, length: int = 8) -> nn.Module:
    arch = lm_arch(words=30, cutoffs=(6, 15), width=16, depth=2, heads=2, mlp=24, length=length)
    return random_model(arch, seed)


def batches_of(model: nn.Module, *sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    texts = [random_images(arch_of(model), 50 + i, batch=n) for i, n in enumerate(sizes)]
    return [(words, words) for words in texts]


def without(model: nn.Module, name: str, unit: int) -> Cut:
    """The cut that lacks one unit."""
    arch = arch_of(model)
    _, place, kind = name.split(".")
    kept = tuple(c for c in range(vector_sizes(arch, upvit.KINDS)[name]) if c != unit)
    whole = (BlockCut(),) * arch.depth
    if kind == "embed":
        return Cut(embed=(kept,), blocks=whole)
    if kind == "tail":
        return Cut(blocks=whole, tails=tuple(kept if b == int(place) else None for b in range(1, len(arch.bands))))
    choice = BlockCut(qk=(kept,), v=(kept,)) if kind == "attn" else BlockCut(**{kind: kept})
    return Cut(blocks=tuple(choice if i == int(place) else BlockCut() for i in range(arch.depth)))


@SEEDS
@torch.no_grad()
def test_the_pieces_are_the_model(seed: int) -> None:
    model = random_model(random_arch(Random(seed), "lm"), seed)
    words, forward = random_images(model.arch, seed), TextForward(model)
    read = forward(words)
    torch.testing.assert_close(model.log_prob(forward.split(read)[0]), model(words), rtol=1e-10, atol=1e-12)


@SEEDS
@torch.no_grad()
def test_divergence_by_bands_is_that_over_all_words(seed: int) -> None:
    """Down to differences that the whole distribution would lose to rounding."""
    model = coupled(seed)
    forward, words = TextForward(model), random_images(model.arch, seed)
    source = forward(words).flatten(0, 1)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = forward.split(source)[0]
    width = hidden.shape[1]
    for size in (1.0, 1e-2):
        changed = hidden + size * noise[:, :width]
        read = forward.logits(changed)
        want = kl_divergence(model.log_prob(hidden), model.log_prob(changed))
        torch.testing.assert_close(text_kl(forward, source, read[None])[0], want, rtol=1e-7, atol=1e-13)
    assert torch.equal(text_kl(forward, source, source[None]), torch.zeros(1, len(source), dtype=torch.float64))


@SEEDS
@torch.no_grad()
def test_exact_scores_are_what_removal_costs(seed: int) -> None:
    """Of every kind of unit, against the masked model's distribution over all words."""
    model, random = coupled(seed), Random(seed)
    batches = batches_of(model, 2, 1)
    vectors = upvit.score(model, batches, importance="exact").vectors
    assert {name: len(v) for name, v in vectors.items()} == vector_sizes(arch_of(model), upvit.KINDS)
    sources = [model(words) for words, _ in batches]
    for name, vector in vectors.items():
        unit = random.randrange(len(vector))
        if len(vector) == 1:
            continue
        with masked(model, without(model, name, unit)) as small:
            changed = [small(words) for words, _ in batches]
        want = sum(float(kl_divergence(z, y).sum()) for z, y in zip(sources, changed, strict=True))
        assert vector[unit].item() == pytest.approx(want, rel=1e-7, abs=1e-13), f"{name}[{unit}]"


@torch.no_grad()
def test_a_cut_of_one_unit_costs_its_score() -> None:
    model = uniform()
    ((words, _),) = batches = batches_of(model, 3)
    vectors = upvit.score(model, batches, importance="exact").vectors
    for name in ("stages.0.embed", "blocks.0.mlp", "bands.1.tail"):
        small = cut(model, without(model, name, 2))
        want = float(kl_divergence(model(words), small(words)).sum())
        assert vectors[name][2].item() == pytest.approx(want, rel=1e-7)


def test_memory_changes_nothing_but_the_stacks() -> None:
    model = uniform()
    batches = batches_of(model, 2)
    one_by_one, stacked = (upvit.score(model, batches, importance="exact", memory_mb=m).vectors for m in (0, 1024))
    for name, vector in stacked.items():
        torch.testing.assert_close(one_by_one[name], vector, rtol=1e-9, atol=1e-14)


@SEEDS
@torch.no_grad()
def test_block_scores(seed: int) -> None:
    model = coupled(seed)
    depth = arch_of(model).depth
    ((words, _),) = batches = batches_of(model, 3)
    entries, source = upvit.score_blocks(model, batches).vectors["skip"][0::2], model(words)
    for i in range(depth):
        with masked(model, Cut(blocks=tuple(BlockCut(keep=j != i) for j in range(depth)))) as small:
            want = float(kl_divergence(source, small(words)).sum())
        assert entries[i].item() == pytest.approx(want, rel=1e-7, abs=1e-13)


def expected_fisher(model: nn.Module, words: torch.Tensor) -> dict[str, torch.Tensor]:
    """1/2 sum over places of E over words of (d log p / d gate)², word by word."""
    forward, sizes = TextForward(model), vector_sizes(arch_of(model), upvit.KINDS)
    total = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    for text in words:
        gates = {name: torch.ones(1, 1, n, dtype=torch.float64, requires_grad=True) for name, n in sizes.items()}
        read = forward(text[None], gates)
        head, *tails = (logits.log_softmax(-1)[0] for logits in forward.groups(read))
        first, clusters = head.tensor_split([len(model.arch.bands[0])], dim=-1)
        log_p = torch.cat([first, *(t + c[:, None] for t, c in zip(tails, clusters.unbind(1), strict=True))], -1)
        for one in log_p.flatten():
            gradients = torch.autograd.grad(one, list(gates.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += 0.5 * one.detach().exp() * gradient[0, 0].square()
    return total


def test_fisher_scores_approach_the_expectation_over_all_words() -> None:
    """Without bias: the error falls as one over the square root of the number of labels."""
    model = uniform(length=4)
    batches = batches_of(model, 4)
    want = expected_fisher(model, batches[0][0])

    def error(labels: int) -> float:
        found = upvit.score(model, batches, importance="fisher", labels_per_image=labels).vectors
        return sum(float((found[n] - v).abs().sum() / v.sum()) for n, v in want.items()) / len(want)

    errors = [error(labels) for labels in (4, 64, 1024)]
    assert errors[2] < 0.03
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_fisher_is_exact_for_small_changes() -> None:
    """The expectation itself, where a unit's output weights are small."""
    model = uniform(3, length=4)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight *= 1e-4
    ((words, _),) = batches = batches_of(model, 2)
    names = ["blocks.0.mlp", "blocks.1.mlp"]
    exact = upvit.score(model, batches, importance="exact", vectors=names).vectors
    want = expected_fisher(model, words)
    for name in names:
        torch.testing.assert_close(want[name], exact[name], rtol=1e-2, atol=1e-20)


def test_shards_add_up(tmp_path: Path) -> None:
    """Of texts and of vectors, through files, in any order; drawn labels follow the text."""
    model = uniform()
    words = torch.cat([words for words, _ in batches_of(model, 5)])
    whole = upvit.score(model, [(words, words)])
    names, paths = list(whole.vectors), []
    for texts, vectors in itertools.product((words[:2], words[2:]), (names[:2], names[2:])):
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        upvit.score(model, [(texts, texts)], vectors=vectors).save(paths[-1])
    Random(0).shuffle(paths)
    merged = upvit.merge(Scores.load(path) for path in paths)
    assert merged.provenance == whole.provenance
    for name, vector in whole.vectors.items():
        torch.testing.assert_close(merged.vectors[name], vector, rtol=1e-10, atol=1e-14)


def test_selection_is_the_target_and_keeps_the_best() -> None:
    """The UP-Transformer's kind of target: every width halved, tails too, heads kept."""
    model = uniform()
    batches = batches_of(model, 2)
    scores, blocks = upvit.score(model, batches, importance="exact"), upvit.score_blocks(model, batches)
    target = Target(embed=8, head_width=4, mlp=12, depth=1, tails=(2, 1))
    decision = select(arch_of(model), scores, target, blocks=blocks)
    small = arch_of(cut(model, decision))
    (block,) = small.blocks
    assert (small.stages[0].width, block.heads, block.qk, block.v, block.mlp) == (8, 2, 4, 4, 12)
    assert (small.text.tails, small.text.positions, block.scale) == ((2, 1), 16, 8**-0.5)
    assert decision.tails is not None
    assert decision.tails[0] == tuple(sorted(scores.vectors["bands.1.tail"].argsort()[-2:].tolist()))
    with pytest.raises(UserError, match="target.tails has 1 entries for 2 bands behind the first"):
        select(arch_of(model), scores, Target(tails=(2,)))


def test_a_budget_of_parameters_reaches_into_the_vocabulary() -> None:
    """Most parameters of a small model are its words', so tails become narrower where that costs least."""
    model = random_model(lm_arch(words=4000, cutoffs=(100, 1000), width=64, depth=1, heads=2, mlp=32, length=8), 0)
    arch = arch_of(model)
    scores = get_method("magnitude", WidthMethod).score(model)
    low = {**scores.vectors, "bands.1.tail": 1e-6 * scores.vectors["bands.1.tail"]}
    groups = {"embed": 4, "heads": 1, "qk": 4, "v": 4, "dim": 4, "mlp": 8, "sr": 1, "tail": 2}
    found = get_method("upvit", WidthMethod).decide(
        arch, Scores(low), 0.8 * cost(arch).params, measure=PARAMS, groups=groups
    )
    small = arch_of(cut(model, found.cut))
    assert found.met
    assert cost(small).params == found.cost <= 0.8 * cost(arch).params
    assert (small.text.tails, small.stages[0].width) == ((4, 4), 64)  # of (16, 4) and 64: the cheapest band gives most


def test_wrong_input_is_named() -> None:
    model = uniform()
    words = batches_of(model, 2)[0][0]
    with pytest.raises(UserError, match="there are too many words; give the number to draw per word"):
        upvit.score(model, [(words, words)], labels_per_image="all")
    with pytest.raises(UserError, match="takes texts B·T of word numbers below 30"):
        upvit.score(model, [(words + 30, words)])
    with pytest.raises(UserError, match="torch.float32 of shape"):
        upvit.score(model, [(words.float(), words)])
