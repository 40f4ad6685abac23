"""Token mixers of one record: attention with any widths, and SPViT's bottleneck convolution.

Shapes: B batch, N tokens, D residual width, H heads, E query/key width of a head, V value width of a head, d bottleneck
width of a convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm
from torch import nn

__all__ = ["ConvMixer", "HeteroAttention", "attend", "kernel_width", "with_heads_as_they_are"]

_fill = True  # whether ``kernel_width`` may widen anything


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_dims: Sequence[int], scale: float, **options: Any
) -> torch.Tensor:
    """Compute softmax attention whose heads may have different value widths.

        y_h = softmax(scale * Q_h K_h^T) V_h

    Heads of unequal width are run in groups of equal width. Where the queries' width and the values' differ, zeros
    make them equal in memory if PyTorch's fast kernel, which takes equal widths alone, is then faster: see
    ``kernel_width``.

    Args:
        q: queries (B, H, N, E).
        k: keys (B, H, M, E).
        v: values (B, M, sum of ``v_dims``), head after head.
        v_dims: value width of every head.
        scale: factor on the products of queries and keys.
        options: those of ``scaled_dot_product_attention``; an ``attn_mask`` has an axis of length H or 1 for the heads.

    Returns:
        (B, N, sum of ``v_dims``), head after head.
    """
    widths = sorted(set(v_dims))
    if len(widths) == 1:
        v = rearrange(v, "b n (h v) -> b h n v", v=widths[0])
        return rearrange(_equal_heads(q, k, v, scale=scale, **options), "b h n v -> b n (h v)")
    v_heads = torch.split(v, list(v_dims), dim=-1)
    mask = options.pop("attn_mask", None)
    out: list[torch.Tensor | None] = [None] * len(v_dims)
    for width in widths:
        heads = [h for h, d in enumerate(v_dims) if d == width]
        own = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask
        group = torch.stack([v_heads[h] for h in heads], dim=1)
        y = _equal_heads(q[:, heads], k[:, heads], group, attn_mask=own, scale=scale, **options)
        for h, y_head in zip(heads, y.unbind(1), strict=True):
            out[h] = y_head
    return torch.cat([y for y in out if y is not None], dim=-1)


def _equal_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    wanted = kernel_width(q, v)
    if wanted is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    filled_q, filled_k, filled_v = (F.pad(x, (0, wanted - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(filled_q, filled_k, filled_v, **options)[..., : v.shape[-1]]


def kernel_width(q: torch.Tensor, v: torch.Tensor) -> int | None:
    """Return the width to which queries, keys and values are filled up with zeros; None leaves them as they are.

    On a CPU unequal widths take three kernels and all N·M products in memory, which takes up to 3.5 times as long as
    one kernel with zeros; where gradients are recorded there is little to win. On CUDA the kernels for half precision
    take unequal widths, but only multiples of 8. Programs that other software reads (ONNX) stay as they are written.

    Args:
        q: queries (B, H, N, E).
        v: values (B, H, M, V).
    """
    widths = q.shape[-1], v.shape[-1]
    # a compiler cannot trace the question whether the kernel is switched off
    fast = torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    if not (_fill and fast) or torch.onnx.is_in_onnx_export():
        return None
    if q.is_cuda:
        ragged = q.element_size() == 2 and any(width % 8 for width in widths) and widths[0] != widths[1]
        return -(-max(widths) // 8) * 8 if ragged else None
    recorded = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad) and not torch.compiler.is_exporting()
    unequal = widths[0] != widths[1] and max(widths) <= 4 * min(widths)
    return max(widths) if q.device.type == "cpu" and unequal and not recorded else None


def with_heads_as_they_are(model: nn.Module) -> Any:
    """Return a copy of a model that never fills heads up with zeros, to compare speeds; no other runs meanwhile."""
    own = copy.deepcopy(model)

    def turn(on: bool) -> None:
        global _fill
        _fill = on

    own.register_forward_pre_hook(lambda *_: turn(False))
    own.register_forward_hook(lambda *_: turn(True), always_call=True)
    return own


class HeteroAttention(nn.Module):
    """Self-attention with a value width that may differ from the query/key width and between heads, and a given scale.

    The rows of ``qkv`` are all of Q (H*E), then K (H*E), then V (sum of the heads' widths), each head after head, which
    is timm's layout where E equals V. With ``tokens``, query, key and value of every token are multiplied by a frozen
    factor of its own (``token_scale``), which only NViT's released checkpoints have.
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
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dims, self.scale = num_heads, qk_dim, tuple(v_dims), scale
        self.attn_dim = sum(self.v_dims)
        self.qkv = nn.Linear(dim, 2 * num_heads * qk_dim + self.attn_dim, bias=qkv_bias)
        self.q_norm = norm_layer(qk_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(qk_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(self.attn_dim, dim)
        self.token_scale: torch.Tensor | None
        self.register_buffer("token_scale", None if tokens is None else torch.ones(tokens, 1))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over tokens, (B, N, D) to the same."""
        width = self.num_heads * self.qk_dim
        qkv = self.qkv(x)
        if self.token_scale is not None:
            qkv = qkv * self.token_scale
        q, k, v = qkv.split([width, width, self.attn_dim], dim=-1)
        q, k = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(attend(q, k, v, self.v_dims, self.scale, attn_mask=attn_mask, is_causal=is_causal))


class ConvMixer(nn.Module):
    """SPViT's bottleneck convolution D -> d -> D over the grid of patches (arXiv 2111.11802), in its frozen form.

    A kxk convolution with zero padding at the map's border, BatchNorm, ReLU and a 1x1 convolution. Prefix tokens have
    no place on the grid and pass through.
    """

    def __init__(self, dim: int, bottleneck: int, kernel: int, grid: tuple[int, int], prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens
        self.bconv = nn.Sequential(
            nn.Conv2d(dim, bottleneck, kernel, padding=kernel // 2),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(),
            nn.Conv2d(bottleneck, dim, 1),
        )

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Mix tokens, (B, N, D) to (B, N, D), of a grid of rows and columns, by default the module's own."""
        rows, columns = self.grid if grid is None else grid
        prefix, patches = x.tensor_split([self.prefix_tokens], dim=1)
        x_map = rearrange(patches, "b (h w) d -> b d h w", h=rows, w=columns)
        patches = rearrange(self.bconv(x_map), "b d h w -> b (h w) d")
        return torch.cat([prefix.to(patches.dtype), patches], dim=1) if self.prefix_tokens else patches
