from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import UserError, cut
from prunesweep.pruners import pmvit
from prunesweep.pruners.pmvit.hook import PruneMergeSettings, PruneMergeTraining
from prunesweep.training import fit, load_recipe, open_data
from prunesweep.training.recipe import Distill, Recipe
from tests.generate import random_model
from tests.models.test_fuse import planned

RECIPE = Recipe(epochs=1, batch_size=128, lr=1e-2, weight_decay=0.05, distill=(Distill(weight=0.01, temperature=20),))


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


def models(form: str) -> tuple[nn.Module, nn.Module]:
    """A planned model for digits, and its source."""
    arch = planned(None, None, None, img_size=(8, 8), num_classes=10)
    arch = type(arch).from_dict(arch.to_dict() | {"stages": [arch.to_dict()["stages"][0] | {"grid": [4, 4]}]})
    model = random_model(arch, 0, torch.float32)
    scores = pmvit.score(model, [], importance="random", seed=2)
    return cut(model, pmvit.plan(arch, scores, 0.5, prune_rate=0.2, merge_list=[0, 2], form=form)), model


def moved(form: str, digits: Any, **settings: Any) -> tuple[set[str], nn.Module, nn.Module]:
    """What one epoch changes: names of parameters, short where they are of a plan."""
    model, source = models(form)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hook = PruneMergeTraining(PruneMergeSettings(**settings))
    assert fit(model, digits, RECIPE, teacher=source, hook=hook)
    hook.finish()
    assert all(p.requires_grad for p in model.parameters())
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert not changed & {f"blocks.{i}.token_merge.{name}" for i in (0, 2) for name in ("assign", "takes_part")}
    return {name.rpartition("token_merge.")[2] for name in changed}, model, models(form)[0]


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize(("train_matrices", "train_weights"), [("none", True), ("recover", True), ("both", False)])
def test_what_is_trained(form: str, train_matrices: str, train_weights: bool, digits: Any) -> None:
    changed, model, _ = moved(form, digits, train_matrices=train_matrices, train_weights=train_weights)
    merge = {"sparse": "weight", "dense": "matrix"}[form]
    matrices = {"none": set(), "recover": {"recover"}, "both": {"recover", merge}}[train_matrices]
    assert changed & {"recover", merge} == matrices
    weights = {name for name, _ in model.named_parameters() if "token_merge" not in name}
    assert changed & weights == (weights if train_weights else set())


def test_a_dense_plan_fills_in_and_a_sparse_one_keeps_its_support(digits: Any) -> None:
    filled, support = (moved(form, digits)[1:] for form in ("dense", "sparse"))
    for now, start in (filled, support):
        for i in (0, 2):
            M, R, m = now.blocks[i].token_merge.matrices()
            M_0, R_0, m_0 = start.blocks[i].token_merge.matrices()
            assert torch.equal(m, m_0)
            new = torch.cat([((M != 0) & (M_0 == 0)).flatten(), ((R != 0) & (R_0 == 0)).flatten()])
            assert new.any() == (now is filled[0])


def test_the_matrices_have_a_learning_rate_and_a_decay_of_their_own() -> None:
    model, _ = models("sparse")
    hook = PruneMergeTraining(PruneMergeSettings(train_matrices="recover", lr_mult_matrices=0.1))
    hook.wrap(model)
    (group,) = hook.parameter_groups()
    assert [id(p) for p in group["params"]] == [id(model.blocks[i].token_merge.recover) for i in (0, 2)]
    assert (group["lr_scale"], group["weight_decay"]) == (0.1, 1e-3)


def test_the_factor_of_the_learning_rate_counts(digits: Any) -> None:
    way = []
    for factor in (1e-3, 1.0):
        _, now, start = moved("sparse", digits, lr_mult_matrices=factor)
        pairs = [(model.blocks[0].token_merge.recover, model.blocks[2].token_merge.recover) for model in (now, start)]
        way.append((torch.cat(pairs[0]) - torch.cat(pairs[1])).detach().abs().max())
    assert 0 < 50 * way[0] < way[1]


def test_settings_that_train_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        PruneMergeTraining(PruneMergeSettings(train_matrices="none", train_weights=False))


def test_models_without_a_plan_are_refused() -> None:
    with pytest.raises(UserError, match="test has no token plan: plan it first"):
        PruneMergeTraining().wrap(random_model(planned(None), 0))


def test_the_published_recipe() -> None:
    recipe = load_recipe("pmvit")
    (term,) = recipe.distill
    assert (recipe.epochs, recipe.batch_size, recipe.peak_lr, recipe.min_lr) == (60, 512, 1e-4, 1e-6)
    assert (recipe.weight_decay, recipe.drop_path, recipe.warmup_epochs, recipe.clip_grad) == (1e-3, 0, 0, 0)
    assert (recipe.mixup, recipe.cutmix, recipe.random_erasing, recipe.auto_augment) == (0.8, 1.0, 0.25, None)
    assert (term.kind, term.temperature, term.weight * 1000) == ("soft", 20, 1.0)  # a mean over 1000 classes there
