"""Equivalent models for inference that skip what inference does not need. They are not stored.

A head that reads prefix tokens (the class token) needs those of the last block alone: only they ask for anything there,
and only they go through its MLP. That saves some 10/12 of one block's MACs, which published counts include.

Between two planned blocks that no token passes by, R of the first and M of the second become one map from merged
tokens to merged tokens, T = M R, so the full set of tokens is never computed. Behind the last block, a head that reads
prefix tokens needs their rows of R alone. Source: arXiv 2503.23455; both follow from its eq. y = R z + (1 - m) x.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from prunesweep.models.layers.token_merging import DenseMerge, SparseMerge, add_rows

from .arch import Arch
from .builder import arch_of, blocks_of
from .errors import UserError
from .views import BlockView, block_views

__all__ = ["FusedMerge", "PrefixBlock", "for_inference", "fuse_tokens"]

Merge = SparseMerge | DenseMerge
FAMILIES = ("beit", "diff", "eva", "vit")  # whose heads may read prefix tokens alone


def for_inference(model: nn.Module, *, plans: bool = True) -> nn.Module:
    """Copy ``model`` for inference, in evaluation mode: the same logits by fewer operations.

    The copy's ``forward_features`` may give prefix tokens only.

    Args:
        model: one that ``Arch.from_timm`` accepts; it is not changed.
        plans: fuse token plans as well, see ``fuse_tokens``.

    Returns:
        The copy, without a record; parameters keep their names. It does all that ``model`` does where nothing can be
        skipped.
    """
    arch = arch_of(model)
    fused: Any
    if plans and any(block.tokens is not None for block in arch.blocks):
        fused = fuse_tokens(model)
    else:
        fused = copy.deepcopy(model).eval().requires_grad_(False)
    if arch.family in FAMILIES and arch.pool == "token" and arch.blocks:
        last = block_views(fused, arch)[-1]
        if _can_skip(last) and not arch.parallel:
            fused.blocks[len(fused.blocks) - 1] = PrefixBlock(last, arch.prefix_tokens)
    if "arch" in vars(fused):
        del fused.arch
    return fused  # type: ignore[no-any-return]


def _can_skip(view: BlockView) -> bool:
    attention = view.attention
    plain = attention is not None and attention.reduction is None and attention.windows is None
    return plain and view.record.tokens is None and not view.record.norm_residual


class PrefixBlock(nn.Module):
    """Replaces the last block: gives its first tokens (B, P, D) from all of its inputs (B, N, D).

    Args:
        view: of the block, whose parameters keep their names.
        prefix_tokens: P.
    """

    def __init__(self, view: BlockView, prefix_tokens: int) -> None:
        super().__init__()
        self._attention, self._mlp, self._tokens = view.attention, view.mlp, prefix_tokens
        for name, child in view.module.named_children():
            self.add_module(name, child)
        for name, parameter in view.module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in view.module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Compute the first tokens behind the block; what timm passes beside tokens is in the attention already."""
        attention, first = self._attention, slice(self._tokens)
        assert attention is not None
        tokens = attention.norm(x)
        y = attention.attended(attention.queries(tokens[:, first]), *attention.keys_values(tokens), x)
        found: torch.Tensor = x[:, first] + attention.scale(attention.out(y))
        return found if self._mlp is None else self._mlp.after(found, 0)


def fuse_tokens(model: nn.Module) -> nn.Module:
    """Copy ``model`` for inference, in evaluation mode: the same logits, fewer operations between blocks.

    The copy has no record, and its ``forward_features`` may give prefix tokens only.

    Args:
        model: a ViT with a token plan in at least one block; it is not changed.

    Raises:
        UserError: the model has no token plan.
    """
    arch = arch_of(model)
    if all(block.tokens is None for block in arch.blocks):
        raise UserError(f"{arch.source} has no token plan: there is nothing to fuse")
    fused: Any = copy.deepcopy(model).eval().requires_grad_(False)
    del fused.arch
    merges: list[Any] = [block.token_merge for block in blocks_of(fused)]
    bridges = [_bridge(first, second) for first, second in pairwise(merges)]
    for i, block in enumerate(blocks_of(fused)):
        if merges[i] is None:
            continue
        enter, leave = bridges[i - 1] if i else None, _leave(arch, merges, bridges, i)
        if enter is not None or leave is not None:
            block.token_merge = FusedMerge(merges[i], enter, leave)
    return fused


class FusedMerge(nn.Module):
    """Replaces a block's token plan: ``enter`` takes merged tokens, ``leave`` returns fewer than all tokens."""

    def __init__(self, plan: Merge, enter: nn.Module | None, leave: nn.Module | None) -> None:
        super().__init__()
        self.plan: Any = plan if enter is None else None
        self.whole = plan  # what merged tokens' places follow from
        self.enter, self.leave = enter, leave

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Return merged tokens (B, c, D), from all tokens or from the merged tokens of the block before."""
        return self.plan.merge(x) if self.enter is None else self.enter(x)

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens (B, N, D); or z itself, for the next block; or the prefix tokens."""
        return self.plan.spread(z, x) if self.leave is None else self.leave(z)


class Dense(nn.Module):
    """Multiplies z by a full matrix A."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Buffer(matrix)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Compute A z, from (B, c, D)."""
        return self.matrix @ z


class Sparse(nn.Module):
    """Multiplies z by a sparse matrix A: token ``source`` of z, times ``weight``, is added to ``row``."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        row, source = torch.nonzero(matrix, as_tuple=True)
        self.rows = len(matrix)
        self.row, self.source, self.weight = nn.Buffer(row), nn.Buffer(source), nn.Buffer(matrix[row, source])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Compute A z, from (B, c, D)."""
        return add_rows(z.index_select(1, self.source), self.row, self.weight, self.rows)


def _map(matrix: torch.Tensor, sparse: bool) -> nn.Module:
    return Sparse(matrix) if sparse else Dense(matrix)


def _leave(arch: Arch, merges: list[Any], bridges: list[nn.Module | None], i: int) -> nn.Module | None:
    """Choose what follows the inside of planned block ``i``; None where its plan is needed as it is."""
    if i < len(bridges) and bridges[i] is not None:
        return nn.Identity()
    _, R, _ = merges[i].matrices()
    if i == len(bridges) and arch.pool == "token":
        return Dense(R[: arch.prefix_tokens])
    if i and bridges[i - 1] is not None:  # nothing passes by, and the tokens from before the block are not there
        return _map(R, isinstance(merges[i], SparseMerge))
    return None


def _bridge(first: Merge | None, second: Merge | None) -> nn.Module | None:
    """Make T, from the merged tokens of one block to those of the next; None where a token passes either by."""
    if first is None or second is None:
        return None
    (_, R, m), (M, _, next_m) = first.matrices(), second.matrices()
    if not (m.all() and next_m.all()):
        return None
    sparse = isinstance(first, SparseMerge) and isinstance(second, SparseMerge)
    return _map(M @ R, sparse)
