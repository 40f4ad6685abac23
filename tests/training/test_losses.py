from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import nn

from prunesweep.training.losses import cnn_distillation, full_model_kl


class Answers(nn.Module):
    """Gives the same logits to any images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.num_classes, self.in_chans = nn.Parameter(logits), logits.shape[1], 1
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def draw(seed: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_full_model_kl_is_timms_without_the_squared_temperature(temperature: float) -> None:
    student, teacher = draw(0), draw(1)
    task = LogitDistillationTask(
        Answers(student),
        Answers(teacher),
        temperature=temperature,
        distill_loss_weight=1.0,
        dtype=torch.float64,
        verbose=False,
    )
    timms = task(torch.zeros(6, 1, 2, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.long))["kd_loss"]
    got = full_model_kl(student, teacher, temperature)
    assert got.item() == pytest.approx(timms.item() / temperature**2, rel=1e-12)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    assert got.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-12)
    assert full_model_kl(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-15)


def test_cnn_distillation_reads_the_heads_as_it_is_told() -> None:
    logits, dist, cnn = draw(0), draw(1), draw(2)
    labels = torch.arange(6) % 5
    soft = F.one_hot(labels, 5) * 0.9 + 0.02
    hard = F.cross_entropy(dist, cnn.argmax(-1))
    mean = -(soft * ((logits + dist) / 2).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cnn_distillation(logits, dist, soft, cnn), 0.5 * mean + 0.5 * hard)
    own = F.cross_entropy(logits, labels)
    got = cnn_distillation(logits, dist, labels, cnn, alpha=0.2, base_on="cls")
    torch.testing.assert_close(got, 0.8 * own + 0.2 * hard)
    with pytest.raises(ValueError, match="base_on = 'dist': must be 'mean' or 'cls'"):
        cnn_distillation(logits, dist, labels, cnn, base_on="dist")
