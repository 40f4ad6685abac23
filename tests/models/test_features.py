from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import Arch, Stage, UserError, arch_of, build, cut
from prunesweep.models.features import features
from prunesweep.pruners import pmvit
from tests.generate import random_arch, random_images, random_model
from tests.models.test_fuse import planned


@pytest.mark.parametrize("seed", range(12))
def test_features_are_the_patches_of_the_dense_output(seed: int) -> None:
    """Any prefix tokens, mixers, norms and plans."""
    arch = random_arch(Random(seed), "vit")
    model, x = random_model(arch, seed), random_images(arch, seed)
    (rows, columns), width = arch.stages[0].grid, arch.stages[0].width
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: outputs.append(y))
    with torch.no_grad():
        last = model.forward_features(x)[:, arch.prefix_tokens :]
        want = [y[:, arch.prefix_tokens :] for y in outputs]
        for block, tokens in ((None, last), *enumerate(want)):
            found = features(model, x, block)
            assert found.shape == (len(x), rows, columns, width)
            for r in range(rows):
                for c in range(columns):
                    assert torch.equal(found[:, r, c], tokens[:, r * columns + c])


def test_impossible_questions_are_refused() -> None:
    arch = planned(5, None)
    model, x = random_model(arch, 0), random_images(arch, 0)
    for block in (-1, 2):
        with pytest.raises(UserError, match=f"block = {block}: test has blocks 0..1"):
            features(model, x, block)
    swin = random_arch(Random(0), "swin")
    with pytest.raises(UserError, match="is of family 'swin'"):
        features(random_model(swin, 0), random_images(swin, 0))


def squares(arch: Arch, images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright patch; every patch's label is the quadrant in which the bright one is."""
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), (side, _) = arch.stages[0].grid, arch.patch_size
    x = 0.3 * torch.randn(images, arch.in_chans, *arch.img_size, generator=generator)
    row, column = (torch.randint(n, (images,), generator=generator) for n in (rows, columns))
    for i in range(images):
        x[i, :, row[i] * side :, column[i] * side :][:, :side, :side] += 3
    quadrant = 2 * (row >= rows // 2) + (column >= columns // 2)
    return x, quadrant[:, None, None].expand(-1, rows, columns)


def test_a_segmentation_head_on_a_planned_model_learns_every_patch() -> None:
    """A patch has to know of the others: what a plan merges or lets pass still gets there, and back to its place."""
    wide = {"heads": 2, "qk": 16, "v": 16, "scale": 0.25, "mlp": 64}
    arch = planned(None, None, img_size=(8, 8), class_token=False, pool="avg", num_classes=4)
    blocks = tuple(dataclasses.replace(block, **wide) for block in arch.blocks)
    arch = dataclasses.replace(arch, stages=(Stage(width=32, grid=(4, 4), blocks=blocks),))
    torch.manual_seed(0)
    model = build(arch)
    small = cut(model, pmvit.plan(arch, pmvit.score(model, [], importance="random", seed=1), 0.4, prune_rate=0.25))
    assert [block.tokens for block in arch_of(small).blocks] == [6, 6]
    head = nn.Linear(32, 4)
    optimizer = torch.optim.AdamW([*small.parameters(), *head.parameters()], lr=1e-2)
    for step in range(120):
        x, y = squares(arch, 32, step)
        loss = F.cross_entropy(head(features(small, x)).flatten(0, 2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = squares(arch, 256, 10**6)
    with torch.no_grad():
        right = (head(features(small.eval(), x)).argmax(-1) == y).float().mean((0,))
    assert right.mean() > 0.8, f"{right.mean():.2f} of all patches are right; by chance it is 0.25"
    assert right.min() > 0.6, "a patch of the grid has not learnt"
