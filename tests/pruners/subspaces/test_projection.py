from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from prunesweep.models import BlockCut, Cut, UserError, arch_of, cost, cut, cut_arch
from prunesweep.pruners import kl_divergence
from prunesweep.pruners.subspaces import (
    BlockWidths,
    Widths,
    compress,
    compressed_arch,
    projectable,
    projected_widths,
    recover,
)
from tests.pruners.subspaces.test_compress import images, made, outputs, vit
from tests.pruners.subspaces.test_recovery import DECISIONS, aligned, whole

SAME = (
    "stream",
    "ranks",
    "units",
    "blocks",
    "no attention",
    "no MLP",
    "convolution",
    "tokens",
)  # decisions that keep all heads


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


@pytest.mark.parametrize("name", DECISIONS)
def test_a_projectable_cut_has_the_record_of_the_projected_model(name: str) -> None:
    arch, decision = vit(), DECISIONS[name]
    even = projectable(arch, decision)
    assert cut_arch(arch, even) == compressed_arch(arch, projected_widths(arch, decision))
    assert projected_widths(arch, even) == projected_widths(arch, decision)


def test_queries_that_can_only_be_chosen_stay_whole_in_a_projectable_cut() -> None:
    arch = dataclasses.replace(vit(), qk_norm=True)
    even = projectable(arch, Cut(blocks=(aligned(heads=[1], v=range(5)), BlockCut(), BlockCut())))
    small = cut_arch(arch, even).blocks[0]
    assert (small.heads, small.qk, small.v) == (arch.blocks[0].heads, arch.blocks[0].qk, (3, 2))


def test_the_subspace_knows_better_which_channels() -> None:
    source, decision = made(vit()), dataclasses.replace(whole(), embed=(tuple(range(0, 24, 2)),))
    batches = images()
    models = cut(source, decision), recover(source, decision, batches)
    projected = compress(source, projected_widths(vit(), decision), batches)
    wanted = outputs(source)
    as_cut, refitted, best = (kl_divergence(wanted, outputs(m)).mean() for m in (*models, projected))
    assert best < refitted < as_cut


@pytest.mark.parametrize("name", ["convolution", "tokens"])
def test_mixers_and_tokens_are_refitted_in_the_projected_stream(name: str) -> None:
    source = made(vit(width=48))
    decision = dataclasses.replace(DECISIONS[name], embed=(tuple(range(24)),))
    widths, wanted, batches = projected_widths(arch_of(source), decision), outputs(source), images(200, 20)
    plain, fitted = (compress(source, widths, batches, refit=refit) for refit in (False, True))
    assert arch_of(fitted) == cut_arch(arch_of(source), decision)
    chosen = recover(source, decision, batches)
    assert error(fitted, wanted) < 0.7 * error(plain, wanted)
    assert error(fitted, wanted) < error(chosen, wanted)


def error(model: nn.Module, wanted: torch.Tensor) -> torch.Tensor:
    return (outputs(model) - wanted).square().mean()


def test_a_norm_cannot_take_the_place_of_attention() -> None:
    with pytest.raises(UserError, match=r"blocks\[1\].mixer = 'norm': a norm in the place of attention cannot be"):
        compressed_arch(vit(), Widths(blocks=(BlockWidths(), BlockWidths(mixer="norm"), BlockWidths())))


def test_a_cut_of_another_depth_is_refused() -> None:
    with pytest.raises(UserError, match="the cut has 2 blocks"):
        projected_widths(vit(), Cut(blocks=(BlockCut(),) * 2))
