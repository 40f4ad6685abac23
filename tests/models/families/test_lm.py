from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    UserError,
    arch_of,
    build,
    cost,
    cut,
    cut_arch,
    load,
    num_params,
    save,
)
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.families.lm import lm_arch
from prunesweep.models.published.counts import tables_twice
from tests.generate import random_arch, random_cut, random_images, random_model
from tests.oracle import masked

SEEDS = pytest.mark.parametrize("seed", range(40))
WIKI = {"words": 267_744, "cutoffs": (20_000, 60_000), "depth": 16, "heads": 8}


def small(**changes: object) -> Arch:
    arch = lm_arch(words=30, cutoffs=(6, 15), width=16, depth=2, heads=2, mlp=24, length=8)
    return dataclasses.replace(arch, **changes)


DEIT = Arch.from_timm("deit_tiny_patch16_224")


def with_text(**changes: object) -> dict:
    data = small().to_dict()
    return {**data, "text": {**data["text"], **changes}}


@SEEDS
def test_record(seed: int) -> None:
    arch = random_arch(Random(seed), "lm")
    assert Arch.from_dict(json.loads(arch.to_json())) == arch
    assert [word for band in arch.bands for word in band] == list(range(arch.num_classes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_text(cutoffs=[6, 6]), "text.cutoffs = [6, 6]: must be one or more, ascending in 1..29"),
        (with_text(cutoffs=[6, 30]), "text.cutoffs = [6, 30]: must be one or more, ascending in 1..29"),
        (with_text(cutoffs=[]), "text.cutoffs = []: must be one or more"),
        (with_text(tails=[4]), "text.tails = [4]: must have one width per cutoff, 2"),
        (with_text(tails=[4, 0]), "text.tails[1] = 0: must be a whole number of at least 1"),
        (with_text(tied="some"), "text.tied = 'some': must be one of all, tables, none"),
        (with_text(embed_scale=0.0), "text.embed_scale = 0.0: must be a positive float"),
        (with_text(positions=14), "text.positions = 14: must be a whole number of at least 16"),
        (with_text(positions=17), "text.positions = 17: must be even"),
        (with_text(cutofs=[6]), "arch.text has an unknown key 'cutofs'"),
        ({**small().to_dict(), "text": 3}, "arch.text: must be a JSON object"),
        ({**small().to_dict(), "text": None}, "text: family 'lm' needs its vocabulary"),
        ({**small().to_dict(), "act": "tanh"}, "act = 'tanh': must be one of relu, gelu"),
        ({**small().to_dict(), "pool": "avg"}, "family = 'lm': needs pool = 'none', got 'avg'"),
        (
            {**DEIT.to_dict(), "pool": "none"},
            "pool = 'none': is for family 'lm' only",
        ),
        ({**DEIT.to_dict(), "text": with_text()["text"]}, "is for family 'lm' only"),
    ],
)
def test_errors_say_where_and_what(data: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Arch.from_dict(data)
    assert message in str(error.value)


def test_convolutions_would_look_ahead() -> None:
    with pytest.raises(UserError, match="a convolution would see the words that are to be predicted"):
        conv = dataclasses.replace(small().blocks[0], mixer="conv3x3", heads=0, qk=0, scale=0.0)
        stage = dataclasses.replace(small().stages[0], blocks=(conv,))
        small(stages=(stage,)).validate()


@SEEDS
@torch.no_grad()
def test_log_probabilities(seed: int) -> None:
    """They are normalised, those of the targets are among them, and no word depends on what follows it."""
    arch = random_arch(Random(seed), "lm")
    model, words, targets = random_model(arch, seed), random_images(arch, seed), random_images(arch, seed + 1)
    log_p = model(words)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones_like(words, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(words, targets), log_p.gather(-1, targets[..., None])[..., 0])
    changed = torch.cat([words[:, :-1], (words[:, -1:] + 1) % arch.num_classes], 1)
    torch.testing.assert_close(model(changed)[:, :-1], log_p[:, :-1])
    torch.testing.assert_close(model(words[:, :2]), log_p[:, :2])  # texts may be shorter


def reference(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """The equations, word by word and head by head."""
    arch, text = model.arch, model.arch.text
    E = [model.words.tables[b].weight for b in range(len(arch.bands))]
    P = [model.words.projections[b].weight for b in range(len(arch.bands))]
    half = text.positions // 2
    rows = []
    for t, word in enumerate(words):
        band = next(b for b, own in enumerate(arch.bands) if int(word) in own)
        angles = (t + text.first_position) * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        positions = torch.cat([angles.sin(), angles.cos()])[model.columns]
        rows.append(text.embed_scale * P[band] @ E[band][int(word) - arch.bands[band].start] + positions)
    x = torch.stack(rows)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(words), 3, arch.blocks[0].heads, -1).unbind(1)
        heads = []
        for h in range(arch.blocks[0].heads):
            logits = arch.blocks[0].scale * q[:, h] @ k[:, h].T
            heads.append(logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf).softmax(-1) @ v[:, h])
        x = x + block.attn.proj(torch.cat(heads, -1))
        x = x + block.mlp.fc2(block.mlp.fc1(block.norm2(x)).relu())
    head = torch.cat([x @ E[0].T, x @ model.clusters.weight.T], -1).softmax(-1)
    n = len(arch.bands[0])
    tails = [(x @ P[b] @ E[b].T).softmax(-1) * head[:, n + b - 1, None] for b in range(1, len(arch.bands))]
    return torch.cat([head[:, :n], *tails], -1).log()


@torch.no_grad()
def test_the_equations() -> None:
    model = random_model(small(), 0)
    words = random_images(small(), 0)
    want = torch.stack([reference(model, text) for text in words])
    torch.testing.assert_close(model(words), want, rtol=1e-10, atol=1e-10)


def test_low_precision_trains() -> None:
    """Under bfloat16 autocast: both forms of the loss, with gradients everywhere."""
    model, words = random_model(small(), 2, torch.float32), random_images(small(), 2)
    targets = random_images(small(), 3)
    exact = model(words, targets).detach()
    with torch.autocast("cpu", torch.bfloat16):
        of_targets, all_words = model(words, targets), model(words)
    assert of_targets.dtype == all_words.dtype == torch.float32
    torch.testing.assert_close(of_targets, exact, rtol=0.1, atol=0.3)
    torch.testing.assert_close(all_words.gather(-1, targets[..., None])[..., 0], of_targets, rtol=0, atol=1e-3)
    of_targets.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_tail_without_words_in_a_batch_has_gradients() -> None:
    """Of zero: data-parallel training needs every parameter in every batch."""
    arch = dataclasses.replace(small(), text=dataclasses.replace(small().text, tied="none"))
    model = build(arch)
    words = torch.zeros(2, 8, dtype=torch.long)
    model(words, words).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@SEEDS
def test_formula_equals_counting(seed: int) -> None:
    arch = random_arch(Random(seed), "lm")
    model, found = build(arch).eval(), cost(arch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(random_images(arch, 0, batch=1))
    assert counter.get_total_flops() == 2 * arch.tokens * found.macs
    assert found.params == num_params(model)
    (stage,) = arch.stages
    parts = [outside_cost(arch), *(block_cost(arch, stage, block) for block in stage.blocks)]
    assert (found.macs, found.params) == (sum(p.macs for p in parts), sum(p.params for p in parts))


@pytest.mark.parametrize(
    ("width", "mlp", "params", "twice"),
    [(1024, 4096, 246_933_504, 290_949_120), (512, 2048, 72_791_040, 94_798_848)],
)
def test_published_models(width: int, mlp: int, params: int, twice: int) -> None:
    """adaptive_lm_wiki103.v2 and, by its published size, the UP-Transformer: 247 M, 291 M and 95 M."""
    arch = lm_arch(width=width, mlp=mlp, **WIKI)
    arch.validate()
    assert (cost(arch).params, tables_twice(arch)) == (params, twice)


@SEEDS
@torch.no_grad()
def test_masked_source_equals_cut_model(seed: int) -> None:
    random = Random(seed)
    arch = random_arch(random, "lm")
    model, words = random_model(arch, seed), random_images(arch, seed)
    decision = random_cut(random, arch)
    assert Cut.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    once = cut(model, decision)
    assert arch_of(once) == cut_arch(arch, decision)
    assert num_params(once) == cost(arch_of(once)).params
    with masked(model, decision):
        want = model(words)
    torch.testing.assert_close(once(words), want, rtol=1e-9, atol=1e-9)
    again = random_cut(random, arch_of(once))
    with masked(once, again):
        want = once(words)
    torch.testing.assert_close(cut(once, again)(words), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_cut_keeps_positions_and_scales_of_the_source() -> None:
    model = random_model(small(), 1)
    kept = (0, 3, 8, 11)
    narrow = cut(model, Cut(embed=(kept,), blocks=(BlockCut(),) * 2, tails=((1, 2), None)))
    arch = arch_of(narrow)
    assert (arch.stages[0].width, arch.text.tails, arch.text.positions, arch.text.embed_scale) == (4, (2, 1), 16, 4.0)
    assert torch.equal(narrow.positions(8), model.positions(8)[:, list(kept)])


@pytest.mark.parametrize(
    ("tails", "message"),
    [(((0,),), "cut.tails has 1 entries for 2 tails"), (((0, 4), None), "cut.tails[0]: index 4 is outside 0..3")],
)
def test_impossible_tails_are_named(tails: tuple, message: str) -> None:
    with pytest.raises(UserError) as error:
        cut_arch(small(), Cut(blocks=(BlockCut(),) * 2, tails=tails))
    assert message in str(error.value)
    with pytest.raises(UserError, match="cut.tails has 1 entries for 0 tails"):
        cut_arch(DEIT, Cut(blocks=(BlockCut(),) * 12, tails=(None,)))


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_saved_and_loaded_in_one_line(seed: int, tmp_path: Path) -> None:
    """By us and by timm, after a cut too."""
    random = Random(seed)
    model = random_model(random_arch(random, "lm"), seed, torch.float32)
    model = cut(model, random_cut(random, model.arch)).eval()
    words = random_images(model.arch, seed)
    save(model, tmp_path / "model")
    for again in (load(tmp_path / "model"), timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)):
        assert arch_of(again) == arch_of(model)
        assert torch.equal(again.eval()(words), model(words))
    with pytest.raises(UserError, match="this model's vocabulary has"):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=99)
