"""The divergence between the output distributions of a model before and after a change."""

from __future__ import annotations

import torch

__all__ = ["kl_divergence"]


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
