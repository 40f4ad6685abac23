"""Losses of distillation on logits, and NViT's loss on the two heads of a distilled ViT, which is a sum of them.

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
    """Return KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, without a factor T^2.

    NViT averages over batch and classes, so its coefficient 1e5 for 1000 classes is 100 here. A ``Distill`` term of a
    recipe has the factor T^2: a coefficient of 100 here is a weight of 100 / T^2 there.

    Args:
        student: logits B·K.
        teacher: logits B·K.
        temperature: T.
    """
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def hard_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy to the teacher's most likely class, mean over the batch.

    Source: Touvron et al., DeiT (arXiv 2012.12877), equation 3.

    Args:
        student: logits B·K.
        teacher: logits B·K.
    """
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
    """Return (1 - alpha) * CE(base, target) + alpha * hard_distillation(dist_logits, cnn_logits).

    A recipe expresses the same by ``loss_weight = 1 - alpha`` and a hard ``Distill`` term of weight alpha on the token.

    Args:
        logits: of the class head, B·K.
        dist_logits: of the distillation head, B·K.
        target: labels B, or probabilities B·K (mixup, label smoothing).
        cnn_logits: the teacher's, B·K; only its most likely class counts.
        alpha: weight of the distillation, in [0, 1].
        base_on: ``mean`` takes the mean of both heads as base, as in the code; ``cls`` takes the class head alone, as
            in the paper's eq. 8.

    Raises:
        ValueError: ``base_on`` is neither.
    """
    if base_on not in ("mean", "cls"):
        raise ValueError(f"base_on = {base_on!r}: must be 'mean' or 'cls'")
    base = (logits + dist_logits) / 2 if base_on == "mean" else logits
    return (1 - alpha) * F.cross_entropy(base, target) + alpha * hard_distillation(dist_logits, cnn_logits)
