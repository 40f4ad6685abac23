from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunesweep.models import Arch, UserError
from prunesweep.pruners import Scores, vector_sizes


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
    ("changes", "kinds", "message"),
    [
        ({"v": (64, 32, 64)}, ("heads", "qk", "v"), "blocks[1].v is ragged: 'heads' scores need equal widths"),
        ({"v": 32}, ("attn",), "blocks[1].v is 32, query/key width 64: 'attn' scores need equal widths"),
    ],
)
def test_what_cannot_be_scored_is_named(changes: dict, kinds: tuple[str, ...], message: str) -> None:
    arch = Arch.from_timm("deit_tiny_patch16_224")
    (stage,) = arch.stages
    blocks = (stage.blocks[0], dataclasses.replace(stage.blocks[1], **changes), *stage.blocks[2:])
    arch = dataclasses.replace(arch, stages=(dataclasses.replace(stage, blocks=blocks),))
    with pytest.raises(UserError) as error:
        vector_sizes(arch, kinds)
    assert message in str(error.value)
    assert vector_sizes(arch, ("mlp",)) == {f"blocks.{i}.mlp": 768 for i in range(12)}
