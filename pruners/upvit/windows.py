"""The evaluation forward pass of a Swin or Swin V2 in pieces, with gates as ``pruners.upvit.forward`` has them.

Every stage has a residual stream of its own, as tokens (B, N, D). Patch merging reads four neighbours of the stream
before, each with that stream's gate: in Swin its norm counts the channels that are left, in Swin V2 the norm stands
behind it and belongs to the stream that it writes. Cosines of Swin V2 are those of the channels that are left.

Shapes: B batch, W windows of a map, n tokens of a window, N tokens of a map, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange

from prunesweep.models.families.swin import neighbours
from prunesweep.models.layers.cosine_attention import Directions

from .forward import UNGATED, Forward, Gates, normed, normed_over

__all__ = ["WindowForward"]


class WindowForward(Forward):
    """``model`` in pieces, whose attention is within windows."""

    def stem(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the start of stage ``s``, before a norm that writes it: (B, N, D), of images or of tokens."""
        if not s:
            return rearrange(self.model.patch_embed.proj(x), "b d h w -> b (h w) d")
        merging, gate = self.model.layers[s].downsample, gates.get(f"stages.{s - 1}.embed")
        four = None if gate is None else gate.repeat(1, 1, 4)
        merged = neighbours(self._as_map(s - 1, x)).flatten(1, 2)
        if self.arch.post_norm:
            read = merged if four is None else merged * four
        else:
            read = normed(merging.norm, merged, four)
        found: torch.Tensor = merging.reduction(read)
        return found

    def begin(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the first block's input in stage ``s`` from the output of ``stem``."""
        if s and not self.arch.post_norm:
            return x
        norm = self.model.layers[s].downsample.norm if s else self.model.patch_embed.norm
        return normed_over(norm, x, gates.get(f"stages.{s}.embed"))

    def logits(self, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute logits (B, K) from the last block's output."""
        last = len(self.arch.stages) - 1
        found: torch.Tensor = self.model.head(
            self._as_map(last, normed(self.model.norm, x, gates.get(f"stages.{last}.embed")))
        )
        return found

    def attended(self, i: int, y: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the attention of block ``i``, (B, N, D) to the same; a gate is that of all windows of its image."""
        attention, block, s = self.attention_of(i), self.arch.blocks[i], self.stage_of[i]
        windows = attention.windows
        assert windows is not None
        split = windows.split(self._as_map(s, y))  # (B·W, n, D), image by image
        name = f"blocks.{i}.attn"
        gate = gates[name].repeat_interleave(len(split) // len(y), 0) if name in gates else None
        q, k, v = self.qkv(i, split, UNGATED if gate is None else {name: gate})
        q, k = self.scaled_heads(i, q, k, gate)
        bias = windows.logit_bias(len(split))
        mask = None if bias is None else bias.to(q.dtype)
        mixed = attention.attend(q, k, v, block.v_widths, block.scale, attn_mask=mask)
        return attention.out.layer(windows.join(mixed, self.arch.stages[s].grid).flatten(1, 2))

    def scaled_heads(self, i: int, q: torch.Tensor, k: torch.Tensor, gate: torch.Tensor | None) -> tuple[Any, Any]:
        """Split queries and keys into heads, gated as in ``Forward``; cosines count the channels that are left."""
        attention = self.attention_of(i)
        if gate is None or not isinstance(attention.q_norm, Directions):
            return super().scaled_heads(i, q, k, gate)
        own = attention.by_head(gate)
        q, k = attention.by_head(q), attention.by_head(k)
        return own * _direction(q, own, attention.q_norm.factors), _direction(k, own, None)

    def _as_map(self, s: int, x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b (h w) d -> b h w d", h=self.arch.stages[s].grid[0])


def _direction(x: torch.Tensor, gate: torch.Tensor, factors: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    """Divide by the length over the channels that a gate leaves; ``factors`` multiply."""
    length = (x.square() * gate).sum(-1, keepdim=True).clamp(min=1e-24).sqrt()  # of places beyond the map 0
    unit = x / length
    return unit if factors is None else unit * factors().to(unit.dtype)
