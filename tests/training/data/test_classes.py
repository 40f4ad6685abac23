"""Classes of data and of models: matched by name, by position where that is all there is, never by chance."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prunesweep.models import UserError
from prunesweep.training import open_data
from prunesweep.training.data import Data
from prunesweep.training.data import huggingface as hub

PREPROCESSING = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
FOLDERS = ("a", "B", "c")  # timm's order; torchvision's is B, a, c


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image of each class in each split."""
    for split in ("train", "val"):
        for name in FOLDERS:
            place = tmp_path / "data" / split / name / "0.png"
            place.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (9, 9, 9)).save(place)
    return tmp_path / "data"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards with the labels 0, 1 and 2 in each split."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for label in range(3):
                image = io.BytesIO()
                Image.new("RGB", (16, 16), (label, 9, 9)).save(image, "png")
                for ending, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{label}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return tmp_path


def opened(name: str, model: list[str] | None = None, **options: Any) -> Data:
    """Open data for a model whose classes have these names."""
    return open_data(name, {**PREPROCESSING, "label_names": model}, **options)


def test_the_same_names_in_another_order_are_permuted(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = opened(f"imagefolder:{folder}", ["c", "a", "B"])
    assert data.info.classes == ("c", "a", "B")
    assert data.labels("val") == [1, 2, 0]  # of the files a, B, c


@pytest.mark.parametrize("model", [["B", "a", "d"], ["x", "a", "z"]])
def test_names_that_match_in_part_are_refused(model: list[str], folder: Path) -> None:
    name = f"imagefolder:{folder}"
    with pytest.raises(UserError) as caught:
        opened(name, model)
    shared = [c for c in FOLDERS if c in model]
    assert f"{len(shared)} of 3 classes have names of the model's classes" in str(caught.value)
    for c in {*model, *FOLDERS}:
        assert repr(c) in str(caught.value)
    assert "--classes" in str(caught.value)
    assert "--class-order" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(name, model, classes=["c", "B", "a"]).info.classes == ("c", "B", "a")
        assert opened(name, model, class_order="natural").info.classes == FOLDERS
        assert opened(name, model, class_order="codepoint").info.classes == ("B", "a", "c")


def test_names_of_which_none_matches_go_by_position_with_a_warning(folder: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"named otherwise \('B', 'a', 'c' in the data, 'n1', 'n2', 'n3' in the model\)"
    ):
        data = opened(f"imagefolder:{folder}", ["n1", "n2", "n3"])
    assert data.info.classes == FOLDERS


def test_the_order_is_said_where_it_is_a_matter_of_convention(folder: Path) -> None:
    name, own = f"imagefolder:{folder}", ["B", "a", "c"]
    (note,) = opened(name).info.notes
    assert note.startswith("classes by position, in timm's natural order (a .. c); torchvision's is another (B .. c): ")
    for data in (opened(name, own), opened(name, class_order="natural"), opened(name, classes=FOLDERS)):
        assert data.info.notes == ()


def test_an_order_that_is_not_the_models_is_refused(folder: Path) -> None:
    name, own = f"imagefolder:{folder}", ["B", "a", "c"]
    assert opened(name, own, class_order="codepoint").info.classes == tuple(own)
    with pytest.raises(UserError, match="--class-order.* = 'natural': the model names its classes .* from 'B' to 'c'"):
        opened(name, own, class_order="natural")
    assert opened(name, own, classes=FOLDERS).info.classes == FOLDERS


def test_numbers_with_names_are_matched_by_name(shards: Path) -> None:
    name = f"wds:{shards}"
    plain, named = opened(name), opened(name, classes=FOLDERS)
    permuted = opened(name, ["c", "a", "B"], classes=FOLDERS)
    assert permuted.info.classes == ("c", "a", "B")
    assert permuted.labels("val") == permuted.train_labels().tolist() == [1, 2, 0]
    assert [y for _, batch in permuted.val_loader(3) for y in batch.tolist()] == [1, 2, 0]
    assert len({data.info.fingerprint for data in (plain, named, permuted)}) == 3
    with pytest.raises(UserError, match="2 of 3 classes have names.*give the data's numbers the model's names"):
        opened(name, ["a", "B", "d"], classes=FOLDERS)
    assert opened(name, ["a", "B", "d"]).labels("val") == [0, 1, 2]  # the numbers have no names


@pytest.mark.parametrize("name", ["digits", "wds:{}"])
def test_options_that_do_not_concern_the_data_are_refused(name: str, shards: Path) -> None:
    with pytest.raises(UserError, match=r"data.class_order \(--class-order\): is for 'imagefolder:PATH', not for"):
        opened(name.format(shards), class_order="natural")
    with pytest.raises(UserError, match=r"data.classes .*: is for .*'hfds:NAME' and .*, not for 'digits'"):
        opened("digits", classes=["a"])


def test_data_of_the_hub_are_matched_by_name_and_say_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reader in the place of timm's, which needs the package ``datasets`` and the network."""

    class Label:
        num_classes, names = 3, list(FOLDERS)

    class Table:
        features = {"label": Label()}  # noqa: RUF012
        _fingerprint = "x"

        def __getitem__(self, column: str) -> list[int]:
            return [0, 1, 2]

    class Reader:
        label_key, dataset = "label", Table()

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
            file = io.BytesIO()
            Image.new("RGB", (16, 16)).save(file, "png")
            return io.BytesIO(file.getvalue() if index else b"no image"), index

    monkeypatch.setattr(hub, "_reader", lambda name, split: Reader())
    data = opened("hfds:x/y", ["c", "a", "B"])
    assert data.info.classes == ("c", "a", "B")
    assert data.train_labels().tolist() == [1, 2, 0]
    with pytest.warns(UserWarning, match="image 0: cannot identify image file$"):
        labels = torch.cat([y for _, y in data.val_loader(2)])
    assert labels.tolist() == [2, 0]
    assert opened("hfds:x/y", classes=["x", "y", "z"]).info.classes == ("x", "y", "z")
    assert data.info.fingerprint != opened("hfds:x/y").info.fingerprint
    with pytest.raises(UserError, match="2 names, data 'hfds:x/y' has 3 classes"):
        opened("hfds:x/y", classes=["x", "y"])


def test_a_mean_of_other_channels_than_the_images_is_refused(folder: Path) -> None:
    cfg = {**PREPROCESSING, "mean": (0.5, 0.5)}
    with pytest.raises(UserError, match=r"pretrained_cfg.mean = \[0.5, 0.5\]: 2 numbers for images of 3 channels"):
        open_data(f"imagefolder:{folder}", cfg)
    grey = {**PREPROCESSING, "input_size": (1, 16, 16)}
    with pytest.raises(UserError, match="3 numbers for images of 1 channels"):
        open_data(f"imagefolder:{folder}", grey)
