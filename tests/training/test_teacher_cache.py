from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from prunesweep.models import UserError
from prunesweep.training import Recipe, fit, load_recipe, open_data, seeded
from prunesweep.training import teacher_cache as module

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1}


class Counted(nn.Module):
    """A teacher that knows how many images it has seen."""

    def __init__(self, seed: int, heads: int = 2) -> None:
        super().__init__()
        self.model, self.images = make(seed, heads), 0
        self.num_classes, self.pretrained_cfg = 10, self.model.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return self.model(x)


def make(seed: int, heads: int = 2) -> Any:
    with seeded(seed):
        model = timm.create_model("vit_tiny_patch16_224", num_heads=heads, **SHAPE)
    model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
    return model


DISTILL = [{"kind": "soft", "temperature": 3.0}, {"kind": "hard", "weight": 0.5}]
FIELDS: dict[str, Any] = {"epochs": 2, "batch_size": 96, "lr": 2e-3, "drop_path": 0.2, "fixed_view": True}


def recipe(cached: bool, **fields: Any) -> Recipe:
    return Recipe(**{**FIELDS, "distill": [{**term, "cache_teacher": cached} for term in DISTILL], **fields})


def train(teacher: nn.Module, recipe: Recipe, folder: Path | None = None) -> tuple[list[float], list[str]]:
    losses: list[float] = []
    notes: list[str] = []
    model, data = make(0), open_data("digits")
    reports: dict[str, Any] = {"on_step": lambda done, total, loss: losses.append(loss), "on_note": notes.append}
    fit(model, data, recipe, teacher=teacher, seed=3, teacher_cache=folder, **reports)
    return losses, notes


@pytest.mark.parametrize("fields", [{}, {"accumulate": 2}, {"amp": "bf16"}])
def test_losses_are_those_of_the_teacher_itself(fields: dict[str, Any], tmp_path: Path) -> None:
    teacher = Counted(1)
    wanted, _ = train(teacher, recipe(False, **fields))
    assert teacher.images == 2 * 14 * 96
    tolerance = 2e-2 if fields.get("amp") else 1e-6  # bfloat16 rounds by the size of the batch too
    for folder in (tmp_path / "cache", None):
        counted = Counted(1)
        found, notes = train(counted, recipe(True, **fields), folder)
        assert counted.images == 1347
        assert notes == ["computing the logits of teacher 'source' on 1,347 images"]
        assert found == pytest.approx(wanted, abs=tolerance)
    again = Counted(1)
    read, notes = train(again, recipe(True, **fields), tmp_path / "cache")
    assert again.images == 0
    assert notes == []
    assert read == found  # drop path too is drawn as in the run that computed them


def test_shards_that_are_missing_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 500)
    wanted, _ = train(Counted(1), recipe(True), tmp_path)
    (folder,) = tmp_path.iterdir()
    shards = sorted(folder.iterdir())
    assert [shard.name for shard in shards] == [f"0000{i}.safetensors" for i in range(3)]
    shards[1].unlink()
    counted = Counted(1)
    found, _ = train(counted, recipe(True), tmp_path)
    assert counted.images == 500
    assert found == wanted


def test_a_shard_of_another_teacher_is_made_again(tmp_path: Path) -> None:
    wanted, _ = train(Counted(1), recipe(True, epochs=1), tmp_path)
    (own,) = tmp_path.rglob("*.safetensors")
    train(Counted(2), recipe(True, epochs=1), tmp_path)
    (other,) = (file for file in tmp_path.rglob("*.safetensors") if file != own)
    own.write_bytes(other.read_bytes())
    counted = Counted(1)
    found, _ = train(counted, recipe(True, epochs=1), tmp_path)
    assert counted.images == 1347
    assert found == wanted


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    wanted, _ = train(Counted(1), recipe(True, epochs=1), tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    counted = Counted(1)
    found, _ = train(counted, recipe(True, epochs=1), tmp_path)
    assert counted.images == 1347
    assert found == wanted
    assert load_file(shard)["logits"].any(1).all()


def test_another_teacher_data_or_precision_is_another_file(tmp_path: Path) -> None:
    short = {"epochs": 1}
    for count, (teacher, fields) in enumerate(
        [(make(1), {}), (make(2), {}), (make(1, heads=4), {}), (make(1), {"amp": "bf16"}), (make(1), {})], start=1
    ):
        train(teacher, recipe(True, **short, **fields), tmp_path)
        assert len(list(tmp_path.iterdir())) == min(count, 4)


def test_one_teacher_may_have_a_term_that_is_not_cached() -> None:
    distill = [{"cache_teacher": True}, {"kind": "feature", "weight": 0.1}]
    found, _ = train(make(1), recipe(True, distill=distill))
    wanted, _ = train(make(1), recipe(False, distill=[{}, distill[1]]))
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fixed_view": False},
            "fixed_view = false, mixup = 0.0, cutmix = 0.0: the teacher's answers can",
        ),
        ({"mixup": 0.8}, "with fixed_view = true, mixup = 0.8, .*: set fixed_view = true and mixup = cutmix = 0"),
        ({"cutmix": 1.0}, "cutmix = 1.0: the teacher's answers can be kept only for images that look the same"),
        ({"distill": [{"kind": "feature", "cache_teacher": True}]}, "logits are kept, not features"),
        ({"auto_augment": "rand-m9"}, "fixed_view = true: training images are those of evaluation, so auto_augment"),
        ({"random_erasing": 0.25}, "auto_augment and random_erasing must be off"),
    ],
)
def test_where_images_change_it_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"recipe quick: .*{message}"):
        load_recipe("quick", {"fixed_view": True, "distill": [{"cache_teacher": True}], **fields})
