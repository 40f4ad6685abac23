"""The evaluation forward pass of Segment Anything's image encoder in pieces, with gates as ``pruners.upvit.forward``.

One stage of maps, as tokens (B, N, D). The neck's first convolution reads the stream without a norm in between, so its
gate is there; where a norm ends the model, it counts the channels that are left. Terms of relative positions are those
of gated queries.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d

from .forward import UNGATED, Gates, normed, normed_over
from .windows import WindowForward

__all__ = ["MapForward"]


class MapForward(WindowForward):
    """``model`` in pieces, whose attention is within windows of its only stage's map, or over all of it."""

    def stem(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the start of the stage, before a norm that writes it: (B, N, D)."""
        model = self.model
        x = model.patch_embed(x)
        return (x if model.pos_embed is None else x + model.pos_embed).flatten(1, 2)

    def begin(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the first block's input from the output of ``stem``."""
        return normed_over(self.model.norm_pre, x, gates.get(f"stages.{s}.embed"))

    def logits(self, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute logits (B, K), or features, from the last block's output."""
        model, gate = self.model, gates.get("stages.0.embed")
        if isinstance(model.neck, LayerNorm2d):
            y = normed(model.neck, x, x.new_ones(1, 1, x.shape[-1]) if gate is None else gate)
            return model.forward_head(self._as_map(0, y).permute(0, 3, 1, 2))
        y = x if gate is None else x * gate
        return model.forward_head(model.neck(self._as_map(0, y).permute(0, 3, 1, 2)))
