from __future__ import annotations

import dataclasses

import pytest

from prunesweep.models import BlockCut, Cut, UserError, cost, cut, cut_arch
from prunesweep.pruners import kl_divergence
from prunesweep.pruners.subspaces import compress, compressed_arch, projected_widths, recover
from tests.pruners.subspaces.test_compress import images, made, outputs, vit
from tests.pruners.subspaces.test_recovery import DECISIONS, aligned, whole

SAME = ("stream", "ranks", "units", "blocks", "no attention")  # decisions that keep all heads


@pytest.mark.parametrize("name", SAME)
def test_the_projected_model_has_the_record_of_the_cut_one(name: str) -> None:
    arch, decision = vit(), DECISIONS[name]
    assert compressed_arch(arch, projected_widths(arch, decision)) == cut_arch(arch, decision)


def test_channels_of_heads_that_go_are_shared_out_among_all() -> None:
    arch = vit()
    decision = Cut(blocks=(aligned(heads=[1], v=range(5)), BlockCut(), BlockCut()))
    widths = projected_widths(arch, decision)
    assert (widths.blocks[0].qk, widths.blocks[0].v) == (3, (3, 2))
    small = compressed_arch(arch, widths)
    assert small.blocks[0].heads == arch.blocks[0].heads
    assert cost(small).macs == cost(cut_arch(arch, decision)).macs


def test_the_subspace_knows_better_which_channels() -> None:
    source, decision = made(vit()), dataclasses.replace(whole(), embed=(tuple(range(0, 24, 2)),))
    batches = images()
    models = cut(source, decision), recover(source, decision, batches)
    projected = compress(source, projected_widths(vit(), decision), batches)
    wanted = outputs(source)
    as_cut, refitted, best = (kl_divergence(wanted, outputs(m)).mean() for m in (*models, projected))
    assert best < refitted < as_cut


@pytest.mark.parametrize("name", ["convolution", "tokens"])
def test_mixers_and_tokens_have_no_subspace(name: str) -> None:
    with pytest.raises(UserError, match="only widths and depth can be projected"):
        projected_widths(vit(), DECISIONS[name])


def test_a_cut_of_another_depth_is_refused() -> None:
    with pytest.raises(UserError, match="the cut has 2 blocks"):
        projected_widths(vit(), Cut(blocks=(BlockCut(),) * 2))
