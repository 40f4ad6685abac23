from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, build, cost, num_params
from prunesweep.models.counting import block_cost
from tests.generate import FAMILIES, random_arch, random_images


def counted_macs(model: torch.nn.Module, arch: Arch) -> int:
    return counted(model, random_images(arch, 0, batch=1, dtype=torch.float32))


def counted(model: torch.nn.Module, x: torch.Tensor) -> int:
    """MACs of one forward pass. Before torch 2.15 the counter does not see the CPU's own kernel of attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tens", range(30))
def test_formula_equals_counting(family: str, tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        arch = random_arch(Random(seed), family)
        model = build(arch).eval()
        found = cost(arch)
        assert (found.params, found.macs) == (num_params(model), counted_macs(model, arch)), arch.to_json()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_is_the_sum_of_its_blocks(family: str) -> None:
    arch = random_arch(Random(7), family)
    blocks = [block_cost(arch, stage, block) for stage in arch.stages for block in stage.blocks]
    stages = tuple(dataclasses.replace(stage, blocks=()) for stage in arch.stages)
    rest = cost(dataclasses.replace(arch, stages=stages))
    assert cost(arch).macs == rest.macs + sum(block.macs for block in blocks)
    assert cost(arch).params == rest.params + sum(block.params for block in blocks)


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [  # as NViT, UP-ViT and SPViT count them
        ("deit_base_patch16_224", 17_563_828_224, 86_567_656),
        ("deit_base_distilled_patch16_224", 17_656_811_520, 87_338_192),
        ("deit_small_patch16_224", 4_598_882_304, 22_050_664),
        ("deit_tiny_patch16_224", 1_253_683_200, 5_717_416),
        ("swin_tiny_patch4_window7_224", 4_490_566_656, 28_288_354),
        ("pvt_v2_b1", 2_108_355_584, 14_009_000),
    ],
)
def test_published_models(name: str, macs: int, params: int) -> None:
    found = cost(Arch.from_timm(name))
    assert found.params == params
    assert found.macs == macs
