from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from prunesweep.training import Recipe, fit, load_state, open_data, save_state, seeded

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(leaves, lambda t: st.lists(t) | st.dictionaries(st.text() | st.integers(), t), max_leaves=20)


@settings(deadline=None, max_examples=50)
@given(tree=trees)
def test_any_tree_comes_back(tree: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("state") / "s"
    save_state(path, tree)
    assert load_state(path) == tree


def test_optimizer_state_comes_back_bit_equal(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s", optimizer.state_dict())
    other = torch.optim.AdamW(model.parameters(), lr=0.5)
    other.load_state_dict(load_state(tmp_path / "s"))
    assert other.param_groups[0]["lr"] == 0.1
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert other.state[p]["step"] == optimizer.state[p]["step"]


def test_no_file_and_a_torn_file_are_no_state(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert load_state(path) is None
    save_state(path, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    assert load_state(path) is None


def test_a_state_that_is_not_what_was_written_is_no_state(tmp_path: Path) -> None:
    """Its size is right, and safetensors reads it: only the digest tells."""
    path = tmp_path / "s"
    save_state(path, {"x": torch.arange(1.0, 101.0), "epoch": 3})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert load_file(path)["0"][-1] == 0
    assert load_state(path) is None
    path.write_bytes(whole.replace(b'\\"epoch\\", 3', b'\\"epoch\\", 4'))
    assert path.read_bytes() != whole
    assert load_state(path) is None
    path.write_bytes(whole)
    assert load_state(path)["epoch"] == 3


def test_a_training_whose_state_is_damaged_begins_anew_and_says_so(tmp_path: Path) -> None:
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 8, "depth": 1}
    state, weights, notes = tmp_path / "state", [], []
    for epochs_before in (0, 1):
        with seeded(0):
            model: Any = timm.create_model("vit_tiny_patch16_224", num_heads=2, **shape)
        data, recipe = open_data("digits", model.pretrained_cfg), Recipe(epochs=2, batch_size=256)
        if epochs_before:
            fit(copy.deepcopy(model), data, recipe, state=state, should_stop=lambda: True)
            whole = state.read_bytes()
            state.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        fit(model, data, recipe, state=state if epochs_before else None, on_note=notes.append)
        weights.append(model.head.weight)
    assert torch.equal(*weights)
    assert notes == [f"{state} is damaged, or of another version: training begins anew"]


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "s", {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []
