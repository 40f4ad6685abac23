from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from prunesweep.models import BlockCut, Cut, arch_of, cut, cut_arch
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.models.recalibrate import recalibrate
from prunesweep.pruners import kl_divergence
from prunesweep.pruners.subspaces import can_recover, compress, instant, projected_widths, recover
from prunesweep.pruners.subspaces.compression import compress_all
from prunesweep.pruners.subspaces.widths import equal_shares
from tests.pruners.subspaces.test_compress import VARIANTS, images, made, outputs, vit


def aligned(**kept: Any) -> BlockCut:
    shape = {"heads": range(2), "qk": range(6), "v": range(6), "mlp": range(32), **kept}
    return BlockCut.aligned(vit().blocks[0], **shape)


def whole() -> Cut:
    return Cut(blocks=(BlockCut(),) * 3)


def plan() -> BlockCut:
    """Nine patches in four merged tokens behind the class token; one passes by."""
    assign = (0, 1, 1, 2, 2, 3, 3, 4, 4, -1)
    return BlockCut(tokens=TokenPlan(kept=5, assign=assign, weight=(1.0, *(0.5,) * 8, 0.0)))


DECISIONS: dict[str, Cut] = {
    "stream": dataclasses.replace(whole(), embed=(tuple(range(0, 24, 2)),)),
    "heads": Cut(blocks=(aligned(heads=[1]), BlockCut(), BlockCut())),
    "ranks": Cut(blocks=(aligned(qk=[0, 3]), aligned(v=[1, 2, 5]), BlockCut())),
    "units": Cut(blocks=(aligned(mlp=range(4, 20)),) * 3),
    "blocks": Cut(blocks=(BlockCut(), BlockCut(keep=False), BlockCut())),
    "no attention": Cut(blocks=(BlockCut(), BlockCut(mixer="none"), BlockCut())),
    "no MLP": Cut(blocks=(BlockCut(), BlockCut(mlp=()), BlockCut())),
    "convolution": Cut(blocks=(BlockCut(mixer="conv3x3"), BlockCut(mixer="conv1x1"), BlockCut())),
    "tokens": Cut(blocks=(BlockCut(), plan(), plan())),
    "all": Cut(
        embed=(tuple(range(20)),),
        blocks=(
            dataclasses.replace(aligned(mlp=range(24)), tokens=plan().tokens),
            BlockCut(mixer="conv3x3"),
            aligned(qk=range(4)),
        ),
    ),
}


@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_what_is_not_cut_stays_the_source(facts: dict[str, Any]) -> None:
    source = made(vit(**facts))
    same = recover(source, whole(), images())
    torch.testing.assert_close(outputs(same), outputs(source), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decision", DECISIONS.values(), ids=DECISIONS)
@pytest.mark.parametrize("facts", [{}, {"layer_scale": True, "qkv_bias": False}], ids=["plain", "scaled"])
def test_recovered_is_nearer_to_the_source_than_cut(decision: Cut, facts: dict[str, Any]) -> None:
    source, batches = made(vit(**facts)), images(400, 40)
    before = {name: t.clone() for name, t in source.state_dict().items()}
    small = cut(source, decision).eval()
    recalibrate(small, [(batch, batch) for batch in batches])
    mended = recover(source, decision, batches)
    assert arch_of(mended) == cut_arch(arch_of(source), decision)
    wanted = outputs(source)
    as_cut, recovered = (kl_divergence(wanted, outputs(model)).mean() for model in (small, mended))
    assert recovered < 0.8 * as_cut
    assert all(torch.equal(before[name], t) for name, t in source.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half, decision = made(vit()).to(dtype), dataclasses.replace(whole(), embed=(tuple(range(16)),))
    wide, batches = copy.deepcopy(half).float(), [batch.float() for batch in images(400, 40)]
    share = equal_shares(arch_of(half), 0.7)
    pairs = [
        (recover(half, decision, batches), recover(wide, decision, batches)),
        (compress(half, share, batches), compress(wide, share, batches)),
        (instant(half, batches, [0.6])[0].model, instant(wide, batches, [0.6])[0].model),
    ]
    for found, wanted in pairs:
        weights = wanted.to(dtype).state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_a_source_whose_first_block_has_no_mlp() -> None:
    arch = vit()
    blocks = (dataclasses.replace(arch.blocks[0], mlp=0), *arch.blocks[1:])
    source = made(dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], blocks=blocks),)))
    same = recover(source, whole(), images())
    torch.testing.assert_close(outputs(same), outputs(source), rtol=1e-9, atol=1e-9)


def test_units_that_are_mixtures_of_kept_ones_are_recovered() -> None:
    """Hidden units that repeat kept ones, and channels that nothing uses, cost nothing once writers are refitted."""
    source: Any = made(vit())
    with torch.no_grad():
        for block in source.blocks:
            block.mlp.fc1.weight[16:] = block.mlp.fc1.weight[:16]
            block.mlp.fc1.bias[16:] = block.mlp.fc1.bias[:16]
    decision = Cut(blocks=(BlockCut(mlp=tuple(range(16))),) * 3)
    mended = recover(source, decision, images(200, 20), shrinkage=1e-12)
    torch.testing.assert_close(outputs(mended), outputs(source), rtol=1e-6, atol=1e-6)


def test_both_heads_of_a_distilled_model_are_refitted() -> None:
    source = made(vit(dist_token=True))
    decision = dataclasses.replace(whole(), embed=(tuple(range(16)),))
    small, mended = cut(source, decision).eval(), recover(source, decision, images(400, 40))
    wanted = outputs(source)
    assert (outputs(mended) - wanted).square().mean() < 0.5 * (outputs(small) - wanted).square().mean()
    for head in ("head", "head_dist"):
        assert not torch.equal(mended.get_parameter(f"{head}.weight"), small.get_parameter(f"{head}.weight"))


def test_what_cannot_be_recovered_says_why() -> None:
    assert can_recover(vit()) is None
    planned = cut_arch(vit(), Cut(blocks=(BlockCut(), plan(), BlockCut())))
    assert "blocks[1] has a convolution, a token plan or token factors" in str(can_recover(planned))


def test_models_of_other_tokens_are_computed_side_by_side() -> None:
    """A block that works on merged tokens is fitted to the source's outputs at these, not to what others share."""
    source, batches = made(vit()), images()
    several = [projected_widths(vit(), decision) for decision in (DECISIONS["all"], whole(), DECISIONS["tokens"])]
    found = compress_all(source, several, batches)
    for ours, widths in zip(found, several, strict=True):
        theirs = compress(source, widths, batches)
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
