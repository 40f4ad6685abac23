"""Exact accuracy and perplexity, whatever the number of workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models.families.lm import LanguageModel

from .data import Data
from .data.text import IGNORED
from .world import World

__all__ = ["EVAL_BATCH", "EvalMetrics", "chance_warning", "evaluate"]

EVAL_BATCH = 256
LOGITS_AT_A_TIME = 2**26  # of a language model


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World | None = None
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and mean cross-entropy ``loss`` over all images; the model's mode is kept.

    Of a language model every word that is to be predicted counts, and there is ``ppl``, its perplexity: exp(loss).

    With a ``world``, ``batches`` are this worker's share, and all workers get the result over all shares.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # right, right among five, loss, images
    for logits, y in _answers(model, batches, device):
        best = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss, y.new_tensor(len(y))]).double()
    model.train(training)
    right, among_five, loss, images = (world or World()).all_reduce(sums).tolist()
    if images == 0:
        raise ValueError("no images to evaluate on")
    found = {"top1": 100 * right / images, "top5": 100 * among_five / images, "loss": loss / images}
    return {**found, "ppl": math.exp(loss / images)} if isinstance(model, LanguageModel) else found


class EvalMetrics(NamedTuple):
    """What is kept of an evaluation: ``top1`` in percent and, of a language model, ``ppl``, the perplexity."""

    top1: float
    ppl: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> EvalMetrics:
        """Read ``evaluate``'s result, or a saved model's provenance."""
        return cls(float(found["top1"]), found.get("ppl"))

    def as_dict(self) -> dict[str, float]:
        """Return ``top1`` and, where there is one, ``ppl``."""
        return {"top1": self.top1} if self.ppl is None else {"top1": self.top1, "ppl": self.ppl}

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %" if self.ppl is None else f"ppl {self.ppl:.2f}"


def chance_warning(model: nn.Module, data: Data, found: EvalMetrics) -> str | None:
    """What is likely wrong where a model of images answers no better than by chance; None where it does.

    Args:
        model: the model that was evaluated, whose ``pretrained_cfg`` may have ``label_names``.
        data: the data it was evaluated on.
        found: the result.
    """
    info = data.info
    chance = 100 / info.num_classes
    if isinstance(model, LanguageModel) or found.top1 > chance:
        return None
    said = f"top-1 of {found.top1:.2f} % is no better than chance ({chance:.2f} % for {info.num_classes} classes)"
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if info.classes and names and set(names) != set(info.classes):
        return (
            f"{said}: the model's classes are named otherwise ({names[0]}, ..) than the data's ({info.classes[0]}, ..)"
        )
    if info.classes and not names:
        return (
            f"{said}: the model may have been trained with its classes in another order than {info.classes[0]} .. "
            f"{info.classes[-1]}; it has no names of its own. data.class_order = 'codepoint' is torchvision's order"
        )
    return f"{said}: it may be untrained, or trained on other data or with other preprocessing"


def _answers(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (B, K) and labels (B,); of a language model, some words at a time."""
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        if not isinstance(model, LanguageModel):
            yield model(x), y
            continue
        wanted = y != IGNORED
        hidden, words = model.hidden(x)[wanted], y[wanted]
        step = max(1, LOGITS_AT_A_TIME // model.num_classes)
        for own in range(0, len(words), step):
            yield model.log_prob(hidden[own : own + step]), words[own : own + step]
