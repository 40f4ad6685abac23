"""ToMe: tokens merged by similarity, image by image, without training; a peer to compare token plans with.

Written from the paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), section 3 and
appendix D. Between attention and MLP of every block, tokens are split in turn into two sets A and B, the r tokens of A
that are most similar to one of B (cosine of keys, mean over heads) are merged into it, and attention weighs a merged
token by its size. The grid of patches does not survive, so there is no record of such a model: it is evaluated, timed
and counted, not stored.

Shapes: B images, n tokens of a block, D width, E head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from prunesweep.models.families.views import AttentionView

from .arch import Arch
from .builder import arch_of
from .counting import block_cost, outside_cost
from .errors import UserError
from .families import family_of
from .views import block_views

__all__ = ["Matching", "Schedule", "ToMe", "apply_tome", "match", "tome_macs", "tome_schedule"]

Schedule = int | tuple[int, float] | Sequence[int]


def tome_schedule(depth: int, r: Schedule) -> list[int]:
    """Return the number of tokens to merge in every block.

    Args:
        depth: number of blocks.
        r: one number for every block; or (mean, inflection), linear over the blocks from mean * (1 - inflection) on: an
            inflection of -1 merges most at the start, 1 at the end, 0 the same everywhere; or a list, continued by 0.

    Raises:
        UserError: a negative number, more numbers than blocks, or an inflection outside -1..1.
    """
    if isinstance(r, tuple):
        mean, inflect = r
        if not -1 <= inflect <= 1:
            raise UserError(f"r = {r}: the inflection must lie in -1..1")
        first = int(mean * (1 - inflect))
        step = 2 * (mean - first) / max(depth - 1, 1)
        counts = [int(first + step * i) for i in range(depth)]
    else:
        counts = [r] * depth if isinstance(r, int) else [*r, *[0] * (depth - len(r))]
    if len(counts) != depth or min(counts) < 0:
        raise UserError(f"r = {r}: give at most {depth} numbers (one per block) of at least 0")
    return counts


class Matching(NamedTuple):
    """The pairs of tokens to merge: A are the tokens in even places, B those in odd places.

    ``src`` (B, r) are the tokens of A that are merged into ``dst`` (B, r) of B; ``unm`` are those of A that stay.
    """

    src: torch.Tensor
    unm: torch.Tensor
    dst: torch.Tensor
    prefix: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum tokens, (B, n, D) to (B, n - r, D): prefix tokens in their order, the rest of A, the rest of B."""

        def of(a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return a.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

        a, b = x[:, ::2], x[:, 1::2]
        b = b.scatter_add(1, self.dst[..., None].expand(-1, -1, x.shape[2]), of(a, self.src))
        a = of(a, self.unm)
        first_a, first_b = (self.prefix + 1) // 2, self.prefix // 2
        prefix = [t for pair in zip(a[:, :first_a].unbind(1), b[:, :first_b].unbind(1), strict=False) for t in pair]
        prefix += a[:, :first_a].unbind(1)[first_b:]
        return torch.cat([*(t[:, None] for t in prefix), a[:, first_a:], b[:, first_b:]], dim=1)


def match(metric: torch.Tensor, r: int, prefix: int) -> Matching | None:
    """Find the r most similar pairs of tokens by bipartite soft matching (arXiv 2210.09461, section 3 and appendix D).

    Args:
        metric: what similarity (the cosine) is computed from, (B, n, E).
        r: pairs to merge, at most half of all tokens without the prefix.
        prefix: number of prefix tokens, which come first and are never merged.

    Returns:
        The pairs; None where there is none to merge.
    """
    r = min(r, (metric.shape[1] - prefix) // 2)
    if r <= 0:
        return None
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, : (prefix + 1) // 2] = -torch.inf
    similarity[:, :, : prefix // 2] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    src, unm = order[:, :r], order[:, r:].sort(dim=-1).values
    return Matching(src, unm, partner.gather(1, src), prefix)


class Step(NamedTuple):
    """One block's result: output (B, n, D), token sizes (B, n, 1), keys (B, n, E) and matching, where it merged."""

    x: torch.Tensor
    size: torch.Tensor
    metric: torch.Tensor | None
    matching: Matching | None


class ToMe(nn.Module):
    """A ViT that merges ``r[i]`` tokens in block i; ``r`` and ``proportional`` may be set at any time."""

    def __init__(self, model: nn.Module, arch: Arch, r: Sequence[int], proportional: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.record, self.r, self.proportional = arch, list(r), proportional

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K) of images (B, C, rows, columns). Average pooling weighs every token by its size."""
        x, size = self.forward_features(x)
        if self.record.pool == "avg":
            first = 0 if self.record.pool_prefix else self.record.prefix_tokens
            prefix, patches = x.tensor_split([first], dim=1)
            weight = size[:, first:]
            x = torch.cat([prefix, (patches * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)], dim=1)
        return self.model.forward_head(x)

    def forward_features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute tokens (B, n, D) after the last norm, and their sizes (B, n, 1)."""
        *_, last = self.steps(x)
        return self.model.norm(last.x), last.size

    def steps(self, x: torch.Tensor) -> Iterator[Step]:
        """Run block by block, yielding the result of each."""
        x = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(x)))
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        merged = False
        for view, r in zip(block_views(self.model, self.record), self.r, strict=True):
            block: Any = view.module
            record, attention = view.record, view.attention
            metric = matching = None
            if attention is not None:
                bias = size.log().transpose(1, 2)[:, None] if merged and self.proportional else None
                y, metric = _attend(attention, attention.norm(x), bias)
                x = x + attention.scale(y)
                matching = match(metric, r, self.record.prefix_tokens)
            elif record.norm_residual:
                x = x + block.drop_path1(block.ls1(block.norm1(x)))
            if matching is not None:
                merged, total = True, matching.sum(size)
                x, size = matching.sum(x * size) / total, total
            if view.mlp is not None:
                x = view.mlp.after(x, 0)
            yield Step(x, size, metric, matching)


def _attend(attention: AttentionView, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with ``bias`` (B, 1, 1, n) on its logits.

    Returns the output (B, n, D) and the mean of the heads' keys (B, n, E).
    """
    record = attention.record
    q, k, v = attention.queries_keys_values(x)
    q, k = attention.q_norm(attention.by_head(q)), attention.k_norm(attention.by_head(k))
    y = attention.attend(q, k, v, record.v_widths, record.scale, attn_mask=bias)
    return attention.out.layer(attention.out_norm(y)), k.mean(1)


def apply_tome(model: nn.Module, r: Schedule, *, proportional: bool = True) -> ToMe:
    """Wrap ``model`` so that it merges tokens; weights are shared, and the result is in evaluation mode.

    Args:
        model: a ViT that ``Arch.from_timm`` accepts, whose blocks have attention or no mixer; it is not changed.
        r: see ``tome_schedule``. No block merges more than half of its patches.
        proportional: attention weighs tokens by size. The paper turns it off for MAE's models.

    Raises:
        UserError: another family, a convolution or a token plan, which need the grid of patches; factors per token; or
            an impossible schedule.
    """
    arch = arch_of(model)
    _check(arch)
    return ToMe(model, arch, tome_schedule(arch.depth, r), proportional).eval()


def _check(arch: Arch) -> None:
    if not family_of(arch).supports("global_attention"):
        raise UserError(f"ToMe: {arch.source} is of family {arch.family!r}, whose windows need the grid of patches")
    if family_of(arch).supports("rotary"):
        raise UserError(
            f"ToMe: {arch.source} is of family {arch.family!r}, whose queries and keys are turned by the places of "
            "tokens, which merging by similarity does not keep; take method 'pmvit'"
        )
    if family_of(arch).supports("mixed_maps"):
        raise UserError(
            f"ToMe: {arch.source} is of family {arch.family!r}, whose heads' logits are mixed, so that sizes of merged "
            "tokens cannot be added to them; take method 'pmvit'"
        )
    if arch.parallel:
        raise UserError(
            f"ToMe: MLPs of {arch.source} read what attention reads, so nothing can be merged between them; take "
            "method 'pmvit'"
        )
    if arch.attn_pool is not None:
        raise UserError(f"ToMe: {arch.source} has an attention pool, which would have to weigh merged tokens")
    for i, block in enumerate(arch.blocks):
        for wrong, what in (
            (block.conv_kernel, f"mixer {block.mixer!r} needs the grid of patches"),
            (block.tokens is not None, "has a token plan, which needs the grid of patches"),
            (block.token_scale, "has factors per token"),
        ):
            if wrong:
                raise UserError(f"ToMe: blocks[{i}] {what}, which ToMe does not keep")


def tome_macs(arch: Arch, r: Schedule) -> int:
    """Count the MACs per image of ``apply_tome(build(arch), r)``, similarities included.

    Args:
        arch: the record of a ViT.
        r: the schedule, as for ``tome_schedule``.

    Raises:
        UserError: ToMe cannot serve the record, or the schedule is impossible.
    """
    _check(arch)
    (stage,) = arch.stages
    macs, n, prefix = outside_cost(arch).macs, arch.tokens, arch.prefix_tokens
    for block, count in zip(arch.blocks, tome_schedule(arch.depth, r), strict=True):
        macs += block_cost(arch, stage, dataclasses.replace(block, tokens=n, mlp=0)).macs
        merged = min(count, (n - prefix) // 2) if block.mixer == "attn" else 0
        macs += ((n + 1) // 2) * (n // 2) * block.qk if merged else 0
        n -= merged
        macs += n * 2 * block.mlp * stage.width
    return macs
