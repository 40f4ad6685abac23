from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunesweep.models import Arch, UserError, arch_of, build, cost, cut_arch
from prunesweep.pruners import MACS, PARAMS, kind_of, nvit, vector_sizes
from prunesweep.pruners.masking import KeptLayerNorm, space_masks
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.nvit.schedule import Grouping, dims_of, narrow, total_cost
from prunesweep.pruners.snapshot import Snapshot
from prunesweep.training import Distill, Recipe, fit, open_data, seeded
from tests.generate import random_arch, random_images, random_model
from tests.oracle import masked
from tests.pruners.nvit.test_schedule import vit

GROUPS = {"embed": 2, "heads": 1, "qk": 2, "v": 2, "mlp": 4}


def least(arch: Arch, measure=MACS, groups=GROUPS) -> float:
    return total_cost(measure, narrow(arch, Grouping(groups).narrowest(vector_sizes(arch, nvit.KINDS))))


def ladder(arch: Arch, *shares: float, measure=MACS) -> list[float]:
    """Budgets at these shares of the way from the narrowest model to the whole one."""
    low, high = least(arch, measure), total_cost(measure, arch)
    return [low + share * (high - low) for share in shares]


def train(
    model: nn.Module, hook: NViTPruning, *, lr: float = 0.01, steps: int = 500, scale: float = 1.0
) -> Iterator[int]:
    """AdamW on random images, with the hook where the training loop has it; yields after every step."""
    arch = arch_of(model)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        x = random_images(arch, step, batch=4, dtype=dtype)
        optimizer.zero_grad()
        loss = scale * F.cross_entropy(model(x), torch.arange(len(x)) % arch.num_classes)
        hook.loss({"loss": loss}).backward()
        hook.after_backward()
        optimizer.step()
        hook.after_step()
        yield step
        if hook.done:
            return
    raise AssertionError("the last budget was not reached")


@pytest.mark.parametrize("family", ["vit", "eva", "beit", "swin", "swin_v2", "sam"])
@pytest.mark.parametrize("seed", range(6))
def test_every_snapshot_is_the_masked_model_and_meets_its_budget(family: str, seed: int) -> None:
    """Any mixers, norms, token plans, stages; at the moment when it is taken, while the weights go on."""
    random = Random(100 * seed)
    arch = random_arch(random, family, ragged=False)
    model = random_model(arch, seed)
    hook = NViTPruning(ladder(arch, 0.8, 0.5, 0.0), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    x, seen = random_images(arch, 1000), 0
    for _ in train(model, hook):
        for snapshot in hook.snapshots[seen:]:
            copied = build(arch).double().eval()
            copied.load_state_dict(model.state_dict(), strict=True)
            with torch.no_grad():
                want = snapshot.model(x)
                torch.testing.assert_close(model(x), want, rtol=0, atol=1e-9)
                with masked(copied, snapshot.cut) as by_the_oracle:
                    torch.testing.assert_close(by_the_oracle(x), want, rtol=0, atol=1e-9)
            assert snapshot.cost == cost(arch_of(snapshot.model)).macs <= snapshot.budget
            assert arch_of(snapshot.model) == cut_arch(arch, snapshot.cut)
            seen += 1
    assert [s.budget for s in hook.finish()] == ladder(arch, 0.8, 0.5, 0.0)
    assert seen == 3
    assert not any(isinstance(m, KeptLayerNorm) for m in model.modules())


@pytest.mark.parametrize("family", ["vit", "eva", "swin"])
@pytest.mark.parametrize("seed", range(3))
def test_a_snapshot_gives_back_what_its_budget_allows(family: str, seed: int) -> None:
    """It is the model of that moment, before the step's groups are zeroed, without what the snapshot lacks."""
    arch = random_arch(Random(100 * seed), family, ragged=False)
    model = random_model(arch, seed)
    hook = NViTPruning(ladder(arch, 0.8, 0.5, 0.1), groups=GROUPS, interval=1, groups_per_step=4)
    hook.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, step = random_images(arch, 1000), 0
    while not hook.done:
        images = random_images(arch, step, batch=4)
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(4) % arch.num_classes).backward()
        hook.after_backward()
        optimizer.step()
        weights, seen = {name: t.clone() for name, t in model.state_dict().items()}, len(hook.snapshots)
        before = total_cost(MACS, narrow(arch, dims_of(hook.keep)))
        hook.after_step()
        after = total_cost(MACS, narrow(arch, dims_of(hook.keep)))
        for snapshot in hook.snapshots[seen:]:
            assert after <= snapshot.cost == cost(arch_of(snapshot.model)).macs <= snapshot.budget < before
            assert snapshot.cost >= 0.995 * snapshot.budget or "is" in snapshot.hindrance
            copied = build(arch).double().eval()
            copied.load_state_dict(weights, strict=True)
            with torch.no_grad(), masked(copied, snapshot.cut) as by_the_oracle:
                torch.testing.assert_close(by_the_oracle(x), snapshot.model(x), rtol=0, atol=1e-9)
        step += 1


def test_a_training_too_short_for_its_budget_is_refused() -> None:
    arch = vit(width=16, mlp=24)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=5, groups_per_step=1)
    model = random_model(arch, 0)
    hook.wrap(model)
    fewest = hook.fewest_updates
    assert fewest % 5 == 0
    hook.check_length(1, fewest)
    with pytest.raises(UserError, match=rf"{fewest} updates, 1 groups every 5; 2 epochs have 8. Train"):
        hook.check_length(2, 4)
    done = sum(1 for _ in train(model, hook))
    assert done >= fewest


def test_what_is_pruned_stays_zero_and_gets_no_gradient() -> None:
    arch = random_arch(Random(4), "vit", ragged=False)
    model = random_model(arch, 4)
    names, before = list(model.state_dict()), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    hook = NViTPruning(ladder(arch, 0.2), groups=GROUPS, interval=3, layer_norm="full")
    hook.wrap(model)
    pruned = {name: torch.zeros_like(mask) for name, mask in space_masks(arch, hook.keep).items()}
    for _ in train(model, hook, lr=0.1):
        embed = pruned["stages.0.embed"]  # before this step
        assert (model.patch_embed.proj.weight.grad[embed] == 0).all()
        pruned = {axis: ~mask for axis, mask in space_masks(arch, hook.keep).items()}
        embed = pruned["stages.0.embed"]
        assert (model.patch_embed.proj.weight[embed] == 0).all()
        assert (model.pos_embed[..., embed] == 0).all()
        assert (model.head.weight[:, embed] == 0).all()
        assert (model.head.weight[:, ~embed] != 0).all()
        for i, block in enumerate(model.blocks):
            if arch.blocks[i].mlp:
                mlp = pruned[f"blocks.{i}.mlp"]
                assert (block.mlp.fc1.weight[mlp] == 0).all()
                assert (block.mlp.fc1.bias[mlp] == 0).all()
                assert (block.mlp.fc2.weight[:, mlp] == 0).all()
            if arch.blocks[i].mixer == "attn":
                qkv = torch.cat([pruned[f"blocks.{i}.{part}"] for part in "qkv"])
                assert (block.attn.qkv.weight[qkv] == 0).all()
                assert (block.attn.proj.weight[:, pruned[f"blocks.{i}.v"]] == 0).all()
    assert {name.rpartition(".")[2] for name, gone in pruned.items() if gone.any()} >= {"embed", "mlp", "q", "k", "v"}
    assert list(model.state_dict()) == names
    hook.finish()
    assert dict(model.named_modules()) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_saliency_is_the_mean_of_squares_over_optimizer_steps_averaged_over_prunings() -> None:
    """Two micro-batches are one step: their gradients are summed before anything is squared."""
    arch = vit()
    model = random_model(arch, 0)
    reference = copy.deepcopy(model)
    hook = NViTPruning([least(arch)], groups=GROUPS, interval=2, momentum=0.75, divide={"mlp": 3.0}, eta=0.0)
    hook.wrap(model)
    means, x = [], random_images(arch, 0, batch=16)
    divisors = nvit.divisors(arch) | {"mlp": 3.0}
    y = torch.arange(len(x)) % arch.num_classes
    for part in (0, 8):
        model.zero_grad()
        for start in (part, part + 4):  # accumulation
            (F.cross_entropy(model(x[start : start + 4]), y[start : start + 4]) / 2).backward()
        hook.after_backward()
        hook.after_step()
    first = {name: vector.clone() for name, vector in hook.scores.items()}
    want = nvit.score(reference, [(x[:8], y[:8]), (x[8:], y[8:])])
    for name, vector in want.vectors.items():
        share = 1 / 9 if kind_of(name) == "mlp" else 1
        torch.testing.assert_close(first[name], vector * share, rtol=1e-9, atol=0)
    for batch in (x[:8], x[8:]):
        model.zero_grad()
        F.cross_entropy(model(batch), y[:8]).backward()
        means.append({n: (r / divisors[kind_of(n)]) ** 2 for n, r in nvit.raw_saliency(model, arch).items()})
        hook.after_backward()
        hook.after_step()
    for name, vector in hook.scores.items():
        mean = (means[0][name] + means[1][name]) / 2
        torch.testing.assert_close(vector, 0.75 * first[name] + 0.25 * mean, rtol=1e-9, atol=0)


def test_a_run_that_ends_early_has_the_snapshots_that_it_reached() -> None:
    arch = vit(width=16, mlp=24)
    hook = NViTPruning(ladder(arch, 0.7, 0.0), groups=GROUPS, interval=1)
    model = random_model(arch, 0)
    hook.wrap(model)
    for _ in train(model, hook):
        if hook.snapshots:
            break
    assert not hook.done
    assert [s.budget for s in hook.finish()] == ladder(arch, 0.7)


def decisions(scale: float = 1.0, **settings) -> list[Snapshot]:
    arch = vit(width=16, mlp=24)
    model = random_model(arch, 1)
    measure = settings.get("measure", MACS)
    hook = NViTPruning(
        ladder(arch, 0.5, measure=measure), **({"groups": GROUPS, "interval": 2, "groups_per_step": 1} | settings)
    )
    hook.wrap(model)
    for _ in train(model, hook, lr=0.0, scale=scale):
        pass
    return list(hook.finish())


def test_the_relative_exchange_rate_does_not_depend_on_the_scale_of_the_loss() -> None:
    assert decisions(1.0, eta=3.0)[0].cut == decisions(8.0, eta=3.0)[0].cut
    per_mac = {"eta": 1e-6, "eta_unit": "absolute"}
    assert decisions(1.0, **per_mac)[0].cut != decisions(8.0, **per_mac)[0].cut


def test_a_higher_price_of_cost_gets_there_in_fewer_steps() -> None:
    steps = [decisions(eta=eta)[0].step for eta in (0.0, 0.1, 1e6)]
    assert steps[2] < steps[1] <= steps[0]


def test_settings_decide() -> None:
    """Kinds that are left whole, floors, divisors, the measure."""
    whole = decisions(groups=GROUPS | {"embed": 0, "qk": 0})[0]
    small = arch_of(whole.model)
    assert small.stages[0].width == 16
    assert [block.qk for block in small.blocks] == [4, 4]
    assert all(block.mlp >= 18 for block in arch_of(decisions(floors={"mlp": 0.75})[0].model).blocks)
    plain, cheap = (arch_of(decisions(eta=0.0, divide={"mlp": d})[0].model) for d in (1.0, 1e3))
    assert sum(block.mlp for block in cheap.blocks) < sum(block.mlp for block in plain.blocks)
    params = decisions(measure=PARAMS)[0]
    assert params.cost == cost(arch_of(params.model)).params <= params.budget
    assert decisions(schedule="reference")[0].cut != decisions()[0].cut


def test_impossible_settings_are_refused() -> None:
    for settings, message in (
        ({"budgets": []}, "budgets = .*: must be at least one, all above 0"),
        ({"budgets": [5, 0]}, "budgets = "),
        ({"eta": -1.0}, "eta = -1.0: must be at least 0"),
        ({"eta_unit": "seconds"}, "eta_unit = 'seconds': must be one of relative, absolute"),
        ({"interval": 0}, "interval = 0: must be at least 1 optimizer step"),
        ({"groups_per_step": 0}, "groups_per_step = 0"),
        ({"schedule": "greedy"}, "schedule = 'greedy': must be one of live, reference"),
        ({"layer_norm": "none"}, "layer_norm = 'none': must be one of kept, full"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"divide": {"neck": 2.0}}, "divide = .*must be numbers above 0 for some of embed, heads"),
    ):
        with pytest.raises(UserError, match=message):
            NViTPruning(**({"budgets": [1]} | settings))


def test_models_that_cannot_be_served_are_refused() -> None:
    arch = random_arch(Random(0), "pvt_v2")
    with pytest.raises(
        UserError, match="of family 'pvt_v2': NViT prunes families vit, eva, beit, diff, cait, xcit, swin, swin_v2"
    ):
        NViTPruning([1.0]).wrap(build(arch))
    arch = vit()
    for budgets in ([cost(arch).macs], [least(arch) - 1, least(arch)]):
        with pytest.raises(UserError, match=f"must lie below .* and not below {least(arch):.6g}"):
            NViTPruning(budgets, groups=GROUPS).wrap(build(arch))


def test_the_first_interval_does_not_distil() -> None:
    model = random_model(vit(), 0)
    terms = {"loss": torch.tensor(5.0), "task_loss": torch.tensor(2.0), "kd_loss": torch.tensor(3.0)}
    hook = NViTPruning([least(vit())], groups=GROUPS, interval=1)
    hook.wrap(model)
    assert hook.loss(terms) == 2
    assert hook.loss({"loss": torch.tensor(5.0), "output": torch.zeros(1)}) == 5
    assert NViTPruning([1.0], distill_first=True).loss(terms) == 5
    next(train(model, hook))
    assert hook.loss(terms) == 5


@pytest.mark.parametrize("once_pruned", [True, False])
def test_stochastic_depth_ends_with_the_first_pruning_if_asked(once_pruned: bool) -> None:
    model = random_model(vit(), 0).train()
    hook = NViTPruning(ladder(vit(), 0.0), groups=GROUPS, interval=2, groups_per_step=1, eval_once_pruned=once_pruned)
    hook.wrap(model)
    modes = []
    for _ in train(model, hook):
        modes.append(model.training)
        if len(modes) in (1, 4):  # an epoch ends
            model.train()
            hook.start_epoch()
    assert modes == [True] + [not once_pruned] * (len(modes) - 1)
    assert len(modes) > 6


def prune_on_rank(rank: int, folder: str, ranks: int) -> None:
    """Train on this rank's share of every batch; from rank 1 on, with a saliency that is wrong."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    arch = vit(width=16, mlp=24)
    model = random_model(arch, 2)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, eta=0.0, divide={"mlp": 100.0} if rank else {})
    hook.wrap(model)
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        x = random_images(arch, step, batch=8)
        y = torch.arange(8) % arch.num_classes
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[own]), y[own]).backward()
        hook.after_backward()
        optimizer.step()
        hook.after_step()
        if hook.done:
            break
    save_file({name: mask.to(torch.uint8) for name, mask in hook.keep.items()}, f"{folder}/{rank}-of-{ranks}")
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_decide_as_one_process_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(prune_on_rank, args=(str(tmp_path), 2), nprocs=2)
    prune_on_rank(0, str(tmp_path), 1)
    alone, *ranks = (load_file(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert not all(mask.all() for mask in alone.values())
    for keep in ranks:
        assert all(torch.equal(keep[name], mask) for name, mask in alone.items())


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


def digits_model(seed: int = 0) -> nn.Module:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with seeded(seed):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
    return model


RECIPE = Recipe(epochs=30, batch_size=64, lr=3e-3, drop_path=0.1, distill=(Distill(weight=0.1),))


def digits_hook(arch: Arch, **settings) -> NViTPruning:
    """An interval that no epoch of 22 steps is a multiple of."""
    groups = {"embed": 2, "heads": 1, "qk": 4, "v": 4, "mlp": 8}
    budgets = [0.75 * cost(arch).macs, 0.5 * cost(arch).macs]
    return NViTPruning(budgets, groups=groups, groups_per_step=1, interval=5, **settings)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_training_run_gives_a_ladder_and_may_be_interrupted(digits, tmp_path: Path) -> None:
    arch, teacher = arch_of(digits_model()), digits_model(5)
    whole, hook, epochs = digits_model(), digits_hook(arch), []
    assert fit(whole, digits, RECIPE, teacher=teacher, hook=hook, seed=2, on_epoch=epochs.append)
    assert 2 < len(epochs) < RECIPE.epochs  # the last budget ends it
    snapshots = hook.finish()
    assert [s.budget for s in snapshots] == [0.75 * cost(arch).macs, 0.5 * cost(arch).macs]
    for snapshot in snapshots:
        assert cost(arch_of(snapshot.model)).macs == snapshot.cost <= snapshot.budget
        assert arch_of(snapshot.model) == cut_arch(arch, snapshot.cut)
    assert snapshots[0].step < snapshots[1].step
    assert epochs[-1].loss < epochs[0].loss

    state = tmp_path / "state.safetensors"
    done, times = False, 0
    while not done:  # cut off after every epoch; a resumed model's own weights do not matter
        model, again = digits_model(times), digits_hook(arch)
        done = fit(model, digits, RECIPE, teacher=teacher, hook=again, seed=2, state=state, should_stop=lambda: True)
        times += 1
    assert times == len(epochs)
    model, after = digits_model(8), digits_hook(arch)  # all is done: nothing but reading remains
    assert fit(model, digits, RECIPE, teacher=teacher, hook=after, seed=2, state=state)
    for resumed in (again.finish(), after.finish()):
        for ours, theirs in zip(snapshots, resumed, strict=True):
            assert (ours.budget, ours.cost, ours.step) == (theirs.budget, theirs.cost, theirs.step)
            assert ours.cut == theirs.cut
            assert equal(ours.model, theirs.model)
    assert equal(whole, model)
    with pytest.raises(UserError, match="the run to go on with has"):
        fit(digits_model(), digits, RECIPE, teacher=teacher, hook=NViTPruning([2e5]), state=state)
