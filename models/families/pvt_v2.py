"""PVTv2 whose blocks may all differ: timm's skeleton, stage norms and MLP, and attention of any widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers import DropPath, LayerNorm, calculate_drop_path_rates
from timm.models.pvt_v2 import Block as TimmBlock
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.mixers import ConvMixer, attend

from .base import Family
from .block_costs import Cost, Counts, global_attention_cost, mlp_cost, projection_params
from .checks import PYRAMID, check_at_least
from .reading import Require, activation_of, layer_norms, pyramid_record, require, shared_eps
from .spaces import CLASSIFIERS, CONVOLUTION, MLP, NORMS, AxisUse, Table, linear, per_channel
from .views import (
    AttentionView,
    Entrance,
    MlpView,
    Reader,
    ReductionView,
    attention_view,
    consecutive,
    mlp_view,
    patches,
)

__all__ = ["PVT_V2", "HeteroPvtBlock", "ReducedAttention", "build_pvt_v2"]

POOLED = 7  # side of the map that timm pools to


class ReducedAttention(nn.Module):
    """PVTv2's attention, keys and values read from a spatially reduced map, with any widths.

    ``q`` maps D to H*E; ``sr`` (where the stage reduces, or its map is pooled) gives R channels on M places; ``kv``
    maps R (or D) to K (H*E) and V (sum of the heads' widths), each head after head.
    """

    def __init__(self, arch: Arch, stage: Stage, block: Block) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dims, self.scale = block.heads, block.qk, block.v_widths, block.scale
        width, bias = block.heads * block.qk, arch.qkv_bias
        self.q = nn.Linear(stage.width, width, bias=bias)
        self.kv = nn.Linear(block.sr or stage.width, width + block.total_v, bias=bias)
        self.sr = self.norm = None
        if block.sr:
            self.sr = nn.Conv2d(stage.width, block.sr, stage.sr_ratio, stride=stage.sr_ratio)
            self.norm = nn.LayerNorm(block.sr)
        pooled = arch.pooled_map
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(pooled) if pooled else nn.Identity()
        self.act: nn.Module = nn.GELU() if pooled else nn.Identity()
        self.proj = nn.Linear(block.total_v, stage.width)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Attend on a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        q = self.q(x)
        if self.sr is not None and self.norm is not None:
            reduced = self.sr(self.pool(rearrange(x, "b (h w) d -> b d h w", h=feat_size[0])))
            x = self.act(self.norm(rearrange(reduced, "b r h w -> b (h w) r")))
        k, v = self.kv(x).split([self.num_heads * self.qk_dim, sum(self.v_dims)], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        return self.proj(attend(q, k, v, self.v_dims, self.scale))


class HeteroPvtBlock(nn.Module):
    """PVTv2 block of one record; either half may be missing. Parameter names are timm's."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        super().__init__()

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        if block.mixer != "none" or block.norm_residual:
            self.norm1, self.drop_path1 = norm_layer(stage.width), drop()
        if block.mixer == "attn":
            self.attn: nn.Module = ReducedAttention(arch, stage, block)
        elif block.conv_kernel:
            self.attn = ConvMixer(stage.width, block.total_v, block.conv_kernel, stage.grid)
        if self.has_mlp:
            self.norm2, self.drop_path2 = norm_layer(stage.width), drop()
            self.mlp = MlpWithDepthwiseConv(stage.width, block.mlp, extra_relu=arch.pooled_map > 0)

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        """Run on a map of ``feat_size`` (rows, columns), (B, N, D) to the same."""
        if self.mixer == "attn" or self.mixer != "none":
            x = x + self.drop_path1(self.attn(self.norm1(x), feat_size))
        elif self.norm_residual:
            x = x + self.drop_path1(self.norm1(x))
        if self.has_mlp:
            x = x + self.drop_path2(self.mlp(self.norm2(x), feat_size))
        return x


def build_pvt_v2(arch: Arch, *, drop_path: float = 0.0) -> PyramidVisionTransformerV2:
    """Build a timm PyramidVisionTransformerV2 with the blocks of ``arch``.

    Args:
        arch: the record.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
    """
    norm_layer = partial(LayerNorm, eps=arch.norm_eps)
    model = PyramidVisionTransformerV2(
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        depths=(0,) * len(arch.stages),
        embed_dims=[stage.width for stage in arch.stages],
        num_heads=1,
        sr_ratios=1,
        mlp_ratios=1.0,
        norm_layer=norm_layer,
    )
    rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
    for stage, layer, own in zip(arch.stages, model.stages, rates, strict=True):
        pairs = zip(stage.blocks, own, strict=True)
        layer.blocks = nn.ModuleList(_block(arch, stage, block, rate, norm_layer) for block, rate in pairs)
    model.depths = tuple(len(stage.blocks) for stage in arch.stages)
    model.stages.apply(model._init_weights)
    return model


def _block(arch: Arch, stage: Stage, block: Block, drop_path: float, norm_layer: Any) -> nn.Module:
    reduced = stage.width if stage.sr_ratio > 1 or arch.pooled_map else 0
    stock = block.stock_heads and block.mlp and block.heads * block.qk == stage.width and block.sr == reduced
    if not stock or arch.pooled_map not in (0, POOLED):
        return HeteroPvtBlock(arch, stage, block, drop_path=drop_path, norm_layer=norm_layer)
    return TimmBlock(
        stage.width,
        num_heads=block.heads,
        mlp_ratio=(block.mlp + 0.5) / stage.width,  # timm rounds width * ratio down
        sr_ratio=stage.sr_ratio,
        linear_attn=arch.pooled_map > 0,
        qkv_bias=arch.qkv_bias,
        drop_path=drop_path,
        norm_layer=norm_layer,
    )


class PVTv2Family(Family):
    """timm's PVTv2: overlapping patch embeddings, keys and values from a reduced map, a convolution within MLPs."""

    name = "pvt_v2"
    capabilities = frozenset(
        {"images", "width", "depth", "convolutions", "spatial_reduction", "mixed_heads", "streams"}
    )
    timm_classes = (PyramidVisionTransformerV2,)
    lacks: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("tokens", "global_attention"),
            "convolutions of its MLPs and of its reduced maps read neighbours on the whole grid of patches",
        ),
        "mixers": "its values are of a reduced map, not of the places that a convolution in their stead would read",
    }
    stages_name = "stages"
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in PYRAMID.items() if name != "pooled_map"},
        "act": "gelu",
    }
    probe_patch = 4
    block_tensors: ClassVar[Table] = {
        **NORMS,
        **linear("attn.q", "q", "embed"),
        **linear("attn.kv", "kv", "kv_in"),
        **linear("attn.sr", "sr", "embed"),
        **per_channel("attn.norm", "sr"),
        **linear("attn.proj", "embed", "v"),
        **CONVOLUTION,
        **MLP,
        **per_channel("mlp.dwconv", "mlp"),
    }
    stage_tensors: ClassVar[Table] = {
        **linear("downsample.proj", "out", "in"),
        **per_channel("downsample.norm", "out"),  # behind the projection
        **per_channel("norm", "out"),
    }
    outer_tensors: ClassVar[Table] = {
        **linear("patch_embed.proj", "in", ""),
        **per_channel("patch_embed.norm", "in"),
        **CLASSIFIERS,
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a PyramidVisionTransformerV2 for images of ``img_size``."""
        needs = partial(require, name)
        needs(model.global_pool == "avg", f"its pooling is {model.global_pool!r}, not 'avg'")
        embeds = [model.patch_embed, *(layer.downsample for layer in model.stages[1:])]
        layer_norms(model, needs)
        fixed = {m.norm.eps for m in embeds} | {m.norm.eps for m in model.modules() if hasattr(m, "sr") and m.norm}
        needs(fixed == {1e-5}, "a LayerNorm of its embeddings or reductions has eps other than 1e-5")
        eps = shared_eps([n for s in model.stages for n in (s.norm, *(b.norm1 for b in s.blocks))], needs)
        grid: tuple[int, ...] = tuple((side + 3) // 4 for side in img_size)
        pools = {b.attn.pool and b.attn.pool.output_size for s in model.stages for b in s.blocks}
        needs(pools in ({None}, {POOLED}), "its blocks differ in whether keys and values read a pooled map")
        index, stages, biases = 0, [], set()
        for s, layer in enumerate(model.stages):
            grid = grid if s == 0 else tuple((side + 1) // 2 for side in grid)
            blocks = []
            for block in layer.blocks:
                blocks.append(_read_block(index, block, needs))
                biases.add(block.attn.q.bias is not None)
                index += 1
            sr = layer.blocks[0].attn.sr
            ratio = 1 if sr is None else int(sr.kernel_size[0])
            stages.append(
                Stage(width=embeds[s].proj.out_channels, grid=(grid[0], grid[1]), blocks=tuple(blocks), sr_ratio=ratio)
            )
        shape = {"img_size": img_size, "patch_size": (4, 4), "in_chans": model.in_chans}
        return pyramid_record(
            model, self.name, name, stages, biases, norm_eps=eps, pooled_map=pools.pop() or 0, **shape
        )

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> PyramidVisionTransformerV2:
        """Build a timm PyramidVisionTransformerV2 with the blocks of ``arch``."""
        return build_pvt_v2(arch, drop_path=drop_path)

    def set_img_size(self, model: Any, arch: Arch, img_size: tuple[int, int]) -> Arch:
        """Return the record for images of another size: nothing in the model depends on it."""
        sized = dataclasses.replace(arch, img_size=img_size)
        pairs = zip(arch.stages, self.grids(sized), strict=True)
        stages = tuple(dataclasses.replace(stage, grid=(grid[0], grid[1])) for stage, grid in pairs)
        return dataclasses.replace(sized, stages=stages)

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Do nothing: PVTv2 takes images of any size."""

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention: queries from a projection of their own, keys and values from the reduced map.

        Without spatial reduction, keys and values are read from the block's own map.
        """
        if record.mixer != "attn":
            return None
        attn, width = block.attn, record.heads * record.qk
        (q,), (k, v) = consecutive("attn.q", attn.q, width), consecutive("attn.kv", attn.kv, width, record.total_v)
        ends = {part: getattr(attn, part) or nn.Identity() for part in ("pool", "act")}
        reduction = ReductionView(attn.sr, attn.norm, **ends) if record.sr else None
        return attention_view(block, record, (q, k, v), reduction)

    def mlp_view(self, block: Any, record: Block) -> MlpView | None:
        """View a block's MLP, whose hidden units pass a depthwise convolution before the activation."""
        return mlp_view(block, block.mlp.dwconv, block.mlp.relu) if record.mlp else None

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute the first tokens (B, N, D) from images."""
        found: torch.Tensor = model.patch_embed(x).flatten(1, 2)
        return found

    def stem_norm(self, model: Any) -> nn.Module:
        """Return the norm of the first patch embedding."""
        found: nn.Module = model.patch_embed.norm
        return found

    def entrance(self, model: Any, arch: Arch, stage: int) -> Entrance:
        """View the patch embedding in front of a stage: the last norm of the stage before, a convolution, a norm."""
        before, embed = model.stages[stage - 1].norm, model.stages[stage].downsample
        rows = arch.stages[stage - 1].grid[0]

        def run(x: torch.Tensor) -> torch.Tensor:
            image = rearrange(before(x), "b (h w) d -> b d h w", h=rows)
            found: torch.Tensor = embed(image).flatten(1, 2)
            return found

        name = f"stages.{stage}.downsample.proj"
        reader = Reader(name, embed.proj, before, lambda x: patches(before(x), rows, embed.proj), padded=True)
        return Entrance(reader, embed.norm, run)

    def rows_and_features(self, arch: Arch) -> Iterator[tuple[int, int]]:
        """List those of blocks, of their reduced maps, and of the 3x3 convolution in front of a stage."""
        yield from super().rows_and_features(arch)
        for stage in arch.stages:
            if any(block.sr for block in stage.blocks):
                yield _reduced_places(arch, stage), stage.width * stage.sr_ratio**2
        for before, stage in pairwise(arch.stages):
            yield math.prod(stage.grid), 9 * before.width

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the classifier, which reads the average of the last tokens; none of a backbone without a head."""
        if not arch.num_classes:
            return ()
        norm = model.stages[-1].norm
        return (Reader("head", model.head, norm, lambda x: norm(x).mean(1)),)

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K) from the last tokens."""
        found: torch.Tensor = model.head(model.stages[-1].norm(x).mean(1))
        return found

    def grids(self, arch: Arch) -> list[tuple[int, ...]]:
        """Return rows and columns of every stage.

        The first patch embedding, a 7x7 convolution of stride 4 and padding 3, rounds up too.
        """
        grids = [tuple((i + p - 1) // p for i, p in zip(arch.img_size, arch.patch_size, strict=True))]
        for _ in arch.stages[1:]:
            grids.append(tuple((side + 1) // 2 for side in grids[-1]))
        return grids

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for another stride of the first patch embedding than 4, or as every family does."""
        super().check_fields(arch)
        check_at_least("pooled_map", arch.pooled_map, 0)
        if arch.pooled_map and any(stage.sr_ratio > 1 for stage in arch.stages):
            raise UserError(f"pooled_map = {arch.pooled_map}: needs sr_ratio = 1 in every stage")
        if arch.patch_size != (4, 4):
            raise UserError(f"patch_size = {list(arch.patch_size)}: the patch embedding of pvt_v2 has stride [4, 4]")

    def outside_cost(self, arch: Arch) -> Cost:
        """Count overlapping patch embeddings (7x7, then 3x3) with a norm each, a norm per stage, and the classifier."""
        last = arch.stages[-1]
        macs, params = last.width * arch.num_classes, (last.width + 1) * arch.num_classes
        channels, kernel = arch.in_chans, 49
        for stage in arch.stages:
            macs += stage.grid[0] * stage.grid[1] * stage.width * channels * kernel
            params += stage.width * (channels * kernel + 5)
            channels, kernel = stage.width, 9
        return Cost(macs, params)

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention with queries from all places, keys and values from a map that may be reduced or pooled."""
        if not block.sr:
            return global_attention_cost(arch, stage, block, tokens)
        qk, v = block.heads * block.qk, block.total_v
        keys = _reduced_places(arch, stage)
        macs = keys * stage.width * block.sr * stage.sr_ratio**2
        macs += tokens * (stage.width + keys) * (qk + v) + keys * block.sr * (qk + v)
        reduction = block.sr * (stage.width * stage.sr_ratio**2 + 3)
        return macs, projection_params(arch, stage, block, block.sr) + reduction

    def mlp_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count two linear layers and a 3x3 depthwise convolution between them."""
        macs, params = mlp_cost(arch, stage, block, tokens)
        return macs + tokens * block.mlp * 9, params + 10 * block.mlp

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True: every stage's patch embedding ends with a norm."""
        return True

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of the tokens, and the rows and columns that they are."""
        return (stage.grid[0] * stage.grid[1], stage.width), {"feat_size": stage.grid}

    def _block_use(self, arch: Arch, stage: int, index: int, use: AxisUse) -> AxisUse:
        if use.axis == "kv_in":  # what keys and values are read from
            use = AxisUse("sr" if arch.blocks[index].sr else "embed", use.role)
        return super()._block_use(arch, stage, index, use)


def _reduced_places(arch: Arch, stage: Stage) -> int:
    """Count the places that keys and values are read from, where the map is not the stage's own."""
    return arch.pooled_map**2 or math.prod(side // stage.sr_ratio for side in stage.grid)


def _read_block(index: int, block: Any, require: Require) -> Block:
    where = f"block {index}"
    require(type(block) is TimmBlock, f"{where} is a {type(block).__name__}")
    attn = block.attn
    wanted = nn.Identity if attn.pool is None else nn.ReLU
    require(type(block.mlp.relu) is wanted, f"{where} has a {type(block.mlp.relu).__name__} in its MLP")
    activation_of(block.mlp, MlpWithDepthwiseConv, where, require, known=("gelu",))
    return Block(
        src=index,
        heads=attn.num_heads,
        qk=attn.head_dim,
        v=attn.head_dim,
        scale=float(attn.scale),
        mlp=block.mlp.fc1.out_features,
        sr=0 if attn.sr is None else attn.dim,
    )


PVT_V2 = PVTv2Family()
