"""Searches of models whose weights are adopted, three trials long, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from prunesweep.models import adopted, arch_of, cost, load, save
from prunesweep.search.config import parse_config
from prunesweep.search.execution.driver import run_search
from tests.search.in_process import without_ray

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16}
VIT = {"depth": 2, "num_heads": 2}
SWIN = {"depths": (1, 1), "num_heads": (2, 2), "window_size": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no better than chance")
@pytest.mark.parametrize(
    ("name", "shape", "recover"),
    [
        ("eva02_tiny_patch14_224", VIT, False),
        ("eva02_tiny_patch14_224", VIT, True),
        ("beit_base_patch16_224", VIT, True),
        ("swinv2_tiny_window8_256", SWIN, False),
    ],
)
def test_three_trials(
    name: str, shape: dict[str, Any], recover: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    torch.manual_seed(0)
    source = save(adopted(timm.create_model(name, **SHAPE, **shape)), tmp_path / "source")
    table = {
        "name": "adopted",
        "data": {"name": "digits"},
        "source": {"model": f"local-dir:{source}"},
        "scores": {"method": "nvit", "images": 64},
        "space": {"budget": [0.4, 0.9], "groups": {"embed": 2, "qk": 1, "v": 2, "mlp": 4, "heads": 1}},
        "search": {"trials": 3, "recover": recover, "project": recover, "screen_images": 64},
        "finetune": {"epochs": 1, "batch_size": 256},
    }
    run_search(parse_config(table, "test"), tmp_path / "run")
    whole = arch_of(load(source))
    found = [load(folder) for folder in (tmp_path / "run" / "trials").glob("*/model")]
    assert found
    for arch in map(arch_of, found):
        assert (arch.family, arch.rope, arch.position_bias) == (whole.family, whole.rope, whole.position_bias)
        assert cost(arch).macs < cost(whole).macs
