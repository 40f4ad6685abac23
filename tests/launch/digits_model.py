"""A saved model of random weights that fits the digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from prunesweep.models import build, save
from tests.pruners.subspaces.test_compress import vit


def digits_model(path: Path) -> Path:
    """Save a ViT of two blocks."""
    arch = vit(width=16, depth=2)
    stage = dataclasses.replace(arch.stages[0], grid=(4, 4))
    shape = {"img_size": (8, 8), "patch_size": (2, 2), "in_chans": 1, "num_classes": 10}
    torch.manual_seed(0)
    return save(build(dataclasses.replace(arch, stages=(stage,), **shape)), path)
