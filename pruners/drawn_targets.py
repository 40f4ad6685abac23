"""Targets drawn from a model's own outputs, for scores that are made of gradients where there are no labels.

The KL divergence between a model and itself is at its minimum, so its gradient is zero and says nothing. With labels y
drawn from the model's p = softmax(logits), the gradient of -log p(y) has mean zero and the Fisher information as its
covariance, which is the Hessian of that divergence. Scores that square gradients, or take absolute values of them, then
measure how far the answers move when a unit goes: NViT's saliency, Taylor and Isomorphic importance, the tokens' scores
of Prune-and-Merge. UP-ViT's Fisher scores are made so by definition, and draw their labels here.

Features of a backbone without a head have targets f + e with random signs e, and the loss |f - target|^2 / 2: its
gradient is that of -e' f, whose covariance is the Hessian of half the squared error of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "draw_labels",
    "draw_signs",
    "image_digest",
    "target_loss",
    "uniform_of",
    "with_drawn_features",
    "with_drawn_labels",
]


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


@torch.no_grad()
def with_drawn_features(
    model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of the same images with one target each, the model's own features and a random sign on each.

    A target follows from ``seed`` and its image, as for ``with_drawn_labels``.

    Args:
        model: a backbone without a head, on its device; left in the mode it came in.
        batches: (images B·C·H·W, labels B); labels are not read.
        seed: of the signs.

    Returns:
        (images B·C·H·W, targets B·D) per batch, for ``target_loss``.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for x, _ in batches:
        features = model(x.to(device)).cpu()
        starts = [uniform_of(seed, image_digest(image)) for image in x]
        found.append((x, features + draw_signs(features.shape[1], 1, starts)[:, 0].to(features)))
    model.train(training)
    return found


def target_loss(outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the loss that scores are gradients of: cross-entropy, or half the squared error of features.

    Args:
        outputs: logits B·K, or features B·D.
        targets: labels B, or features B·D.
        reduction: over the images, ``mean`` or ``sum``.
    """
    if not targets.is_floating_point():
        return F.cross_entropy(outputs, targets, reduction=reduction)
    errors = 0.5 * (outputs - targets).square().sum(1)
    return errors.mean() if reduction == "mean" else errors.sum()


def draw_signs(width: int, number: int, uniform: Sequence[float]) -> torch.Tensor:
    """Draw vectors of random signs.

    Args:
        width: D, their length.
        number: n, vectors per image.
        uniform: a number in [0, 1) of every image's own, B numbers, from which its signs follow.

    Returns:
        1 and -1, (B, n, D) in float32.
    """
    rows = []
    for start in uniform:
        generator = torch.Generator().manual_seed(int(start * 2**53))
        rows.append(torch.randint(0, 2, (number, width), generator=generator) * 2.0 - 1)
    return torch.stack(rows)


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
