"""Prune-and-Merge: a fixed plan that gives a block fewer tokens and its output all of them again.

    z = M x;   z <- block(z);   y = R z + (1 - m) x

M (c, N) sums tokens into merged ones, R (N, c) spreads the result back, m marks the tokens that take part; the others
pass the block by (arXiv 2503.23455, methods of record: the released code's "merge to centre" plan). Between blocks
there are always N tokens, so the grid of patches survives.

Two forms of one function: *sparse*, where every token belongs to at most one merged token, costs O(N D) and no matrix
product; *dense* holds full M and R, as training all their entries leaves them.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DenseMerge", "SparseMerge", "default_groups", "make_merge"]


def default_groups(tokens: int, kept: int, prefix: int) -> torch.Tensor:
    """(N,) merged token of every token: prefix tokens alone, patches in ``kept - prefix`` equal runs, row by row."""
    patches = torch.arange(tokens - prefix) * (kept - prefix) // (tokens - prefix)
    return torch.cat([torch.arange(prefix), prefix + patches])


class SparseMerge(nn.Module):
    """``assign`` (N,) int64 is the merged token of every token, -1 where it passes the block by.

    ``weight`` (N,) holds M's non-zero entry of every token, ``recover`` (N,) R's. A new module sums and averages equal
    runs of patches; a plan is put in by loading.
    """

    def __init__(self, tokens: int, kept: int, prefix: int) -> None:
        super().__init__()
        self.kept = kept
        groups = default_groups(tokens, kept, prefix)
        sizes = torch.zeros(kept).index_add(0, groups, torch.ones(tokens))
        self.assign: torch.Tensor
        self.register_buffer("assign", groups)
        self.weight = nn.Parameter(torch.ones(tokens))
        self.recover = nn.Parameter(1 / sizes[groups])

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """M x: (B, N, D) to (B, c, D)."""
        B, _, D = x.shape
        weighted = x * self.weight[:, None]
        row = torch.where(self.assign < 0, self.kept, self.assign)  # tokens that pass by go to a row that is dropped
        return weighted.new_zeros(B, self.kept + 1, D).index_add(1, row, weighted)[:, : self.kept]

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """R z + (1 - m) x: (B, c, D) and (B, N, D) to (B, N, D)."""
        y = z[:, self.assign.clamp(min=0)] * self.recover[:, None]
        return torch.where((self.assign < 0)[:, None], x, y)


class DenseMerge(nn.Module):
    """``matrix`` (c, N) is M, ``recover`` (N, c) is R, ``takes_part`` (N,) bool is m."""

    def __init__(self, tokens: int, kept: int, prefix: int) -> None:
        super().__init__()
        groups = default_groups(tokens, kept, prefix)
        matrix = (groups[None] == torch.arange(kept)[:, None]).float()
        self.matrix = nn.Parameter(matrix)
        self.recover = nn.Parameter((matrix / matrix.sum(1, keepdim=True)).T.contiguous())
        self.takes_part: torch.Tensor
        self.register_buffer("takes_part", torch.ones(tokens, dtype=torch.bool))

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """M x: (B, N, D) to (B, c, D)."""
        return self.matrix @ x

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """R z + (1 - m) x: (B, c, D) and (B, N, D) to (B, N, D)."""
        y = self.recover @ z
        return torch.where(self.takes_part[:, None], y, y + x)


def make_merge(form: str, tokens: int, kept: int, prefix: int) -> SparseMerge | DenseMerge:
    """The module for ``Block.merge``."""
    return SparseMerge(tokens, kept, prefix) if form == "sparse" else DenseMerge(tokens, kept, prefix)
