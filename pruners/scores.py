"""Importance scores: one float64 vector per prunable group of a model, with where they come from.

A vector is named by its place in the record: ``embed`` (residual channels), ``blocks.3.heads``, ``blocks.3.qk``,
``blocks.3.v``, ``blocks.3.mlp``, or ``depth`` (one entry per block). Larger is more important.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models import Arch, UserError
from models.arch import Block

__all__ = ["FORMAT", "KINDS", "Scores", "vector_sizes"]

KINDS = ("embed", "heads", "qk", "v", "mlp")
FORMAT = "prunesweep/scores/1"  # to be counted up when a method's scores change, so that no cache is believed


def vector_sizes(arch: Arch) -> dict[str, int]:
    """Name and number of units of every width vector of ``arch``: embed, then heads, qk, v, mlp of each block.

    ``qk`` and ``v`` units are channel indices within a head, aligned over the heads of the block. Raises UserError for
    a family, a mixer or a token plan whose widths cannot be scored yet.
    """
    if arch.family != "vit":
        raise UserError(f"{arch.source} is of family {arch.family!r}: widths can be scored for family 'vit'")
    (stage,) = arch.stages
    sizes = {"embed": stage.width}
    for i, block in enumerate(stage.blocks):
        sizes |= {f"blocks.{i}.{kind}": size for kind, size in _block_sizes(block, i)}
    return sizes


def _block_sizes(block: Block, index: int) -> Iterator[tuple[str, int]]:
    if block.conv_kernel or block.tokens is not None:
        what = f"mixer {block.mixer!r}" if block.conv_kernel else "a token plan"
        raise UserError(f"blocks[{index}] has {what}: widths are to be pruned before")
    if block.mixer == "attn":
        if not isinstance(block.v, int):
            raise UserError(f"blocks[{index}].v is ragged: aligned scores need one value width for all heads")
        yield from (("heads", block.heads), ("qk", block.qk), ("v", block.v))
    if block.mlp:
        yield "mlp", block.mlp


@dataclass(frozen=True)
class Scores:
    """``vectors`` by name, and ``provenance``: JSON-ready facts (method, model, data, settings, number of images)."""

    vectors: Mapping[str, torch.Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file; the caller names a scratch path and publishes it."""
        tensors = {name: v.detach().cpu().double().contiguous() for name, v in self.vectors.items()}
        save_file(tensors, path, metadata={"format": FORMAT, "provenance": json.dumps(dict(self.provenance))})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what ``save`` wrote. Raises UserError for a damaged file or one of another kind."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {error}; delete it to score again") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise UserError(f"{path}: format {found!r}, this version reads {FORMAT!r}; delete it to score again")
        return cls(vectors, json.loads(metadata["provenance"]))
