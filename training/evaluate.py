"""Exact accuracy, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .world import World

__all__ = ["EVAL_BATCH", "evaluate"]

EVAL_BATCH = 256


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World | None = None
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and mean cross-entropy ``loss`` over all images; the model's mode is kept.

    With a ``world``, ``batches`` are this worker's share, and all workers get the result over all shares.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # right, right among five, loss, images
    for x, y in batches:
        logits, y = model(x.to(device)), y.to(device)
        best = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss, y.new_tensor(len(y))]).double()
    model.train(training)
    right, among_five, loss, images = (world or World()).total(sums).tolist()
    if images == 0:
        raise ValueError("no images to evaluate on")
    return {"top1": 100 * right / images, "top5": 100 * among_five / images, "loss": loss / images}
