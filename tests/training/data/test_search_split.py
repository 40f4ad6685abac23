"""A share of the training images, held out to compare candidates by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunesweep.models import UserError
from prunesweep.training import Data, open_data
from prunesweep.training.data import content_changes, content_of, search_split
from tests.training.data.test_text import tiny_data

CONFIG = {"input_size": (3, 8, 8)}


def images(data: Data, split: str) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in data.split(split, augment=None)]  # type: ignore[attr-defined]


def test_the_held_out_images_are_no_training_images_and_of_every_class_alike() -> None:
    whole, data = open_data("digits"), open_data("digits", search_split=0.2)
    held, rest = images(data, "val"), images(data, "train")
    assert sorted(held + rest) == sorted(images(whole, "train"))
    assert not {*held} & {*rest}
    assert (data.val_images, data.train_images) == (269, 1078)
    labels = torch.tensor(data.labels("val"))
    assert torch.equal(labels, torch.tensor([label for _, label in data.split("val", augment=None)]))  # type: ignore[attr-defined]
    share = labels.bincount() / whole.train_labels().bincount()
    assert share.min() > 0.19
    assert share.max() < 0.21
    assert torch.equal(data.train_labels(), torch.tensor(data.labels("train")))
    assert images(data.report, "val") == images(whole, "val")
    # the first of them are of all classes, for rungs that look at few
    assert len(labels[:60].unique()) == 10
    fitted = [image.numpy().tobytes() for batch, _ in data.calibration(2000, 256, 0) for image in batch]
    assert sorted(fitted) == sorted(rest)


def test_the_same_data_and_share_give_the_same_images_under_a_name_of_their_own() -> None:
    first, again, other = (open_data("digits", search_split=share) for share in (0.2, 0.2, 0.1))
    assert images(first, "val") == images(again, "val")
    names = {data.info.fingerprint for data in (first, again, other, open_data("digits"))}
    assert len(names) == 3
    assert content_changes(content_of(first), content_of(again)) == []
    assert content_changes(content_of(first), content_of(other)) == ["held out of train: 269 images, now 136"]
    assert "269 are held out" in first.describe()[-1]


def test_there_is_a_limit_and_at_least_one_image(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = open_data(f"imagefolder:{image_folder}", CONFIG, search_split=0.2)
    assert (few.val_images, few.train_images) == (2, 10)
    assert sorted(few.labels("val") or []) == [0, 1]
    least = open_data(f"imagefolder:{image_folder}", CONFIG, search_split=0.01)
    assert (least.val_images, least.train_images) == (1, 11)
    monkeypatch.setattr(search_split, "SEARCH_IMAGES", 100)
    assert open_data("digits", search_split=0.5).val_images == pytest.approx(100, abs=5)


def test_unlabelled_images_and_texts_are_drawn_from_all(image_folder: Path) -> None:
    plain = open_data(f"images:{image_folder}", CONFIG, search_split=0.25)
    whole = open_data(f"images:{image_folder}", CONFIG)
    assert plain.val_images == round(whole.train_images * 0.25)
    assert not plain.info.labelled
    texts = tiny_data()
    held = search_split.SearchSplit(texts, 0.25)
    assert held.val_images + held.train_images == texts.train_images
    assert sum(len(words) for words, _ in held.val_loader(256)) == held.val_images
    with pytest.raises(UserError, match="no classes"):
        held.train_labels()


def test_a_single_image_cannot_be_shared() -> None:
    class One(type(open_data("digits"))):  # type: ignore[misc]
        train_images = 1

    with pytest.raises(UserError, match=r"search_split = 0.2: 'digits' has 1 training images, none to hold out"):
        search_split.SearchSplit(One(), 0.2)


def test_images_that_cannot_be_read_are_left_out_or_replaced_by_one_of_the_same_part(
    image_folder: Path,
) -> None:
    name = f"imagefolder:{image_folder}"
    before = {part: images(open_data(name, CONFIG, search_split=0.4), part) for part in ("train", "val")}
    for file in sorted((image_folder / "train").rglob("*.jpg")):
        content = file.read_bytes()
        file.write_bytes(b"no image")
        data = open_data(name, CONFIG, search_split=0.4)
        with pytest.warns(UserWarning, match="evaluation leaves it out.: .*cannot identify image file$"):
            rest, held = images(data, "train"), [image.numpy().tobytes() for x, _ in data.val_loader(2) for image in x]
        gone = (set(before["val"]) - set(held)) | (set(before["train"]) - set(rest))
        assert len(gone) == 1
        assert set(rest) <= set(before["train"])
        assert len(rest) == len(before["train"])
        assert held == [image for image in before["val"] if image not in gone]
        plain = [image for x, _ in data.plain_loader(range(data.train_images), 4) for image in x]
        assert len(plain) == len(rest) - (gone <= set(before["train"]))
        file.write_bytes(content)
