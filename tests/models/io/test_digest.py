from __future__ import annotations

from random import Random

import pytest
import torch

from prunesweep.models import weights_digest
from tests.generate import FAMILIES, random_arch, random_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_digest_names_the_weights(family: str) -> None:
    arch = random_arch(Random(3), family)
    model = random_model(arch, 0)
    assert weights_digest(model) == weights_digest(random_model(arch, 0))
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert weights_digest(model) != weights_digest(random_model(arch, 0))


def test_statistics_count_too() -> None:
    arch = next(a for a in (random_arch(Random(s)) for s in range(30)) if any(b.conv_kernel for b in a.blocks))
    model = random_model(arch, 0)
    before = weights_digest(model)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # a tensor without dimensions
            buffer += 1
    assert weights_digest(model) != before
