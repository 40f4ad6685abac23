"""The model families that methods serve whose own code is only loaded when they are used."""

from __future__ import annotations

from prunesweep.models.families import FamiliesWith

__all__ = ["PMVIT", "SPVIT", "UVC"]

UVC = FamiliesWith(
    "images",
    "width",
    "depth",
    without={
        "difference_maps": "value channels that its gates close still count in the norm over those of their head",
        "channel_attention": "it gates value channels, and heads of attention between channels have all of theirs",
        "local_mixers": "it gates heads and their value channels, and pooling and separable convolutions have none",
        "pooled_queries": "every block that it gates has attention, and the first of a stage is an MLP alone",
    },
)
SPVIT = FamiliesWith("images", "mixers")
PMVIT = FamiliesWith("images", "tokens")
