"""PiT: ViTs in stages, whose class token goes along and whose maps are halved by convolutions of single channels.

A channel of a stage comes from one channel of the stage before; where that is cut, it begins with a bias alone, and is
cut by itself. timm has this as a grouped convolution; here a buffer says which channels belong together
(``layers.channel_pooling``), so a timm model is *adopted* (``families.eva``).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import Attention, LayerNorm, Mlp, calculate_drop_path_rates, resample_abs_pos_embed_nhwc
from timm.models.pit import PoolingVisionTransformer, SequentialTuple, Transformer
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.channel_pooling import ChannelPooling
from prunesweep.models.layers.conv_mixing import ConvSharing

from .base import Family
from .block_costs import Cost
from .checks import PYRAMID
from .reading import Require, activation_of, block_record, layer_norms, require, shared_eps
from .spaces import BLOCK, CLASSIFIERS, WHOLE, Table, linear, per_channel, reads, writes
from .vit import HeteroBlock

__all__ = ["PIT", "HeteroPoolingTransformer"]


class HeteroPoolingTransformer(PoolingVisionTransformer):  # type: ignore[misc]  # timm is untyped
    """timm's PiT of one record; patches overlap, their convolution is twice as wide as its stride."""

    def __init__(self, arch: Arch, *, drop_path: float = 0.0) -> None:
        widths = [stage.width for stage in arch.stages]
        super().__init__(
            img_size=arch.img_size,
            patch_size=tuple(2 * side for side in arch.patch_size),
            stride=arch.patch_size[0],
            base_dims=[widths[0]],
            depth=(0,),
            heads=[1],
            num_classes=arch.num_classes,
            in_chans=arch.in_chans,
            distilled=arch.dist_token,
        )
        norm_layer = partial(LayerNorm, eps=arch.norm_eps)
        rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
        layers, self.feature_info = [], []
        for s, (stage, own) in enumerate(zip(arch.stages, rates, strict=True)):
            alone = dataclasses.replace(arch, stages=(stage,))
            pool = ChannelPooling(widths[s - 1], stage.width) if s else None
            layer = Transformer(stage.width, depth=0, heads=1, mlp_ratio=1, pool=pool, drop_path_prob=[])
            pairs = zip(stage.blocks, own, strict=True)
            blocks = (HeteroBlock(alone, block, drop_path=rate, norm_layer=norm_layer) for block, rate in pairs)
            layer.blocks = nn.Sequential(*blocks)
            layers.append(layer)
            reduction = arch.patch_size[0] * 2**s
            self.feature_info.append({"num_chs": stage.width, "reduction": reduction, "module": f"transformers.{s}"})
        self.transformers = SequentialTuple(*layers)
        self.norm = norm_layer(widths[-1])
        self.num_features = self.head_hidden_size = self.embed_dim = widths[-1]
        self.reset_classifier(arch.num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the prefix tokens (B, P, D) behind the last norm from images."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        prefix = self.cls_token.repeat(x.shape[0], 1, 1)  # no view of a parameter: MACs are counted
        _, prefix = self.transformers((x, prefix))
        found: torch.Tensor = self.norm(prefix)
        return found


class PitFamily(Family):
    """timm's PiT: attention over all tokens of a stage, class and distillation tokens beside every map."""

    name = "pit"
    capabilities = frozenset({"images", "width", "depth", "convolutions", "mixers", "mixed_heads", "single_channels"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (PoolingVisionTransformer,)
    adopts = True
    stages_name = "transformers"
    first_conv = "patch_embed.conv"
    probe_patch = 2
    lacks: ClassVar[dict[str, str]] = {
        "streams": "a stage's channels come one by one from those of the stage before, which no linear layer reads",
        "tokens": "a stage's whole map is halved behind its blocks",
        "global_attention": "a stage's whole map is halved behind its blocks",
    }
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in PYRAMID.items() if name != "dist_token"},
        "class_token": True,
        "pool": "token",
        "prefix_pos_embed": False,
        "act": "gelu",
    }
    conv_sharing: ClassVar[ConvSharing] = ConvSharing(alpha=1e-2)
    block_tensors: ClassVar[Table] = BLOCK
    stage_tensors: ClassVar[Table] = {
        **linear("pool.conv", "out", ""),
        **linear("pool.fc", "out", "in"),
        "pool.select": (writes("out"), reads("in")),
    }
    outer_tensors: ClassVar[Table] = {
        "cls_token": (WHOLE, WHOLE, writes("in")),
        "pos_embed": (WHOLE, writes("in")),
        **linear("patch_embed.conv", "in", ""),
        **per_channel("norm", "out"),
        **CLASSIFIERS,
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a PoolingVisionTransformer, which knows its image size."""
        needs = partial(require, name)
        needs(model.global_pool == "token", f"its pooling is {model.global_pool!r}, not 'token'")
        embed = model.patch_embed
        stride = tuple(embed.conv.stride)
        twice = tuple(embed.conv.kernel_size) == tuple(2 * side for side in stride)
        needs(twice and embed.conv.padding == (0, 0), "its patches are not twice as wide as they are apart")
        eps = shared_eps(layer_norms(model, needs), needs)
        grids = self._grids(tuple(embed.img_size), (stride[0], stride[1]), len(model.transformers))
        stages, index, biases = [], 0, set()
        for layer, (rows, columns) in zip(model.transformers, grids, strict=True):
            blocks = []
            for block in layer.blocks:
                blocks.append(_read_block(index, block, needs))
                biases.add(block.attn.qkv.bias is not None)
                index += 1
            width = layer.blocks[0].norm1.normalized_shape[0]
            stages.append(Stage(width=width, grid=(rows, columns), blocks=tuple(blocks)))
        needs(len(biases) == 1, "its blocks differ in the bias of queries, keys and values")
        return Arch(
            family=self.name,
            source=name,
            img_size=tuple(embed.img_size),
            patch_size=(stride[0], stride[1]),
            in_chans=model.in_chans,
            num_classes=model.num_classes,
            stages=tuple(stages),
            dist_token=model.head_dist is not None,
            prefix_pos_embed=False,
            qkv_bias=biases.pop(),
            norm_eps=eps,
        )

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Give a timm model's weights with the channels that belong together."""
        found: dict[str, torch.Tensor] = dict(model.state_dict())
        for s, (before, stage) in enumerate(pairwise(arch.stages), start=1):
            like = found[f"transformers.{s}.pool.fc.weight"]
            select = ChannelPooling(before.width, stage.width).select
            found[f"transformers.{s}.pool.select"] = select.to(like.device)
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> HeteroPoolingTransformer:
        """Build a ``HeteroPoolingTransformer``."""
        return HeteroPoolingTransformer(arch, drop_path=drop_path)

    def set_img_size(self, model: Any, arch: Arch, img_size: tuple[int, int]) -> Arch:
        """Resample the positions for images of another size; return the record."""
        sized = dataclasses.replace(arch, img_size=img_size)
        grids = self.grids(sized)
        if min(grids[0]) < 1:
            raise UserError(f"img_size = {list(img_size)}: {arch.source} needs at least one patch")
        nhwc = resample_abs_pos_embed_nhwc(model.pos_embed.detach().permute(0, 2, 3, 1), list(grids[0]))
        model.pos_embed = nn.Parameter(nhwc.permute(0, 3, 1, 2).contiguous())
        embed = model.patch_embed
        embed.img_size, embed.grid_size = img_size, tuple(grids[0])
        embed.height, embed.width = grids[0]
        pairs = list(zip(arch.stages, grids, strict=True))
        for layer, (_, grid) in zip(model.transformers, pairs, strict=True):
            for block in layer.blocks:
                if hasattr(getattr(block, "attn", None), "grid"):
                    block.attn.grid = tuple(grid)
        stages = tuple(dataclasses.replace(stage, grid=(grid[0], grid[1])) for stage, grid in pairs)
        return dataclasses.replace(sized, stages=stages)

    def classifiers(self, arch: Arch) -> str | tuple[str, ...]:
        """Return ``head``, and ``head_dist`` of a distilled model."""
        return ("head", "head_dist") if arch.dist_token else "head"

    def grids(self, arch: Arch) -> list[tuple[int, ...]]:
        """Return rows and columns of every stage: places of overlapping patches, halved (rounding up)."""
        return list(self._grids(arch.img_size, arch.patch_size, len(arch.stages)))

    def probe_images(self, grid: tuple[int, int], patch: int) -> tuple[int, int]:
        """Return the size of images with ``grid`` overlapping patches."""
        return patch * (grid[0] + 1), patch * (grid[1] + 1)

    def _grids(self, img_size: tuple[int, ...], stride: tuple[int, int], stages: int) -> list[tuple[int, int]]:
        rows, columns = (side // own - 1 for side, own in zip(img_size, stride, strict=True))
        found = [(rows, columns)]
        for _ in range(1, stages):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            found.append((rows, columns))
        return found

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for patches that are no squares, or no patch."""
        super().check_fields(arch)
        if arch.patch_size[0] != arch.patch_size[1]:
            raise UserError(f"patch_size = {list(arch.patch_size)}: the patches of pit have one stride")
        if any(side < 2 * own for side, own in zip(arch.img_size, arch.patch_size, strict=True)):
            raise UserError(f"img_size = {list(arch.img_size)}: must be at least twice patch_size, one patch")

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        if space.endswith(".embed") and len(arch.stages) > 1:
            return "convolutions of single channels lead from a stage to the next"
        return super().only_chosen(arch, space)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count patch embedding, tokens, positions, what is between stages, the last norm and classifiers.

        Between stages of widths C and D a map of P places takes 9 P D MACs, and prefix tokens C D each.
        """
        first, last = arch.stages[0], arch.stages[-1]
        weights = 4 * arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
        places, heads = math.prod(first.grid), 1 + arch.dist_token
        macs = places * first.width * weights + heads * last.width * arch.num_classes
        params = first.width * (weights + 1 + places + arch.prefix_tokens)
        for before, stage in pairwise(arch.stages):
            macs += stage.width * (9 * math.prod(stage.grid) + arch.prefix_tokens * before.width)
            params += stage.width * (11 + before.width)
        return Cost(macs, params + 2 * last.width + heads * (last.width + 1) * arch.num_classes)


def _read_block(index: int, block: Any, require: Require) -> Block:
    where = f"block {index}"
    require(type(block) is TimmBlock, f"{where} is a {type(block).__name__}")
    require(type(block.attn) is Attention, f"{where} has a {type(block.attn).__name__}")
    require(isinstance(block.attn.q_norm, nn.Identity), f"{where} normalises queries and keys")
    require(isinstance(block.ls1, nn.Identity), f"{where} has a layer scale")
    activation_of(block.mlp, Mlp, where, require, known=("gelu",))
    return block_record(index, block, float(block.attn.scale))


PIT = PitFamily()
