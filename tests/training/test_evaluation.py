"""Figures of models whose answers are no numbers, or certain of what is wrong."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest
import torch
from scipy.stats import binomtest

from prunesweep.models import UserError
from prunesweep.training import EVAL_BATCH, Compared, EvalMetrics, chance_warning, evaluate, evaluate_all, open_data
from tests.generate import random_arch, random_images, random_model
from tests.search.helpers import ARCH
from tests.training.data.test_text import tiny_data, tiny_model


def test_answers_that_are_no_numbers_have_no_accuracy() -> None:
    """The order of NaNs is the order of the classes, so a ninth of the digits would be right."""
    data = open_data("digits")
    arch = random_arch(Random(0), "vit")
    images = torch.randn(6, arch.in_chans, *arch.img_size)
    batches = [(images[:3], torch.zeros(3, dtype=torch.long)), (images[3:], torch.zeros(3, dtype=torch.long))]
    model = random_model(arch, 0, torch.float32)
    assert math.isfinite(evaluate(model, batches)["top1"])
    batches[1][0][0] = math.nan
    found = evaluate(model, batches)
    assert {name for name, value in found.items() if math.isnan(value)} == {"top1", "balanced", "loss"}
    assert "an answer of the model is NaN" in (chance_warning(model, data, EvalMetrics.of(found)) or "")


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_perplexity_too_large_for_a_float_is_infinite(scale: float) -> None:
    data = tiny_data()
    model = tiny_model(data)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= scale
    found = evaluate(model, data.val_loader(EVAL_BATCH))
    assert found["ppl"] == (math.exp(found["loss"]) if scale == 1 else math.inf)
    assert math.isfinite(found["loss"])


@pytest.mark.parametrize("with_source", [True, False])
def test_models_measured_together_are_measured_as_alone(with_source: bool) -> None:
    arch = random_arch(Random(0), "vit")
    source, small = (random_model(arch, seed, torch.float32).eval() for seed in (0, 1))
    small.train()
    images, labels = torch.randn(7, arch.in_chans, *arch.img_size), torch.arange(7) % arch.num_classes
    batches, calls = list(zip(images.split(3), labels.split(3), strict=True)), list[int]()
    source.register_forward_hook(lambda *_: calls.append(1))
    compared = source if with_source else None
    found = evaluate_all([source, small], batches, source=compared)
    assert len(calls) == len(batches)
    assert found == [evaluate(model, batches, source=compared) for model in (source, small)]
    assert found[0] != found[1]
    assert small.training
    if with_source:
        assert (found[0]["kl"], found[0]["agreement"]) == (0, 100)


def test_language_models_measured_together_are_measured_as_alone() -> None:
    data = tiny_data()
    models = [tiny_model(data), tiny_model(data)]
    with torch.no_grad():
        for weight in models[1].parameters():
            weight *= 0.5
    batches = list(data.val_loader(EVAL_BATCH))
    for own, model in zip(evaluate_all(models, batches, source=models[0]), models, strict=True):
        assert own == pytest.approx(evaluate(model, batches, source=models[0]), rel=1e-6)


@pytest.mark.parametrize(("right", "images"), [(441, 450), (0, 7), (7, 7), (1, 1)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, images: int) -> None:
    interval = EvalMetrics(100 * right / images, images=images).interval
    assert interval is not None
    wanted = binomtest(right, images).proportion_ci(method="wilson")
    assert [end / 100 for end in interval] == pytest.approx([wanted.low, wanted.high], abs=1e-6)


def test_an_interval_is_of_an_accuracy_that_was_measured() -> None:
    """Older figures have no number of images; a perplexity is no share, and NaN lies nowhere."""
    assert EvalMetrics(98.0).interval is None
    assert EvalMetrics(30.0, ppl=80.0, images=500).interval is None
    assert EvalMetrics(math.nan, images=500).interval is None
    assert EvalMetrics(None, agreement=90.0, images=100).with_interval().keys() >= {"agreement_low", "agreement_high"}


def test_a_source_is_asked_once_for_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data("digits")
    model, source = (random_model(ARCH, seed, torch.float32) for seed in (0, 1))
    asked: list[int] = []
    source.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    batches = [(x, y) for x, y in data.val_loader(EVAL_BATCH)]
    wanted = evaluate(model, batches, source=source)
    assert (wanted["images"], sum(asked)) == (450, 450)
    compared = Compared(batches, source)
    asked.clear()
    assert evaluate(model, compared) == evaluate(model, compared) == wanted
    assert sum(asked) == 450
    monkeypatch.setattr("prunesweep.training.evaluation.LOGITS_KEPT", 2560)  # room for one batch
    small = Compared(batches, source)
    assert evaluate(model, small) == evaluate(model, small) == wanted
    assert sum(asked) == 450 + 450 + 194


def test_features_are_compared_in_one_pass_however_they_come() -> None:
    """With the source among the models, beside them, or its features with the images; batches do not matter."""
    arch = dataclasses.replace(random_arch(Random(0), "vit"), num_classes=0)
    source, small = (random_model(arch, seed).eval() for seed in (0, 1))
    images = random_images(arch, 0, batch=9)
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images.split(4)]
    itself, found = evaluate_all([source, small], batches, source=source)
    assert (itself["cosine"], itself["relative_error"], itself["images"]) == (pytest.approx(1), 0, 9)
    with torch.no_grad():
        a, b = source(images), small(images)
    assert found["relative_error"] == pytest.approx(((a - b).square().sum() / (a - a.mean(0)).square().sum()).item())
    assert found == evaluate(small, batches, source=source) == evaluate(small, Compared(batches, source))
    assert evaluate(small, [(images, torch.zeros(9, dtype=torch.long))], source=source) == pytest.approx(found)
    assert str(EvalMetrics.of(found)).startswith(f"cosine {found['cosine']:.4f}, relative error ")
    with pytest.raises(UserError, match="the model has no head, so it gives features and no answers"):
        evaluate(small, batches)


class Answers(torch.nn.Module):
    """Answers what it is given."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes, self.scale = classes, torch.nn.Parameter(torch.ones(()))

    def forward(self, wanted: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.nn.functional.one_hot(wanted.long(), self.num_classes).float()


def test_balanced_accuracy_is_the_mean_of_the_classes_recalls() -> None:
    """Of 90 images of class 0 all are right, of 10 of class 1 three are, class 2 has no image."""
    model = Answers(3)
    wanted = torch.tensor([0] * 90 + [1] * 3 + [0] * 7)
    labels = torch.tensor([0] * 90 + [1] * 10)
    batches = list(zip(wanted.split(32), labels.split(32), strict=True))
    found = evaluate(model, batches, per_class=True)
    assert (found["top1"], found["balanced"]) == pytest.approx((93, 65))
    assert found["recall"] == [100, pytest.approx(30), None]
    assert "recall" not in evaluate(model, batches)
    assert ", balanced 65.00 %, " in EvalMetrics.of(found).full
    even = evaluate(model, [(wanted[[0, 90]], labels[[0, 90]])])
    assert even["balanced"] == even["top1"] == 100
    assert "balanced" not in EvalMetrics.of(even).full


@pytest.mark.parametrize("classes", [10, 11])
def test_top5_is_of_more_than_ten_classes(classes: int) -> None:
    found = evaluate(Answers(classes), [(torch.arange(4), torch.arange(4))])
    assert ("top5" in found) == (classes > 10)
