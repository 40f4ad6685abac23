"""The rate by what was removed, held-out training images, and the model that is closest to its source."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import UserError, arch_of, load_provenance, save
from prunesweep.pruners.hook import Hook
from prunesweep.pruners.subspaces import compress, equal_shares
from prunesweep.training import Kept, Recipe, evaluate, fit, load_recipe, open_data
from prunesweep.training.closest import held_out_images, trained_images
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.optim import make_optimizer, make_scheduler
from prunesweep.training.settling import rate_at, settled
from tests.training.test_loop import make

HARSH = {"epochs": 2, "lr": 0.3, "clip_grad": 0.0}  # a rate that only harms


@pytest.fixture(scope="module")
def data() -> Any:
    return open_data("digits")


@pytest.fixture(scope="module")
def pair(data: Any) -> tuple[nn.Module, nn.Module]:
    """A source that knows the digits somewhat, and a model computed from it."""
    source = make(dim=32)
    with torch.no_grad():
        nn.init.trunc_normal_(source.pos_embed, std=0.5)
    fit(source, data, Recipe(epochs=4, batch_size=32, lr=3e-3))
    return source, compress(source, equal_shares(arch_of(source), 0.25), data.calibration(256, 64, seed=0))


def copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def test_the_rate_is_a_power_of_the_share_between_points() -> None:
    points = [(0.25, 1e-4), (0.1, 3e-4), (0.05, 1e-3)]  # in any order
    assert [rate_at(points, share) for share in (0.01, 0.05, 0.1, 0.25, 1.0)] == [1e-3, 1e-3, 3e-4, 1e-4, 1e-4]
    assert rate_at(points, math.sqrt(0.25 * 0.1)) == pytest.approx(math.sqrt(3e-4 * 1e-4))


def test_a_recipe_is_settled_by_model_source_and_labels(data: Any, pair: tuple[Any, Any]) -> None:
    source, small = pair
    gentle = load_recipe("gentle")
    rates = [settled(gentle, data, model, source).lr for model in (small, source)]
    assert rates[0] > rates[1] == 1e-4
    assert settled(gentle, data, small, source).loss_weight == 0.5
    own = load_recipe("gentle", {"lr": 2e-4})
    assert settled(own, data, small, source).lr == 2e-4
    for fields, missing in (({}, "lr_by_share"), ({"lr": 1e-4}, "keep = 'best'")):
        with pytest.raises(UserError, match=rf"{missing}: .*\(--teacher\)"):
            settled(load_recipe("gentle", fields), data, small, None)
    plain = load_recipe("quick")
    assert settled(plain, data, small, None) is plain


def test_without_labels_the_answers_count_and_without_a_head_the_features(data: Any, pair: tuple[Any, Any]) -> None:
    gentle, [source, _] = load_recipe("gentle"), pair
    unlabelled: Any = SimpleNamespace(info=replace(data.info, num_classes=0))
    found = settled(gentle, unlabelled, source, source)
    assert (found.loss_weight, [term.kind for term in found.distill]) == (0, ["soft"])
    backbone = copied(source)
    backbone.reset_classifier(0)
    cached = load_recipe("gentle", {"fixed_view": True, "distill": [{"cache_teacher": True}]})
    [term] = settled(cached, data, backbone, backbone).distill
    assert (term.kind, term.cache_teacher) == ("feature", False)
    small = compress(backbone, equal_shares(arch_of(backbone), 0.25), data.calibration(256, 64, seed=0))
    kept = list[Kept]()
    fit(small, data, load_recipe("gentle", {"epochs": 2, "lr": 1e-3}), teacher=backbone, on_kept=kept.append)
    assert kept[0].measure == "relative_error"
    assert kept[0].distances[kept[0].epoch] == min(kept[0].distances) < kept[0].distances[0]


def test_held_out_images_are_neither_trained_nor_calibrated_on(data: Any) -> None:
    held = held_out_images(data.train_images, 0.1)
    trained = trained_images(data.train_images, load_recipe("gentle"))
    assert trained is not None
    assert len(held) == 135
    assert sorted([*held.tolist(), *trained.tolist()]) == list(range(data.train_images))
    seen = {x.numpy().tobytes() for batch, _ in data.calibration(1000, 64, seed=0) for x in batch}
    [(images, _)] = data.plain_loader(held.tolist(), 200)
    assert not seen & {x.numpy().tobytes() for x in images}
    assert trained_images(data.train_images, load_recipe("quick")) is None
    assert len(held_out_images(10**6, 0.1)) == 2000


def test_training_that_harms_is_undone(data: Any, pair: tuple[Any, Any]) -> None:
    source, small = pair
    trained, kept, seen = copied(small), list[Kept](), list[Any]()
    fit(trained, data, load_recipe("gentle", HARSH), teacher=source, on_kept=kept.append, on_epoch=seen.append)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), small.parameters(), strict=True))
    assert kept[0].epoch == 0
    assert kept[0].images == 135
    [batch] = data.plain_loader(held_out_images(data.train_images, 0.1).tolist(), 200)
    assert kept[0].distances[0] == pytest.approx(evaluate(small, [batch], source=source)["kl"], rel=1e-5)
    assert [e.facts["held_out_kl"] for e in seen] == list(kept[0].distances[1:])
    assert str(kept[0]).startswith("kept the model as it came (epoch 0): KL to the source on 135 held-out")


def test_training_that_helps_is_kept(data: Any, pair: tuple[Any, Any]) -> None:
    source, small = pair
    trained, kept = copied(small), list[Kept]()
    fit(trained, data, load_recipe("gentle", {"epochs": 3, "lr": 1e-3}), teacher=source, on_kept=kept.append)
    far = kept[0].distances
    assert kept[0].epoch == min(range(4), key=far.__getitem__) > 0
    before, after = (evaluate(model, data.val_loader(450), source=source)["kl"] for model in (small, trained))
    assert after < before


def test_what_was_measured_goes_on_with_the_run(data: Any, pair: tuple[Any, Any], tmp_path: Path) -> None:
    """The model as it came is still kept by a process that never saw it."""
    source, small = pair
    recipe, state, kept = load_recipe("gentle", HARSH), tmp_path / "state.safetensors", list[Kept]()
    whole, stopped, resumed = copied(small), copied(small), copied(small)
    fit(whole, data, recipe, teacher=source, on_kept=kept.append)
    assert not fit(stopped, data, recipe, teacher=source, state=state, should_stop=lambda: True)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    assert fit(resumed, data, recipe, teacher=source, state=state, on_kept=kept.append)
    assert kept[0] == kept[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(UserError, match=r"another recipe \(keep\)"):
        fit(resumed, data, load_recipe("gentle", {**HARSH, "keep": "last"}), teacher=source, state=state)


def test_warm_up_is_short_of_short_trainings(pair: tuple[Any, Any]) -> None:
    for epochs, warm in ((1, 4), (10, 20)):
        recipe = load_recipe("gentle", {"epochs": epochs, "lr": 1e-4})
        optimizer = make_optimizer(copied(pair[1]), Hook(), recipe)
        scheduler, rates = make_scheduler(optimizer, recipe, updates=18), []
        for update in range(18 * epochs):
            scheduler.step_update(update)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates.index(max(rates)) == warm
        assert rates[warm] == pytest.approx(1e-4, rel=0.15)  # of a cosine that began at update 0


class Pruning(Hook):
    """A method that does nothing."""


def test_a_method_that_acts_meanwhile_has_its_result_at_the_end(data: Any, pair: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="keep = 'best': .* set keep = 'last'"):
        fit(copied(pair[1]), data, load_recipe("gentle"), teacher=pair[0], hook=Pruning())


def test_a_saved_model_says_what_was_kept(data: Any, pair: tuple[Any, Any], tmp_path: Path) -> None:
    source, small = (save(copied(model), tmp_path / name) for model, name in zip(pair, ("a", "b"), strict=True))
    notes = list[str]()
    job = Finetuning(small, "digits", load_recipe("gentle", {"epochs": 1}), tmp_path / "out", teacher=source)
    finetune(job, on_note=notes.append)
    facts = load_provenance(tmp_path / "out")
    kept = facts["kept"]
    assert len(kept["held_out_kl"]) == 2
    assert facts["lr"] == pytest.approx(settled(job.recipe, data, pair[1], pair[0]).lr)
    assert facts["recipe"]["lr_by_share"]
    assert notes[-1] == str(Kept(kept["epoch"], kept["held_out_images"], "kl", tuple(kept["held_out_kl"])))
    alone = Finetuning(small, "digits", load_recipe("gentle"), tmp_path / "alone")
    with pytest.raises(UserError, match="not known here"):
        finetune(alone)
    assert not list(tmp_path.glob("*alone*"))  # nothing was begun
    harmed = Finetuning(small, "digits", load_recipe("gentle", HARSH), tmp_path / "harmed", teacher=source)
    finetune(harmed)
    facts = load_provenance(tmp_path / "harmed")
    assert facts["kept"]["epoch"] == 0
    assert facts["top1"] == evaluate(pair[1], data.val_loader(256))["top1"]
