from __future__ import annotations

from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Arch, build, cost, num_params
from tests.generate import random_arch, random_images


def counted_macs(model: torch.nn.Module, arch: Arch) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(arch, 0, batch=1, dtype=torch.float32))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("seed", range(60))
def test_formula_equals_counting(seed: int) -> None:
    arch = random_arch(Random(seed))
    model = build(arch).eval()
    assert cost(arch).params == num_params(model)
    assert cost(arch).macs == counted_macs(model, arch)


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [  # the tables of NViT, UP-ViT and UVC (which leaves the classifier out)
        ("deit_base_patch16_224", 17_563_828_224, 86_567_656),
        ("deit_base_distilled_patch16_224", 17_656_811_520, 87_338_192),
        ("deit_small_patch16_224", 4_598_882_304, 22_050_664),
        ("deit_tiny_patch16_224", 1_253_683_200, 5_717_416),
    ],
)
def test_published_models(name: str, macs: int, params: int) -> None:
    found = cost(Arch.from_timm(name))
    assert found.params == params
    assert found.macs == macs
