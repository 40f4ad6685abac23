from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from prunesweep.models import UserError
from prunesweep.pruners.hook import Hook
from prunesweep.training import EVAL_BATCH, Distill, Diverged, Epoch, Recipe, evaluate, fit, open_data, seeded


@pytest.fixture(scope="module")
def data():
    return open_data("digits")


def make(seed: int = 0, dim: int = 16) -> nn.Module:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": dim, "depth": 2, "num_heads": 2}
    with seeded(seed):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
    return model


RECIPE = Recipe(epochs=3, batch_size=128, lr=2e-3, warmup_epochs=1, drop_path=0.1, label_smoothing=0.1)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_training_learns_and_reports(data) -> None:
    model, epochs, steps = make(dim=32), [], []
    with seeded(0):
        torch.nn.init.trunc_normal_(model.pos_embed, std=0.5)
    recipe = Recipe(epochs=4, batch_size=32, lr=3e-3)
    done = fit(model, data, recipe, on_epoch=epochs.append, on_step=lambda *step: steps.append(step))
    assert done
    assert not model.training
    assert [e.epoch for e in epochs] == [1, 2, 3, 4]
    assert epochs[-1].loss < epochs[0].loss - 0.3
    assert epochs[-1].top1 > 40
    assert epochs[-1].top1 == evaluate(model, data.val_loader(EVAL_BATCH))["top1"]
    assert [s[0] for s in steps] == list(range(1, 4 * 42 + 1))
    assert {s[1] for s in steps} == {4 * 42}


def test_same_seed_same_weights_another_seed_others(data) -> None:
    runs = [make(), make(), make()]
    for model, seed in zip(runs, (1, 1, 2), strict=True):
        fit(model, data, RECIPE.model_copy(update={"epochs": 1}), seed=seed)
    first, second, other = map(weights, runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(data, tmp_path: Path) -> None:
    whole, cut_off, resumed = make(), make(), make(seed=9)  # a resumed model's own weights do not matter
    teacher = make(seed=5)
    recipe = RECIPE.model_copy(update={"distill": (Distill(temperature=2.0),)})
    state = tmp_path / "state.safetensors"
    assert fit(whole, data, recipe, teacher=teacher, seed=4)
    assert not fit(cut_off, data, recipe, teacher=teacher, seed=4, state=state, should_stop=lambda: True)
    seen: list[Epoch] = []
    assert fit(resumed, data, recipe, teacher=teacher, seed=4, state=state, on_epoch=seen.append)
    assert [e.epoch for e in seen] == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert fit(resumed, data, recipe, teacher=teacher, seed=4, state=state)  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_global_generators_go_on_undisturbed(data) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    fit(make(), data, RECIPE.model_copy(update={"epochs": 1}))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(99):
        draw()
    assert draw() == want


def test_distillation_pulls_towards_the_teacher(data) -> None:
    """The teacher always answers 3: a strong enough pull makes the model answer 3, though labels say otherwise."""
    teacher = make()
    with torch.no_grad():
        teacher.head.weight.zero_()
        teacher.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(3), 10) * 9.0)
    model, plain = make(1), make(1)
    recipe = Recipe(epochs=2, batch_size=128, lr=2e-3, distill=(Distill(weight=100.0),))
    fit(model, data, recipe, teacher=teacher)
    fit(plain, data, recipe.model_copy(update={"distill": ()}))
    x = torch.cat([x for x, _ in data.val_loader(256)])
    with torch.no_grad():
        assert (model(x).argmax(-1) == 3).float().mean() > 0.95
        assert (plain(x).argmax(-1) == 3).float().mean() < 0.9
    assert not any(p.grad is not None for p in teacher.parameters())


def test_distillation_needs_a_teacher(data) -> None:
    with pytest.raises(UserError, match="there is no source model to learn from"):
        fit(make(), data, RECIPE.model_copy(update={"distill": (Distill(),)}))


def test_stochastic_depth_acts_in_training_only(data) -> None:
    recipe = Recipe(epochs=1, batch_size=128, drop_path=0.9)
    with_drops, without = make(1), make(1)
    fit(with_drops, data, recipe)
    fit(without, data, recipe.model_copy(update={"drop_path": 0.0}))
    assert not all(torch.equal(a, b) for a, b in zip(weights(with_drops), weights(without), strict=True))
    x = next(iter(data.val_loader(64)))[0]
    with torch.no_grad():
        assert torch.equal(with_drops(x), with_drops(x))
        with_drops.train()
        assert not torch.equal(with_drops(x), with_drops(x))


def test_no_epochs_is_no_training(data) -> None:
    model = make()
    before = weights(model)
    assert fit(model, data, Recipe(epochs=0))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


class Gate(Hook):
    """Adds a parameter with a learning rate of its own and a loss term on it, and notes what is called."""

    def __init__(self, lr: float = 0.0, stop_after: int | None = None) -> None:
        self.lr, self.stop_after, self.calls, self.steps = lr, stop_after, [], 0

    @property
    def done(self) -> bool:
        return self.steps == self.stop_after

    def wrap(self, model: nn.Module) -> None:
        self.model = model
        model.gate = nn.Parameter(torch.ones(10))
        self.calls.append("wrap")

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.model.gate], "lr": self.lr, "weight_decay": 0.0}]

    def start_epoch(self) -> None:
        assert self.model.training
        self.calls.append("epoch")

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.calls.append("loss")
        return terms["loss"] + (self.model.gate * torch.arange(10)).sum()

    def after_backward(self) -> None:
        assert torch.equal(self.model.gate.grad, torch.arange(10.0))  # not clipped to norm 1 yet
        self.before = weights(self.model)
        self.calls.append("backward")

    def after_step(self) -> None:
        assert not all(torch.equal(a, b) for a, b in zip(self.before, weights(self.model), strict=True))
        self.steps += 1
        self.calls.append("step")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_hook_is_called_in_order_and_can_end_the_training(data) -> None:
    model, hook, epochs = make(), Gate(stop_after=14), []
    assert fit(model, data, RECIPE, hook=hook, on_epoch=epochs.append)
    step = ["loss", "backward", "step"]
    assert hook.calls == ["wrap", "epoch", *step * 10, "epoch", *step * 4]  # 10 steps are an epoch
    assert len(epochs) == 2


def test_a_hook_s_parameters_have_a_learning_rate_of_their_own(data) -> None:
    recipe = RECIPE.model_copy(update={"warmup_epochs": 0})
    for lr, moves in ((0.0, 0.0), (0.1, 0.1)):
        model = make()
        fit(model, data, recipe, hook=Gate(lr, stop_after=1))
        torch.testing.assert_close(1 - model.gate.detach(), torch.tensor([0.0] + [moves] * 9), rtol=1e-4, atol=1e-7)


def test_a_hook_that_does_nothing_changes_nothing(data) -> None:
    runs = [make(), make()]
    recipe = RECIPE.model_copy(update={"epochs": 1})
    fit(runs[0], data, recipe)
    fit(runs[1], data, recipe, hook=Hook())
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, runs), strict=True))


def test_a_hook_s_state_goes_on_with_the_run(data, tmp_path: Path) -> None:
    whole, model, state = make(), make(), tmp_path / "state.safetensors"
    fit(whole, data, RECIPE, hook=Gate(0.1, stop_after=25), seed=3)
    assert not fit(model, data, RECIPE, hook=Gate(0.1, 25), seed=3, state=state, should_stop=lambda: True)
    with pytest.raises(UserError, match="was started with another method of pruning; delete it"):
        fit(make(), data, RECIPE, state=state)
    again, hook = make(8), Gate(0.1, stop_after=25)
    assert fit(again, data, RECIPE, hook=hook, seed=3, state=state)
    assert hook.steps == 25
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    finished = Gate(0.1, stop_after=25)
    assert fit(make(8), data, RECIPE, hook=finished, seed=3, state=state)
    assert finished.calls == ["wrap"]


def test_evaluation_is_exact() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.p

    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    model = Fixed().train()
    found = evaluate(model, [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert found["top1"] == 100 * 2 / 3
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert model.training
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [])


def test_evaluation_compares_with_a_source(data) -> None:
    source, model = make(dim=32).eval(), make(dim=16).eval()
    batches = list(data.val_loader(100))
    with torch.no_grad():
        wanted, got = (torch.cat([one(x) for x, _ in batches]) for one in (source, model))
    found = evaluate(model, batches, source=source)
    p = wanted.double().log_softmax(1)
    assert found["kl"] == pytest.approx((p.exp() * (p - got.double().log_softmax(1))).sum(1).mean().item())
    assert found["agreement"] == pytest.approx(100 * (wanted.argmax(1) == got.argmax(1)).double().mean().item())
    assert {name: found[name] for name in ("top1", "balanced", "loss", "images")} == evaluate(model, batches)
    same = evaluate(source, batches, source=source)
    assert (same["kl"], same["agreement"]) == (0, 100)


@pytest.mark.parametrize(
    "fields", [{"amp": "bf16"}, {"channels_last": True}, {"mixup": 0.8, "cutmix": 1.0}, {"layer_decay": 0.7}]
)
def test_options_train_too(data, fields: dict[str, Any]) -> None:
    epochs: list[Epoch] = []
    recipe = Recipe(epochs=2, batch_size=64, lr=3e-3, **fields)
    assert fit(make(dim=32), data, recipe, on_epoch=epochs.append)
    assert epochs[1].loss < epochs[0].loss
    assert epochs[1].top5 is None  # of so few classes
    assert epochs[1].balanced > 0


def test_the_average_is_evaluated_and_kept(data, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=128, lr=2e-3, ema=0.9)
    model, plain, epochs, state = make(), make(), [], tmp_path / "state.safetensors"
    fit(plain, data, recipe.model_copy(update={"ema": None}), seed=1)
    assert not fit(model, data, recipe, seed=1, state=state, should_stop=lambda: True)
    assert fit(model, data, recipe, seed=1, state=state, on_epoch=epochs.append)  # resumed, its average too
    whole = make()
    fit(whole, data, recipe, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(whole), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(model)[:4], weights(plain)[:4], strict=True))
    assert epochs[-1].top1 == evaluate(model, data.val_loader(EVAL_BATCH))["top1"]


def test_a_loss_that_is_no_number_ends_the_run_with_what_was_good(data, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    good = make()
    assert not fit(good, data, RECIPE, seed=1, state=state, should_stop=lambda: True)
    kept = weights(good)
    with pytest.raises(Diverged, match=r"the loss is nan at update 1\d with learning rate .*: lower lr"):
        fit(make(), data, RECIPE, hook=Poison(), seed=1, state=state)
    again = make(seed=3)
    fit(again, data, RECIPE, seed=1, state=state, should_stop=lambda: True)  # epoch 2 is done again, from epoch 1
    assert not torch.equal(weights(again)[0], kept[0])


class Poison(Hook):
    """Turns the third loss of an epoch into no number."""

    seen = 0

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.seen += 1
        return terms["loss"] * (torch.nan if self.seen == 3 else 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 2000}, "batch_size = 2000, but digits has 1347 training images"),
        ({"batch_size": 66, "accumulate": 6, "mixup": 0.5}, "mixup needs an even number of images at a time, not 11"),
    ],
)
def test_recipes_that_do_not_fit(data, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(make(), data, Recipe(**fields))


def test_what_a_hook_says_is_in_every_epoch(data) -> None:
    epochs: list[Epoch] = []
    fit(make(), data, RECIPE, hook=Telling(0.1), on_epoch=epochs.append)
    assert [epoch.facts for epoch in epochs] == [
        {"steps": 10.0, "phase": "x"},
        {"steps": 20.0, "phase": "xx"},
        {"steps": 30.0, "phase": "xxx"},
    ]
    plain: list[Epoch] = []
    fit(make(), data, RECIPE, on_epoch=plain.append)
    assert [epoch.facts for epoch in plain] == [{}, {}, {}]


class Telling(Gate):
    @property
    def facts(self) -> Mapping[str, float | str]:
        return {"steps": float(self.steps), "phase": "x" * (self.steps // 10)}
