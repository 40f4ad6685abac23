"""Random records, models and cuts for property tests; every draw follows from the Random that is passed in."""

from __future__ import annotations

import dataclasses
from itertools import count
from random import Random
from typing import Any

import torch
from torch import nn

from prunesweep.models import (
    Arch,
    AttentionPool,
    Block,
    BlockCut,
    ClassAttention,
    Cut,
    PositionBias,
    QueryPool,
    Rope,
    Stage,
    Stem,
    Text,
    build,
)
from prunesweep.models.layers.activations import ACTIVATIONS

FAMILIES = (
    "vit",
    "eva",
    "beit",
    "diff",
    "cait",
    "xcit",
    "swin",
    "swin_v2",
    "hiera",
    "sam",
    "pvt_v2",
    "pit",
    "metaformer",
)  # of images; there is "lm" too


def random_block(
    random: Random, index: int, *, ragged: bool = True, missing: bool = True, extras: bool = True
) -> Block:
    """Attention of any widths and an MLP; with ``missing`` either half may be absent, with ``extras`` a convolution."""
    mlp = random.choice([0, 5, 16, 33] if missing else [5, 16, 33])
    draw = random.random()
    if missing and draw < 0.15:
        residual = extras and draw < 0.07
        return Block(src=index, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=mlp, norm_residual=residual)
    if extras and draw < 0.3:
        mixer = random.choice(["conv1x1", "conv3x3"])
        return Block(src=index, mixer=mixer, heads=0, qk=0, v=random.randint(1, 9), scale=0.0, mlp=mlp)
    heads, qk = random.randint(1, 4), random.randint(2, 9)
    v: int | tuple[int, ...] = random.choice([qk, random.randint(2, 9)])
    if ragged and heads > 1 and random.random() < 0.4:
        v = tuple(random.randint(1, 6) for _ in range(heads))
        v = v[0] if len(set(v)) == 1 else v
    return Block(src=index, heads=heads, qk=qk, v=v, scale=random.choice([qk**-0.5, 0.3]), mlp=mlp)


def random_arch(
    random: Random, family: str = "vit", *, ragged: bool = True, missing: bool = True, extras: bool = True
) -> Arch:
    """Any record of a family; ``extras`` are convolutions, token plans and what else is no width."""
    makers = {
        "vit": random_vit,
        "eva": random_eva,
        "beit": random_beit,
        "diff": random_diff,
        "cait": random_cait,
        "xcit": random_xcit,
        "swin": random_swin,
        "swin_v2": random_swin_v2,
        "hiera": random_hiera,
        "pvt_v2": random_pvt,
        "pit": random_pit,
        "metaformer": random_metaformer,
        "sam": random_sam,
        "lm": random_lm,
    }
    return makers[family](random, ragged, missing, extras)


def random_vit(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Class, distillation and register tokens, either pooling, every switch, token plans."""
    patch, rows, columns = random.choice([2, 3]), random.randint(2, 4), random.randint(2, 4)
    class_token = random.random() < 0.8
    dist_token = class_token and random.random() < 0.25
    average = not class_token or (not dist_token and random.random() < 0.3)
    depth = random.randint(1, 4)
    blocks = tuple(random_block(random, i, ragged=ragged, missing=missing, extras=extras) for i in range(depth))
    arch = Arch(
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
    arch = dataclasses.replace(arch, act=Random(arch.hash).choice(list(ACTIVATIONS)))  # other draws stay as they are
    return arch if not extras else _planned(random, arch)


def random_eva(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Every rotation and none, gated MLPs, norms within attention and MLP, keys with and without a bias."""
    drawn = random_vit(random, ragged, missing, extras=False)
    blocks = [random_block(random, i, ragged=ragged, missing=missing, extras=extras) for i in range(drawn.depth)]
    kind = random.choice([None, "axial", "axial", "centred", "mixed"])
    if kind is not None:  # pairs of channels, no more than the source has
        blocks = [dataclasses.replace(block, qk=min(block.qk, 4)) for block in blocks]
    grid = drawn.stages[0].grid
    rope = kind and Rope(
        kind=kind,
        pairs=4,
        temperature=random.choice([10.0, 100.0]),
        column_first=random.random() < 0.5,
        offset=0.0 if kind == "mixed" else random.choice([0.0, 1.0]),
        reference=(3, 4) if kind == "axial" and random.random() < 0.5 else None,
    )
    glu = random.random() < 0.4
    arch = dataclasses.replace(
        drawn,
        family="eva",
        stages=(Stage(width=drawn.stages[0].width, grid=grid, blocks=tuple(blocks)),),
        dist_token=False,
        qk_norm=False,
        pos_embed=random.random() < 0.5,
        k_bias=random.random() < 0.5,
        attn_norm=random.random() < 0.3,
        mlp_norm=random.random() < 0.3,
        glu=glu,
        rope=rope,
    )
    own = Random(arch.hash)  # other draws stay as they are
    if own.random() < 0.4:
        arch = dataclasses.replace(
            arch,
            norm=own.choice(["layer", "rms"]),
            embed_norm=own.random() < 0.5,
            proj_bias=own.random() < 0.5,
            mlp_bias=own.random() < 0.5,
            post_norm=not arch.layer_scale and own.random() < 0.4,
            parallel=extras and own.random() < 0.3,
        )
        qk_norm, mlp_scale = own.random() < 0.4, own.random() < 0.5
        if arch.pool == "avg" and own.random() < 0.3:
            arch = dataclasses.replace(arch, head_norm="both")
        arch = dataclasses.replace(arch, qk_norm=qk_norm, mlp_scale=not arch.layer_scale or mlp_scale)
        arch = dataclasses.replace(arch, mlp_entry_norm=arch.glu and own.random() < 0.5)
    return arch if not extras else _planned(random, arch)


def random_beit(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Position biases of either kind; tables for one prefix token at the most."""
    drawn = random_eva(random, ragged, missing, extras=False)
    (stage,) = drawn.stages
    blocks = [random_block(random, i, ragged=ragged, missing=missing, extras=extras) for i in range(drawn.depth)]
    stages = (dataclasses.replace(stage, blocks=tuple(blocks)),)
    table = drawn.prefix_tokens < 2 and random.random() < 0.6
    bias = PositionBias(kind="table") if table else PositionBias(kind="mlp", hidden=random.randint(1, 9))
    own = {"stages": stages, "rope": None, "position_bias": bias, "qk_norm": False}
    return dataclasses.replace(drawn, family="beit", **own)


def random_diff(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Two maps for every head; with ``extras`` also blocks whose halves are parallel."""
    drawn = random_eva(random, ragged, missing, extras=False)
    (stage,) = drawn.stages
    blocks = [random_block(random, i, ragged=ragged, missing=missing, extras=extras) for i in range(drawn.depth)]
    blocks = [dataclasses.replace(block, qk=min(block.qk, 4)) for block in blocks]
    stages = (dataclasses.replace(stage, blocks=tuple(blocks)),)
    own = {"stages": stages, "rope": None, "qk_norm": False, "attn_norm": False, "differential": True}
    arch = dataclasses.replace(drawn, family="diff", parallel=extras and random.random() < 0.3, **own)
    return arch if not extras else _planned(random, arch)


def random_cait(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Patches alone, and blocks of a class token behind them."""
    drawn = random_vit(random, ragged, missing, extras=False)
    (stage,) = drawn.stages
    blocks = [random_block(random, i, ragged=ragged, missing=missing, extras=extras) for i in range(drawn.depth)]
    heads, own = random.randint(1, 3), dict.fromkeys(("class_token", "dist_token", "qk_norm", "pre_norm"), False)
    arch = dataclasses.replace(
        drawn,
        family="cait",
        stages=(dataclasses.replace(stage, blocks=tuple(blocks)),),
        reg_tokens=0,
        prefix_pos_embed=True,
        pool="map",
        head_norm="pooled",
        class_attention=ClassAttention(
            blocks=random.randint(1, 2), width=heads * random.randint(1, 6), heads=heads, mlp=random.randint(1, 20)
        ),
        **own,
    )
    return arch if not extras else _planned(random, arch)


def random_xcit(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Attention between channels, or none, behind one or two convolutions that halve an image."""
    drawn = random_cait(random, ragged, missing, extras=False)
    (stage,) = drawn.stages
    blocks, each = [], random.randint(1, 6)
    for i in range(drawn.depth):
        mlp = random.choice([0, 5, 16, 33] if missing else [5, 16, 33])
        mixer = "none" if missing and random.random() < 0.15 else "xca"
        own = (
            {"heads": 0, "qk": 0, "v": 0} if mixer == "none" else {"heads": random.randint(1, 3), "qk": each, "v": each}
        )
        blocks.append(Block(src=i, mixer=mixer, **own, scale=0.0, mlp=mlp))
    channels = tuple(random.randint(1, 6) for _ in range(random.randint(0, 1)))
    patch, pool = 2 ** (len(channels) + 1), drawn.class_attention
    assert pool is not None
    return dataclasses.replace(
        drawn,
        family="xcit",
        img_size=(stage.grid[0] * patch, stage.grid[1] * patch),
        patch_size=(patch, patch),
        stages=(dataclasses.replace(stage, blocks=tuple(blocks)),),
        layer_scale=True,
        class_attention=dataclasses.replace(pool, norm_patches=random.random() < 0.5),
        stem=Stem(kind="conv3x3", channels=channels),
        pos_embed=random.random() < 0.7,
    )


def _planned(random: Random, arch: Arch) -> Arch:
    (stage,) = arch.stages
    planned = tuple(_with_tokens(random, arch, block) for block in stage.blocks)
    return dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=planned),))


def random_pooled_vit(random: Random) -> Arch:
    """A ViT whose pool reads prefix tokens, or that has an attention pool of widths of its own."""
    arch = random_vit(random, ragged=True, missing=True, extras=True)
    if arch.dist_token:
        return random_pooled_vit(random)
    if arch.pool == "avg" and random.random() < 0.5:
        return dataclasses.replace(arch, pool_prefix=True)
    heads = random.randint(1, 3)
    pool = AttentionPool(width=heads * random.randint(1, 6), heads=heads, mlp=random.randint(1, 20))
    norm = "tokens" if arch.head_norm == "pooled" else arch.head_norm
    return dataclasses.replace(arch, pool="map", attn_pool=pool, head_norm=norm, pool_prefix=random.random() < 0.5)


def _with_tokens(random: Random, arch: Arch, block: Block) -> Block:
    if block.conv_kernel or random.random() < 0.7:
        scaled = block.mixer == "attn" and random.random() < 0.1 and arch.family == "vit"
        return dataclasses.replace(block, token_scale=scaled)
    tokens = random.randint(arch.prefix_tokens + 1, arch.tokens)
    return dataclasses.replace(block, tokens=tokens, merge=random.choice(["sparse", "dense"]))


def random_swin(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Grids that windows do not divide, shifted windows, odd grids before patch merging."""
    patch, grid = random.choice([2, 3]), (random.randint(3, 9), random.randint(3, 9))
    img_size = (grid[0] * patch, grid[1] * patch)
    stages: list[Stage] = []
    index = count()
    for _ in range(random.randint(1, 3)):
        window = (random.randint(1, min(4, grid[0])), random.randint(1, min(4, grid[1])))
        blocks = []
        for _ in range(random.randint(1, 3)):
            block = random_block(random, next(index), ragged=ragged, missing=missing, extras=extras)
            shifted = block.mixer == "attn" and random.random() < 0.5
            blocks.append(dataclasses.replace(block, shifted=shifted))
        stages.append(Stage(width=random.randint(4, 20), grid=grid, blocks=tuple(blocks), window=window))
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return _pyramid(random, "swin", img_size, (patch, patch), stages, norm_eps=1e-5)


def random_swin_v2(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """The same, with windows that distances are meant for, or without; blocks may add their norm's output."""
    drawn = random_swin(random, ragged, missing, extras=False)
    stages = []
    for stage in drawn.stages:
        blocks = []
        for block in stage.blocks:
            own = {"scale": 1.0} if block.mixer == "attn" else {"norm_residual": extras and random.random() < 0.5}
            blocks.append(dataclasses.replace(block, **own))
        reference = random.choice([None, (random.randint(2, 5), random.randint(2, 5))])
        stages.append(dataclasses.replace(stage, blocks=tuple(blocks), reference_window=reference))
    return dataclasses.replace(drawn, family="swin_v2", k_bias=False, post_norm=True, stages=tuple(stages))


def random_hiera(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Windows or the whole map, either way from stage to stage; any block may come first in a stage."""
    number, last = random.randint(1, 3), (random.randint(1, 2), random.randint(1, 3))
    stages: list[Stage] = []
    index = count()
    for s in reversed(range(number)):
        grid = (last[0] << s, last[1] << s)
        window = (random.choice([grid[0], 2 if s else 1]), random.choice([grid[1], 2 if s else 1]))
        blocks = []
        for _ in range(random.randint(1, 2)):
            block = random_block(random, next(index), ragged=ragged, missing=missing, extras=extras)
            blocks.append(dataclasses.replace(block, whole_map=block.mixer == "attn" and random.random() < 0.3))
        stages.append(Stage(width=random.randint(4, 20), grid=grid, blocks=tuple(blocks), window=window))
    heads, img_size = random.randint(1, 2), (4 * stages[0].grid[0], 4 * stages[0].grid[1])
    arch = _pyramid(random, "hiera", img_size, (4, 4), stages, head_norm="pooled", layer_scale=random.random() < 0.3)
    pool = QueryPool(width=heads * random.randint(1, 5), heads=heads, average=random.random() < 0.3)
    act = random.choice(list(ACTIVATIONS))
    return dataclasses.replace(arch, qkv_bias=True, query_pool=pool, act=act)


def random_pvt(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Any image size, reductions that do not divide the grid."""
    img_size = (random.randint(9, 40), random.randint(9, 40))
    grid = ((img_size[0] + 3) // 4, (img_size[1] + 3) // 4)
    stages: list[Stage] = []
    index = count()
    for _ in range(random.randint(1, 3)):
        ratio = random.choice([1, 2, 3] if min(grid) >= 3 else [1])
        blocks = []
        for _ in range(random.randint(1, 2)):
            block = random_block(random, next(index), ragged=ragged, missing=missing, extras=extras)
            reduced = random.randint(1, 12) if ratio > 1 and block.mixer == "attn" else 0
            blocks.append(dataclasses.replace(block, sr=reduced))
        stages.append(Stage(width=random.randint(4, 20), grid=grid, blocks=tuple(blocks), sr_ratio=ratio))
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    arch = _pyramid(random, "pvt_v2", img_size, (4, 4), stages)
    own = Random(arch.hash)  # other draws stay as they are
    return _pooled(own, arch) if extras and own.random() < 0.3 else arch


def _pooled(random: Random, arch: Arch) -> Arch:
    """The same with maps that are averaged, to more places than there may be, in every stage."""
    stages = []
    for stage in arch.stages:
        widths = [random.randint(1, 12) if block.mixer == "attn" else 0 for block in stage.blocks]
        pairs = zip(stage.blocks, widths, strict=True)
        blocks = tuple(dataclasses.replace(block, sr=width) for block, width in pairs)
        stages.append(dataclasses.replace(stage, sr_ratio=1, blocks=blocks))
    return dataclasses.replace(arch, pooled_map=random.choice([2, 3, 7]), stages=tuple(stages))


def random_pit(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Overlapping patches, up to three stages of any widths, with and without a distillation token."""
    stride, grid = random.choice([1, 2]), (random.randint(2, 6), random.randint(2, 6))
    img_size = ((grid[0] + 1) * stride, (grid[1] + 1) * stride)
    stages: list[Stage] = []
    index = count()
    for _ in range(random.randint(1, 3)):
        options = {"ragged": ragged, "missing": missing, "extras": extras}
        blocks = tuple(random_block(random, next(index), **options) for _ in range(random.randint(1, 2)))
        stages.append(Stage(width=random.randint(4, 20), grid=grid, blocks=blocks))
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    drawn = _pyramid(random, "pit", img_size, (stride, stride), stages)
    own = {"class_token": True, "dist_token": random.random() < 0.4, "prefix_pos_embed": False, "pool": "token"}
    return dataclasses.replace(drawn, **own)


def random_metaformer(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Any image size, norms of either kind, and in every block attention, a separable convolution, pooling or none."""
    img_size = (random.randint(9, 40), random.randint(9, 40))
    grid = ((img_size[0] + 1) // 4, (img_size[1] + 1) // 4)
    stages: list[Stage] = []
    index = count()
    for _ in range(random.randint(1, 3)):
        blocks = []
        for _ in range(random.randint(1, 2) + (not stages)):
            block = random_block(random, next(index), ragged=ragged, missing=missing, extras=False)
            mixer = ("sepconv", "attn", "pool")[block.src % 3]
            if block.mixer == "attn" and mixer != "attn":
                v = random.randint(2, 12) if mixer == "sepconv" else 0
                block = Block(src=block.src, mixer=mixer, heads=0, qk=0, v=v, scale=0.0, mlp=block.mlp)
            residual = extras and block.mixer == "none" and random.random() < 0.5
            blocks.append(dataclasses.replace(block, norm_residual=residual))
        scaled = random.random() < 0.5
        stages.append(Stage(width=random.randint(4, 20), grid=grid, blocks=tuple(blocks), res_scale=scaled))
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return _pyramid(
        random,
        "metaformer",
        img_size,
        (4, 4),
        stages,
        head_norm="pooled",
        norm=random.choice(["layer", "group"]),
        norm_bias=random.random() < 0.5,
        embed_norm=random.random() < 0.7,
        act=random.choice(["star_relu", "star_relu", "gelu"]),
        layer_scale=random.random() < 0.4,
        proj_bias=random.random() < 0.5,
        mlp_bias=random.random() < 0.5,
        head_mlp=random.choice([0, random.randint(1, 12)]),
    )


def random_sam(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Windows that may not divide the map, blocks over all of it, positions of either kind and none, with a neck."""
    patch, rows, columns = random.choice([2, 3]), random.randint(2, 5), random.randint(2, 5)
    blocks = []
    for i in range(random.randint(2, 3)):
        block = random_block(random, i, ragged=ragged, missing=missing, extras=extras)
        spans = block.mixer == "attn" and random.random() < 0.4
        blocks.append(dataclasses.replace(block, whole_map=spans))
    window = (random.randint(1, rows), random.randint(1, columns))
    stage = Stage(width=random.randint(4, 20), grid=(rows, columns), blocks=tuple(blocks), window=window)
    return _pyramid(
        random,
        "sam",
        (rows * patch, columns * patch),
        (patch, patch),
        [stage],
        pos_embed=random.random() < 0.7,
        pre_norm=random.random() < 0.2,
        qk_norm=random.random() < 0.2,
        layer_scale=random.random() < 0.25,
        position_bias=PositionBias(kind="decomposed") if random.random() < 0.7 else None,
        neck=random.choice([0, 5]),
        norm_eps=1e-5,
        act=random.choice(list(ACTIVATIONS)),
    )


def random_lm(random: Random, ragged: bool, missing: bool, extras: bool) -> Arch:
    """Up to three tails, every way of sharing, residual channels that are some of the source's."""
    cutoffs = tuple(sorted(random.sample(range(1, 20), random.randint(1, 3))))
    width, length = random.randint(4, 16), random.randint(3, 8)
    blocks = tuple(random_block(random, i, ragged=ragged, missing=missing, extras=False) for i in range(3))
    return Arch(
        family="lm",
        source="random",
        img_size=(1, length),
        patch_size=(1, 1),
        in_chans=1,
        num_classes=random.randint(20, 30),
        stages=(Stage(width=width, grid=(1, length), blocks=blocks[: random.randint(1, 3)]),),
        class_token=False,
        pool="none",
        head_norm="none",
        norm_eps=1e-5,
        act=random.choice(["relu", "gelu"]),
        text=Text(
            cutoffs=cutoffs,
            tails=tuple(random.randint(1, 6) for _ in cutoffs),
            tied=random.choice(["all", "all", "tables", "none"]),
            embed_scale=random.choice([1.0, width**0.5]),
            positions=2 * random.randint(8, 10),
        ),
    )


def _pyramid(random: Random, family: str, img_size: Any, patch_size: Any, stages: list[Stage], **options: Any) -> Arch:
    return Arch(
        family=family,
        source="random",
        img_size=img_size,
        patch_size=patch_size,
        in_chans=random.choice([1, 3]),
        num_classes=random.randint(2, 7),
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        qkv_bias=random.random() < 0.8,
        **options,
    )


def random_model(arch: Arch, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``build(arch)`` with every parameter, norms and biases included, and every statistic drawn at random."""
    model = build(arch).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=dtype) * 0.3 + ("norm" in name and "weight" in name)
            )
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var", "token_scale", "patch_embed.factor")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=dtype))
            elif name == "columns":  # some of the source's sinusoids
                text = model.arch.text
                buffer.copy_(torch.randperm(text.positions, generator=generator)[: len(buffer)].sort().values)
            elif name.endswith("assign"):  # some patches pass the block by
                buffer[-2:] = torch.where(torch.rand(2, generator=generator) < 0.5, -1, buffer[-2:])
    return model


def random_images(arch: Arch, seed: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What the model takes: of a language model, word numbers B·T."""
    generator = torch.Generator().manual_seed(seed)
    if arch.family == "lm":
        return torch.randint(arch.num_classes, (batch, arch.tokens), generator=generator)
    return torch.randn(batch, arch.in_chans, *arch.img_size, generator=generator, dtype=dtype)


def subset(random: Random, size: int) -> tuple[int, ...]:
    return tuple(sorted(random.sample(range(size), random.randint(1, size))))


def random_cut(random: Random, arch: Arch) -> Cut:
    """Any cut of ``arch``: aligned or not, ragged values, dropped blocks, residual streams cut or whole."""
    choices: list[BlockCut] = []
    for stage in arch.stages:
        own = [_random_choice(random, arch, block) for block in stage.blocks]
        for i in random.sample(range(len(own)), random.randint(0, len(own) - 1)):
            own[i] = BlockCut(keep=False)
        choices += own
    embed = tuple(subset(random, stage.width) if random.random() < 0.8 else None for stage in arch.stages)
    tails = arch.text and tuple(subset(random, d) if random.random() < 0.8 else None for d in arch.text.tails)
    return Cut(embed=embed, blocks=tuple(choices), tails=tails)


def _random_choice(random: Random, arch: Arch, block: Block) -> BlockCut:
    mlp = subset(random, block.mlp) if block.mlp and random.random() < 0.8 else None
    sr = subset(random, block.sr) if block.sr and random.random() < 0.8 else None
    if block.mixer in ("none", "pool") or random.random() < 0.2:
        return BlockCut(mlp=mlp, sr=sr)
    if block.mixer == "xca":
        whole = range(block.qk)
        return BlockCut.aligned(block, heads=subset(random, block.heads), qk=whole, v=whole, mlp=mlp)
    if block.convolves:
        return BlockCut(v=(subset(random, block.total_v),), mlp=mlp)
    heads, channels = subset(random, block.heads), subset(random, block.qk)
    width = len(channels)
    starts = [sum(block.v_widths[:h]) for h in range(block.heads)]
    own = [channels if arch.qk_norm else tuple(sorted(random.sample(range(block.qk), width))) for _ in heads]
    return BlockCut(
        qk=tuple(tuple(h * block.qk + j for j in js) for h, js in zip(heads, own, strict=True)),
        v=tuple(tuple(starts[h] + j for j in subset(random, block.v_widths[h])) for h in heads),
        mlp=mlp,
        sr=sr,
    )
