"""Exact accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["EVAL_BATCH", "evaluate"]

EVAL_BATCH = 256


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """``top1`` in percent and mean cross-entropy ``loss`` over all images; the model's mode is kept."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    correct = images = 0
    loss = 0.0
    for x, y in batches:
        logits, y = model(x.to(device)), y.to(device)
        correct += int((logits.argmax(-1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        images += len(y)
    model.train(training)
    if images == 0:
        raise ValueError("no images to evaluate on")
    return {"top1": 100 * correct / images, "loss": loss / images}
