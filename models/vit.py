"""Vision transformers with a shape of their own in every block, from stock timm parts.

``VisionTransformer`` takes ``block_fn`` and passes it the block's index: that is all the freedom a heterogeneous record
needs, so the model is a stock timm class with stock parameter names, and a full record has timm's own state dict.
timm's ``Attention`` holds a block whose query, key and value widths agree; ``HeteroAttention`` holds every other one.

Shapes: B batch, N tokens, D residual width, H heads, E query/key width of a head, V value width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .arch import Arch, Block

__all__ = ["ACTIVATIONS", "HeteroAttention", "HeteroBlock", "build_vit"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU}


class HeteroAttention(nn.Module):
    """Self-attention with a value width that may differ from the query/key width and between heads, and a given scale.

    The rows of ``qkv`` are all of Q (H*E), then K (H*E), then V (sum of the heads' widths), each head after head, which
    is timm's layout where E equals V. Ragged heads are run in groups of equal width, so nothing is padded and the MACs
    are exactly N*N*H*E + N*N*sum(V).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dims: Sequence[int],
        scale: float,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dims, self.scale = num_heads, qk_dim, tuple(v_dims), scale
        self.attn_dim = sum(self.v_dims)
        self.qkv = nn.Linear(dim, 2 * num_heads * qk_dim + self.attn_dim, bias=qkv_bias)
        self.q_norm = norm_layer(qk_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(qk_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(self.attn_dim, dim)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        width = self.num_heads * self.qk_dim
        q, k, v = self.qkv(x).split([width, width, self.attn_dim], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        attend = partial(F.scaled_dot_product_attention, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale)
        if len(set(self.v_dims)) == 1:
            y = attend(q, k, rearrange(v, "b n (h v) -> b h n v", h=self.num_heads))
            return self.proj(rearrange(y, "b h n v -> b n (h v)"))
        v_heads = v.split(self.v_dims, dim=-1)
        out: list[torch.Tensor | None] = [None] * self.num_heads
        for dim in sorted(set(self.v_dims)):
            heads = [h for h, d in enumerate(self.v_dims) if d == dim]
            y = attend(q[:, heads], k[:, heads], torch.stack([v_heads[h] for h in heads], dim=1))
            for h, y_head in zip(heads, y.unbind(1), strict=True):
                out[h] = y_head
        return self.proj(torch.cat([y for y in out if y is not None], dim=-1))


class HeteroBlock(nn.Module):
    """Pre-norm transformer block of one record: either half may be missing. Parameter names are timm's."""

    def __init__(
        self,
        block: Block,
        dim: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: bool = False,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return LayerScale(dim) if layer_scale else nn.Identity()

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.has_attn, self.has_mlp = block.mixer == "attn", block.mlp > 0
        if self.has_attn:
            options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "norm_layer": norm_layer}
            self.norm1 = norm_layer(dim)
            self.attn: nn.Module
            if block.v == block.qk and block.scale == block.qk**-0.5:
                self.attn = Attention(dim, block.heads, attn_head_dim=block.qk, **options)
            else:
                self.attn = HeteroAttention(dim, block.heads, block.qk, block.v_widths, block.scale, **options)
            self.ls1, self.drop_path1 = scale(), drop()
        if self.has_mlp:
            self.norm2 = norm_layer(dim)
            self.mlp = Mlp(dim, block.mlp, act_layer=act_layer)
            self.ls2, self.drop_path2 = scale(), drop()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        if self.has_attn:
            y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(self.ls1(y))
        if self.has_mlp:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def build_vit(arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
    """A timm VisionTransformer (VisionTransformerDistilled with a distillation token) with the blocks of ``arch``."""
    (stage,) = arch.stages

    def block_fn(*, depth: int, dim: int, drop_path: float, act_layer: Any, norm_layer: Any, **_: Any) -> HeteroBlock:
        return HeteroBlock(
            stage.blocks[depth],
            dim,
            qkv_bias=arch.qkv_bias,
            qk_norm=arch.qk_norm,
            layer_scale=arch.layer_scale,
            drop_path=drop_path,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )

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
