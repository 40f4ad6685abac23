from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import UserError
from pruners import Scores


def test_round_trip(tmp_path: Path) -> None:
    scores = Scores({"embed": torch.arange(3.0), "blocks.0.mlp": torch.rand(5)}, {"method": "nvit", "images": 7})
    scores.save(tmp_path / "s.safetensors")
    again = Scores.load(tmp_path / "s.safetensors")
    assert again.provenance == scores.provenance
    assert all(torch.equal(again.vectors[name], v.double()) for name, v in scores.vectors.items())


def test_damage_and_strangers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(UserError, match="is damaged"):
        Scores.load(path)
    Scores({"embed": torch.ones(3)}).save(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged"):
        Scores.load(path)
    save_file({"embed": torch.ones(3)}, path)
    with pytest.raises(UserError, match="format None"):
        Scores.load(path)
