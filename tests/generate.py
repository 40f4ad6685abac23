"""Random records, models and cuts for property tests; every draw follows from the Random that is passed in."""

from __future__ import annotations

from random import Random

import torch
from torch import nn

from models import Arch, Block, BlockCut, Cut, Stage, build


def random_block(random: Random, index: int, *, ragged: bool = True, missing: bool = True) -> Block:
    mlp = random.choice([0, 5, 16, 33] if missing else [5, 16, 33])
    if missing and mlp and random.random() < 0.15:
        return Block(src=index, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=mlp)
    heads, qk = random.randint(1, 4), random.randint(2, 9)
    v: int | tuple[int, ...] = random.choice([qk, random.randint(2, 9)])
    if ragged and heads > 1 and random.random() < 0.4:
        v = tuple(random.randint(1, 6) for _ in range(heads))
        v = v[0] if len(set(v)) == 1 else v
    return Block(src=index, heads=heads, qk=qk, v=v, scale=random.choice([qk**-0.5, 0.3]), mlp=mlp)


def random_arch(random: Random, *, ragged: bool = True, missing: bool = True) -> Arch:
    """A ViT of any supported form: class, distillation and register tokens, either pooling, every switch."""
    patch, rows, columns = random.choice([2, 3]), random.randint(2, 4), random.randint(2, 4)
    class_token = random.random() < 0.8
    dist_token = class_token and random.random() < 0.25
    average = not class_token or (not dist_token and random.random() < 0.3)
    blocks = tuple(random_block(random, i, ragged=ragged, missing=missing) for i in range(random.randint(1, 4)))
    return Arch(
        family="vit",
        source="random",
        img_size=(rows * patch, columns * patch),
        patch_size=(patch, patch),
        in_chans=random.choice([1, 3]),
        num_classes=random.randint(2, 7),
        stages=(Stage(width=random.randint(4, 24), grid=(rows, columns), blocks=blocks),),
        class_token=class_token,
        dist_token=dist_token,
        reg_tokens=0 if dist_token else random.choice([0, 0, 2]),
        prefix_pos_embed=dist_token or random.random() < 0.7,
        pool="avg" if average else "token",
        head_norm="tokens" if dist_token else random.choice(["tokens", "pooled", "none"]),
        pre_norm=random.random() < 0.2,
        qkv_bias=random.random() < 0.8,
        qk_norm=random.random() < 0.25,
        layer_scale=random.random() < 0.25,
    )


def random_model(arch: Arch, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``build(arch)`` with every parameter, norms and biases included, drawn at random."""
    model = build(arch).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=dtype) * 0.3 + ("norm" in name and "weight" in name)
            )
    return model


def random_images(arch: Arch, seed: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, arch.in_chans, *arch.img_size, generator=generator, dtype=dtype)


def subset(random: Random, size: int) -> tuple[int, ...]:
    return tuple(sorted(random.sample(range(size), random.randint(1, size))))


def random_cut(random: Random, arch: Arch) -> Cut:
    """Any cut of ``arch``: aligned or not, ragged values, dropped blocks, the residual stream cut or whole."""
    (stage,) = arch.stages
    choices = []
    for block in stage.blocks:
        mlp = subset(random, block.mlp) if block.mlp and random.random() < 0.8 else None
        if block.mixer == "none" or random.random() < 0.2:
            choices.append(BlockCut(mlp=mlp))
            continue
        heads, channels = subset(random, block.heads), subset(random, block.qk)
        width = len(channels)
        starts = [sum(block.v_widths[:h]) for h in range(block.heads)]
        own = [channels if arch.qk_norm else tuple(sorted(random.sample(range(block.qk), width))) for _ in heads]
        choices.append(
            BlockCut(
                qk=tuple(tuple(h * block.qk + j for j in js) for h, js in zip(heads, own, strict=True)),
                v=tuple(tuple(starts[h] + j for j in subset(random, block.v_widths[h])) for h in heads),
                mlp=mlp,
            )
        )
    for i in random.sample(range(len(choices)), random.randint(0, len(choices) - 1)):
        choices[i] = BlockCut(keep=False)
    return Cut(embed=subset(random, stage.width) if random.random() < 0.8 else None, blocks=tuple(choices))
