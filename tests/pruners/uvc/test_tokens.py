"""Token gates: patches that leave all blocks while UVC trains."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, build, cost, cut_arch, load, save
from prunesweep.pruners.uvc.primal_dual import TOKEN_START, PrimalDual
from prunesweep.pruners.uvc.resource import Resource
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.generate import random_images, random_model
from tests.oracle import hooks_of
from tests.pruners.uvc import test_hook as small
from tests.pruners.uvc.test_hook import hook, pyramid, step, unit
from tests.pruners.uvc.test_primal_dual import random_norms


def of_sixteen(arch: Arch) -> Arch:
    """The same on 4 x 4 patches."""
    (stage,) = arch.stages
    return dataclasses.replace(arch, img_size=(8, 8), stages=(dataclasses.replace(stage, grid=(4, 4)),))


ARCH, ROTARY = of_sixteen(small.ARCH), of_sixteen(small.ROTARY)
GATED = {"token_gates": True, "token_weight": 3.0}  # so that patches go on images of noise, too
PATCHES = ARCH.tokens - ARCH.prefix_tokens
AVERAGED = dataclasses.replace(ARCH, class_token=False, pool="avg")


def wrapped(arch: Arch = ARCH, **settings):
    return small.wrapped(arch, **settings)


def with_tokens(arch: Arch, tokens: int) -> Arch:
    stages = [
        dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, tokens=tokens) for b in s.blocks))
        for s in arch.stages
    ]
    return dataclasses.replace(arch, stages=tuple(stages))


def patches_of(decision) -> list[int]:
    """The patches that stay, the same in every block that is left."""
    plans = {choice.tokens for choice in decision.blocks if choice.keep}
    (plan,) = plans
    return [j - ARCH.prefix_tokens for j in range(ARCH.prefix_tokens, ARCH.tokens) if plan.assign[j] >= 0]


@pytest.mark.parametrize("arch", [ARCH, ROTARY], ids=lambda arch: arch.family)
def test_macs_at_any_number_of_tokens_are_those_of_the_record(arch: Arch) -> None:
    resource = Resource.of(arch, "exact", tokens=True)
    s, r = torch.zeros(arch.depth, 2).double(), torch.zeros(arch.depth, resource.num_heads).double()
    gone, pi = torch.zeros(arch.depth, resource.num_heads, dtype=torch.bool), torch.ones(arch.depth).double()
    for tokens in (2, 5, arch.tokens):
        used = resource(s, r, pi, gone, tokens)
        assert used.value == pytest.approx(cost(with_tokens(arch, tokens)).macs / cost(arch).macs, rel=1e-12)
        above, below = (resource(s, r, pi, gone, tokens + by).value for by in (0.5, -0.5))
        assert used.tokens == pytest.approx(above - below, rel=1e-12)  # of a parabola exactly
    assert resource(s, r, pi, gone, arch.tokens).value == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("arch", [ARCH, ROTARY, AVERAGED], ids=["token", "rotary", "averaged"])
def test_evaluation_is_the_cut_model_with_its_plan(arch: Arch, tmp_path: Path) -> None:
    model, own, optimizer = wrapped(arch, budgets=(0.7, 0.45), **GATED)
    before = random_model(arch, 0)
    for t in range(55):
        step(model, own, optimizer, t)
    assert own.machine.settled
    x = random_images(arch, 1000)
    with torch.no_grad():
        evaluated = model.eval()(x)
    shown = dict(own.facts)
    first, last = own.finish()
    record = arch_of(last.model)
    assert record == cut_arch(arch, last.cut)
    assert {block.tokens for block in record.blocks} == {shown["tokens"]}
    assert arch.prefix_tokens < shown["tokens"] < arch.tokens
    assert last.cost == cost(record).macs == round(shown["macs"] * cost(arch).macs)
    for found in (first, last):
        assert found.budget - unit(arch) < found.cost <= found.budget
    with torch.no_grad():
        torch.testing.assert_close(evaluated, last.model(x), rtol=0, atol=1e-10)
    save(last.model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model").double()(x.float().double()), last.model(x.float().double()))
    assert list(model.state_dict()) == list(before.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(getattr(block, "token_merge", None) is None for block in model.blocks)
    assert hooks_of(model) == []


def test_patches_that_are_gone_are_gone_in_training_too() -> None:
    """Nothing of their pixels reaches the answer, before the decisions are final and after."""
    model, own, optimizer = wrapped(budgets=(0.4,), **GATED, skip="111")
    for t in range(55):
        step(model, own, optimizer, t)
        if t in (30, 54):
            gone = (~own.machine.patches).nonzero()[:, 0].tolist()
            assert gone
            assert own.machine.settled == (t == 54)
            x = random_images(ARCH, 1000)
            changed, columns, (p, q) = x.clone(), ARCH.stages[0].grid[1], ARCH.patch_size
            for patch in gone:
                row, column = divmod(patch, columns)
                changed[..., row * p : (row + 1) * p, column * q : (column + 1) * q] += 1
            with torch.no_grad():
                assert torch.equal(model(x), model(changed))
                assert not torch.equal(model(x), model(x + 1))
    (snapshot,) = own.finish()
    assert patches_of(snapshot.cut) == [j for j in range(PATCHES) if j not in gone]


def test_factors_of_open_gates_act_before_positions_are_added() -> None:
    model, own, _ = wrapped(**GATED, skip="111")
    own.machine.token_gates[3] = 0.4
    own._set_control()
    plain, x = random_model(ARCH, 0).train(), random_images(ARCH, 5)
    factor = torch.full((PATCHES, 1), TOKEN_START).double().sigmoid()
    factor[3] = torch.tensor(0.4, dtype=torch.float64).sigmoid()
    plain.patch_embed.register_forward_hook(lambda _m, _x, y: y * factor)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.eval()(x), random_model(ARCH, 0)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("when", [8, 30, 50])
def test_a_run_with_token_gates_goes_on_from_any_step(when: int) -> None:
    given = {"budgets": (0.8, 0.45), **GATED}
    model, own, optimizer = wrapped(**given)
    for t in range(when):
        step(model, own, optimizer, t)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), own.state_dict()))
    other, again, second = wrapped(seed=7, **given)
    for part, saved in zip((other, second, again), state, strict=True):
        part.load_state_dict(saved)
    assert again.facts == own.facts
    for t in range(when, when + 5):
        step(model, own, optimizer, t)
        step(other, again, second, t)
    assert torch.equal(own.machine.token_gates, again.machine.token_gates)
    assert not torch.equal(own.machine.token_gates, torch.full_like(own.machine.token_gates, TOKEN_START))
    for ours, theirs in zip(own.finish(), again.finish(), strict=True):
        assert (ours.cut, ours.cost, ours.step) == (theirs.cut, theirs.cost, theirs.step)
        assert all(torch.equal(v, theirs.model.state_dict()[k]) for k, v in ours.model.state_dict().items())


def test_budgets_below_the_narrowest_blocks_take_patches() -> None:
    with pytest.raises(UserError, match="at their narrowest have"):
        hook(skip="111", budgets=(0.11,)).wrap(build(ARCH))
    model, own, optimizer = wrapped(skip="111", budgets=(0.11,), token_gates=True)
    step(model, own, optimizer, 0)
    (snapshot,) = own.finish()
    assert snapshot.cost <= snapshot.budget
    assert len(patches_of(snapshot.cut)) < PATCHES
    with pytest.raises(UserError, match="at their narrowest have"):
        hook(skip="111", budgets=(0.005,), token_gates=True).wrap(build(ARCH))


def test_reference_steps_are_the_definition() -> None:
    """q <- q - lr (dl/dq + (weight z dR/dN + l1) dN/dq), and z rises by R at the sum of the gates' keep weights."""
    settings = UVCSettings(steps="reference", token_gates=True, token_weight=5, token_l1=0.01, skip="111", z_init=2)
    machine = PrimalDual(Resource.of(ARCH, "paper", tokens=True), settings, torch.ones(3, dtype=torch.bool))
    norms, task = random_norms(ARCH, 0), torch.linspace(-1, 1, PATCHES).double()
    q = machine.token_gates.clone().requires_grad_()
    kept, z = q.sigmoid().sum(), float(machine.z)
    C, M, N = ARCH.stages[0].width, ARCH.blocks[0].mlp, ARCH.prefix_tokens + kept

    def macs(n):
        return 3 * (4 * n * C * C + 2 * n * n * C + 2 * n * C * M)

    E = PATCHES * C * ARCH.in_chans * ARCH.patch_size[0] * ARCH.patch_size[1]
    total = E + macs(ARCH.tokens)
    (slope,) = torch.autograd.grad(5 * z * (E + macs(N)) / total + 0.01 * kept, q)
    machine.update(norms, torch.zeros(3, 2).double(), torch.zeros(3, 3, 2).double(), task)
    want = q.detach() - 0.01 * (task + slope)
    torch.testing.assert_close(machine.token_gates, want, rtol=1e-12, atol=0)
    assert machine.resource_used == pytest.approx(float((E + macs(N.detach())) / total), rel=1e-12)


def test_what_cannot_gate_tokens_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"token_gates = True: small is of family 'swin', .* families vit, eva.*; it la"
    ):
        hook(token_gates=True).wrap(build(pyramid("swin")))
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    for option, message in (({"patch_drop_rate": 0.5}, "at random"), ({"dynamic_img_size": True}, "one grid")):
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", **tiny, **option)
        with pytest.raises(UserError, match=message):
            hook(token_gates=True).wrap(model)


def test_a_state_from_before_there_were_token_gates_is_gone_on_with() -> None:
    model, own, optimizer = wrapped()
    step(model, own, optimizer, 0)
    state = own.state_dict()
    state["settings"] = json.dumps({k: v for k, v in json.loads(state["settings"]).items() if "token" not in k})
    _, again, _ = wrapped()
    again.load_state_dict(state)
    assert torch.equal(again.machine.s, own.machine.s)
    with pytest.raises(UserError, match="the run to go on with has the settings"):
        wrapped(**GATED)[1].load_state_dict(state)
