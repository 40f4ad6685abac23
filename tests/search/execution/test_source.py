"""The kept source of a search: found by all that it follows from, and believed only where it says so itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from prunesweep.models import UserError, load, load_provenance, save, weights_digest
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.source import prepare
from prunesweep.training import evaluate
from tests.search.execution.test_task import nothing

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 2}


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "num_heads": 2, **changes})


def config_of(tiny: Callable[..., SearchConfig], folder: Path) -> SearchConfig:
    config = tiny()
    source = config.source.model_copy(update={"model": f"local-dir:{folder}", "train": None, "args": {}})
    return config.model_copy(update={"source": source.model_copy(update={"pos_embed_std": None})})


def test_a_mended_record_is_not_ignored(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    """The weights stay as they are; the folder, too, has the name that it had."""
    config, cache = config_of(tiny, tmp_path / "model"), tmp_path / "cache"
    kept = []
    for heads in (2, 4, 2):
        save(model(num_heads=heads), tmp_path / "model")
        kept.append(prepare(config, cache, nothing))
    assert [one.arch.blocks[0].heads for one in kept] == [2, 4, 2]
    assert kept[0].folder == kept[2].folder != kept[1].folder
    assert kept[0].score_files == kept[2].score_files
    assert not set(kept[0].score_files.values()) & set(kept[1].score_files.values())


def test_a_source_of_another_key_is_made_again(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    config, cache = config_of(tiny, save(model(), tmp_path / "model")), tmp_path / "cache"
    kept = prepare(config, cache, nothing)
    with torch.no_grad():
        other = load(kept.folder)
        other.head.bias[0] += 1.0
    save(other, kept.folder, {"method": "source", "top1": 100.0, "key": "of another"})
    again = prepare(config, cache, nothing)
    assert (again.folder, again.weights, again.figures) == (kept.folder, kept.weights, kept.figures)
    assert again.folder.name.endswith(load_provenance(again.folder)["key"])


def test_weights_that_are_no_numbers_are_refused_before_any_work(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    broken = model()
    broken.norm.bias.data[2] = torch.nan
    save(broken, tmp_path / "model")
    with pytest.raises(UserError, match=r"source.model = 'local-dir:.*': norm.bias has 1 values that are NaN or inf"):
        prepare(config_of(tiny, tmp_path / "model"), tmp_path / "cache", nothing)
    assert not (tmp_path / "cache").exists()


def test_a_source_in_half_precision_is_scored_in_float32_and_kept_as_it_is(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    config = config_of(tiny, save(model().half(), tmp_path / "model"))
    kept = prepare(config, tmp_path / "cache", nothing)
    assert {p.dtype for p in kept.model.parameters()} == {torch.float32}
    stored = load(kept.folder)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    assert weights_digest(stored) == weights_digest(load(tmp_path / "model")) == kept.weights
    assert evaluate(stored, kept.data.report.val_loader(256))["top1"] == kept.figures.top1


@pytest.mark.parametrize(("answer", "known"), [(0, False), (1, True)])
def test_classes_are_named_only_after_a_source_that_is_better_than_chance(
    tiny: Callable[..., SearchConfig], tmp_path: Path, answer: int, known: bool
) -> None:
    """At chance, the order of classes may be another one than the source was trained with."""
    for split, name, count in (("train", "a", 90), ("train", "B", 90), ("val", "a", 2), ("val", "B", 6)):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 3 * i).save(tmp_path / "data" / split / name / f"{i}.png")
    constant = model(num_classes=2)
    constant.head.weight.data.zero_()
    constant.head.bias.data[answer] = 5.0
    config = config_of(tiny, save(constant, tmp_path / "model"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"name": f"imagefolder:{tmp_path}/data"})})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept = prepare(config, tmp_path / "cache", nothing)
    assert any("no better than chance" in str(one.message) for one in said) != known
    assert load(kept.folder).pretrained_cfg.get("label_names") == (["a", "B"] if known else None)


def test_a_batch_of_more_images_than_there_are_is_refused_before_any_work(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    config = config_of(tiny, save(model(), tmp_path / "model"))
    finetune = config.finetune.model_copy(update={"batch_size": 5000, "epochs": 1})
    with pytest.raises(
        UserError, match="finetune.batch_size = 5000: data.name = 'digits' has only 1,078 training images"
    ):
        prepare(config.model_copy(update={"finetune": finetune}), tmp_path / "cache", nothing)
    assert not (tmp_path / "cache").exists()


def test_a_backbone_without_a_head_is_refused_before_any_work(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    config = config_of(tiny, save(model(num_classes=0), tmp_path / "model"))
    with pytest.raises(UserError, match="has no head, so it gives features, which no objective measures"):
        prepare(config, tmp_path / "cache", nothing)
    assert not (tmp_path / "cache").exists()
