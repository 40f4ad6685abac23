"""How far the outputs of a model are from those before a change: distributions of answers, or features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["FeatureQuality", "feature_error", "feature_quality", "feature_sums", "kl_divergence"]


def kl_divergence(source: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Compute KL(softmax(source) || softmax(changed)) per image, in nats and float64.

        KL = log E_p[exp(d - E_p[d])],    d = changed - source,    p = softmax(source)

    This form does not lose a small divergence to cancellation, as the difference of two logarithms would.

    Args:
        source: logits (..., K).
        changed: logits (..., K).

    Returns:
        (...,).
    """
    source = source.double()
    p = source.softmax(-1)
    d = changed.double() - source
    d = d - (p * d).sum(-1, keepdim=True)
    series = d * d * (0.5 + d / 6 + d * d / 24)
    excess = torch.where(d.abs() < 1e-3, series, torch.expm1(d) - d)
    return torch.log1p((p * excess).sum(-1))


def feature_error(source: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Compute half the squared distance of features (..., D) per image, in float64, (...,)."""
    return 0.5 * (changed.double() - source.double()).square().sum(-1)


class FeatureQuality(NamedTuple):
    """How close features are to those of a source.

    Args:
        cosine: mean over images of the cosine between both, the source's mean feature taken off.
        relative_error: squared distance between both, as a share of the variance of the source's.
    """

    cosine: float
    relative_error: float

    @classmethod
    def of(cls, sums: torch.Tensor, images: int) -> FeatureQuality:
        """Take the means of ``feature_sums`` over so many images."""
        cosine, error, energy = sums.tolist()
        return cls(cosine / images, error / energy if energy else math.inf if error else 0.0)


def feature_quality(source: torch.Tensor, changed: torch.Tensor) -> FeatureQuality:
    """Compare features of the same images, at least two.

    Args:
        source: features (B, D).
        changed: features (B, D).
    """
    return FeatureQuality.of(feature_sums(source, changed, source.double().mean(0)), len(source))


def feature_sums(source: torch.Tensor, changed: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Sum over images: the centred cosines, the squared distances, the squared lengths of centred source features.

    Args:
        source: features (B, D).
        changed: features (B, D).
        mean: of the source's features over all images, (D,).

    Returns:
        (3,) in float64; sums of several parts of the images add up.
    """
    a, b = source.double() - mean, changed.double() - mean
    return torch.stack([F.cosine_similarity(a, b).sum(), (a - b).square().sum(), a.square().sum()])
