"""timm's VisionTransformerSAM: the image encoder of Segment Anything, and plain backbones for detection (ViTDet).

One stage of maps B x rows x columns x D. A block attends within windows, the map padded with zeros behind its norm to
whole ones (what is padded has keys and values too, by their biases), or over the whole map. Attention may have tables
of relative positions, which queries read; here every head has columns of its own, so timm's models, whose heads share
them, are adopted (``families.eva``). Two convolutions may end the model, the neck: the first one reads the stream, and
their own width stays whole.

Sources: Segment Anything, arXiv 2304.02643, and ViTDet, arXiv 2203.16527.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import (
    ClassifierHead,
    Format,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
)
from timm.models.vision_transformer_sam import Block as TimmBlock
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from prunesweep.models.arch import Arch, Block, PositionBias, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS
from prunesweep.models.layers.conv_mixing import ConvSharing
from prunesweep.models.layers.map_block import MapBlock, span
from prunesweep.models.layers.mixers import ConvMixer
from prunesweep.models.layers.relative_positions import RelativeAttention

from .base import Family
from .block_costs import Cost, Counts, projection_params
from .checks import PYRAMID, check_at_least, check_one_of
from .reading import Require, activation_of, block_record, isotropic_record, layer_norms, require, shared_eps
from .spaces import BLOCK, CLASSIFIERS, TOKEN_PLAN, WHOLE, AxisUse, Table, linear, per_channel, reads, scales, writes
from .views import AttentionView, Reader, WindowView, attention_view, consecutive

__all__ = ["SAM", "HeteroVisionTransformerSAM", "SamBlock"]

KIND = "decomposed"
NECK_EPS = 1e-6  # of timm's LayerNorm2d


class SamBlock(MapBlock):
    """Block of one record on a map, whose attention may have relative positions."""

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        super().__init__(arch, stage, block, drop_path=drop_path, norm_layer=norm_layer)
        self.spans = block.whole_map

    def _attention(self, arch: Arch, dim: int, block: Block, norm_layer: Any) -> nn.Module:
        return RelativeAttention(
            dim,
            block.heads,
            block.qk,
            block.v_widths,
            block.scale,
            grid=self.window_size,
            relative=arch.position_bias is not None,
            qkv_bias=arch.qkv_bias,
            qk_norm=arch.qk_norm,
            norm_layer=norm_layer,
        )

    def resize(self, grid: tuple[int, int]) -> None:
        """Take maps of another size."""
        attn = getattr(self, "attn", None)
        if isinstance(attn, ConvMixer):
            attn.grid = grid
        elif isinstance(attn, RelativeAttention) and self.spans:
            attn.resize(grid)
            self.window_size = grid


class HeteroVisionTransformerSAM(VisionTransformerSAM):  # type: ignore[misc]  # timm is untyped
    """timm's VisionTransformerSAM with the blocks of a record, for images of one size.

    Args:
        arch: the record.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
    """

    blocks: Any
    pos_embed: nn.Parameter | None

    def __init__(self, arch: Arch, *, drop_path: float = 0.0) -> None:
        (stage,) = arch.stages
        norm_layer = partial(LayerNorm, eps=arch.norm_eps)
        super().__init__(
            img_size=arch.img_size,
            patch_size=arch.patch_size,
            in_chans=arch.in_chans,
            num_classes=arch.num_classes,
            embed_dim=stage.width,
            depth=0,
            num_heads=1,
            pre_norm=arch.pre_norm,
            embed_layer=partial(PatchEmbed, output_fmt=Format.NHWC),
            norm_layer=norm_layer,
            use_abs_pos=arch.pos_embed,
            neck_chans=arch.neck or None,
            global_pool=arch.pool,
        )
        rates = calculate_drop_path_rates(drop_path, len(stage.blocks))
        self.blocks = nn.Sequential(
            *(
                SamBlock(arch, stage, block, drop_path=rate, norm_layer=norm_layer)
                for block, rate in zip(stage.blocks, rates, strict=True)
            )
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": stage.width,
                "num_chs_norm": arch.neck or stage.width,
                "reduction": reduction,
            }
            for i in range(len(stage.blocks))
        ]

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the first map (B, rows, columns, D) of images."""
        x = self.patch_embed(x)
        found: torch.Tensor = self.norm_pre(x if self.pos_embed is None else x + self.pos_embed)
        return found

    def forward_intermediates(self, x: torch.Tensor, *options: Any, output_fmt: str = "NCHW", **named: Any) -> Any:
        """Compute maps behind blocks, as timm's function of this name; ``NLC`` lays places out one by one, too.

        Raises:
            ValueError: another format is asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt = {output_fmt!r}: must be NCHW or NLC")
        found = super().forward_intermediates(x, *options, **named)
        if output_fmt == "NCHW":
            return found
        return (
            [own.flatten(2).mT for own in found]
            if isinstance(found, list)
            else (found[0], [own.flatten(2).mT for own in found[1]])
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another size of images: positions are resampled, and relative ones of blocks that see the whole map.

        Raises:
            UserError: another size of patches, or a map that is smaller than the windows.
        """
        if patch_size is not None:
            raise UserError(f"patch_size = {patch_size}: must be left out, relative positions are between patches")
        embed = self.patch_embed
        size = to_2tuple(img_size or embed.img_size)
        rows, columns = (side // own for side, own in zip(size, embed.patch_size, strict=True))
        for block in self.blocks:
            h, w = block.window_size
            if block.mixer == "attn" and not block.spans and (rows < h or columns < w):
                raise UserError(f"img_size = {list(size)}: gives {rows}x{columns} patches, windows have {h}x{w}")
        embed.set_input_size(img_size=size)
        if self.pos_embed is not None:
            own = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), [rows, columns])
            self.pos_embed = nn.Parameter(own.contiguous(), requires_grad=self.pos_embed.requires_grad)
        for block in self.blocks:
            block.resize((rows, columns))

    def no_weight_decay(self) -> set[str]:
        """Name the weights that are not to decay."""
        return {"pos_embed"}


class SamFamily(Family):
    """timm's VisionTransformerSAM: windows and whole maps in one stage, and a neck."""

    name = "sam"
    capabilities = frozenset(
        {
            "images",
            "width",
            "depth",
            "convolutions",
            "mixers",
            "windows",
            "mixed_heads",
            "features",
            "streams",
        }
    )
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformerSAM,)
    lacks: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens", "global_attention"),
        "attention is within windows of the whole map, and a merged token has no place in it",
    )
    single_stage = True
    adopts = True
    leaves_windows = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        name: value
        for name, value in PYRAMID.items()
        if name not in ("position_bias", "neck", "pos_embed", "pre_norm", "qk_norm", "layer_scale")
    }
    conv_sharing: ClassVar[ConvSharing] = ConvSharing(alpha=1e-2)
    block_tensors: ClassVar[Table] = {
        **{name: uses for name, uses in BLOCK.items() if name not in TOKEN_PLAN and name != "attn.token_scale"},
        "attn.rel_pos_h": (WHOLE, reads("q")),
        "attn.rel_pos_w": (WHOLE, reads("q")),
    }
    outer_tensors: ClassVar[Table] = {
        "pos_embed": (WHOLE, WHOLE, WHOLE, writes("in")),
        **linear("patch_embed.proj", "in", ""),
        **per_channel("norm_pre", "in"),
        "neck.weight": (scales("out"),),  # of a norm alone
        "neck.bias": (scales("out"),),
        "neck.0.weight": (WHOLE, reads("out")),
        **{f"neck.{i}.{part}": () for i in (1, 2, 3) for part in ("weight", "bias")},
        **CLASSIFIERS,
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a VisionTransformerSAM for its nominal size of images."""
        needs = partial(require, name)
        embed = model.patch_embed
        needs(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        needs(isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
        needs(model.rope_global is None, "it turns queries and keys by their places (use_rope)")
        needs(type(model.head) is ClassifierHead, "its head has a hidden layer (head_hidden_size)")
        pooled = "; of a model that is pooled, prunesweep.models.features.features gives the map"
        pool = model.global_pool
        needs(pool == "avg", f"its pooling is {pool!r}, not 'avg'{'' if pool else pooled}")
        (rows, columns), window = embed.grid_size, _read_window(model, needs)
        fits = window is None or (window[0] <= rows and window[1] <= columns)
        needs(fits, f"its windows {window} are larger than its map of {rows}x{columns} patches")
        blocks, features = zip(*(_read_block(i, b, window, needs) for i, b in enumerate(model.blocks)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in bias, q/k norm, layer scale, positions or activation")
        qkv_bias, qk_norm, layer_scale, relative, act = features[0]
        if not embed.strict_img_size:
            size = "x".join(map(str, embed.img_size))
            warnings.warn(f"{name} takes images of any size; its record is for {size} images", stacklevel=2)
        arch = isotropic_record(
            model,
            self.name,
            name,
            blocks,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            position_bias=PositionBias(kind=KIND) if relative else None,
            norm_eps=shared_eps([*layer_norms(model.blocks, needs), *layer_norms(model.norm_pre, needs)], needs),
            act=act,
            neck=_read_neck(model.neck, needs),
        )
        stage = dataclasses.replace(arch.stages[0], window=window or (rows, columns))
        return dataclasses.replace(arch, stages=(stage,))

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> nn.Module:
        """Build a ``HeteroVisionTransformerSAM``."""
        return HeteroVisionTransformerSAM(arch, drop_path=drop_path)

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Give a timm model's tables of relative positions, which all heads of a block share, to every head."""
        heads = [block.heads for block in arch.blocks]
        found = dict(model.state_dict())
        for name, tensor in found.items():
            if name.endswith((".rel_pos_h", ".rel_pos_w")):
                found[name] = tensor.repeat(1, heads[int(name.split(".")[1])])
        return found

    def current(self, model: Any, arch: Arch) -> Arch:
        """Follow ``set_input_size`` too."""
        arch, embed = super().current(model, arch), model.patch_embed
        if (img_size := tuple(embed.img_size)) == arch.img_size:
            return arch
        stage = dataclasses.replace(arch.stages[0], grid=tuple(embed.grid_size))
        return dataclasses.replace(arch, img_size=img_size, stages=(stage,))

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, whose window may be the whole map."""
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v), windows=_Windows(block), attend=block.attn.attend)

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute the first map (B, rows, columns, D) from images."""
        found: torch.Tensor = model.embed(x)
        return found

    def stem_norm(self, model: Any) -> nn.Module | None:
        """Return the norm in front of the first block, if there is one."""
        norm: nn.Module = model.norm_pre
        return None if isinstance(norm, nn.Identity) else norm

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the neck's first convolution or, without one, the classifier; none of a backbone with neither."""
        if arch.neck:
            return (Reader("neck.0", model.neck[0], None, lambda x: x.flatten(1, 2)),)
        if not arch.num_classes:
            return ()

        def rows(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model.head(model.neck(x.permute(0, 3, 1, 2)), pre_logits=True)
            return found

        return (Reader("head.fc", model.head.fc, model.neck, rows),)

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K), or features, from the last map."""
        found: torch.Tensor = model.forward_head(model.neck(x.permute(0, 3, 1, 2)))
        return found

    def classifiers(self, arch: Arch) -> str:
        """Return ``head.fc``: timm pools within ``head``."""
        return "head.fc"

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for impossible positions, activation or neck."""
        super().check_fields(arch)
        check_one_of("act", arch.act, ACTIVATIONS)
        check_at_least("neck", arch.neck, 0)
        if arch.position_bias is not None:
            check_one_of("position_bias.kind", arch.position_bias.kind, (KIND,))
            if arch.position_bias.hidden:
                raise UserError(f"position_bias.hidden = {arch.position_bias.hidden}: must be 0, positions have no MLP")

    def outside_cost(self, arch: Arch) -> Cost:
        """Count patch embedding, positions, norms, neck and classifier."""
        (stage,) = arch.stages
        width, patches = stage.width, math.prod(stage.grid)
        weights = width * math.prod(arch.patch_size) * arch.in_chans
        features = arch.neck or width
        neck = arch.neck * width + 9 * arch.neck**2
        norms = 2 * width * arch.pre_norm + (4 * arch.neck or 2 * width)
        start = width * (patches * arch.pos_embed + (not arch.pre_norm))
        macs = patches * (weights + neck) + features * arch.num_classes
        return Cost(macs, weights + start + norms + neck + (features + 1) * arch.num_classes)

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention within windows, the map padded to whole ones, or over the map; queries read two tables."""
        window = span(stage, block)
        qk, v, keys = block.heads * block.qk, block.total_v, math.prod(window)
        queries = keys * math.prod(-(-side // own) for side, own in zip(stage.grid, window, strict=True))
        macs = queries * (stage.width + keys) * (qk + v) + queries * stage.width * (qk + v)
        params = projection_params(arch, stage, block, stage.width)
        if arch.position_bias is None:
            return macs, params
        return macs + queries * qk * sum(window), params + qk * sum(2 * side - 1 for side in window)

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Return what axes count; a classifier behind a neck reads the neck's channels, not the stream."""
        return (WHOLE, WHOLE) if arch.neck and tensor == "head.fc.weight" else super().uses(arch, tensor)

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        if space.rpartition(".")[2] in ("q", "k") and arch.position_bias is not None:
            return "relative positions are read by the channels of queries"
        return super().only_chosen(arch, space)

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True with ``pre_norm``: the stream then begins with a norm's output."""
        return arch.pre_norm

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of a map: rows, columns and channels."""
        return (*stage.grid, stage.width), {}


class _Windows(WindowView):
    """Windows whose attention computes its own position terms."""

    def logit_bias(self, windows: int) -> torch.Tensor | None:
        """Return None: what is added to logits depends on queries."""
        return None


def _read_window(model: Any, require: Require) -> tuple[int, int] | None:
    """Return the sides of the windows; None where no block has some."""
    sides = {block.window_size for block in model.blocks} - {0}
    require(len(sides) <= 1, f"its blocks have windows of different sides {sorted(sides)}")
    return (side, side) if (side := next(iter(sides), 0)) else None


def _read_block(
    index: int, block: Any, window: tuple[int, int] | None, require: Require
) -> tuple[Block, tuple[bool, bool, bool, bool, str]]:
    """Read the record of a block, and the features that all blocks of a model must share."""
    where = f"block {index}"
    require(type(block) is TimmBlock, f"{where} is a {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    act = activation_of(mlp, Mlp, where, require)
    require(isinstance(mlp.norm, nn.Identity), f"{where} normalises its hidden units")
    require(mlp.fc1.bias is not None and mlp.fc2.bias is not None, f"{where} has no biases in its MLP")
    spans = window is not None and not block.window_size
    features = (
        attn.qkv.bias is not None,
        not isinstance(attn.q_norm, nn.Identity),
        isinstance(block.ls1, LayerScale),
        attn.use_rel_pos,
        act,
    )
    return block_record(index, block, float(attn.scale), whole_map=spans), features


def _read_neck(neck: Any, require: Require) -> int:
    """Return the channels of a neck's convolutions; 0 for a norm alone."""
    norms = [neck] if isinstance(neck, LayerNorm2d) else list(neck)[1::2]
    require(all(type(norm) is LayerNorm2d for norm in norms), "its neck has norms that are not LayerNorm2d")
    require({norm.eps for norm in norms} == {NECK_EPS}, f"the norms of its neck have another eps than {NECK_EPS:g}")
    return 0 if isinstance(neck, LayerNorm2d) else int(neck[0].out_channels)


SAM = SamFamily()
