"""Which blocks a model misses least: measured by leaving them out.

Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers" (UP-ViT, arXiv 2111.15127): the importance of
a block is the KL divergence, source first, between the output distributions with and without it, summed over a set of
unlabelled images. Here progressively: the least important block goes, and the others are measured again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from prunesweep.models import UserError, arch_of

from .scores import Scores

__all__ = ["kl_divergence", "score_depth"]


def kl_divergence(source: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """KL(softmax(source) || softmax(changed)) of logits B·K, per image, in float64.

    With d the change of the logits and p the source's distribution, log E_p[exp(d - E_p[d])]; that form does not lose a
    small divergence to cancellation, as the difference of two logarithms would.
    """
    source = source.double()
    p = source.softmax(-1)
    d = changed.double() - source
    d = d - (p * d).sum(-1, keepdim=True)
    series = d * d * (0.5 + d / 6 + d * d / 24)
    excess = torch.where(d.abs() < 1e-3, series, torch.expm1(d) - d)
    return torch.log1p((p * excess).sum(-1))


@torch.no_grad()
def score_depth(
    model: nn.Module, batches: Iterable[torch.Tensor], *, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Importance ``depth`` of every block; ascending order is the order in which to drop them.

    Takes L(L+1)/2 - 1 evaluations of the images for L blocks. An entry is the divergence at the time when its block
    went, made to rise along the order; the block that is never dropped gets infinity.

    Args:
        model: a ViT that ``Arch.from_timm`` accepts; left in the mode it came in.
        batches: images B·C·H·W.
        progress: called with (evaluations done, evaluations in all).

    Raises:
        UserError: the model is not a ViT.
    """
    arch = arch_of(model)
    if arch.family != "vit":
        raise UserError(f"{arch.source} is of family {arch.family!r}: blocks can be scored for family 'vit'")
    device = next(model.parameters()).device
    images = [x.to(device) for x in batches]
    blocks = list(model.blocks)  # type: ignore[arg-type]
    training = model.training
    model.eval()
    logits = [model(x) for x in images]
    importance = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
    alive, done, last = list(range(len(blocks))), 0, 0.0
    total = len(blocks) * (len(blocks) + 1) // 2 - 1
    try:
        while len(alive) > 1:
            trials = {}
            for b in alive:
                model.blocks = nn.Sequential(*(blocks[i] for i in alive if i != b))
                trials[b] = sum(float(kl_divergence(z, model(x)).sum()) for x, z in zip(images, logits, strict=True))
                done += 1
                if progress:
                    progress(done, total)
            least = min(alive, key=lambda b: (trials[b], b))
            # strictly rising, so that sorting the vector gives the order back
            last = max(trials[least], last + torch.finfo(torch.float64).eps * max(last, 1.0))
            importance[least] = last
            alive.remove(least)
    finally:
        model.blocks = nn.Sequential(*blocks)
        model.train(training)
    provenance = {"method": "depth_kl", "arch": arch.hash, "images": sum(len(x) for x in images)}
    return Scores({"depth": importance}, provenance)
