"""A model family from outside the package: what one must write to add one, in the smallest form."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import ClassVar

import torch
from timm.layers import LayerNorm
from torch import nn

from prunesweep.models import Arch, Cost, Stage
from prunesweep.models.families import Family
from prunesweep.models.families.spaces import BLOCK, Table, linear, per_channel
from prunesweep.models.families.vit import HeteroBlock
from tests.generate import random_block


class ToyNet(nn.Module):
    """Patches by a convolution called ``stem``, blocks, a norm, the average, a classifier called ``classify``."""

    def __init__(self, arch: Arch, drop_path: float) -> None:
        super().__init__()
        (stage,) = arch.stages
        norm_layer = partial(LayerNorm, eps=arch.norm_eps)
        self.num_classes, self.num_features = arch.num_classes, stage.width  # timm stores both
        self.stem = nn.Conv2d(arch.in_chans, stage.width, arch.patch_size, stride=arch.patch_size)
        self.blocks = nn.ModuleList(
            HeteroBlock(arch, block, drop_path=drop_path, norm_layer=norm_layer) for block in stage.blocks
        )
        self.last = norm_layer(stage.width)
        self.classify = nn.Linear(stage.width, arch.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images B·C·H·W to logits B·K."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.classify(self.last(x).mean(1))


class ToyFamily(Family):
    """A ViT without positions, class token and convolutions."""

    name = "toy"
    capabilities = frozenset({"images", "width", "depth", "mixed_heads"})
    single_stage = True
    fixed_fields: ClassVar = {"class_token": False, "dist_token": False, "reg_tokens": 0, "pool": "avg"}
    first_conv = "stem"
    block_tensors = BLOCK
    outer_tensors: ClassVar[Table] = {
        **linear("stem", "in", ""),
        **per_channel("last", "out"),
        **linear("classify", "", "out"),
    }

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> ToyNet:
        return ToyNet(arch, drop_path)

    def classifiers(self, arch: Arch) -> str:
        return "classify"

    def outside_cost(self, arch: Arch) -> Cost:
        (stage,) = arch.stages
        pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
        macs = stage.grid[0] * stage.grid[1] * pixels * stage.width + stage.width * arch.num_classes
        return Cost(macs, stage.width * (pixels + 3) + (stage.width + 1) * arch.num_classes)


def toy_arch(random: Random, ragged: bool = True, missing: bool = True, extras: bool = False) -> Arch:
    """A random record of the toy family."""
    depth, width = random.randint(2, 3), random.randint(4, 12)
    blocks = tuple(random_block(random, i, ragged=ragged, missing=missing, extras=False) for i in range(depth))
    return Arch(
        family="toy",
        source="toy",
        img_size=(6, 8),
        patch_size=(2, 2),
        in_chans=3,
        num_classes=5,
        stages=(Stage(width=width, grid=(3, 4), blocks=blocks),),
        class_token=False,
        pool="avg",
    )
