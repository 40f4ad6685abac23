from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from prunesweep.models import UserError
from prunesweep.training import Recipe, World, open_data, seeded
from prunesweep.training.batches import EpochBatches

PREPROCESSING = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}


def test_digits_split_is_fixed_and_complete() -> None:
    data = open_data("digits")
    train, val = (data.split(split, augment=None) for split in ("train", "val"))
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
            batches = EpochBatches(data.train_images, 32, World())
            batches.start(seed)
            x, _ = next(iter(data.train_loader(batches, Recipe())))
        return x

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


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
    assert sum(len(y) for _, y in data.train_loader(EpochBatches(12, 4, World()), Recipe())) == 12


def test_image_folder_fingerprint_sees_changes(image_folder: Path) -> None:
    before = open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint
    assert before == open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint
    assert before != open_data(f"imagefolder:{image_folder}", {**PREPROCESSING, "crop_pct": 0.9}).info.fingerprint
    (image_folder / "train" / "red" / "0.jpg").unlink()
    assert before != open_data(f"imagefolder:{image_folder}", PREPROCESSING).info.fingerprint


def test_errors_say_what_is_missing(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="must be 'digits', 'glyphs', .*'imagefolder:PATH', .*'images:PATH', 'hfds:NAME' or 'python:M",
    ):
        open_data("digit")
    with pytest.raises(UserError, match="no folder .*nowhere/train"):
        open_data(f"imagefolder:{tmp_path / 'nowhere'}")
    (image_folder / "val" / "green").mkdir()
    with pytest.raises(UserError, match="no folder in .*/train for class 'green', which .*/val has"):
        open_data(f"imagefolder:{image_folder}", PREPROCESSING)


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """The image folder as webdataset shards: two for training, one for validation."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for split, count in (("train", 2), ("val", 1)):
        images = sorted((image_folder / split).rglob("*.jpg"))
        for k in range(count):
            with tarfile.open(folder / f"{split}-{k}.tar", "w") as tar:
                for i, image in enumerate(images[k::count]):
                    tar.add(image, f"{i:04}.jpg")
                    label = io.BytesIO(b"0" if image.parent.name == "blue" else b"1")
                    entry = tarfile.TarInfo(f"{i:04}.cls")
                    entry.size = 1
                    tar.addfile(entry, label)
    return folder


def test_shards_hold_what_the_folder_holds(image_folder: Path, shards: Path) -> None:
    folder, tars = (
        open_data(f"{kind}:{path}", PREPROCESSING) for kind, path in (("imagefolder", image_folder), ("wds", shards))
    )
    assert tars.info.num_classes == 2
    assert sorted(tars.train_labels().tolist()) == sorted(folder.train_labels().tolist())
    pixels = [{(x.sum().item(), int(y)) for x, y in data.split("val", augment=None)} for data in (folder, tars)]
    assert pixels[0] == pixels[1]
    assert len(pixels[0]) == 5
    assert open_data(f"wds:{shards}", PREPROCESSING).info.fingerprint == tars.info.fingerprint


def test_shards_that_are_not_whole(shards: Path) -> None:
    with tarfile.open(shards / "train-9.tar", "w") as tar:
        entry = tarfile.TarInfo("x.cls")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"0"))
    with pytest.raises(UserError, match="x in train-9.tar has label only"):
        open_data(f"wds:{shards}", PREPROCESSING)
    with pytest.raises(UserError, match=r"no shard .*/train\*.tar with images"):
        open_data(f"wds:{shards / 'nowhere'}", PREPROCESSING)


def test_images_that_cannot_be_read(image_folder: Path) -> None:
    broken = sorted((image_folder / "val").rglob("*.jpg"))
    broken[1].write_bytes(b"no image")
    whole = open_data(f"imagefolder:{image_folder}", PREPROCESSING)
    with pytest.warns(
        UserWarning,
        match="an image cannot be read .* evaluation leaves it out.: .*1.jpg: cannot identify image file$",
    ):
        assert sum(len(y) for _, y in whole.val_loader(2)) == 4
    assert whole.val_images == 4
    for k in range(12):
        (broken[0].parent / f"broken{k}.jpg").write_bytes(b"no image")
    data = open_data(f"imagefolder:{image_folder}", PREPROCESSING).split("val", augment=None)
    with (
        pytest.raises(UserError, match="more than 10 images cannot be read: .*/val/.*jpg: "),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        list(data)


def test_calibration_per_class() -> None:
    data = open_data("digits")
    batches = data.calibration(5, 16, 0, per_class=True)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [c for c in range(10) for _ in range(5)]


def test_evaluation_is_exact_for_any_number_of_workers() -> None:
    data = open_data("digits")
    shares = [list(data.val_loader(64, World(rank, 4))) for rank in range(4)]
    labels = [y for share in shares for _, y in share]
    assert sum(map(len, labels)) == 450
    want = torch.cat([y for _, y in data.val_loader(64)]).bincount()
    assert torch.equal(torch.cat(labels).bincount(), want)
