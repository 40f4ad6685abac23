"""The benchmark of methods beside each other: every method's models, each way that it allows, with honest figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from benchmarks import methods
from prunesweep.search.config import load_config
from prunesweep.training import Compared, open_data
from prunesweep.training.jobs.recovery import Recovery
from prunesweep.training.jobs.scoring import Calibration


def test_models_of_every_way_and_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"img_size": 8, "in_chans": 1, "num_classes": 10, "patch_size": 2, "embed_dim": 32, "depth": 2}
    source = timm.create_model("vit_tiny_patch16_224", num_heads=2, **shape).eval()
    data = open_data("digits")
    for name, value in {
        "BUDGETS": (0.6,),
        "INSTANT": (0.6,),
        "METHODS": ("taylor", "subspaces", "pmvit"),
        "SCORED": Calibration(images=32),
        "RECOVERY": Recovery(images=64),
        "PROJECTION": Recovery(images=64, project=True),
    }.items():
        monkeypatch.setattr(methods, name, value)
    models = list(methods.untrained(source, data, tmp_path))
    rows = methods.measured(models, Compared(data.val_loader(64), source))
    assert [(row["method"], row["how"]) for row in rows] == [
        ("taylor", "as published"),
        ("taylor", "refitted"),
        ("taylor", "projected"),
        ("subspaces", "projected"),
        ("pmvit", "as published"),
        ("pmvit", "refitted"),
        ("instant", "projected"),
    ]
    assert all(0.5 < row["macs"] <= 0.6 + 1e-9 and row["images"] == 450 for row in rows)
    assert all(row["top1_low"] <= row["top1"] <= row["top1_high"] for row in rows)
    by_way = {row["how"]: row["kl"] for row in rows if row["method"] == "taylor"}
    assert by_way["refitted"] < by_way["as published"]  # a closed form that helps even where nothing was learned
    assert "taylor" in methods.shown(rows[0])

    monkeypatch.setattr(methods, "BUDGETS", (0.9, 0.6))  # the second is that of training
    trained = list(methods.finetuned(models, source, data, epochs=1))
    assert [(row["method"], row["how"]) for row, _ in trained] == [
        ("taylor", "as published, quick"),
        ("taylor", "projected, gentle"),
        ("instant", "projected, gentle"),
    ]


def test_the_example_is_a_search_on_glyphs() -> None:
    config = load_config(methods.CONFIG)
    assert config.data.name == "glyphs"
    assert config.source.args["depth"] == 12
