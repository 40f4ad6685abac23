from __future__ import annotations

import copy
import dataclasses
import warnings
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pydantic
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunesweep.models import Arch, Block, Stage, UserError, arch_of, build, cost, cut_arch
from prunesweep.models.arch import ClassAttention, PositionBias, Rope
from prunesweep.pruners.hook import Collapsed
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.resource import unit_macs
from prunesweep.pruners.uvc.settings import UVCSettings
from prunesweep.training import Recipe, fit, open_data, seeded
from tests.generate import random_arch, random_images, random_model
from tests.oracle import hooks_of, masked
from tests.pruners.nvit.test_schedule import vit

ARCH = vit(depth=3, width=16, heads=2, head=8, mlp=32)
QUICK: dict[str, Any] = {"warmup_epochs": 0, "ramp_steps": 40, "gating_interval": 10, "mlp_align": 4}


def hook(**settings) -> UVC:
    return UVC(UVCSettings(**(QUICK | settings)))


def wrapped(arch: Arch = ARCH, seed: int = 0, **settings) -> tuple[nn.Module, UVC, torch.optim.Optimizer]:
    """A random model behind gates, in training mode."""
    model, own = random_model(arch, seed), hook(**settings)
    own.wrap(model)
    own.start_epoch()
    return model.train(), own, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model: nn.Module, own: UVC, optimizer: torch.optim.Optimizer, t: int, part: slice = slice(None)) -> None:
    """One update on this part of random images, where the training loop has the hook."""
    x = random_images(own.arch, t, batch=8)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x[part]), (torch.arange(8) % ARCH.num_classes)[part])
    own.loss({"loss": loss}).backward()
    own.after_backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    own.after_step()


def unit(arch: Arch, align: int = 4) -> int:
    """MACs of the smallest thing that can come back: a group of MLP units, or a channel of every head."""
    N, C = arch.tokens, arch.stages[0].width
    return max(align * 2 * N * C, arch.blocks[0].heads * (2 * C + N) * N)


@pytest.mark.parametrize(
    "settings", [{}, {"r_mode": "ragged"}, {"r_mode": "off"}, {"gates": "soft_l0"}, {"skip": "101"}]
)
def test_evaluation_during_the_run_is_the_cut_model(settings: dict[str, Any]) -> None:
    model, own, optimizer = wrapped(budgets=(0.45,), **settings)
    before = random_model(ARCH, 0)
    for t in range(55):
        step(model, own, optimizer, t)
    assert own.machine.settled
    x = random_images(ARCH, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    shown = dict(own.facts)
    (snapshot,) = own.finish()
    assert snapshot.cost == cost(arch_of(snapshot.model)).macs == round(shown["macs"] * cost(ARCH).macs)
    assert snapshot.budget - unit(ARCH) < snapshot.cost <= snapshot.budget == 0.45 * cost(ARCH).macs
    assert arch_of(snapshot.model) == cut_arch(ARCH, snapshot.cut)
    assert shown["skip"] == "".join("01"[choice.keep] for choice in snapshot.cut.blocks)
    assert shown["heads"] == sum(block.heads for block in arch_of(snapshot.model).blocks)
    assert shown["mlp"] == sum(block.mlp for block in arch_of(snapshot.model).blocks)
    with torch.no_grad():
        torch.testing.assert_close(evaluated, snapshot.model(x), rtol=0, atol=1e-10)
        with masked(model, snapshot.cut):
            torch.testing.assert_close(evaluated, model(x), rtol=0, atol=1e-10)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert hooks_of(model) == []


GATED = dataclasses.replace(ARCH, glu=True, act="silu")
ROTARY = dataclasses.replace(
    ARCH,
    family="eva",
    rope=Rope(kind="axial", pairs=4, temperature=10.0),
    stages=tuple(
        dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, qk=4) for b in s.blocks)) for s in ARCH.stages
    ),
)


@pytest.mark.parametrize("arch", [GATED, ROTARY], ids=["gated MLPs", "rotary positions"])
@pytest.mark.parametrize("r_mode", ["ragged", "uniform"])
def test_gated_mlps_and_turned_queries_are_counted_and_cut_as_they_are(arch: Arch, r_mode: str) -> None:
    model, own, optimizer = wrapped(arch, budgets=(0.3,), r_mode=r_mode, skip="111")
    for t in range(55):
        step(model, own, optimizer, t)
    x = random_images(arch, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    (snapshot,) = own.finish()
    assert own.facts["macs"] == snapshot.cost / cost(arch).macs
    assert 0.29 * cost(arch).macs < snapshot.cost <= 0.3 * cost(arch).macs
    assert any(block.heads == 1 for block in arch_of(snapshot.model).blocks)
    with torch.no_grad():
        torch.testing.assert_close(evaluated, snapshot.model(x), rtol=0, atol=1e-10)


CAIT = dataclasses.replace(
    ARCH,
    family="cait",
    class_token=False,
    pool="map",
    head_norm="pooled",
    layer_scale=True,
    class_attention=ClassAttention(blocks=1, width=16, heads=2, mlp=8),
)


@pytest.mark.parametrize(
    "settings",
    [{}, {"r_mode": "ragged", "skip": "111"}, {"steps": "reference", "skip": "111", "slr": 1.0, "z_init": 50.0}],
)
def test_heads_whose_maps_are_mixed_stay_whole(settings: dict[str, Any]) -> None:
    """Values, units and blocks go as elsewhere; what a head gives to others is part of the price of none of them."""
    model, own, optimizer = wrapped(CAIT, budgets=(0.6,), mlp_align=1, **settings)
    normalized = "steps" not in settings
    for t in range(55):
        step(model, own, optimizer, t)
        assert (own.machine.s[:, 0] == 0).all()
        if normalized:
            assert own.machine.usage(own.norms()).value == pytest.approx(own.facts["macs"], rel=1e-9)
    assert (own.machine.s[:, 1] > 0).any()
    x = random_images(CAIT, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    (snapshot,) = own.finish()
    small = arch_of(snapshot.model)
    assert all(block.heads == 2 for block in small.blocks)
    assert small.depth < 3 or any(block.total_v < 16 for block in small.blocks)
    assert snapshot.budget - unit(CAIT) < snapshot.cost <= snapshot.budget
    with torch.no_grad():
        with masked(model, snapshot.cut):
            torch.testing.assert_close(model(x), snapshot.model(x), rtol=0, atol=1e-10)
        if normalized:
            torch.testing.assert_close(evaluated, snapshot.model(x), rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="at their narrowest have"):
        hook(skip="111", budgets=(0.3,)).wrap(build(CAIT))


@pytest.mark.parametrize("norm", ["attn_norm", "mlp_norm"])
def test_a_norm_over_what_would_go_is_refused(norm: str) -> None:
    arch = dataclasses.replace(ROTARY, **{norm: True})
    with pytest.raises(UserError, match="has a norm over the"):
        hook().wrap(random_model(arch, 0))


FAMILIES = {
    "plain": dataclasses.replace(ARCH, family="eva", norm="rms", embed_norm=True, proj_bias=False, mlp_bias=False),
    "normed": dataclasses.replace(ROTARY, qk_norm=True, glu=True, mlp_entry_norm=True),
    "behind": dataclasses.replace(ARCH, family="eva", post_norm=True),
    "table": dataclasses.replace(ARCH, family="beit", position_bias=PositionBias(kind="table")),
    "mlp": dataclasses.replace(ARCH, family="beit", position_bias=PositionBias(kind="mlp", hidden=3)),
    "windows": dataclasses.replace(
        ARCH,
        family="sam",
        class_token=False,
        pool="avg",
        position_bias=PositionBias(kind="decomposed"),
        neck=5,
        stages=tuple(
            dataclasses.replace(
                s,
                window=(min(s.grid[0], 3), 1),
                blocks=tuple(dataclasses.replace(b, whole_map=b.src == 1) for b in s.blocks),
            )
            for s in ARCH.stages
        ),
    ),
}


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES)
def test_other_families_are_evaluated_as_cut(arch: Arch) -> None:
    model, own, optimizer = wrapped(arch, budgets=(0.5,))
    for t in range(55):
        step(model, own, optimizer, t)
    assert own.machine.settled
    x = random_images(arch, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    (snapshot,) = own.finish()
    assert snapshot.cost == cost(arch_of(snapshot.model)).macs
    assert snapshot.budget - 2 * unit(arch) < snapshot.cost <= snapshot.budget
    assert cost(arch_of(snapshot.model)).macs == own.facts["macs"] * cost(arch).macs
    with torch.no_grad():
        torch.testing.assert_close(evaluated, snapshot.model(x), rtol=0, atol=1e-10)
        with masked(model, snapshot.cut):
            torch.testing.assert_close(evaluated, model(x), rtol=0, atol=1e-10)


def pyramid(family: str) -> Arch:
    """Two stages of two blocks, whose heads, channels and MLP units differ."""
    scale = {"scale": 1.0} if family == "swin_v2" else {}
    stages, index = [], count()
    for width, grid, heads, mlp in ((12, (4, 6), 2, 24), (20, (2, 3), 4, 40)):
        blocks = []
        for shifted in (False, True):
            qk = 6 if width == 12 else 5
            block = Block(src=next(index), heads=heads, qk=qk, v=qk, scale=qk**-0.5, mlp=mlp)
            own = {"sr": 8 if width == 12 else 0} if family == "pvt_v2" else {"shifted": shifted}
            blocks.append(dataclasses.replace(block, **own, **scale))
        stage = Stage(width=width, grid=grid, blocks=tuple(blocks))
        own = {"sr_ratio": 2 if width == 12 else 1} if family == "pvt_v2" else {"window": (2, 3)}
        stages.append(dataclasses.replace(stage, **own))
    return Arch(
        family=family,
        source="small",
        img_size=(16, 24),
        patch_size=(4, 4),
        in_chans=1,
        num_classes=ARCH.num_classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        k_bias=family != "swin_v2",
        post_norm=family == "swin_v2",
    )


UNEVEN = dataclasses.replace(
    ARCH,
    stages=tuple(
        dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, mlp=12 * (b.src + 1)) for b in s.blocks))
        for s in ARCH.stages
    ),
)


@pytest.mark.parametrize(
    "arch", [pyramid("swin"), pyramid("swin_v2"), pyramid("pvt_v2"), UNEVEN], ids=lambda a: a.family
)
@pytest.mark.parametrize("r_mode", ["uniform", "ragged"])
def test_blocks_that_differ_are_priced_each_by_itself(arch: Arch, r_mode: str) -> None:
    model, own, optimizer = wrapped(arch, budgets=(0.5,), r_mode=r_mode, ramp_steps=16, mlp_align=1)
    source = cost(arch).macs
    for t in range(22):
        step(model, own, optimizer, t)
        norms = own.norms()
        assert own.machine.usage(norms).value == pytest.approx(own.facts["macs"], rel=1e-9)  # R is exact
    assert own.machine.settled
    x = random_images(arch, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    shown = dict(own.facts)
    (snapshot,) = own.finish()
    largest = max(
        head + block.qk * channel for block, (head, channel, *_) in zip(arch.blocks, unit_macs(arch), strict=True)
    )
    assert snapshot.budget - largest < snapshot.cost <= snapshot.budget == 0.5 * source
    assert shown["macs"] * source == pytest.approx(cost(arch_of(snapshot.model)).macs) == snapshot.cost
    assert arch_of(snapshot.model) == cut_arch(arch, snapshot.cut)
    with torch.no_grad():
        torch.testing.assert_close(evaluated, snapshot.model(x), rtol=0, atol=1e-10)
        with masked(model, snapshot.cut):
            torch.testing.assert_close(evaluated, model(x), rtol=0, atol=1e-10)
    assert [type(m) for m in model.modules()] == [type(m) for m in random_model(arch, 0).modules()]
    assert hooks_of(model) == []


def test_reference_steps_of_blocks_that_differ() -> None:
    model, own, optimizer = wrapped(
        pyramid("swin"), budgets=(0.5,), steps="reference", slr=1.0, z_init=50.0, skip="1111"
    )
    for t in range(12):
        step(model, own, optimizer, t)
        assert (own.machine.s <= own.machine.s_max).all()
        assert (own.machine.r[:2, 2:] == 0).all()  # of heads that those blocks do not have
    assert (own.machine.s[:, 0] > 0).all()
    (snapshot,) = own.finish()
    assert snapshot.cost <= snapshot.budget


def test_every_stage_keeps_a_block() -> None:
    """Whatever gates say, the last block of a stage stays, and comes back where it is gone."""
    arch = pyramid("swin")
    model, own, optimizer = wrapped(arch, budgets=(0.3,), gating_weight=50.0, ramp_steps=16, gating_interval=3)
    for t in range(22):
        step(model, own, optimizer, t)
        assert all("1" in own.facts["skip"][first : first + 2] for first in (0, 2)), own.facts["skip"]
    assert "0" in own.facts["skip"]
    own.machine.gates[:2] = torch.tensor([1.0, -1.0]).double()
    (snapshot,) = own.finish()
    assert [len(stage.blocks) > 0 for stage in arch_of(snapshot.model).stages] == [True, True]
    assert snapshot.cost <= snapshot.budget


@pytest.mark.parametrize("family", ["swin", "pvt_v2"])
def test_a_pyramid_s_run_goes_on_from_any_step(family: str) -> None:
    arch = pyramid(family)
    model, own, optimizer = wrapped(arch, budgets=(0.8, 0.5))
    for t in range(20):
        step(model, own, optimizer, t)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), own.state_dict()))
    other, again, second = wrapped(arch, seed=7, budgets=(0.8, 0.5))
    for part, saved in zip((other, second, again), state, strict=True):
        part.load_state_dict(saved)
    for t in range(20, 26):
        step(model, own, optimizer, t)
        step(other, again, second, t)
    for ours, theirs in zip(own.finish(), again.finish(), strict=True):
        assert (ours.cut, ours.cost, ours.step) == (theirs.cut, theirs.cost, theirs.step)


def test_warm_up_is_half_of_every_block_and_decides_nothing() -> None:
    model, own, optimizer = wrapped(warmup_epochs=1)
    x = random_images(ARCH, 5)
    half = random_model(ARCH, 0)
    with torch.no_grad():
        z = half.norm_pre(half._pos_embed(half.patch_embed(x)))
        for block in half.blocks:
            z = 0.5 * block(z) + 0.5 * z
        torch.testing.assert_close(model(x), half.forward_head(half.norm(z)), rtol=0, atol=1e-12)
    for t in range(5):
        step(model, own, optimizer, t)
    assert (own.machine.s == 0).all()
    assert own.facts["macs"] == 1
    assert all(torch.equal(g.gate.detach(), torch.tensor([-1.0, 1.0]).double()) for g in model.blocks)
    own.start_epoch()
    for t in range(20):
        step(model, own, optimizer, t)
    assert (own.machine.s[:, 1] > 0).all()


def test_gates_see_a_new_sample_every_step_and_the_same_one_again() -> None:
    weights = []
    for _ in range(2):
        model, own, optimizer = wrapped()
        for t in range(4):
            weights.append(torch.stack([g.keep_weight() for g in model.blocks]).detach())
            step(model, own, optimizer, t)
    assert all(torch.equal(a, b) for a, b in zip(weights[:4], weights[4:], strict=True))
    assert len({float(w[0]) for w in weights[:4]}) == 4
    assert all(len(set(w.tolist())) == 3 for w in weights)


def test_gates_move_with_the_weights_only_where_asked() -> None:
    still, moved = (wrapped(gates_in_weight_optimizer=given, steps="reference", glr=0.0) for given in (False, True))
    for model, own, optimizer in (still, moved):
        step(model, own, optimizer, 0)
    assert torch.equal(still[1].machine.gates[0], torch.tensor([-1.0, 1.0]).double())
    assert not torch.equal(moved[1].machine.gates[0], torch.tensor([-1.0, 1.0]).double())
    for model, own, _ in (still, moved):
        assert torch.equal(torch.stack([g.gate for g in model.blocks]), own.machine.gates)


@pytest.mark.parametrize("when", [3, 25, 52])
def test_a_run_goes_on_from_any_step(when: int) -> None:
    model, own, optimizer = wrapped(budgets=(0.8, 0.45))
    for t in range(when):
        step(model, own, optimizer, t)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), own.state_dict()))
    other, again, second = wrapped(seed=7, budgets=(0.8, 0.45))
    other.load_state_dict(state[0])
    second.load_state_dict(state[1])
    again.load_state_dict(state[2])
    assert again.facts == own.facts
    for t in range(when, when + 8):
        step(model, own, optimizer, t)
        step(other, again, second, t)
    assert own.facts == again.facts
    for ours, theirs in zip(own.finish(), again.finish(), strict=True):
        assert (ours.cut, ours.cost, ours.step) == (theirs.cut, theirs.cost, theirs.step)
        assert all(torch.equal(v, theirs.model.state_dict()[k]) for k, v in ours.model.state_dict().items())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_several_budgets_are_passed_on_the_way_down() -> None:
    model, own, optimizer = wrapped(budgets=(0.45, 0.7, 0.9))
    for t in range(60):
        step(model, own, optimizer, t)
    snapshots = own.finish()
    assert [s.budget / cost(ARCH).macs for s in snapshots] == pytest.approx([0.9, 0.7, 0.45])
    assert snapshots[0].step < snapshots[1].step < snapshots[2].step == 60
    for snapshot in snapshots:
        assert snapshot.budget - unit(ARCH) < snapshot.cost <= snapshot.budget
        assert arch_of(snapshot.model) == cut_arch(ARCH, snapshot.cut)


def decide_on_rank(rank: int, folder: str, ranks: int) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    model, own, optimizer = wrapped(budgets=(0.5,))
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    for t in range(20):
        step(parallel, own, optimizer, t, slice(rank * 8 // ranks, (rank + 1) * 8 // ranks))
    found = {name: getattr(own.machine, name) for name in own.machine.TENSORS}
    save_file(found, f"{folder}/{rank}-of-{ranks}")
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_decide_as_one_process_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(decide_on_rank, args=(str(tmp_path), 2), nprocs=2)
    decide_on_rank(0, str(tmp_path), 1)
    alone, *ranks = (load_file(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert (alone["s"] > 0).any()
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-6, atol=1e-6)


def test_a_run_that_falls_through_its_budget_is_ended() -> None:
    reference = {"steps": "reference", "slr": 20.0, "z_init": 1e4, "budgets": (0.9,)}
    model, own, optimizer = wrapped(**reference)
    with pytest.raises(
        Collapsed, match=r"of the source's MACs at update \d+, below 0.7 x budget 0.9 \(blocks [01]{3}\)"
    ):
        for t in range(20):
            step(model, own, optimizer, t)


def test_given_blocks_are_skipped_from_the_start() -> None:
    by_order = {"skip_count": 1, "skip_order": (1, 0)}
    for settings in ({"skip": "101"}, by_order):
        model, own, optimizer = wrapped(budgets=(0.5,), **settings)
        skipped = copy.deepcopy(model.blocks[1].block.state_dict())
        for t in range(60):
            step(model, own, optimizer, t)
        assert own.facts["skip"] == "101"
        assert all(torch.equal(v, skipped[k]) for k, v in model.blocks[1].block.state_dict().items())
        (snapshot,) = own.finish()
        assert [block.src for block in arch_of(snapshot.model).blocks] == [0, 2]
        assert snapshot.budget - unit(ARCH) < snapshot.cost <= snapshot.budget


def test_what_cannot_be_is_refused_before_training() -> None:
    for settings, message in (
        ({"skip": "111", "budgets": (0.05,)}, r"budget = 0.05 of .* MACs is .*, but 3 blocks at their narrowest have"),
        ({"skip": "10"}, "skip = '10': has 2 digits for 3 blocks"),
        ({"skip_count": 1, "skip_order": (4,)}, r"skip_order = \[4\]: must name some of the blocks 0..2"),
        ({"skip_count": 3, "skip_order": (0, 1, 2)}, "skip_count = 3: at least one of 3 blocks must run"),
    ):
        with pytest.raises(UserError, match=message):
            hook(**settings).wrap(build(ARCH))
    for settings in (
        {"skip": "000"},
        {"skip": "101", "skip_count": 1, "skip_order": (0,)},
        {"skip_count": 1},
        {"skip_count": 2, "skip_order": (0,)},
        {"budgets": ()},
        {"budgets": (1.5,)},
        {"budget": 0.5},
    ):
        with pytest.raises(pydantic.ValidationError):
            UVCSettings(**settings)


def test_models_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(UserError, match="of family .lm.: UVC prunes families vit, eva, beit, cait, swin, swin_v2, sam"):
        hook().wrap(build(random_arch(Random(0), "lm")))
    (snapshot,) = finished(budgets=(0.5,))
    with pytest.raises(UserError, match=r"blocks\[\d\] of .* whose values are as wide"):
        hook().wrap(snapshot.model)
    for family, settings, message in (
        ("swin", {"resource": "paper"}, "resource = 'paper': UVC's paper counts models whose blocks attend over all"),
        ("pvt_v2", {"skip": "1100"}, "skip = '1100': leaves no block of stage 1; every stage of small needs one"),
        ("swin_v2", {"skip_count": 2, "skip_order": (1, 0)}, r"skip_order = \[1, 0\]: leaves no block of stage 0"),
        ("swin", {"budgets": (0.05,)}, "but 2 blocks at their narrowest have"),
    ):
        with pytest.raises(UserError, match=message):
            hook(**settings).wrap(build(pyramid(family)))


def finished(**settings):
    model, own, optimizer = wrapped(**settings)
    for t in range(5):
        step(model, own, optimizer, t)
    return own.finish()


def test_a_training_that_is_too_short_for_its_ramp_is_told_of() -> None:
    """Warm-up decides nothing, so it does not count."""
    own = hook(warmup_epochs=1, ramp_steps=40)
    with pytest.warns(UserWarning, match=r"ramp_steps = 40: .* 39 of this training .* to half of them, 19, or train"):
        own.check_length(4, 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.check_length(5, 10)


def test_a_run_that_ends_early_is_cut_to_its_budget() -> None:
    (snapshot,) = finished(budgets=(0.4,))
    assert snapshot.step == 5
    assert snapshot.budget - unit(ARCH) < snapshot.cost <= snapshot.budget


def test_the_training_loop_and_its_saved_state(tmp_path: Path) -> None:
    """A distilled DeiT, float32, averaged weights; cut off after every epoch it ends up the same."""
    data = open_data("digits")
    recipe = Recipe(epochs=3, batch_size=256, lr=1e-3, ema=0.5)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}

    def fresh(seed: int) -> tuple[nn.Module, UVC]:
        with seeded(seed):
            model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **shape)
        model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
        return model, hook(budgets=(0.6,), warmup_epochs=1, ramp_steps=6, gating_interval=4)

    model, own = fresh(0)
    assert fit(model, data, recipe, hook=own, seed=3)
    (want,) = own.finish()
    assert want.cost <= want.budget
    state, done, times = tmp_path / "state.safetensors", False, 0
    while not done:
        other, again = fresh(times)
        done = fit(other, data, recipe, hook=again, seed=3, state=state, should_stop=lambda: True)
        times += 1
    (found,) = again.finish()
    assert times == 3
    assert (found.cut, found.cost, found.step) == (want.cut, want.cost, want.step)
    assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in want.model.state_dict().items())
    with pytest.raises(UserError, match="the run to go on with has the settings"):
        fit(fresh(0)[0], data, recipe, hook=hook(budgets=(0.7,)), state=state)
