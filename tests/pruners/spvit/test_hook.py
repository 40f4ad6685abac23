from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunesweep.models import Arch, Block, BlockCut, Cut, Stage, UserError, arch_of, build, cost, cut, cut_arch
from prunesweep.models.published.counts import SPVIT
from prunesweep.models.recalibrate import recalibrate
from prunesweep.pruners.hook import Collapsed
from prunesweep.pruners.spvit.hook import SPViT, SPViTSettings
from prunesweep.pruners.spvit.mixed import SPViTMixed
from prunesweep.pruners.spvit.supernet import SearchAttention, SearchSwinBlock, UnitGates
from prunesweep.training import Epoch, Recipe, fit
from tests.generate import random_arch, random_images, random_model
from tests.pruners.spvit.test_supernet import swin
from tests.training.test_ddp import Noise

RECIPE = Recipe(epochs=20, batch_size=13, lr=1e-3, drop_path=0.1)  # 80 updates
FAST = {"theta_lr": 0.08, "weight": 3.0}
BLOCK = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=100)
VIT = Arch(
    family="vit",
    source="tiny",
    img_size=(4, 4),
    patch_size=(1, 1),
    in_chans=1,
    num_classes=3,
    stages=(Stage(width=8, grid=(4, 4), blocks=(BLOCK, dataclasses.replace(BLOCK, src=1))),),
)
ARCHS = {"vit": VIT, "swin": swin(mlp=100)}


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ARCHS)
def test_a_search_meets_its_budget_and_what_follows_trains(family: str) -> None:
    """Search, cut from the weights before it, recalibration, finetuning with mixed weights, freezing."""
    arch, data = ARCHS[family], Noise()
    model, dense = random_model(arch, 0), random_model(arch, 0)
    hook, epochs = SPViT(SPViTSettings(budget=0.5, **FAST)), list[Epoch]()
    assert fit(model, data, RECIPE, hook=hook, seed=2, on_epoch=epochs.append)
    assert [epochs[0].facts["macs_share"], epochs[-1].facts] == [1, hook.facts]
    facts, decision = hook.facts, hook.finish()
    assert not any(isinstance(m, (SearchAttention, SearchSwinBlock, UnitGates)) for m in model.modules())
    assert list(model.state_dict()) == list(dense.state_dict())
    assert not equal(model, dense)

    small = cut(dense, decision)
    share = cost(arch_of(small)).macs / cost(arch).macs
    assert 0.99 * 0.5 <= share <= 0.5
    assert abs(float(facts["macs_share"]) - 0.5) < 0.15  # the gates did most of it
    letters = {"attn": "M", "none": "s", "conv1x1": "1", "conv3x3": "3"}
    assert str(facts["mixers"]).split() == [letters[block.mixer] for block in arch_of(small).blocks]
    convs = sum(block.conv_kernel > 0 for block in arch_of(small).blocks)
    assert recalibrate(small, data.calibration(52, 13, 0)) == convs
    mixed = SPViTMixed(dense, decision)
    assert fit(small, data, RECIPE.model_copy(update={"epochs": 2}), hook=mixed)
    assert mixed.finish() == convs
    assert list(small.state_dict()) == list(build(cut_arch(arch, decision)).state_dict())


@pytest.mark.parametrize("family", ARCHS)
def test_an_interrupted_search_is_the_one_that_was_not(family: str, tmp_path: Path) -> None:
    settings, arch = SPViTSettings(budget=0.6, **FAST), ARCHS[family]
    recipe = RECIPE.model_copy(update={"epochs": 4, "ema": 0.9})

    def run(hook: SPViT, seed: int = 0, **options: Any) -> tuple[nn.Module, bool]:
        model = random_model(arch, seed)
        return model, fit(model, Noise(), recipe, hook=hook, seed=2, **options)

    hook = SPViT(settings)
    whole, _ = run(hook)
    state, done, times = tmp_path / "state.safetensors", False, 0
    while not done:  # a resumed model's own weights do not matter
        again = SPViT(settings)
        model, done = run(again, times, state=state, should_stop=lambda: True)
        times += 1
    assert times == 4
    assert any((theta != 1.5).any() for theta in hook.supernet.thetas)
    assert all(torch.equal(a, b) for a, b in zip(hook.supernet.thetas, again.supernet.thetas, strict=True))
    assert again.facts == hook.facts
    assert again.finish() == hook.finish()
    assert equal(model, whole)
    with pytest.raises(UserError, match=r"budget = 0.5: the run to go on with has 0.6"):
        run(SPViT(SPViTSettings(budget=0.5, **FAST)), state=state)


def test_gates_have_settings_of_their_own() -> None:
    hook = SPViT(SPViTSettings(theta_lr=0.2, theta_momentum=0.5))
    hook.wrap(random_model(VIT, 0))
    (group,) = hook.parameter_groups()
    assert [group["lr"], group["weight_decay"], group["betas"]] == [0.2, 0.0, (0.5, 0.999)]
    assert sum(theta.numel() for theta in group["params"]) == 2 * (3 + 100)


def test_the_state_fixes_the_draws_of_any_step() -> None:
    arch = random_arch(Random(3), missing=False, extras=False, ragged=False)

    def wrapped(seed: int = 0) -> SPViT:
        hook = SPViT(SPViTSettings(seed=seed))
        hook.wrap(random_model(arch, 0))
        return hook

    first, second, other = wrapped(), wrapped(), wrapped(1)
    for _ in range(3):
        first.after_step()
    second.load_state_dict(first.state_dict())
    draws = [[own.u for own in hook.supernet.units] for hook in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("count", ["exact", "reference"])
def test_the_loss_counts_from_the_dense_model_down(count: str) -> None:
    """weight * (1 - budget)^2 with all gates open; the decision's own share with others."""
    arch = random_arch(Random(3), missing=False, extras=False, ragged=False)
    hook = SPViT(SPViTSettings(budget=0.5, weight=12.0, cost=count))
    hook.wrap(random_model(arch, 0))
    assert hook.loss({"loss": torch.tensor(2.0)}).item() == pytest.approx(2 + 12 * 0.25)
    assert hook.facts["macs_share"] == 1
    assert hook.loss({"loss": torch.tensor(2.0)}).requires_grad
    with torch.no_grad():
        for theta in hook.supernet.thetas[1::2]:
            theta[2:] = -1  # two hidden units stay
    small = cut_arch(arch, Cut(blocks=(BlockCut(mlp=(0, 1)),) * arch.depth))
    share = cost(small).macs / cost(arch).macs
    assert hook.facts["macs_share"] == pytest.approx(share)
    if count == "reference":
        share = SPVIT.macs(small) / SPVIT.macs(arch)
    assert hook.complexity().item() == pytest.approx(12 * max(share - 0.5, 0) ** 2)


def test_a_search_that_fell_far_below_its_budget_is_an_error() -> None:
    arch = random_arch(Random(3), missing=False, extras=False, ragged=False)
    for family_arch in (arch, swin()):
        model = random_model(family_arch, 0)
        classes = [type(m) for m in model.modules()]
        hook = SPViT(SPViTSettings(budget=0.9))
        hook.wrap(model)
        with torch.no_grad():
            for theta in hook.supernet.thetas:
                theta.fill_(-1.0)
        with pytest.raises(Collapsed, match=r"ended at 0\.\d+ of the source's macs \(mixers s.*, 0 hidden units\)"):
            hook.finish()
        assert [type(m) for m in model.modules()] == classes


def test_a_block_without_open_units_keeps_its_best_one() -> None:
    model = random_model(swin(), 0)
    hook = SPViT(SPViTSettings(budget=0.8))
    hook.wrap(model)
    with torch.no_grad():
        hook.supernet.units[0].theta.copy_(torch.linspace(-2, -1, 12).flip(0))
        hook.supernet.units[1].theta[:4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    decision = hook.finish()
    assert 0 in decision.blocks[0].mlp
    assert cost(cut_arch(swin(), decision)).macs <= 0.8 * cost(swin()).macs


def test_gates_in_front_of_a_norm_are_refused() -> None:
    arch = dataclasses.replace(VIT, mlp_norm=True)
    with pytest.raises(UserError, match="normalises the hidden units"):
        SPViT(SPViTSettings(budget=0.5)).wrap(build(arch))


def test_what_cannot_be_searched_is_refused() -> None:
    for bad in ({"budget": 1.0}, {"budgets": 0.5}, {"penalty": "soft"}, {"theta_lr": 0}, {"seed": -1}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            SPViTSettings(**bad)
    with pytest.raises(UserError, match="of family 'pvt_v2': SPViT serves families vit, eva, beit, diff, cait, swin"):
        SPViT().wrap(build(random_arch(Random(0), "pvt_v2")))
    grid = swin(grid=5)
    with pytest.raises(UserError, match="use conv_scope = 'map'"):
        SPViT(SPViTSettings(conv_scope="window")).wrap(build(grid))


def search_on_rank(rank: int, folder: str) -> None:
    """Train on this rank's own images; keep thetas and the sub-network after the last step."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    arch = random_arch(Random(3), missing=False, extras=False, ragged=False)
    for draws in ("shared", "per_rank"):
        model = random_model(arch, 2).train()
        hook = SPViT(SPViTSettings(budget=0.5, weight=300.0, draws=draws))
        hook.wrap(model)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(20):
            x = random_images(arch, 2 * step + rank, batch=4)
            optimizer.zero_grad()
            loss = F.cross_entropy(parallel(x), torch.arange(4) % arch.num_classes)
            hook.loss({"loss": loss}).backward()
            hook.after_backward()
            optimizer.step()
            hook.after_step()
        found = {f"theta.{i}": t.detach() for i, t in enumerate(hook.supernet.thetas)}
        found |= {f"u.{i}": own.u for i, own in enumerate(hook.supernet.units)}
        save_file(found, f"{folder}/{draws}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_have_the_same_gates(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(search_on_rank, args=(str(tmp_path),), nprocs=2)
    for draws in ("shared", "per_rank"):
        first, second = (load_file(tmp_path / f"{draws}-{rank}") for rank in (0, 1))
        assert any((t < 0).any() for name, t in first.items() if name.startswith("theta"))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]) == (name.startswith("theta") or draws == "shared")
