"""Data of one's own: a pair of data sets, by object or by the name of a function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from prunesweep.models import UserError, build
from prunesweep.training import Data, Recipe, evaluate_on, fit, open_data, own_data
from prunesweep.training.named_code import MODULES
from tests.models.test_in_other_code import KINDS

ARCH = KINDS["attention"]


def pair(images: int = 12, classes: int = 3) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, *(ARCH.in_chans, *ARCH.img_size), generator=generator)
    y = torch.arange(images) % classes
    return TensorDataset(x, y), TensorDataset(x[:5], y[:5])


class Plain(Dataset[Any]):
    """Labels are Python's numbers, and ``targets`` says them without reading an image."""

    def __init__(self, items: list[Any], targets: list[int] | None = None) -> None:
        self.items, self.read = items, list[int]()
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.items[index]


def test_a_pair_is_trained_on_and_measured() -> None:
    data = Data.of(*pair(), classes=["a", "b", "c"])
    assert (data.info.num_classes, data.info.input_size, data.info.classes) == (3, (3, 6, 8), ("a", "b", "c"))
    assert (data.train_images, data.val_images) == (12, 5)
    model = build(ARCH)
    before = [p.clone() for p in model.parameters()]
    assert fit(model, data, Recipe(epochs=1, batch_size=6, lr=1e-2))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert evaluate_on(model, data, source=None)["images"] == 5


def test_the_fingerprint_follows_images_and_labels() -> None:
    train, val = pair()
    found = Data.of(train, val).info
    assert found.num_classes == 3
    assert Data.of(*pair()).info.fingerprint == found.fingerprint
    x, y = train.tensors
    for changed in (TensorDataset(x + 1e-3, y), TensorDataset(x, 2 - y)):
        assert Data.of(changed, val).info.fingerprint != found.fingerprint
    assert Data.of(train, val, classes="abc").info.fingerprint != found.fingerprint


def test_labels_that_are_known_need_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunesweep.training.data.own.HASHED", 2)
    items = [(torch.zeros(1, 4, 4), i % 2) for i in range(8)]
    train, val = Plain(items, [i % 2 for i in range(8)]), Plain(items)
    data = Data.of(train, val)
    assert data.train_labels().tolist() == [0, 1] * 4
    assert set(train.read) == {0, 4}
    assert set(val.read) == set(range(8))


def test_augmented_images_train() -> None:
    train, val = pair()
    data = Data.of(train, val, augmented=TensorDataset(train.tensors[0] + 100, train.tensors[1]))
    assert data.split("train", augment=Recipe())[0][0].mean() > 50
    assert data.split("train", augment=None)[0][0].mean() < 50


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ([], {}, "own: train has no images"),
        ([torch.zeros(1, 4, 4)], {}, r"own: train: item 0 is a Tensor: must be \(image, label\)"),
        ([("picture", 0)], {}, "own: train: image 0 is str: must be a tensor of floats"),
        ([(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)], {}, "image 0 is torch.uint8: must be a tensor of floats"),
        ([(torch.zeros(4, 4), 0)], {}, r"own: an image has shape \[4, 4\]: must be channels, rows and columns"),
        ([(torch.zeros(1, 4, 4), "cat")], {}, "own: train: label 0 is 'cat': must be a whole number"),
        ([(torch.zeros(1, 4, 4), 3)], {"classes": ["a", "b"]}, r"own: train has the label 3: must lie in 0\.\.1"),
        ([(torch.zeros(1, 4, 4), -1)], {}, "own: train has the label -1"),
        ([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 4, 5), 0)], {}, r"image 1 has shape \[1, 4, 5\], others have"),
        ([(torch.zeros(1, 4, 4), 0)], {"augmented": Plain([])}, "augmented has 0 images, train 1: give the same"),
    ],
)
def test_what_is_no_data(train: list[Any], options: dict[str, Any], message: str) -> None:
    val = Plain([(torch.zeros(1, 4, 4), 0)])
    with pytest.raises(UserError, match=message):
        Data.of(Plain(train), val, **options)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module ``cells_NUMBER`` with a function of data, which nothing has imported."""
    name = f"cells_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from prunesweep.training import Data, own_data\n"
        "from tests.training.data.test_own import pair\n\n"
        "@own_data\ndef data():\n    return Data.of(*pair(), classes=['a', 'b', 'c'])\n\n"
        "@own_data\ndef nothing():\n    return 3\n\n"
        "def plain():\n    return Data.of(*pair())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(MODULES, "")
    return name


def test_a_configuration_alone_runs_no_code(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"names code, which .* alone does not run: set {MODULES}={module}"):
        open_data(f"python:{module}:data")
    assert module not in sys.modules
    monkeypatch.setenv(MODULES, f"other, {module}")
    data = open_data(f"python:{module}:data", {"label_names": ["c", "a", "b"]})
    assert (data.info.name, data.info.classes) == (f"python:{module}:data", ("c", "a", "b"))
    assert data.train_labels().tolist() == [1, 2, 0] * 4
    assert data.split("val", augment=None)[0][1] == 1
    for function, message in (
        ("plain", "is no function with the decorator"),
        ("absent", "is no function with the decorator"),
        ("nothing", r"returned a int, not Data\.of\(train, val\)"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(f"python:{module}:{function}")
    monkeypatch.setenv(MODULES, "no_such_module")
    with pytest.raises(UserError, match="No module named 'no_such_module'; the module must be one that every process"):
        open_data("python:no_such_module:data")
    with pytest.raises(UserError, match="must be python:MODULE:FUNCTION"):
        open_data("python:cells")


def test_a_module_that_was_imported_is_named_for_processes_started_later(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    import os

    importlib.import_module(module)
    assert os.environ[MODULES] == module
    assert open_data(f"python:{module}:data").train_images == 12
    own_data(lambda: Data.of(*pair()))
    assert os.environ[MODULES].split(",") == [module, __name__]
