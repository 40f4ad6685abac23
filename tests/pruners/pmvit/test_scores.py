from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from prunesweep.models import Arch, UserError, block_views
from prunesweep.models.families.views import AttentionView
from prunesweep.pruners import Scores
from prunesweep.pruners.pmvit.scores import IMPORTANCES, scorable, score
from tests.generate import random_arch, random_images, random_model
from tests.models.test_fuse import planned
from tests.oracle import hooks_of


def source(seed: int, family: str = "vit") -> Arch:
    """Any ViT before it is planned, with attention somewhere."""
    arch = random_arch(Random(seed), family)
    (stage,) = arch.stages
    blocks = tuple(dataclasses.replace(b, tokens=None, merge="sparse") for b in stage.blocks)
    arch = dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks),))
    return arch if scorable(arch) else source(seed + 1000, family)


def labelled(arch: Arch, batches: int = 2, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(random_images(arch, i, batch=size), torch.arange(size) % arch.num_classes) for i in range(batches)]


class Spelled(nn.Module):
    """Attention with its map (B, H, N, N) spelled out, and kept."""

    def __init__(self, view: AttentionView) -> None:
        super().__init__()
        self.attn, self.block, self.view = view.module, view.record, view

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        block, attn = self.block, self.attn
        if hasattr(attn, "qkv"):
            qkv = attn.qkv(x) * (attn.token_scale if block.token_scale else 1)
            q, k, v = qkv.split([block.heads * block.qk] * 2 + [block.total_v], dim=-1)
            q, k = (t.unflatten(-1, (block.heads, block.qk)).transpose(1, 2) for t in (q, k))
            q, k = attn.q_norm(q), attn.k_norm(k)
        else:
            q, k = attn.q_norm(attn.by_head(attn.q_proj(x))), attn.k_norm(attn.by_head(attn.k_proj(x)))
            q, k = attn.rotate(q), attn.rotate(k)
            v = attn.v_proj(x)
        self.map = (q @ k.transpose(2, 3) * block.scale).softmax(-1)
        heads = [self.map[:, h] @ own for h, own in enumerate(v.split(list(block.v_widths), dim=-1))]
        return attn.proj(self.view.out_norm(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(("family", "seed"), [*(("vit", n) for n in range(15)), *(("eva", n) for n in range(5))])
def test_scores_by_values_are_those_by_the_attention_map(family: str, seed: int) -> None:
    """Any prefix tokens, ragged heads, q/k norm, factors per token, turned pairs, convolutions in between."""
    arch = source(seed, family)
    model, batches = random_model(arch, seed), labelled(arch)
    found, by_cls = score(model, batches), {}
    if arch.class_token:
        by_cls = score(model, batches, importance="cls_attn").vectors
    views = block_views(model)
    spelled = {i: Spelled(views[i].attention) for i in scorable(arch)}
    for i, module in spelled.items():
        model.blocks[i].attn = module
    sums, cls_sums = dict.fromkeys(spelled, 0.0), dict.fromkeys(spelled, 0.0)
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        maps = [module.map for module in spelled.values()]
        for i, A, G in zip(spelled, maps, torch.autograd.grad(loss, maps), strict=True):
            B, H, N, _ = A.shape
            sums[i] = sums[i] + ((A * G).sum((0, 1, 2)) / (B * H * N)).abs()[arch.prefix_tokens :]
            cls_sums[i] = cls_sums[i] + A[:, :, 0].mean((0, 1))[arch.prefix_tokens :]
    assert list(found.vectors) == [f"blocks.{i}.tokens" for i in spelled]
    for i, want in sums.items():
        torch.testing.assert_close(found.vectors[f"blocks.{i}.tokens"], want, rtol=1e-9, atol=1e-15)
        if by_cls:
            torch.testing.assert_close(by_cls[f"blocks.{i}.tokens"], cls_sums[i], rtol=1e-9, atol=0)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scoring_is_a_pure_function_and_saved(importance: str, tmp_path: Path) -> None:
    arch = planned(None, None)
    model = random_model(arch, 0).train()
    model.requires_grad_(False)  # frozen models are scored, too
    before, calls = {name: t.clone() for name, t in model.state_dict().items()}, []
    first = score(model, labelled(arch), importance=importance, seed=3, progress=lambda *at: calls.append(at))
    with torch.no_grad():
        second = score(model, labelled(arch), importance=importance, seed=3)
    for name, vector in first.vectors.items():
        assert vector.dtype == torch.float64
        assert vector.shape == (12,)
        assert (vector >= 0).all()
        assert torch.equal(vector, second.vectors[name])
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert hooks_of(model) == []
    assert calls == ([(1, 2), (2, 2)] if importance in ("grad_attn", "cls_attn") else [])
    facts = {"importance": importance, "arch": arch.hash, "batches": 2, "images": 8, "skipped": 0, "seed": 3}
    assert first.provenance == {"method": "pmvit", **facts}
    first.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.provenance == first.provenance
    assert all(torch.equal(first.vectors[name], vector) for name, vector in again.vectors.items())


def test_random_scores_follow_the_seed_and_uniform_ones_are_spread() -> None:
    model = random_model(planned(None, None), 0)
    a, b = (score(model, [], importance="random", seed=seed).vectors for seed in (0, 1))
    assert not torch.equal(a["blocks.0.tokens"], b["blocks.0.tokens"])
    assert not torch.equal(a["blocks.0.tokens"], a["blocks.1.tokens"])
    uniform = score(model, [], importance="uniform").vectors
    assert torch.equal(uniform["blocks.0.tokens"], uniform["blocks.1.tokens"])
    for k in range(1, 12):
        best = uniform["blocks.0.tokens"].topk(k).indices.sort().values
        gaps = torch.cat([best, best[:1] + 12]).diff()
        assert gaps.max() <= 12 / k * 2.62  # three-distance theorem


def test_batches_that_are_not_finite_are_left_out_and_counted() -> None:
    arch = planned(None, None)
    model, batches = random_model(arch, 0), labelled(arch, 3)
    broken = batches[1][0].clone()
    broken[0, 0, 0, 0] = torch.nan
    found = score(model, [batches[0], (broken, batches[1][1]), batches[2]])
    want = score(model, [batches[0], batches[2]])
    assert found.provenance["skipped"] == 1
    assert all(torch.equal(found.vectors[name], vector) for name, vector in want.vectors.items())
    with pytest.raises(UserError, match="all 1 batches gave scores that are not finite"):
        score(model, [(broken, batches[1][1])])


def test_models_that_cannot_be_scored_are_refused() -> None:
    arch = planned(None, None)
    with pytest.raises(UserError, match="importance = 'grad': must be one of .* did you mean 'grad_attn'"):
        score(random_model(arch, 0), [], importance="grad")
    with pytest.raises(UserError, match=r"blocks \[1\] have a token plan already"):
        score(random_model(planned(None, 5), 0), [])
    with pytest.raises(UserError, match="no class token; use 'grad_attn'"):
        score(random_model(planned(None, class_token=False, pool="avg"), 0), [], importance="cls_attn")
    swin = random_arch(Random(0), "swin")
    with pytest.raises(UserError, match="of family 'swin'"):
        score(random_model(swin, 0), [])
    none = {"mixer": "none", "heads": 0, "qk": 0, "v": 0, "scale": 0.0}
    blocks = (dataclasses.replace(arch.blocks[0], **none),)
    bare = dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], blocks=blocks),))
    with pytest.raises(UserError, match="no block with attention"):
        score(random_model(bare, 0), [])
    with pytest.raises(ValueError, match="no batches"):
        score(random_model(arch, 0), [])


def score_on_rank(rank: int, folder: str, ranks: int) -> None:
    """This rank's share of every batch; shares are of different size."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    arch = planned(None, None)
    own = slice(0, 6) if ranks == 1 else slice(0, 4) if rank == 0 else slice(4, 6)
    for importance in ("grad_attn", "cls_attn"):
        batches = [(x[own], y[own]) for x, y in labelled(arch, 3, 6)]
        found = score(random_model(arch, 1), batches, importance=importance)
        save_file(dict(found.vectors), f"{folder}/{importance}-{rank}-of-{ranks}")
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_score_as_one_process_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(score_on_rank, args=(str(tmp_path), 2), nprocs=2)
    score_on_rank(0, str(tmp_path), 1)
    for importance in ("grad_attn", "cls_attn"):
        alone, *ranks = (load_file(tmp_path / f"{importance}-{name}") for name in ("0-of-1", "0-of-2", "1-of-2"))
        for name, want in alone.items():
            assert torch.equal(ranks[0][name], ranks[1][name])
            torch.testing.assert_close(ranks[0][name], want, rtol=1e-10, atol=0)
