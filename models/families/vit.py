"""Vision transformers with a shape of their own in every block, from stock timm parts.

``VisionTransformer`` takes ``block_fn`` and passes it the block's index: that is all the freedom a heterogeneous record
needs, so the model is a stock timm class with stock parameter names, and a full record has timm's own state dict.
timm's ``Attention`` holds a block whose query, key and value widths agree; ``HeteroAttention`` holds every other one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block
from prunesweep.models.layers.mixers import ConvMixer, HeteroAttention
from prunesweep.models.layers.token_merging import DenseMerge, SparseMerge, make_merge

__all__ = ["ACTIVATIONS", "HeteroBlock", "build_vit"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU}


class HeteroBlock(nn.Module):
    """Pre-norm transformer block of one record: either half may be missing. Parameter names are timm's.

    A convolution is called ``attn`` too, with the names of SPViT's released checkpoints behind it; ``token_merge``
    holds a token plan.
    """

    def __init__(
        self,
        arch: Arch,
        block: Block,
        *,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()
        (stage,) = arch.stages
        dim = stage.width

        def scale() -> nn.Module:
            return LayerScale(dim) if arch.layer_scale else nn.Identity()

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        self.token_merge: SparseMerge | DenseMerge | None = None
        if block.tokens is not None:
            self.token_merge = make_merge(block.merge, arch.tokens, block.tokens, arch.prefix_tokens)
        if block.mixer != "none" or block.norm_residual:
            self.norm1 = norm_layer(dim)
            self.attn = _mixer(arch, block, norm_layer)
            self.ls1, self.drop_path1 = scale(), drop()
        if self.has_mlp:
            self.norm2 = norm_layer(dim)
            self.mlp = Mlp(dim, block.mlp, act_layer=act_layer)
            self.ls2, self.drop_path2 = scale(), drop()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        z = x if self.token_merge is None else self.token_merge.merge(x)
        if self.mixer == "attn":
            y = self.attn(self.norm1(z), attn_mask=attn_mask, is_causal=is_causal)
            z = z + self.drop_path1(self.ls1(y))
        elif self.mixer != "none" or self.norm_residual:
            z = z + self.drop_path1(self.ls1(self.attn(self.norm1(z))))
        if self.has_mlp:
            z = z + self.drop_path2(self.ls2(self.mlp(self.norm2(z))))
        return z if self.token_merge is None else self.token_merge.spread(z, x)


def _mixer(arch: Arch, block: Block, norm_layer: Any) -> nn.Module:
    (stage,) = arch.stages
    if block.mixer == "none":
        return nn.Identity()
    if block.conv_kernel:
        return ConvMixer(stage.width, block.total_v, block.conv_kernel, stage.grid, arch.prefix_tokens)
    options = {"qkv_bias": arch.qkv_bias, "qk_norm": arch.qk_norm, "norm_layer": norm_layer}
    if block.stock_heads and not block.token_scale:
        return Attention(stage.width, block.heads, attn_head_dim=block.qk, **options)
    tokens = arch.tokens if block.token_scale else None
    return HeteroAttention(stage.width, block.heads, block.qk, block.v_widths, block.scale, tokens=tokens, **options)


def build_vit(arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
    """A timm VisionTransformer (VisionTransformerDistilled with a distillation token) with the blocks of ``arch``."""
    (stage,) = arch.stages

    def block_fn(*, depth: int, drop_path: float, act_layer: Any, norm_layer: Any, **_: Any) -> HeteroBlock:
        return HeteroBlock(arch, stage.blocks[depth], drop_path=drop_path, act_layer=act_layer, norm_layer=norm_layer)

    options: dict[str, Any] = {"reg_tokens": arch.reg_tokens} if arch.reg_tokens else {}
    return (VisionTransformerDistilled if arch.dist_token else VisionTransformer)(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        global_pool=arch.pool,
        embed_dim=stage.width,
        depth=len(stage.blocks),
        num_heads=1,  # the real numbers are in the record; timm would only pass this one on to block_fn
        class_token=arch.class_token,
        no_embed_class=not arch.prefix_pos_embed,
        pre_norm=arch.pre_norm,
        final_norm=arch.head_norm != "none",
        fc_norm=arch.head_norm == "pooled",
        drop_path_rate=drop_path,
        norm_layer=partial(LayerNorm, eps=arch.norm_eps),
        act_layer=ACTIVATIONS[arch.act],
        block_fn=block_fn,
        **options,
    )
