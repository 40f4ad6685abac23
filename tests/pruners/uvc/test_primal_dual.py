from __future__ import annotations

import pytest
import torch

from prunesweep.pruners.uvc.control import NormalizedPrimalDual
from prunesweep.pruners.uvc.primal_dual import Norms, PrimalDual, keep_weight, least_sum, next_least, weakest
from prunesweep.pruners.uvc.resource import Resource
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.pruners.nvit.test_schedule import vit


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_counts_round_up_and_of_equals_the_first_goes() -> None:
    values = vector(3, 1, 2, 1)
    assert weakest(values, vector(0)[0]).tolist() == [False] * 4
    assert weakest(values, vector(0.1)[0]).tolist() == [False, True, False, False]
    assert weakest(values, vector(2.0)[0]).tolist() == [False, True, False, True]
    assert [least_sum(values, vector(k)[0]).item() for k in (0, 0.5, 2, 2.5, 9)] == [0, 1, 2, 4, 7]
    assert [next_least(values, vector(k)[0]).item() for k in (0, 0.5, 1.5, 3, 4, 9)] == [1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["gumbel", "soft_l0"])
def test_slopes_of_the_keep_weight(kind: str) -> None:
    gates = torch.tensor([[-0.3, 0.8], [0.5, -0.2]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.1, -0.4], [1.0, 0.3]], dtype=torch.float64)
    weight, slopes = keep_weight(gates, noise, kind, 0.1)
    (want,) = torch.autograd.grad(weight.sum(), gates)
    torch.testing.assert_close(slopes.detach(), want)
    hard, same = keep_weight(gates, noise, "gumbel", 0.1, hard=True)
    assert hard.tolist() == [1, 0]
    if kind == "gumbel":
        torch.testing.assert_close(same, slopes)


def random_norms(arch, seed: int = 0) -> Norms:
    generator = torch.Generator().manual_seed(seed)
    block, L = arch.blocks[0], arch.depth
    columns = torch.rand(L, block.heads, block.qk, generator=generator, dtype=torch.float64)
    return Norms(columns + 0.1, torch.rand(L, block.mlp, generator=generator, dtype=torch.float64) + 0.1)


def reference(**settings) -> tuple[PrimalDual, Norms]:
    arch = vit(width=16, mlp=24)
    base = {"steps": "reference", "resource": "paper", "warmup_epochs": 0, "slr": 0.5, "rlr": 0.5, "glr": 0.1}
    return PrimalDual(Resource.of(arch, "paper"), UVCSettings(**(base | settings))), random_norms(arch)


NOISE, NO_TASK = torch.zeros(3, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)


def test_the_schedule_of_the_budgets_multiplier_is_applied() -> None:
    """The released code has one, too, and never applies it."""
    machine, norms = reference(zlr=(1.0, 5.0, 9.0), zlr_epochs=2)
    rates = []
    for _ in range(8):
        machine.start_epoch()
        rates.append(machine.zlr)
    assert rates == [1, 1, 5, 5, 9, 9, 9, 9]
    before, machine.z = machine.z, machine.z * 0
    machine.update(norms, NO_TASK, NOISE)
    assert before > 0
    used = machine.resource(
        machine.s,
        machine.r,
        keep_weight(machine.gates, NOISE[2], "gumbel", 0)[0],
        weakest(norms.heads, machine.s[:, 0]),
    )
    assert machine.z.item() == pytest.approx(9 * (used.value - 0.5), rel=1e-12)


def test_outside_of_the_band_macs_do_not_push() -> None:
    """From 1 to a budget of 0.3 the published band of 0.5 never lets anything start."""
    for band, starts in ((0.5, False), (0.7, True), (None, True)):
        machine, norms = reference(budgets=(0.3,), resource_band=band, z_init=50.0, skip="11")
        machine.runs = torch.tensor([True, True])
        machine.update(norms, NO_TASK, NOISE)
        assert bool((machine.s > 0).any()) == starts


@pytest.mark.parametrize("sticky", [False, True])
def test_the_upper_bound(sticky: bool) -> None:
    machine, norms = reference(sticky_upper_bound=sticky, z_init=1e4, slr=30.0)
    machine.update(norms, NO_TASK, NOISE)
    assert bool((machine.s > machine.s_max).any()) == sticky  # the original overshoots for a step,
    for _ in range(3):
        machine.z.zero_()
        machine.y.fill_(1e3)
        machine.update(norms, NO_TASK, NOISE)
    assert bool((machine.s == machine.s_max).any()) == sticky  # and then never leaves the bound


def test_soft_l0_decides_by_its_weight() -> None:
    """Its skip logit never moves, so that the larger logit would always be the one that keeps."""
    machine, _ = reference(gates="soft_l0")
    machine.gates = torch.tensor([[-1, 0.2], [-1, 0.9]], dtype=torch.float64)
    assert machine.decided.tolist() == [False, True]


def test_gates_step_once_per_interval_and_an_epoch_drops_what_was_gathered() -> None:
    for weighting, want in (("mean", 1.0), ("rising", (0 + 1 + 2) / 3)):
        machine, norms = reference(gating_interval=3, gate_weighting=weighting, gating_weight=0.0)
        start, task = machine.gates.clone(), torch.full((2, 2), 0.5, dtype=torch.float64)
        machine.update(norms, task * 100, NOISE)
        machine.step = 2
        machine.start_epoch()
        for step in (3, 4, 5):
            assert torch.equal(machine.gates, start)
            machine.step = step
            if step == 5:  # (t + 1) mod 3
                machine.update(norms, task, NOISE)
                break
            machine.pending += task * (step % 3 if weighting == "rising" else 1)
            machine.collected += 1
        step_size = 0.1 * (0.5 * want + 1e-4 * start)
        torch.testing.assert_close(machine.gates, start - step_size)


def controlled(
    seed: int, depth: int = 6, ramp: int = 100, **settings
) -> tuple[NormalizedPrimalDual, list[float], Norms]:
    """Shrinks random norms and lets gates see random gains; R after every step."""
    arch = vit(depth=depth, width=32, heads=4, head=8, mlp=64)
    machine = NormalizedPrimalDual(Resource.of(arch, "exact"), UVCSettings(ramp_steps=ramp, **settings))
    norms, generator = random_norms(arch, seed), torch.Generator().manual_seed(seed)
    gains = torch.rand(depth, generator=generator, dtype=torch.float64)
    found = []
    for step in range(2 * ramp):
        noise = -torch.log(-torch.log(torch.rand(3, depth, 2, generator=generator, dtype=torch.float64)))
        slope = keep_weight(machine.gates, noise[0], "gumbel", 0)[1]
        noisy = gains + 0.3 * torch.randn(depth, generator=generator, dtype=torch.float64)
        machine.step = step
        norms = norms.scaled(*machine.shrink(norms, machine.eta))
        machine.update(norms, -noisy[:, None] * slope, noise)
        found.append(machine.usage(norms).value)
    return machine, found, norms


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_steps_arrive_at_the_budget_and_stay_there(budget: float, seed: int) -> None:
    machine, found, norms = controlled(seed, budgets=(budget,))
    assert machine.settled
    assert budget - 0.01 <= found[-1] <= budget + 0.0216  # a head; the hook decides the rest to the unit
    assert min(found) >= budget - 0.01 - 1e-9  # no overshoot
    ended = len(found) * 1.25 / 2  # of the ramp
    assert len(set(found[int(ended) :])) == 1  # and no swinging
    gone = weakest(norms.mlp, machine.s[:, 1]) & machine.decided[:, None]
    assert gone.any()
    assert (norms.mlp[gone] < 1e-2).all()  # what goes has been shrunk away


def test_a_larger_gating_weight_skips_more_blocks() -> None:
    none, some = (
        int((~controlled(0, ramp=80, gating_weight=weight, gating_interval=10)[0].decided).sum())
        for weight in (0.0, 4.0)
    )
    assert none == 0 < some < 4  # never more than leaves the budget to be reached


def test_the_state_of_either_machine_is_all_of_it() -> None:
    for make in (lambda: controlled(0, ramp=60)[0], lambda: reference()[0]):
        machine = make()
        fresh = type(machine)(machine.resource, machine.settings)
        fresh.load_state_dict(machine.state_dict())
        norms = random_norms(
            vit(len(machine.s), 32, machine.resource.num_heads, machine.resource.head_dim, machine.resource.hidden)
        )
        noise = torch.randn(3, len(machine.s), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for own in (machine, fresh):
            own.start_epoch()
            own.step += 1
            own.update(norms, noise[0] * 0.01, noise)
        for name, value in machine.state_dict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state_dict()[name])), name
