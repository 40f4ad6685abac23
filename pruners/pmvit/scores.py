"""Prune-and-Merge's scores: the importance of every patch for the attention of every block, which plans are made from.

Source: Mao et al., "Prune and Merge: Efficient Token Compression for Vision Transformer with Spatial Information
Preserved", IEEE TMM 2025 (arXiv 2503.23455), in the form of its released code. With A the attention (B, H, N, N) after
softmax and the loss the mean cross-entropy of a batch,

    v_j = |1 / (B H N) * sum over images, heads and queries of (dL/dA * A) at key j|,    S = sum of v over batches

which is a first-order estimate of what the loss would change by without key j. A meets the loss only through A V, so
the sum over queries is V_j . dL/dV_j: no attention map is needed, and attention stays fused.

Different from that code: no optimizer step between batches, no loss scale in the scores, batches that are not finite
are left out, all prefix tokens are, and a batch is that of all workers together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, block_views
from prunesweep.models.errors import nearest
from prunesweep.models.families.views import AttentionView
from prunesweep.pruners.drawn_targets import target_loss
from prunesweep.pruners.scores import Scores
from prunesweep.pruners.served import PMVIT as FAMILIES

__all__ = ["FAMILIES", "IMPORTANCES", "KINDS", "scorable", "score", "served"]

KINDS = ("tokens",)  # vectors are blocks.I.tokens, one entry per patch in raster order
GOLDEN_RATIO = (5**0.5 - 1) / 2
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[int, int], None]
Outputs = dict[nn.Module, torch.Tensor]


def scorable(arch: Arch) -> tuple[int, ...]:
    """List the blocks whose tokens can be scored: those with attention, over all tokens."""
    return tuple(i for i, block in enumerate(arch.blocks) if block.mixer == "attn" and block.tokens is None)


def score(
    model: nn.Module,
    batches: Batches,
    *,
    importance: str = "grad_attn",
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Compute raw scores of every patch for every block with attention: vectors ``blocks.I.tokens``, (P,) each.

    Scores sum over batches after an absolute value was taken: compare plans by scores of equally many batches of equal
    size. In a process group, every worker brings its share of every batch, and all get the same scores.

    Args:
        model: a ViT that ``Arch.from_timm`` accepts, not planned yet; left in the mode it came in, without gradients.
        batches: (images B·C·H·W, labels B); without labels, targets of ``pruners.drawn_targets``.
        importance: ``grad_attn`` is the method's; ``cls_attn``: attention of the class token, mean over heads and
            images (EViT, arXiv 2202.07800); ``random``: uniform in [0, 1); ``uniform``: the same in all blocks, such
            that the k best patches are spread evenly over the raster, for every k.
        seed: of ``random``.
        progress: called with (batches done, batches in all).

    Raises:
        UserError: an unknown importance, another family, a model that is planned already or has no attention,
            ``cls_attn`` without a class token, or no batch that gives finite scores.
    """
    arch = arch_of(model)
    _check(arch, importance)
    blocks = scorable(arch)
    patches, skipped = arch.tokens - arch.prefix_tokens, 0
    if importance in _MEASURES:
        if not batches:
            raise ValueError("no batches to score on")
        raw, skipped = _sum_over_batches(model, arch, blocks, batches, _MEASURES[importance], progress)
    elif importance == "random":
        generator = torch.Generator().manual_seed(seed)
        raw = torch.rand(len(blocks), patches, generator=generator, dtype=torch.float64)
    else:
        raw = (torch.arange(1, patches + 1, dtype=torch.float64) * GOLDEN_RATIO % 1).expand(len(blocks), -1)
    vectors = {f"blocks.{i}.tokens": row.clone() for i, row in zip(blocks, raw, strict=True)}
    images = sum(len(x) for x, _ in batches)  # of this worker
    facts = {"method": "pmvit", "importance": importance, "arch": arch.hash, "batches": len(batches)}
    return Scores(vectors, {**facts, "skipped": skipped, "images": images, "seed": seed})


def _check(arch: Arch, importance: str) -> None:
    if importance not in IMPORTANCES:
        hint = nearest(importance, IMPORTANCES)
        raise UserError(f"importance = {importance!r}: must be one of {', '.join(IMPORTANCES)}. {hint}".strip())
    if arch.family not in FAMILIES:
        raise UserError(f"{arch.source} is of family {arch.family!r}: Prune-and-Merge plans tokens of {served()}")
    planned = [i for i, block in enumerate(arch.blocks) if block.tokens is not None]
    if planned:
        raise UserError(f"blocks {planned} have a token plan already: score the model that has none, and plan anew")
    if not scorable(arch):
        raise UserError(f"{arch.source} has no block with attention: there is nothing to score")
    if importance == "cls_attn" and not arch.class_token:
        raise UserError("importance = 'cls_attn': the model has no class token; use 'grad_attn'")


def served() -> str:
    """Say in words which families Prune-and-Merge can serve."""
    return f"family {' or '.join(map(repr, FAMILIES))}"


def _sum_over_batches(
    model: nn.Module, arch: Arch, blocks: Sequence[int], batches: Batches, measure: Any, progress: Progress | None
) -> tuple[torch.Tensor, int]:
    """Sum over batches of |measure| (L, P), and the number of batches left out because one entry was not finite."""
    device, training = next(model.parameters()).device, model.training
    total = torch.zeros(len(blocks), arch.tokens - arch.prefix_tokens, dtype=torch.float64)
    skipped = 0
    model.eval()
    try:
        views = [view.attention for view in block_views(model, arch) if view.index in blocks and view.attention]
        with _outputs_of(views) as outputs:
            for done, (x, y) in enumerate(batches, 1):
                outputs.clear()
                found = measure(model, arch, views, outputs, x.to(device), y.to(device)).abs().cpu()
                if torch.isfinite(found).all():
                    total += found
                else:
                    skipped += 1
                if progress:
                    progress(done, len(batches))
    finally:
        model.train(training)
    if skipped == len(batches):
        raise UserError(f"all {skipped} batches gave scores that are not finite: does the model give finite logits?")
    return total, skipped


@contextlib.contextmanager
def _outputs_of(views: Sequence[AttentionView]) -> Iterator[Outputs]:
    """Return the outputs of the query, key and value layers in the last forward pass, (B, N, rows) by layer."""
    outputs: Outputs = {}

    def keep(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        kept = output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
        outputs[layer] = kept
        return kept

    handles = [part.layer.register_forward_hook(keep) for view in views for part in view.inputs]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _grad_attn(
    model: nn.Module, arch: Arch, views: Sequence[AttentionView], outputs: Outputs, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Compute (L, P): mean over images, heads and queries of dL/dA * A, L the mean loss; a factor on V cancels."""
    with torch.enable_grad():
        loss = target_loss(model(x), y, reduction="sum")
    values = [outputs[view.v.layer] for view in views]
    gradients = torch.autograd.grad(loss, values)
    rows = []
    for view, output, gradient in zip(views, values, gradients, strict=True):
        v = view.v.rows
        by_token = (output.detach()[..., v] * gradient[..., v]).sum((0, 2), dtype=torch.float64)
        rows.append(by_token[arch.prefix_tokens :] / (view.record.heads * arch.tokens))
    images, total = _over_workers(len(x), torch.stack(rows))
    return total / images**2


@torch.no_grad()
def _cls_attn(
    model: nn.Module, arch: Arch, views: Sequence[AttentionView], outputs: Outputs, x: torch.Tensor, _: torch.Tensor
) -> torch.Tensor:
    """Compute (L, P): attention of the class token, mean over images and heads."""
    model(x)
    rows = []
    for view in views:
        block, scale = view.record, view.token_scale
        q, k = (outputs[part.layer] if scale is None else outputs[part.layer] * scale for part in (view.q, view.k))
        q, k = q[:, :1, view.q.rows], k[..., view.k.rows]
        q, k = view.turned(view.q_norm(view.by_head(q))), view.turned(view.k_norm(view.by_head(k)))
        logits = torch.einsum("bhqe,bhne->bhn", q, k) * block.scale
        attention = logits.softmax(-1).sum(0, dtype=torch.float64).mean(0)
        rows.append(attention[arch.prefix_tokens :])
    images, total = _over_workers(len(x), torch.stack(rows))
    return total / images


def _over_workers(images: int, rows: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sum the number of images, and ``rows``, over all workers."""
    if not (dist.is_available() and dist.is_initialized()):
        return images, rows
    packed = torch.cat([rows.flatten(), rows.new_tensor([images])])
    dist.all_reduce(packed)
    return packed[-1].item(), packed[:-1].view_as(rows)


_MEASURES: dict[str, Callable[..., torch.Tensor]] = {"grad_attn": _grad_attn, "cls_attn": _cls_attn}
IMPORTANCES = (*_MEASURES, "random", "uniform")
