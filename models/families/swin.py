"""Swin transformers whose blocks may all differ, with a width per stage that is independent of the others.

A stock timm ``SwinTransformer`` gives the skeleton (patch embedding, stages, forward passes); its uniform blocks are
replaced. timm's own block holds every record that it can express; ``HeteroSwinBlock`` holds the others and keeps
timm's windows, shifts, masks and parameter names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import ClassifierHead, Mlp, PatchEmbed, calculate_drop_path_rates
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.layers.conv_mixing import ConvSharing
from prunesweep.models.layers.mixers import ConvMixer, attend

from .base import Family
from .block_costs import Cost, Counts, projection_params
from .checks import PYRAMID
from .reading import Require, activation_of, block_record, layer_norms, pyramid_record, require, shared_eps
from .spaces import BLOCK, CLASSIFIERS, WHOLE, Table, linear, per_channel, reads, scales, writes
from .views import AttentionView, Entrance, Reader, WindowView, attention_view, consecutive

__all__ = [
    "SWIN",
    "HeteroSwinBlock",
    "HeteroWindowAttention",
    "SwinFamily",
    "build_swin",
    "fill_stages",
    "neighbours",
    "set_halves",
    "shift",
    "skeleton",
]


class HeteroWindowAttention(WindowAttention):  # type: ignore[misc]  # timm is untyped
    """timm's window attention with a value width that may differ from E and between heads, and a given scale."""

    def __init__(self, dim: int, block: Block, window: tuple[int, int], qkv_bias: bool) -> None:
        super().__init__(dim, block.heads, head_dim=block.qk, window_size=window, qkv_bias=qkv_bias)
        self.qk_dim, self.v_dims, self.scale = block.qk, block.v_widths, block.scale
        self.qkv = nn.Linear(dim, 2 * block.heads * block.qk + block.total_v, bias=qkv_bias)
        self.proj = nn.Linear(block.total_v, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within windows, (windows*B, N, D) to the same; ``mask`` is (windows, N, N) or None."""
        width = self.num_heads * self.qk_dim
        q, k, v = self.qkv(x).split([width, width, sum(self.v_dims)], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self.proj(attend(q, k, v, self.v_dims, self.scale, attn_mask=bias.to(q.dtype)))


class HeteroSwinBlock(SwinTransformerBlock):  # type: ignore[misc]  # timm is untyped
    """Swin block of one record: windows of any heads, a convolution over the whole map or no mixer; any MLP or none."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        options = {**skeleton(stage, block), "head_dim": 1, "drop_path": drop_path, "norm_layer": norm_layer}
        super().__init__(stage.width, stage.grid, **options)
        mixer: nn.Module | None = None
        if block.mixer == "attn":
            mixer = HeteroWindowAttention(stage.width, block, stage.window or (1, 1), arch.qkv_bias)
        elif block.conv_kernel:
            mixer = ConvMixer(stage.width, block.total_v, block.conv_kernel, stage.grid)
        set_halves(self, stage, block, mixer)

    def set_input_size(self, feat_size: tuple[int, int], window_size: Any, **options: Any) -> None:
        """Take another grid, as timm's ``set_input_size`` of the whole model asks of every block."""
        if self.mixer == "attn":
            super().set_input_size(feat_size, window_size, **options)
            return
        self.input_resolution = feat_size
        if isinstance(conv := getattr(self, "attn", None), ConvMixer):
            conv.grid = feat_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on a map, (B, rows, columns, D) to the same."""
        if self.mixer == "attn":
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        elif self.mixer != "none":
            y = self.attn(self.norm1(x).flatten(1, 2))
            x = x + self.drop_path1(y.unflatten(1, x.shape[1:3]))
        elif self.norm_residual:
            x = x + self.drop_path1(self.norm1(x))
        if self.has_mlp:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


def skeleton(stage: Stage, block: Block) -> dict[str, Any]:
    """Return the arguments of a timm block, of either version, whose attention and MLP are going to be replaced."""
    if block.mixer != "attn":
        return {"num_heads": 1, "mlp_ratio": 0, "window_size": 1, "shift_size": 0}
    return {"num_heads": 1, "mlp_ratio": 0, "window_size": stage.window, "shift_size": shift(stage, block)}


def set_halves(module: Any, stage: Stage, block: Block, mixer: nn.Module | None) -> None:
    """Give a timm block, of either version, the halves of its record, or take them away.

    Args:
        module: the block.
        stage: its stage's record.
        block: its record.
        mixer: what takes the place of its attention; None where there is nothing.
    """
    module.mixer, module.norm_residual, module.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
    if mixer is not None:
        module.attn = mixer
    else:
        del module.attn
        if not block.norm_residual:
            del module.norm1, module.drop_path1
    if block.mlp:
        module.mlp = Mlp(stage.width, block.mlp)
    else:
        del module.norm2, module.mlp, module.drop_path2


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """Put four neighbours of a map (B, rows, columns, D) side by side, (B, rows / 2, columns / 2, 4 D) rounded up."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return rearrange(x, "b (h i) (w j) d -> b h w (j i d)", i=2, j=2)


def shift(stage: Stage, block: Block) -> tuple[int, int]:
    """Return the rows and columns by which a block's windows are shifted."""
    rows, columns = stage.window or (0, 0)
    return (rows // 2, columns // 2) if block.shifted else (0, 0)


def build_swin(arch: Arch, *, drop_path: float = 0.0) -> SwinTransformer:
    """Build a timm SwinTransformer with the blocks and widths of ``arch``.

    Args:
        arch: the record.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
    """
    norm_layer = partial(nn.LayerNorm, eps=arch.norm_eps)
    widths = [stage.width for stage in arch.stages]
    model = SwinTransformer(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        embed_dim=widths[0],
        depths=(0,) * len(widths),
        num_heads=(1,) * len(widths),
        window_size=[stage.window for stage in arch.stages],  # timm scales them when the image size is set anew
        norm_layer=norm_layer,
        drop_path_rate=0.0,
    )
    fill_stages(model, arch, PatchMerging, _block, drop_path=drop_path, norm_layer=norm_layer)
    model.init_weights(needs_reset=False)
    return model


def fill_stages(model: Any, arch: Arch, merging: Any, make_block: Any, *, drop_path: float, norm_layer: Any) -> None:
    """Give a Swin without blocks those of ``arch``, patch merging between its widths, and a head.

    Args:
        model: timm's, of either version.
        arch: the record.
        merging: timm's class of patch merging.
        make_block: makes a block from the record, the stage's, the block's, ``drop_path`` and ``norm_layer``.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
        norm_layer: the class of norms.
    """
    widths = [stage.width for stage in arch.stages]
    rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
    for s, (stage, layer) in enumerate(zip(arch.stages, model.layers, strict=True)):
        if s:
            layer.downsample = merging(widths[s - 1], stage.width, norm_layer=norm_layer)
        made = (
            make_block(arch, stage, block, drop_path=rate, norm_layer=norm_layer)
            for block, rate in zip(stage.blocks, rates[s], strict=True)
        )
        layer.blocks = type(layer.blocks)(made) if isinstance(layer.blocks, nn.ModuleList) else nn.Sequential(*made)
        layer.depth = len(stage.blocks)
        model.feature_info[s]["num_chs"] = stage.width
    model.num_features = model.head_hidden_size = widths[-1]
    model.norm = norm_layer(widths[-1])
    model.head = ClassifierHead(widths[-1], arch.num_classes, pool_type=arch.pool, input_fmt="NHWC")


def _block(arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> SwinTransformerBlock:
    if not (block.stock_heads and block.mlp):
        return HeteroSwinBlock(arch, stage, block, drop_path=drop_path, norm_layer=norm_layer)
    return SwinTransformerBlock(
        stage.width,
        stage.grid,
        num_heads=block.heads,
        head_dim=block.qk,
        window_size=stage.window,
        shift_size=shift(stage, block),
        mlp_ratio=(block.mlp + 0.5) / stage.width,  # timm rounds width * ratio down
        qkv_bias=arch.qkv_bias,
        drop_path=drop_path,
        norm_layer=norm_layer,
    )


class SwinFamily(Family):
    """timm's Swin: attention in windows, shifted or not, and patch merging between stages."""

    name = "swin"
    capabilities = frozenset({"images", "width", "depth", "convolutions", "mixers", "windows", "streams"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer,)
    lacks: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens", "global_attention"),
        "attention is within windows of the whole grid, and its biases are between places: a merged token has none",
    )
    stages_name = "layers"
    fixed_fields: ClassVar[dict[str, Any]] = {**PYRAMID, "act": "gelu"}
    one_head_only = "a Swin head has position biases of its own"
    conv_sharing: ClassVar[ConvSharing] = ConvSharing(alpha=1e2, centre_first=True)
    block_tensors: ClassVar[Table] = {**BLOCK, "attn.relative_position_bias_table": (WHOLE, scales("heads"))}
    stage_tensors: ClassVar[Table] = {
        **per_channel("downsample.norm", "merged"),  # in front of the reduction
        "downsample.reduction.weight": (writes("out"), reads("merged")),
    }
    outer_tensors: ClassVar[Table] = {
        **linear("patch_embed.proj", "in", ""),
        **per_channel("patch_embed.norm", "in"),
        **per_channel("norm", "out"),
        **CLASSIFIERS,
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a Swin, which knows its image size."""
        needs = partial(require, name)
        embed = model.patch_embed
        needs(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        needs(isinstance(embed.norm, nn.LayerNorm), "it has no LayerNorm in the patch embedding")
        needs(not model.dynamic_img_size, "it is built for images of any size (strict_img_size = False)")
        needs(model.global_pool == "avg", f"its pooling is {model.global_pool!r}, not 'avg'")
        eps = shared_eps(layer_norms(model, needs), needs)
        grid, index, stages, biases = tuple(embed.grid_size), 0, [], set()
        for s, layer in enumerate(model.layers):
            grid = grid if s == 0 else tuple((side + 1) // 2 for side in grid)
            needs(len(layer.blocks) > 0, f"stage {s} has no blocks")
            blocks = []
            for block in layer.blocks:
                record, bias = self._read_block(index, block, needs)
                blocks.append(record)
                biases.add(bias)
                index += 1
            window = tuple(layer.blocks[0].window_size)
            own = {"blocks": tuple(blocks), "window": window, **self._stage_fields(layer)}
            stages.append(Stage(width=layer.blocks[0].dim, grid=grid, **own))
        shape = {
            "img_size": tuple(embed.img_size),
            "patch_size": tuple(embed.patch_size),
            "in_chans": embed.proj.in_channels,
        }
        fixed = {"norm_eps": eps, **{name: self.fixed_fields[name] for name in ("k_bias", "post_norm")}}
        return pyramid_record(model, self.name, name, stages, biases, **fixed, **shape)

    def _stage_fields(self, layer: Any) -> dict[str, Any]:
        """Return what else the record of a timm model's stage has."""
        return {}

    def _read_block(self, index: int, block: Any, require: Require) -> tuple[Block, bool]:
        """Read the record of a block, and whether its queries and values have biases."""
        return _read_block(index, block, require), block.attn.qkv.bias is not None

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> nn.Module:
        """Build a timm SwinTransformer with the blocks and widths of ``arch``."""
        return build_swin(arch, drop_path=drop_path)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, which is within windows."""
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v), windows=WindowView(block))

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute the first map (B, rows, columns, D) from images."""
        found: torch.Tensor = model.patch_embed(x)
        return found

    def stem_norm(self, model: Any) -> nn.Module:
        """Return the norm of the patch embedding."""
        found: nn.Module = model.patch_embed.norm
        return found

    def entrance(self, model: Any, arch: Arch, stage: int) -> Entrance:
        """View the patch merging in front of a stage: a norm over four neighbours, and a layer without bias."""
        merging = model.layers[stage].downsample

        def rows(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = merging.norm(neighbours(x))
            return found

        name = f"layers.{stage}.downsample.reduction"
        return Entrance(Reader(name, merging.reduction, merging.norm, rows), None, merging)

    def rows_and_features(self, arch: Arch) -> Iterator[tuple[int, int]]:
        """List those of blocks, and of the patch merging in front of a stage, which reads four tokens at once."""
        yield from super().rows_and_features(arch)
        for before, stage in pairwise(arch.stages):
            yield math.prod(stage.grid), 4 * before.width

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the classifier, which reads the average of the last map; none of a backbone without a head."""
        if not arch.num_classes:
            return ()

        def rows(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model.head(model.norm(x), pre_logits=True)
            return found

        return (Reader("head.fc", model.head.fc, model.norm, rows),)

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K) from the last map."""
        found: torch.Tensor = model.head(model.norm(x))
        return found

    def current(self, model: Any, arch: Arch) -> Arch:
        """Follow ``set_input_size`` too, which gives every stage another grid, other windows and shifts."""
        arch, embed = super().current(model, arch), model.patch_embed
        img_size, patch_size = tuple(embed.img_size), tuple(embed.patch_size)
        sized = dataclasses.replace(arch, img_size=img_size, patch_size=patch_size)
        parts: Any = zip(model.layers, arch.stages, self.grids(sized), strict=True)
        now = dataclasses.replace(sized, stages=tuple(_stage_now(*part) for part in parts))
        return arch if now == arch else now

    def classifiers(self, arch: Arch) -> str:
        """Return ``head.fc``: timm pools within ``head``."""
        return "head.fc"

    def outside_cost(self, arch: Arch) -> Cost:
        """Count patch embedding and its norm, patch merging (norm, reduction of 4 neighbours), norm and classifier."""
        first, last = arch.stages[0], arch.stages[-1]
        pixels = arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
        macs = first.grid[0] * first.grid[1] * pixels * first.width + last.width * arch.num_classes
        params = first.width * (pixels + 3) + last.width * 2 + (last.width + 1) * arch.num_classes
        for before, stage in zip(arch.stages, arch.stages[1:], strict=False):
            macs += stage.grid[0] * stage.grid[1] * 4 * before.width * stage.width
            params += 8 * before.width + 4 * before.width * stage.width
        return Cost(macs, params)

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention within windows, the map padded to whole ones, and a table of biases per head."""
        assert stage.window is not None
        qk, v = block.heads * block.qk, block.total_v
        keys = math.prod(stage.window)
        windows = math.prod(-(-side // w) for side, w in zip(stage.grid, stage.window, strict=True))
        queries = windows * keys
        macs = queries * (stage.width + keys) * (qk + v) + queries * stage.width * (qk + v)
        biases = block.heads * math.prod(2 * w - 1 for w in stage.window)
        return macs, projection_params(arch, stage, block, stage.width) + biases

    def block_spaces(self, arch: Arch, block: Block) -> dict[str, int]:
        """Return the size of the spaces within a block; a head also has a column of position biases."""
        return super().block_spaces(arch, block) | {"heads": block.heads}

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True in stage 0, whose patch embedding ends with a norm; patch merging has its norm before the reduction."""
        return stage == 0

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of a map: rows, columns and channels."""
        return (*stage.grid, stage.width), {}


def _stage_now(layer: Any, stage: Stage, grid: tuple[int, int]) -> Stage:
    """Return a built stage's record with its grid, and with the windows and shifts that its blocks have now."""
    modules = [module for module, block in zip(layer.blocks, stage.blocks, strict=True) if block.mixer == "attn"]
    rows, columns = modules[0].window_size if modules else map(min, stage.window or (1, 1), grid)
    stage = dataclasses.replace(stage, grid=grid, window=(rows, columns))
    blocks = (_block_now(*own, stage) for own in zip(layer.blocks, stage.blocks, strict=True))
    return dataclasses.replace(stage, blocks=tuple(blocks))


def _block_now(module: Any, block: Block, stage: Stage) -> Block:
    """Return a built block's record; where a window spans the grid, nothing is shifted whatever the record says."""
    if block.mixer != "attn":
        return block
    spans = [side <= window for side, window in zip(stage.grid, stage.window or (), strict=True)]
    would = any(by and not span for by, span in zip(shift(stage, block), spans, strict=True))
    return block if would == any(module.shift_size) else dataclasses.replace(block, shifted=any(module.shift_size))


def _read_block(index: int, block: Any, require: Require) -> Block:
    where = f"block {index}"
    require(type(block) is SwinTransformerBlock, f"{where} is a {type(block).__name__}")
    attn = block.attn
    require(type(attn) is WindowAttention, f"{where} has a {type(attn).__name__}")
    require(not block.always_partition, f"{where} is built with always_partition")
    activation_of(block.mlp, Mlp, where, require, known=("gelu",))
    return block_record(index, block, float(attn.scale), shifted=any(block.shift_size))


SWIN = SwinFamily()
