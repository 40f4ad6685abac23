"""Labels drawn from a model's own answers: distributed as they are, the same for the same image; Fisher's scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from prunesweep.models import build
from prunesweep.pruners import METHODS, nvit, taylor, upvit
from prunesweep.pruners.drawn_targets import with_drawn_features, with_drawn_labels
from prunesweep.training.data import NO_LABEL
from tests.pruners.subspaces.test_compress import vit

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def source() -> Any:
    torch.manual_seed(0)
    return build(vit(width=12, depth=1)).double().eval()


def unlabelled(count: int, batch: int) -> Batches:
    x = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(one, torch.full((len(one),), NO_LABEL)) for one in torch.split(x, batch)]


def labels_of(batches: Batches) -> list[int]:
    return torch.cat([y for _, y in batches]).tolist()


def test_labels_are_distributed_as_the_answers() -> None:
    model = source()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 1e-9]).double().log())
    drawn = torch.bincount(torch.tensor(labels_of(with_drawn_labels(model, unlabelled(1000, 100)))), minlength=7)
    torch.testing.assert_close(drawn / 1000, torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0.0]), atol=0.04, rtol=0)


def test_a_label_follows_from_seed_and_image() -> None:
    model = source()
    some = labels_of(with_drawn_labels(model, unlabelled(60, 20), seed=3))
    assert labels_of(with_drawn_labels(model, unlabelled(60, 7), seed=3)) == some
    back = [(x.flip(0), y) for x, y in reversed(unlabelled(60, 20))]
    assert labels_of(with_drawn_labels(model, back, seed=3)) == some[::-1]
    assert labels_of(with_drawn_labels(model, unlabelled(60, 20), seed=4)) != some


def check_mean(exact: dict[str, torch.Tensor], model: Any, images: Any, with_drawn: Any) -> None:
    """Check that saliency of drawn targets has, over many draws, the expected mean."""
    draws = 150
    mean = {name: torch.zeros_like(vector) for name, vector in exact.items()}
    for seed in range(draws):
        for name, vector in nvit.score(model, with_drawn(model, images, seed)).vectors.items():
            mean[name] += vector / draws
    for name, vector in exact.items():
        assert 0.7 < (mean[name].sum() / vector.sum()).item() < 1.4
        assert torch.corrcoef(torch.stack([mean[name], vector]))[0, 1] > 0.9


def test_saliency_of_drawn_labels_is_that_of_the_fisher_information() -> None:
    """Of single images, its mean over draws is the mean over all classes, weighted by their probabilities."""
    model, images = source(), unlabelled(2, 1)
    exact: dict[str, torch.Tensor] = {}
    for x, _ in images:
        with torch.no_grad():
            p = model(x).softmax(1)[0]
        for k in range(7):
            found = nvit.score(model, [(x, torch.tensor([k]))]).vectors
            exact = {name: exact.get(name, 0) + p[k] * vector / len(images) for name, vector in found.items()}
    check_mean(exact, model, images, with_drawn_labels)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if hasattr(method, "score")])
def test_methods_that_read_labels_say_so(name: str) -> None:
    method: Any = METHODS[name]
    model, batches = build(vit()).eval(), [(x.float(), y) for x, y in unlabelled(8, 4)]
    if method.labels:
        with pytest.raises(IndexError):
            method.score(model, batches)
    else:
        method.score(model, batches)
    scores = method.score(model, with_drawn_labels(model, batches))
    assert all(torch.isfinite(vector).all() and vector.any() for vector in scores.vectors.values())


def test_without_labels_the_sum_of_gradients_is_no_zero() -> None:
    """The gradient of the divergence of a model to itself is."""
    model = source()
    gradients = taylor.summed_gradients(model, with_drawn_labels(model, unlabelled(64, 16)))
    assert min(g.abs().max().item() for name, g in gradients.items() if name.endswith("weight")) > 1e-6


def backbone() -> Any:
    torch.manual_seed(0)
    return build(dataclasses.replace(vit(width=12, depth=1), num_classes=0)).double().eval()


def test_a_target_of_features_follows_from_seed_and_image() -> None:
    model = backbone()
    some = torch.cat([y for _, y in with_drawn_features(model, unlabelled(60, 20), seed=3)])
    again = torch.cat([y for _, y in with_drawn_features(model, unlabelled(60, 7), seed=3)])
    torch.testing.assert_close(again, some)
    with torch.no_grad():
        signs = some - model(torch.cat([x for x, _ in unlabelled(60, 20)]))
    torch.testing.assert_close(signs.abs(), torch.ones(60, 12, dtype=torch.float64))
    assert signs.mean().abs() < 0.2
    other = torch.cat([y for _, y in with_drawn_features(model, unlabelled(60, 20), seed=4)])
    assert (other - some).abs().max() > 1


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if hasattr(method, "score")])
def test_methods_score_features(name: str) -> None:
    method: Any = METHODS[name]
    model, batches = backbone().float(), [(x.float(), y) for x, y in unlabelled(8, 4)]
    scores = method.score(model, with_drawn_features(model, batches))
    assert all(torch.isfinite(vector).all() and vector.any() for vector in scores.vectors.values())


def test_saliency_of_drawn_features_is_that_of_their_squared_error() -> None:
    """Of single images, its mean over draws is the sum over all features."""
    model, images = backbone(), unlabelled(2, 1)
    exact: dict[str, torch.Tensor] = {}
    for x, _ in images:
        with torch.no_grad():
            features = model(x)
        for step in torch.eye(12, dtype=torch.float64):
            found = nvit.score(model, [(x, features + step)]).vectors
            exact = {name: exact.get(name, 0) + vector / len(images) for name, vector in found.items()}
    check_mean(exact, model, images, with_drawn_features)


def test_upvit_scores_are_the_squared_error_of_features() -> None:
    """Exactly without the unit; by Fisher, whose signs draw what the sum over all features is."""
    model, batches = backbone(), unlabelled(6, 3)
    exact = upvit.score(model, batches, importance="exact").vectors
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        whole = model(x)
        model.blocks[0].mlp.fc2.weight[:, 3] = 0
        error = 0.5 * (model(x) - whole).square().sum()
    torch.testing.assert_close(exact["blocks.0.mlp"][3], error)
    model = backbone()
    every, drawn = (
        upvit.score(model, batches, importance="fisher", labels_per_image=labels).vectors for labels in ("all", 64)
    )
    for name, vector in every.items():
        assert torch.corrcoef(torch.stack([drawn[name], vector]))[0, 1] > 0.95
        assert 0.8 < (drawn[name].sum() / vector.sum()).item() < 1.25
    assert torch.corrcoef(torch.stack([exact["blocks.0.mlp"], every["blocks.0.mlp"]]))[0, 1] > 0.9
