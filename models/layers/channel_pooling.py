"""What leads from a stage of PiT to the next (arXiv 2103.16302): convolutions of single channels halve the map.

Shapes: B batch, C channels of the stage before, D of the stage, P prefix tokens.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ChannelPooling"]


class ChannelPooling(nn.Module):
    """Halves a map of C channels to D by a 3x3 convolution each of one channel, and maps prefix tokens from C to D.

    ``select`` (D, C) has a 1 where a channel of the stage comes from one of the stage before; a channel whose own has
    gone begins with the convolution's bias alone.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(out_features, out_features, 3, stride=2, padding=1, groups=out_features)
        self.fc = nn.Linear(in_features, out_features)
        self.select: torch.Tensor
        source = torch.arange(out_features) * in_features // out_features
        self.register_buffer("select", (source[:, None] == torch.arange(in_features)).to(torch.uint8))

    def forward(self, x: torch.Tensor, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a map (B, D, rows, columns) of half the size from (B, C, rows, columns), and tokens (B, P, D)."""
        there = self.select.sum(1).to(x.dtype)
        source = x.index_select(1, self.select.argmax(1)) * there[:, None, None]
        return self.conv(source), self.fc(prefix)
