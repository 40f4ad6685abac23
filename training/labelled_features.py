"""What features are worth where images have labels: nearest neighbours and a linear probe, without finetuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import UserError
from prunesweep.models.precision import widened

from .data import NO_LABEL, Data
from .evaluation import EVAL_BATCH

__all__ = ["QUALITIES", "features_and_labels", "knn_answers", "labelled_top1", "probe_answers"]

QUALITIES = ("knn", "probe")
NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the probe's squared weights
HELD_OUT = 5  # every fifth training image chooses the penalty
AT_A_TIME = 2**24  # similarities


def labelled_top1(
    model: nn.Module, data: Data, quality: str, batches: Iterable[Any] | None = None, *, bank: int | None = None
) -> dict[str, float]:
    """Measure a backbone by the labels of images: features of the training split answer for those of another one.

    Args:
        model: gives features (B, D); it is not changed.
        data: with labels; training images are prepared as for evaluation.
        quality: ``knn``, the weighted vote of the nearest training images, or ``probe``, a linear classifier.
        batches: (images, labels) to answer for; the validation split by default.
        bank: number of training images, at most, evenly drawn; all by default.

    Returns:
        ``knn_top1`` or ``probe_top1`` in percent, and ``images``, the number of images answered for.

    Raises:
        UserError: no image has a label, or a feature is not finite.
    """
    if not data.info.labelled:
        raise UserError(f"--quality {quality}: the data have no labels; compare with a source, --teacher SOURCE")
    drawn = range(0, data.train_images, -(-data.train_images // (bank or data.train_images)))
    known = features_and_labels(model, data.plain_loader(drawn, EVAL_BATCH))
    queries, labels = features_and_labels(model, data.val_loader(EVAL_BATCH) if batches is None else batches)
    for split, (features, _) in (("training", known), ("validation", (queries, labels))):
        if not len(features) or not bool(torch.isfinite(features).all()):
            reason = "has no labelled images" if not len(features) else "gives features that are no numbers"
            raise UserError(f"--quality {quality}: the {split} split {reason}")
    found = (knn_answers if quality == "knn" else probe_answers)(*known, queries)
    return {f"{quality}_top1": 100 * float((found == labels).double().mean()), "images": len(labels)}


@torch.no_grad()
def features_and_labels(model: nn.Module, batches: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the features (n, D) in float32 and the labels (n,) of all labelled images, on the CPU."""
    given, model = model.training, widened(model)
    like = next(model.parameters())
    features, labels = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.long)]
    model.eval()
    for x, y in batches:
        known = y != NO_LABEL
        if bool(known.any()):
            features.append(model(x[known].to(like)).float().cpu())
            labels.append(y[known].cpu())
    model.train(given)
    return torch.cat(features[1:] or features), torch.cat(labels)


def knn_answers(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Answer by the vote of the 20 nearest features, each weighing exp(cosine / 0.07).

    Source: Wu et al., arXiv 1805.01978, section 3.4, with the numbers of DINO, arXiv 2104.14294.

    Args:
        bank: features (n, D) that are known.
        labels: theirs, (n,).
        queries: features (m, D).

    Returns:
        Labels (m,).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes, step = int(labels.max()) + 1, max(1, AT_A_TIME // len(bank))
    found = []
    for part in torch.split(queries, step):
        near = (part @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, labels[near.indices], ((near.values - 1) / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def probe_answers(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Answer by logistic regression on standardised features; every fifth image of the bank chooses its penalty.

    Args:
        bank: features (n, D) that are known.
        labels: theirs, (n,).
        queries: features (m, D).

    Returns:
        Labels (m,).
    """
    mean, spread = bank.mean(0), bank.std(0, unbiased=False).clamp_min(1e-6)
    bank, queries = (bank - mean) / spread, (queries - mean) / spread
    classes = int(labels.max()) + 1
    held_out = torch.arange(len(bank)) % HELD_OUT == HELD_OUT - 1
    losses = []
    for penalty in PENALTIES if bool(held_out.any()) else PENALTIES[:1]:
        weight, bias = _fit(bank[~held_out], labels[~held_out], classes, penalty)
        losses.append(float(F.cross_entropy(bank[held_out] @ weight + bias, labels[held_out])))
    weight, bias = _fit(bank, labels, classes, PENALTIES[losses.index(min(losses))])
    return (queries @ weight + bias).argmax(1)


def _fit(x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise the mean cross-entropy plus ``penalty`` times the squared weights, by L-BFGS from 0."""
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
