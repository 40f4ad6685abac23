"""Second-order scores: the cost of removing a unit, from gradients with respect to gates.

KL(source || changed) has a zero and a minimum at no change, so its first-order term vanishes and, with a gate m on the
unit (1 in the source) and p the source's distribution of labels y,

    score = 1/2 · sum over images of E_{y ~ p} [ (d log p(y) / d m)² ]

the expected Fisher information of the gate, with labels drawn from the model. Every image has gates of its own, so one
backward pass per label gives every unit's gradient for every image. Of features f in place of answers, the score is the
second-order term of half their squared error, with random signs e in place of labels:

    score = 1/2 · sum over images of E_e [ (d e'f / d m)² ]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from prunesweep.pruners.drawn_targets import draw_labels, draw_signs

from .forward import Forward

__all__ = ["fisher_sums"]


def fisher_sums(
    forward: Forward, images: torch.Tensor, units: Mapping[str, int], labels: int | str, uniform: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Compute the scores of one batch, summed over its images, float64 on the CPU.

    Args:
        forward: the model.
        images: B·C·H·W.
        units: the number of units of every vector to be scored.
        labels: drawn per image, or "all" for the exact expectation over the classes; of features, random sums of them,
            or "all" for each of them.
        uniform: a number in [0, 1) of every image's own, from which its labels follow.
    """
    shape = {"dtype": images.dtype, "device": images.device}
    with torch.enable_grad():
        gates = {name: torch.ones(len(images), 1, size, **shape, requires_grad=True) for name, size in units.items()}  # type: ignore[call-overload]
        output = forward(images, gates).double()
        values = output if forward.arch.headless else output.log_softmax(-1)
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in units.items()}
    draws = _signs if forward.arch.headless else _labels
    for direction, weight in draws(values.detach(), labels, uniform):
        gradients = torch.autograd.grad(values, list(gates.values()), direction, retain_graph=True)
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += 0.5 * (weight @ gradient[:, 0].double().square()).cpu()
    return sums


def _labels(
    log_p: torch.Tensor, labels: int | str, uniform: Sequence[float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield labels as rows of (B, K) that are 1 there, with weights (B,) that sum to 1."""
    p = log_p.exp()
    if labels == "all":
        for k in range(p.shape[1]):
            yield _one_hot(p, torch.full(p.shape[:1], k, device=p.device)), p[:, k]
    else:
        drawn = draw_labels(p, int(labels), uniform)
        for y in drawn.unbind(1):
            yield _one_hot(p, y), torch.full_like(p[:, 0], 1 / drawn.shape[1])


def _one_hot(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p).scatter(1, y[:, None], 1)


def _signs(
    features: torch.Tensor, labels: int | str, uniform: Sequence[float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield directions (B, D) with weights (B,), by which squared derivatives add up to those of all features."""
    if labels == "all":
        for direction in torch.eye(features.shape[1]).to(features):
            yield direction.expand_as(features), torch.ones_like(features[:, 0])
    else:
        drawn = draw_signs(features.shape[1], int(labels), uniform).to(features)
        for signs in drawn.unbind(1):
            yield signs, torch.full_like(features[:, 0], 1 / drawn.shape[1])
