"""The data set of drawn characters: the same pixels everywhere, and a task for small transformers."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from prunesweep.models import UserError
from prunesweep.training import Recipe, open_data
from prunesweep.training.batches import EpochBatches
from prunesweep.training.data import Glyphs
from prunesweep.training.data.glyph_images import PIXELS, distance_maps, draw_images
from prunesweep.training.data.glyphs import CHARACTERS, font_files
from prunesweep.training.data.search_split import SearchSplit
from prunesweep.training.world import World


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    """Three characters in four fonts."""
    return distance_maps(font_files()[::10], "O1Ж")


def test_maps_have_the_characters_shape(maps: np.ndarray) -> None:
    assert maps.shape == (4, 3, 96, 96)
    ring = maps[0, 0]
    assert ring[48, 48] < 0 < ring[48].max()  # an O: outside in the middle, inside left and right of it
    assert (ring[:, 48] > 0).any()
    assert (ring[0] == -127).all()  # far from the edges
    thin, bold = maps[0, 1] > 0, maps[3, 1] > 0
    assert thin.sum() > 100
    assert bold.sum() > 100


def test_images_are_the_same_on_every_machine(maps: np.ndarray) -> None:
    images, labels = draw_images(maps, 5, seed=3)
    assert images.shape == (15, PIXELS, PIXELS)
    assert labels.tolist() == [0, 1, 2] * 5
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "d9982e291811db70"


def test_fewer_images_are_the_first_ones_of_more(maps: np.ndarray) -> None:
    few, more = (draw_images(maps, count, seed=3)[0] for count in (5, 400))  # 1,200 are drawn in three parts
    assert (few == more[:15]).all()
    other, _ = draw_images(maps, 5, seed=4)
    assert (few != other).mean() > 0.9


def test_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Glyphs(train=5, val=2)
    assert (data.info.num_classes, data.info.input_size) == (80, (1, 32, 32))
    assert data.info.notes == ()  # the fonts are those of the benchmarks
    assert data.describe()[0] == "glyphs: 400 train, 160 val, 80 classes (A .. б)"
    assert torch.bincount(data.train_labels()).tolist() == [5] * 80
    x, y = (torch.cat(parts) for parts in zip(*data.val_loader(64), strict=True))
    assert x.shape == (160, 1, 32, 32)
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1
    assert y.tolist() == data.labels("val") == list(range(80)) * 2
    augmented, _ = next(iter(data.train_loader(EpochBatches(400, 400, World()), Recipe())))
    assert augmented.shape == (400, 1, 32, 32)

    held = SearchSplit(data, 0.2)
    assert torch.bincount(torch.tensor(held.labels("val"))).tolist() == [1] * 80
    assert held.train_images == 320

    def drawn(*_: object) -> None:
        raise AssertionError("the images were kept")

    monkeypatch.setattr("prunesweep.training.data.glyphs.distance_maps", drawn)
    assert Glyphs(train=5, val=2).info == data.info


def test_characters_are_distinct() -> None:
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 80


def test_without_fonts_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "font_manrope" else find(name))
    with pytest.raises(UserError, match=r"data 'glyphs' needs font_manrope: pip install -e '\.\[demo\]'"):
        open_data("glyphs")


def test_a_font_package_without_its_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name != "FiraSans-Thin.ttf" and is_file(path))
    with pytest.raises(UserError, match="needs fontpkg_fira_sans:"):
        font_files()
