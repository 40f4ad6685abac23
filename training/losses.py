"""Losses of distillation on logits; and NViT's on the two heads of a distilled ViT, as the sum of them that it is.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
eq. 8 and 9, in the form and with the weights of the code that its published models were trained with:

    pruning       cnn_distillation + 100 * full_model_kl(mean of both heads, T = 3)
    finetuning    cnn_distillation + 100 * mean of full_model_kl of each head (T = 20)

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["cnn_distillation", "full_model_kl", "hard_distillation"]


def full_model_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of logits B·K, mean over the batch, without a factor T².

    NViT averages over batch and classes, so its coefficient 1e5 for 1000 classes is 100 here. A ``Distill`` term of a
    recipe has the factor T²: 100 here is a weight of 100 / T² there.
    """
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def hard_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits B·K to the teacher's most likely class, mean over the batch (DeiT, arXiv 2012.12877)."""
    return F.cross_entropy(student, teacher.argmax(-1))


def cnn_distillation(
    logits: torch.Tensor,
    dist_logits: torch.Tensor,
    target: torch.Tensor,
    cnn_logits: torch.Tensor,
    *,
    alpha: float = 0.5,
    base_on: str = "mean",
) -> torch.Tensor:
    """(1 - alpha) * CE(base, target) + alpha * hard_distillation(distillation head, CNN).

    A recipe says the same with ``loss_weight = 1 - alpha`` and a hard ``Distill`` term of weight alpha on the token.

    Args:
        logits, dist_logits: of the class and the distillation head, B·K.
        target: labels B, or probabilities B·K (mixup, label smoothing).
        cnn_logits: the teacher's, B·K; only its most likely class counts.
        alpha: share of the distillation.
        base_on: ``mean`` of both heads is what answers the target, as in the code, or the class head alone (``cls``),
            as in the paper's eq. 8.
    """
    if base_on not in ("mean", "cls"):
        raise ValueError(f"base_on = {base_on!r}: must be 'mean' or 'cls'")
    base = (logits + dist_logits) / 2 if base_on == "mean" else logits
    return (1 - alpha) * F.cross_entropy(base, target) + alpha * hard_distillation(dist_logits, cnn_logits)
