"""Trees of images without labels: found at any depth, split for good, and never taken for labelled data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prunesweep.models import UserError, arch_of
from prunesweep.training import Recipe, check_fits, fit, open_data
from prunesweep.training.data import NO_LABEL, Data
from tests.training.data.test_folder_cases import PREPROCESSING, draw


def tree(root: Path, images: int = 20) -> Path:
    """Images of different colours in folders of different depth."""
    for i in range(images):
        draw(root / Path(*"abc"[: i % 4]) / f"{i}.png", 10 * i)
    return root


def opened(root: Path, **options: Any) -> Data:
    return open_data(f"images:{root}", PREPROCESSING, **options)


def pixels(data: Data, split: str) -> set[float]:
    return {round(x.mean().item(), 4) for x, _ in data.split(split, augment=None)}  # type: ignore[attr-defined]


def test_every_image_of_a_tree_is_in_one_split(tmp_path: Path) -> None:
    data = opened(tree(tmp_path / "tree"))
    train, val = pixels(data, "train"), pixels(data, "val")
    assert (len(train), len(val)) == (15, 5)
    assert not train & val
    batches = data.calibration(8, 4, seed=0)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 16, 16)] * 2
    assert {int(y) for _, labels in batches for y in labels} == {NO_LABEL}
    assert data.info.fingerprint == opened(tmp_path / "tree").info.fingerprint
    assert "15 train, 5 val, without labels" in data.describe()[0]
    assert not data.info.labelled


def test_folders_train_and_val_are_the_splits(tmp_path: Path) -> None:
    for split, images in (("train", 4), ("val", 2), ("test", 3)):
        tree(tmp_path / split, images)
    data = opened(tmp_path)
    assert (data.train_images, len(data.split("val", augment=None))) == (4, 2)  # type: ignore[arg-type]
    assert any("3 beside train and val" in note for note in data.info.notes)


def test_what_is_no_image_is_counted_and_loops_end(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / ".hidden.png").write_bytes(b"")
    os.symlink(root / "nowhere.png", root / "broken.png")
    os.symlink(root, root / "a" / "again")
    data = opened(root)
    assert data.train_images == 15
    (note,) = data.info.notes
    assert all(reason in note for reason in ("1 of kind .txt", "1 hidden", "1 links to nothing"))


@pytest.mark.parametrize("change", ["pixels", "name", "more", "preprocessing"])
def test_the_fingerprint_follows_the_images(tmp_path: Path, change: str) -> None:
    root = tree(tmp_path / "tree")
    before, preprocessing = opened(root).info.fingerprint, dict(PREPROCESSING)
    if change == "pixels":
        draw(root / "4.png", 250)
    elif change == "name":
        (root / "4.png").rename(root / "five.png")
    elif change == "more":
        draw(root / "new" / "99.png", 3)
    else:
        preprocessing["mean"] = (0.4, 0.5, 0.5)
    assert open_data(f"images:{root}", preprocessing).info.fingerprint != before


@pytest.mark.parametrize(("images", "said"), [(None, "no folder"), (0, "no image below it"), (1, "1 image below it")])
def test_too_few_images_are_refused(tmp_path: Path, images: int | None, said: str) -> None:
    root = tmp_path / "tree"
    if images is not None:
        tree(root, images).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=said):
        opened(root)


def test_grey_images_suit_a_model_of_one_channel(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    grey = {**PREPROCESSING, "input_size": (1, 8, 8), "mean": (0.3,), "std": (0.4,)}
    (x, _), *_ = open_data(f"images:{tmp_path}", grey).calibration(4, 4, seed=0)
    assert tuple(x.shape[1:]) == (1, 8, 8)


def test_what_needs_labels_says_so(tmp_path: Path, tiny: Any) -> None:
    data = opened(tree(tmp_path / "tree"))
    check_fits(arch_of(tiny), data)  # any number of classes does
    with pytest.raises(UserError, match="has no labels"):
        data.train_labels()
    with pytest.raises(UserError, match="has no labels to train on: set the recipe's loss_weight = 0"):
        fit(tiny, data, Recipe(batch_size=4))


@pytest.fixture
def tiny() -> Any:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=5
    )
