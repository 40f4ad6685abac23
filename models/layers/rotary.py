"""Rotary position embedding of any pairs of channels, and attention with it.

A query or key of a head is P pairs of channels. It is laid out as the first channels of all pairs, then the second
ones, so that a pair (a, b) at place t, turned by the angle of its frequency, is

    a' = a cos(angle) - b sin(angle)        b' = b cos(angle) + a sin(angle)

which commutes with nothing but maps within the pair: pairs are chosen, whole. Every head keeps its own pairs of the
source's (``pairs``), or their frequencies where those are learned (``freqs``). Prefix tokens come first and are not
turned. A merged token has the place that is the mean of its members' places, weighted by their shares in it.

Sources: arXiv 2104.09864 (the rotation), and those of ``models.arch.Rope`` (angles in images).

Shapes: B batch, N tokens, D residual width, H heads, P pairs of a head, V value width of a head, T places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from timm.layers import LayerNorm
from timm.layers.pos_embed_sincos import freq_bands, init_random_2d_freqs
from torch import nn

from prunesweep.models.arch import Rope

from .mixers import attend

__all__ = ["Places", "RotaryAttention", "merged_places", "place_coordinates"]


def place_coordinates(rope: Rope, grid: tuple[int, int]) -> torch.Tensor:
    """Compute the two coordinates of every place of a grid, (T, 2) float32, the first one first.

    Args:
        rope: says how places are counted.
        grid: rows and columns.
    """
    axes = []
    for side, reference in zip(grid, rope.reference or grid, strict=True):
        if rope.kind == "centred":
            steps = (torch.arange(0.5, side, dtype=torch.float32) + rope.offset) / float(side)
        else:
            steps = torch.arange(side, dtype=torch.float32) + rope.offset
        axes.append(steps if rope.reference is None else steps / side * reference)
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    if rope.kind == "centred":
        coordinates = 2.0 * coordinates - 1.0
    return coordinates.flip(-1).contiguous() if rope.column_first else coordinates


class Places(nn.Module):
    """The places of a grid of patches and the angles there; one serves all blocks of a model.

    Nothing of it is a weight, and nothing is rounded to less than float32, whatever the model's type: ``coordinates``
    (T, 2), ``bands``, and ``table`` (T, 2 pairs), the sines and cosines of the places.
    """

    def __init__(self, rope: Rope, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rope, self.grid = rope, grid
        self.coordinates: torch.Tensor
        self.bands: torch.Tensor
        self.table: torch.Tensor
        for name in ("coordinates", "bands", "table"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.init_non_persistent_buffers()

    @property
    def learned(self) -> bool:
        """Whether frequencies are weights of the blocks."""
        return self.rope.kind == "mixed"

    def init_non_persistent_buffers(self) -> None:
        """Compute everything anew, in float32, on the device that it is on."""
        device = self.table.device
        self.coordinates = place_coordinates(self.rope, self.grid).to(device)
        if self.learned:
            return
        count, base = self.rope.pairs // 2, self.rope.temperature
        if self.rope.kind == "axial":
            bands = freq_bands(count, temperature=base, step=1)
        else:  # periods
            bands = base ** (2.0 * torch.arange(count, dtype=torch.float32) / self.rope.pairs)
        self.bands = bands.to(device)
        angles = self.angles(self.coordinates.to(bands.device), bands)
        self.table = torch.cat([angles.sin(), angles.cos()], -1).to(device)

    def resize(self, grid: tuple[int, int]) -> None:
        """Take the places of another grid."""
        if grid != self.grid:
            self.grid, dtype = grid, self.table.dtype
            self.init_non_persistent_buffers()
            self.table = self.table.to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Places:
        exact = self.coordinates, self.bands, self.table
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if self.coordinates.dtype in (torch.float16, torch.bfloat16):
            self.coordinates, self.bands, self.table = (own.to(self.table.device) for own in exact)
        return self

    def angles(
        self, coordinates: torch.Tensor, bands: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Compute the angles of the source's pairs at places with these coordinates (T, 2), (T, pairs)."""
        own, bands = coordinates.to(dtype)[..., None], bands.to(dtype)
        found = own * bands if self.rope.kind == "axial" else 2 * math.pi * own / bands
        return found.flatten(1)

    def turns(
        self, heads: int, pairs: torch.Tensor, coordinates: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute sines and cosines for the pairs of all heads, (H, T, P) each.

        Args:
            heads: H.
            pairs: (H·P,) numbers of the source's pairs; or, learned, frequencies of both coordinates (2, H·P).
            coordinates: of the places, (T, 2); the grid's where there are none.
            dtype: of the queries.
        """
        if self.learned:
            where = (self.coordinates if coordinates is None else coordinates).float()
            first, second = pairs.float()
            angles = where[:, :1] * first + where[:, 1:] * second
            sin, cos = angles.sin().to(pairs.dtype), angles.cos().to(pairs.dtype)
        elif coordinates is None and not (self.rope.kind == "centred" and dtype == torch.float64):
            half = self.rope.pairs
            sin, cos = self.table[:, :half][:, pairs], self.table[:, half:][:, pairs]
        else:
            wide = self.rope.kind == "centred" and dtype == torch.float64  # as timm has it for images of any size
            where = self.coordinates if coordinates is None else coordinates
            angles = self.angles(where, self.bands, torch.float64 if wide else torch.float32)[:, pairs]
            sin, cos = angles.sin().to(dtype), angles.cos().to(dtype)
        sin, cos = (rearrange(own, "t (h p) -> h t p", h=heads) for own in (sin, cos))
        return sin, cos


def merged_places(merge: Any, coordinates: torch.Tensor, prefix: int) -> torch.Tensor:
    """Compute the coordinates of merged tokens without prefix tokens, (c - prefix, 2).

    They are the means of the members' coordinates, weighted by the sizes of their entries of M; 0 without members.

    Args:
        merge: a block's token plan, in either form of its module, fused or not.
        coordinates: of all patches, (T, 2).
        prefix: number of prefix tokens.
    """
    plan: Any = getattr(merge, "whole", merge)
    where = coordinates.float()
    tiny = torch.finfo(torch.float32).tiny
    if hasattr(plan, "matrix"):  # products entry by entry: two columns are no matter
        share = plan.matrix[prefix:, prefix:].detach().float().abs()
        share = share / share.sum(1, keepdim=True).clamp_min(tiny)
        return torch.stack([(share * own).sum(1) for own in where.unbind(1)], -1)
    assign = plan.assign[prefix:]
    row = assign.clamp(min=prefix) - prefix
    weight = torch.where(assign < 0, 0, plan.weight[prefix:].detach().float().abs())
    total = weight.new_zeros(plan.kept - prefix).index_add(0, row, weight).clamp_min(tiny)
    return where.new_zeros(plan.kept - prefix, 2).index_add(0, row, where * (weight / total[row])[:, None])


class RotaryAttention(nn.Module):
    """Self-attention of any widths whose queries and keys are turned by their token's place.

    ``q_proj`` and ``k_proj`` have 2 H P rows, the first channels of all pairs, head after head, then the second ones;
    without ``places`` H P rows, and nothing is turned. ``k_proj`` may be without bias where the others have one,
    ``q_norm`` and ``k_norm`` are norms over a head's query and key before they are turned, which all heads share, and
    ``norm`` is one over the value channels of all heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dims: Sequence[int],
        scale: float,
        places: Places | None,
        *,
        prefix_tokens: int,
        qkv_bias: bool = True,
        k_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        out_norm: bool = False,
        norm_layer: Any = LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dims, self.scale = num_heads, qk_dim, tuple(v_dims), scale
        self.prefix_tokens, self.places = prefix_tokens, places
        rows = num_heads * qk_dim * (1 if places is None else 2)
        self.q_proj = nn.Linear(dim, rows, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, rows, bias=qkv_bias and k_bias)
        self.v_proj = nn.Linear(dim, sum(self.v_dims), bias=qkv_bias)
        if places is not None and places.learned:
            self.freqs = nn.Parameter(self._random_freqs(places.rope))
        elif places is not None:
            first = torch.arange(qk_dim).clamp(max=places.rope.pairs - 1)
            self.register_buffer("pairs", first.repeat(num_heads))
        self.q_norm, self.k_norm = (norm_layer(rows // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        self.norm = norm_layer(sum(self.v_dims)) if out_norm else nn.Identity()
        self.proj = nn.Linear(sum(self.v_dims), dim, bias=proj_bias)

    def _random_freqs(self, rope: Rope) -> torch.Tensor:
        """Draw frequencies (2, H·P) as the source's were drawn, those of its first pairs."""
        drawn = init_random_2d_freqs(2 * rope.pairs, 1, self.num_heads, temperature=rope.temperature)[:, 0]
        index = torch.arange(self.qk_dim, device=drawn.device).clamp(max=rope.pairs - 1)
        return drawn[:, :, index].flatten(1)

    def by_head(self, q: torch.Tensor) -> torch.Tensor:
        """Reshape queries or keys (B, N, 2 H P) to (B, H, N, 2 P)."""
        parts = 1 if self.places is None else 2
        return rearrange(q, "b n (two h p) -> b h n (two p)", two=parts, h=self.num_heads)

    def rotate(self, x: torch.Tensor, coordinates: torch.Tensor | None = None, start: int = 0) -> torch.Tensor:
        """Turn queries or keys of a head.

        Args:
            x: (B, H, N, 2 P).
            coordinates: of the tokens behind the prefix, (T, 2); the grid's where there are none.
            start: number of the first token.
        """
        if self.places is None:
            return x
        pairs = self.freqs if self.places.learned else self.get_buffer("pairs")
        sin, cos = self.places.turns(self.num_heads, pairs, coordinates, x.dtype)
        skipped = max(self.prefix_tokens - start, 0)
        if skipped >= x.shape[2]:
            return x
        first = max(start - self.prefix_tokens, 0)
        sin, cos = (own[:, first : first + x.shape[2] - skipped] for own in (sin, cos))
        prefix, rest = x[:, :, :skipped], x[:, :, skipped:]
        a, b = rest.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        return torch.cat([prefix, turned], 2) if skipped else turned

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        coordinates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over tokens, (B, N, D) to the same; ``coordinates`` are those of merged tokens behind the prefix."""
        q, k, v = self.q_norm(self.by_head(self.q_proj(x))), self.k_norm(self.by_head(self.k_proj(x))), self.v_proj(x)
        q, k = self.rotate(q, coordinates), self.rotate(k, coordinates)
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = attend(q, k, v, self.v_dims, self.scale, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(self.norm(y))
