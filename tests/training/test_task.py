from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from prunesweep.models import UserError
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.training import Recipe, load_recipe
from prunesweep.training.task import make_task

SHAPE = {"img_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dim": 8, "depth": 1, "num_heads": 2}


def model(seed: int, name: str = "vit_tiny_patch16_224", **options: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SHAPE, **options}).double().eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 4])


def test_soft_and_hard_terms(batch) -> None:
    student, teacher = model(0), model(1)
    x, y = batch
    terms = (
        {"kind": "soft", "weight": 2.0, "temperature": 3.0},
        {"kind": "hard", "weight": 0.5},
        {"kind": "feature", "weight": 0.25},
        {"kind": "soft", "weight": 0.0, "teacher": "no_such_model"},  # a term without weight costs nothing
    )
    recipe = Recipe(loss_weight=0.7, distill=terms)
    task = make_task(student, recipe, teacher).double()
    task.train()
    student.eval()
    found = task(x, y)
    z, t = student(x), teacher(x)
    kl = ((t / 3).softmax(-1) * ((t / 3).log_softmax(-1) - (z / 3).log_softmax(-1))).sum(-1).mean()
    pooled = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (student, teacher)]
    want = (
        0.7 * F.cross_entropy(z, y) + 2 * 9 * kl + 0.5 * F.cross_entropy(z, t.argmax(-1)) + 0.25 * F.mse_loss(*pooled)
    )
    torch.testing.assert_close(found["loss"], want)
    torch.testing.assert_close(found["output"], z)
    torch.testing.assert_close(found["task_loss"], F.cross_entropy(z, y))
    torch.testing.assert_close(found["kd_loss"], want - 0.7 * F.cross_entropy(z, y))
    assert torch.equal(NViTPruning([1.0]).loss(found), found["task_loss"])  # its first interval goes without teachers
    found["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_distillation_head_gets_its_term(batch) -> None:
    # both take images normalised alike, so the teacher sees x itself
    student, teacher = model(0, "deit_tiny_distilled_patch16_224"), model(1, "deit_tiny_patch16_224")
    x, y = batch
    task = make_task(student, Recipe(distill=({"kind": "hard", "on": "token", "weight": 0.5},)), teacher).double()
    task.train()
    found = task(x, y)
    features = student.forward_features(x)
    z, z_token = student.head(features[:, 0]), student.head_dist(features[:, 1])
    want = F.cross_entropy((z + z_token) / 2, y) + 0.5 * F.cross_entropy(z_token, teacher(x).argmax(-1))
    torch.testing.assert_close(found["loss"], want)
    task.eval()
    assert student(x).shape == (4, 5)


@pytest.mark.parametrize(
    ("term", "teacher", "message"),
    [
        ({}, None, "there is no source model to learn from"),
        ({"teacher": "resnet5O"}, None, "neither 'source' nor a timm model"),
        ({}, {"num_classes": 7}, "teacher 'source' has 7 classes, the model 5"),
        ({"on": "token"}, {}, "the model has no distillation head"),
    ],
)
def test_what_is_missing_is_named(term: dict, teacher: dict | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe = load_recipe("quick", {"distill": [term]})
        make_task(model(0), recipe, None if teacher is None else model(1, **teacher))


def test_features_of_unequal_width(batch) -> None:
    task = make_task(model(0), Recipe(distill=({"kind": "feature"},)), model(1, embed_dim=16)).double()
    with pytest.raises(UserError, match="the model has 8 features, teacher 'source' 16"):
        task(*batch)


def test_features_of_two_teachers(batch, monkeypatch: pytest.MonkeyPatch) -> None:
    other = model(2)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: other)
    student, teacher = model(0), model(1)
    terms = ({"kind": "feature"}, {"kind": "feature", "teacher": "vit_tiny_patch16_224", "weight": 2.0})
    task = make_task(student, Recipe(distill=terms), teacher).double()
    x, y = batch
    pooled = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (student, teacher, other)]
    want = F.mse_loss(pooled[0], pooled[1]) + 2 * F.mse_loss(pooled[0], pooled[2])
    torch.testing.assert_close(task(x, y)["kd_loss"], want)
