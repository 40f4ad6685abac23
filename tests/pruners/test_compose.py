"""Decisions of two methods, one after the other in any order: models that can be built, with exactly their cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, BlockCut, Cut, UserError, arch_of, cost, cut, num_params
from prunesweep.pruners import GROUP_SIZES, Scores, pmvit, vector_sizes, width_path
from tests.generate import random_images, random_model

GROUPS = dict.fromkeys(GROUP_SIZES, 2)


def source() -> Arch:
    import timm

    shape = {"img_size": 24, "patch_size": 6, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return Arch.from_timm(timm.create_model("deit_tiny_patch16_224", **shape))


def width(arch: Arch, random: Random) -> Cut:
    """As NViT: least saliency per MAC, to 0.8 of what there is."""
    generator = torch.Generator().manual_seed(random.randrange(1000))
    sizes = vector_sizes(arch, ("embed", "heads", "qk", "v", "mlp"))
    vectors = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    path = width_path(arch, Scores(vectors), groups=GROUPS)
    return path.cut(path.step_for(0.8 * cost(arch).macs))


def convolutions(arch: Arch, random: Random) -> Cut:
    """As SPViT: another mixer for some blocks that have attention, and fewer hidden units."""
    new = [random.choice([None, "conv1x1", "conv3x3", "none"]) if b.mixer == "attn" else None for b in arch.blocks]
    units = [tuple(range(0, b.mlp, 2)) for b in arch.blocks]
    return Cut(blocks=tuple(BlockCut(mixer=mixer, mlp=own) for mixer, own in zip(new, units, strict=True)))


def tokens(arch: Arch, random: Random) -> Cut:
    """As Prune-and-Merge, in every block that has attention and no plan yet."""
    patches = arch.tokens - arch.prefix_tokens
    generator = torch.Generator().manual_seed(random.randrange(1000))
    scores = {f"blocks.{i}.tokens": torch.rand(patches, generator=generator).double() for i in range(arch.depth)}
    return pmvit.plan(arch, Scores(scores), 0.6)


def uvc(arch: Arch, random: Random) -> Cut:
    """As UVC: a block skipped, ragged value widths, hidden units."""
    choices = []
    for i, block in enumerate(arch.blocks):
        if block.mixer != "attn":
            choices.append(BlockCut(keep=i != 1))
            continue
        starts = [sum(block.v_widths[:h]) for h in range(block.heads)]
        v = tuple(tuple(range(s, s + random.randint(1, w))) for s, w in zip(starts, block.v_widths, strict=True))
        qk = tuple(tuple(range(h * block.qk, (h + 1) * block.qk)) for h in range(block.heads))
        choices.append(BlockCut(keep=i != 1, qk=qk, v=v, mlp=tuple(range(0, block.mlp, 3))))
    return Cut(blocks=tuple(choices))


METHODS: dict[str, Callable[[Arch, Random], Cut]] = {
    "width": width,
    "convolutions": convolutions,
    "tokens": tokens,
    "uvc": uvc,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pair", list(permutations(METHODS, 2)), ids=" then ".join)
def test_two_methods_in_any_order(pair: tuple[str, str], seed: int) -> None:
    arch, random = source(), Random(seed)
    model = random_model(arch, seed)
    x = random_images(arch, seed)
    for name in pair:
        before = arch_of(model)
        if name == "width" and any(isinstance(block.v, tuple) for block in before.blocks):
            with pytest.raises(UserError, match="scores need equal widths in all heads"):
                METHODS[name](before, random)
            return
        model = cut(model, METHODS[name](before, random))
    small = arch_of(model)
    assert num_params(model) == cost(small).params
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(x[:1])
    assert counter.get_total_flops() // 2 == cost(small).macs < cost(arch).macs
    assert logits.isfinite().all()
    model.train()(x).sum().backward()  # and it trains
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
