"""Labels drawn from a model's own answers, for scores that are made of gradients where data have no labels.

The KL divergence between a model and itself is at its minimum, so its gradient is zero and says nothing. With labels y
drawn from the model's p = softmax(logits), the gradient of -log p(y) has mean zero and the Fisher information as its
covariance, which is the Hessian of that divergence. Scores that square gradients, or take absolute values of them, then
measure how far the answers move when a unit goes: NViT's saliency, Taylor and Isomorphic importance, the tokens' scores
of Prune-and-Merge. UP-ViT's Fisher scores are made so by definition, and draw their labels here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["draw_labels", "image_digest", "uniform_of", "with_drawn_labels"]


@torch.no_grad()
def with_drawn_labels(
    model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of the same images with one label each, drawn from the model's own answers.

    A label follows from ``seed`` and its image, so neither the order nor the batches matter.

    Args:
        model: a classifier, on its device; left in the mode it came in.
        batches: (images B·C·H·W, labels B); labels are not read.
        seed: of the draw.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for x, _ in batches:
        p = model(x.to(device)).double().softmax(-1)
        starts = [uniform_of(seed, image_digest(image)) for image in x]
        found.append((x, draw_labels(p, 1, starts)[:, 0].cpu()))
    model.train(training)
    return found


def draw_labels(p: torch.Tensor, number: int, uniform: Sequence[float]) -> torch.Tensor:
    """Draw labels distributed as ``p``, by systematic sampling.

    They lie at equal steps of the distribution function from a random start, so that together they are closer to ``p``
    than independent draws would be.

    Args:
        p: probabilities (B, K).
        number: n, labels per image.
        uniform: the start in [0, 1) of every image, B numbers.

    Returns:
        Labels (B, n), int64.
    """
    start = torch.tensor(uniform, dtype=p.dtype, device=p.device)[:, None]
    steps = (torch.arange(number, dtype=p.dtype, device=p.device) + start) / number
    return torch.searchsorted(p.cumsum(1), steps, right=True).clamp(max=p.shape[1] - 1)


def image_digest(image: torch.Tensor) -> int:
    """Return a number below 2^64 that follows from an image's values."""
    content = image.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def uniform_of(seed: int, digest: int) -> float:
    """Derive a number in [0, 1) from a seed and an image's digest."""
    mixed = hashlib.blake2b(f"{seed} {digest}".encode(), digest_size=8).digest()
    return (int.from_bytes(mixed, "big") >> 11) / 2**53
