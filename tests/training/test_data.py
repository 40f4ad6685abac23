from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import UserError
from training import open_data, seeded

PREPROCESSING = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}


def test_digits_split_is_fixed_and_complete() -> None:
    data = open_data("digits")
    train, val = (data.split(split, augment=False) for split in ("train", "val"))
    assert (len(train), len(val)) == (1347, 450)
    assert (data.info.num_classes, data.info.input_size) == (10, (1, 8, 8))
    assert data.info.fingerprint == open_data("digits").info.fingerprint == "c99babc3031ef854"
    counts = torch.bincount(torch.tensor([int(y) for _, y in val]))
    assert counts.min() >= 43
    pixels = torch.stack([x for x, _ in train])
    assert pixels.mean().item() == pytest.approx(0, abs=0.01)
    assert pixels.std().item() == pytest.approx(1, abs=0.01)


def test_validation_reads_every_image_once() -> None:
    loader = open_data("digits").val_loader(64)
    assert sum(len(y) for _, y in loader) == 450
    assert all(torch.equal(a[1], b[1]) for a, b in zip(loader, loader, strict=True))


def test_order_and_augmentation_follow_from_the_seed() -> None:
    data = open_data("digits")

    def first(seed: int) -> torch.Tensor:
        with seeded(seed):
            x, _ = next(iter(data.train_loader(32, torch.Generator().manual_seed(seed))))
        return x

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_last_batch_of_one_image_is_left_out() -> None:
    data = open_data("digits")
    assert sum(len(y) for _, y in data.train_loader(1346, torch.Generator())) == 1346
    assert sum(len(y) for _, y in data.train_loader(64, torch.Generator())) == 1347


def test_calibration_is_drawn_by_seed_from_the_training_split() -> None:
    data = open_data("digits")
    first, second, other = (data.calibration(100, 32, seed) for seed in (0, 0, 1))
    assert [len(y) for _, y in first] == [32, 32, 32, 4]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert sum(len(y) for _, y in data.calibration(10**6, 512, 0)) == 1347


def test_image_folder(image_folder: Path) -> None:
    data = open_data(f"imagefolder:{image_folder}", PREPROCESSING)
    assert (data.info.num_classes, data.info.input_size) == (2, (3, 32, 32))
    batches = list(data.val_loader(4))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 32, 32), (1, 3, 32, 32)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert y.tolist() == [0, 0, 1, 1, 1]  # classes in the order of their names: blue, red
    red_minus_blue = (x[:, 0] - x[:, 2]).mean((1, 2))
    assert ((red_minus_blue > 0).long() == y).all()
    assert sum(len(y) for _, y in data.train_loader(5, torch.Generator())) == 12


def test_image_folder_fingerprint_sees_changes(image_folder: Path) -> None:
    before = open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint
    assert before == open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint
    assert before != open_data(f"imagefolder:{image_folder}", {**PREPROCESSING, "crop_pct": 0.9}).info.fingerprint
    (image_folder / "train" / "red" / "0.jpg").unlink()
    assert before != open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint


def test_errors_say_what_is_missing(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be 'digits' or 'imagefolder:PATH'"):
        open_data("digit")
    with pytest.raises(UserError, match="no folder .*nowhere/train"):
        open_data(f"imagefolder:{tmp_path / 'nowhere'}")
    (image_folder / "val" / "green").mkdir()
    with pytest.raises(UserError, match="different classes: green"):
        open_data(f"imagefolder:{image_folder}", PREPROCESSING)
