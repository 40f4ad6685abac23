from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import Arch, UserError
from pruners import Scores, vector_sizes


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


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, "is of family 'swin': widths can be scored for family 'vit'"),
        ("deit_tiny_patch16_224", {"tokens": 99}, "blocks[1] has a token plan"),
        (
            "deit_tiny_patch16_224",
            {"mixer": "conv1x1", "heads": 0, "qk": 0, "v": 64, "scale": 0.0},
            "blocks[1] has mixer 'conv1x1'",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(name: str, changes: dict, message: str) -> None:
    arch = Arch.from_timm(name)
    stage = arch.stages[0]
    blocks = (stage.blocks[0], dataclasses.replace(stage.blocks[1], **changes), *stage.blocks[2:])
    stages = (dataclasses.replace(stage, blocks=blocks), *arch.stages[1:])
    with pytest.raises(UserError) as error:
        vector_sizes(dataclasses.replace(arch, stages=stages))
    assert message in str(error.value)
