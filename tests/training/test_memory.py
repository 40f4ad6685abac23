"""Batches that do not fit into the device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunesweep.models import UserError, build
from prunesweep.training import Recipe, fit
from tests.training.test_ddp import ARCH, Noise, Tight


def train(limit: int | None, *, backward: bool = False, seed: int = 1, **fields: Any) -> tuple[dict, list, list]:
    """State, losses and notes of a run on a device with room for ``limit`` images."""
    torch.manual_seed(0)
    model, epochs, notes = build(ARCH).double(), list[Any](), list[str]()
    if limit is not None:
        model.norm_pre = Tight(limit, backward=backward)
    state = fields.pop("state", None)
    stop, halvings = fields.pop("stop", False), fields.pop("halvings", 0)
    recipe = Recipe(**{"epochs": 2, "batch_size": 12, "lr": 1e-3, "clip_grad": 0.5, **fields})
    reports: dict[str, Any] = {"on_epoch": epochs.append, "on_note": notes.append}
    fit(model, Noise(), recipe, seed=seed, state=state, should_stop=lambda: stop, halvings=halvings, **reports)
    return model.state_dict(), [e.loss for e in epochs], notes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"accumulate": 2}, {"mixup": 0.8, "cutmix": 1.0}, {"accumulate": 3, "mixup": 0.8}]
)
def test_a_batch_that_does_not_fit_is_done_in_parts(fields: dict[str, Any], backward: bool) -> None:
    """The update is the same: gradients that were there before memory ran out do not count twice."""
    wanted, losses, silent = train(None, **fields)
    found, same, notes = train(2, backward=backward, **fields)
    assert same == pytest.approx(losses, abs=1e-12)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)
    assert not silent
    size, said = 12 // fields.get("accumulate", 1), []
    while size > 2:
        half = (size + 1) // 2
        said.append(f"out of memory with {size} images at a time: going on with {half}, which changes no batch (batch_")
        size = half
    assert [note[: len(line)] for note, line in zip(notes, said, strict=True)] == said


def test_a_training_may_begin_with_smaller_parts() -> None:
    wanted, _, notes = train(6)
    found, _, silent = train(6, halvings=1)
    assert (len(notes), silent) == (1, [])
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


def test_what_is_drawn_is_as_if_the_parts_had_been_known(tmp_path: Path) -> None:
    """Stochastic depth draws per part; a run that went on after its first epoch finds the parts again."""
    state = tmp_path / "state.safetensors"
    wanted, _, _ = train(3, drop_path=0.5)
    train(3, drop_path=0.5, state=state, stop=True)
    found, _, notes = train(3, drop_path=0.5, state=state)
    assert len(notes) == 2
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_cpu_s_memory_may_run_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its allocator raises no type of its own."""

    def check(self: Tight, x: torch.Tensor) -> None:
        if len(x) > self.limit:
            torch.empty(2**50, dtype=torch.uint8)

    wanted, *_ = train(None)
    monkeypatch.setattr(Tight, "_check", check)
    found, _, notes = train(3)
    assert [note.partition(":")[0] for note in notes] == [
        "out of memory with 12 images at a time",
        "out of memory with 6 images at a time",
    ]
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


def test_an_error_of_another_kind_is_none_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_self: Tight, _x: torch.Tensor) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Tight, "_check", check)
    with pytest.raises(RuntimeError, match="something else"):
        train(0)


def test_not_even_one_image() -> None:
    with pytest.raises(UserError, match="out of memory with one image at a time: take a smaller model"):
        train(0)
