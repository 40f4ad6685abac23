"""What precedes a search of a PVTv2 whose blocks may be dropped, on image files."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from prunesweep.models import UserError, arch_of, save
from prunesweep.pruners import drop_order
from prunesweep.search.config import parse_config
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.execution.source import open_space

SHAPE = {"embed_dims": (8, 8, 8, 8), "depths": (3, 1, 2, 1), "num_heads": (1, 1, 2, 2), "num_classes": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of random images."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                grey = torch.randint(0, 128, (32, 32, 3), generator=generator) + 127 * (label == "light")
                Image.fromarray(grey.byte().numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_blocks_of_a_pyramid_are_scored_and_dropped(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = timm.create_model("pvt_v2_b0", pretrained_cfg_overlay=cfg, **SHAPE)
    assert arch_of(model).img_size == (32, 32)
    source = save(model, tmp_path / "source")
    table = {
        "name": "pyramid",
        "data": {"name": f"imagefolder:{images}"},
        "source": {"model": f"local-dir:{source}"},
        "scores": {"method": "taylor", "images": 8, "batch_size": 4},
        "space": {"budget": [0.3, 1.0], "skip": [0, 3], "groups": dict.fromkeys(("embed", "dim", "mlp", "sr"), 2)},
        "finetune": {"batch_size": 8},
        "search": {"screen_images": 8},
    }
    begun = prepare_search(parse_config(table, "test"), tmp_path / "cache", lambda *_: None)
    space = open_space(parse_config(table, "test"), begun)
    order = drop_order(space.scores["depth_kl"])
    stage_of = [0, 0, 0, 1, 2, 2, 3]
    assert sorted(stage_of[i] for i in order) == [0, 0, 2]
    for skip in range(4):
        found = space.decode({"budget": 1.0, "skip": skip}).arch
        assert {b.src for b in found.blocks} == set(range(7)) - set(order[:skip])
    assert begun.summary.feasible > 0.5
    table["space"] = {"skip": [0, 4]}
    with pytest.raises(UserError, match="the source has 7 blocks, so it must not exceed 3"):
        prepare_search(parse_config(table, "test"), tmp_path / "cache", lambda *_: None)
