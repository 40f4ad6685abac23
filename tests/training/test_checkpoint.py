from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunesweep.training import load_state, save_state

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


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "s", {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []
