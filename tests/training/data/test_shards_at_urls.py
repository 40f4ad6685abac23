"""Webdataset shards at a URL: the same data as in a folder, kept on this machine as far as there is room."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prunesweep.models import UserError
from prunesweep.models.errors import NotHere
from prunesweep.models.io import objects
from prunesweep.models.io.objects import Objects
from prunesweep.training import open_data
from prunesweep.training.data import shard_files
from prunesweep.training.data.shard_files import LIMIT
from tests.object_store import Store, serving

PREPROCESSING = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}
IMAGES = 12  # of a shard
CONNECT = shard_files._objects


def write_shards(folder: Path, seed: int = 0) -> Path:
    """Write two shards to train on and one to validate on, of random images in two classes."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed)
    for shard in ("train-0", "train-1", "val-0"):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(IMAGES):
                image = io.BytesIO()
                Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(image, "png")
                for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.cls", b"%d" % (i % 2))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT, raising=False)
    CONNECT.cache_clear()
    yield
    CONNECT.cache_clear()


def pixels(data: Any, split: str) -> list[tuple[float, int]]:
    return [(x.double().sum().item(), int(y)) for x, y in data.split(split, augment=None)]


def kept(cache: Path) -> list[str]:
    return sorted(file.name.split("-", 2)[2] for file in cache.glob("prunesweep/shards/*/*.tar"))


@pytest.mark.parametrize("limit", [None, "0"])
def test_the_same_images_as_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None) -> None:
    folder = write_shards(tmp_path / "shards")
    if limit is not None:
        monkeypatch.setenv(LIMIT, limit)
    local, remote = open_data(f"wds:{folder}", PREPROCESSING), open_data(f"wds:file://{folder}", PREPROCESSING)
    assert remote.info.name == f"wds:file://{folder}"
    assert remote.info.fingerprint == local.info.fingerprint
    for split in ("train", "val"):
        assert pixels(remote, split) == pixels(local, split)
    sent = pickle.loads(pickle.dumps(remote.split("val", augment=None)))  # to a loader's process
    assert [int(y) for _, y in sent] == [int(y) for _, y in local.split("val", augment=None)]
    assert kept(tmp_path / "cache") == ([] if limit else ["train-0.tar", "train-1.tar", "val-0.tar"])


def test_kept_shards_are_read_instead_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "shards")
    data = open_data(f"wds:file://{folder}", PREPROCESSING)
    before = pixels(data, "train")
    monkeypatch.setattr(Objects, "part", lambda *_: pytest.fail("asked the store for a kept shard"))
    assert pixels(data, "train") == before
    write_shards(folder, seed=1)  # other images under the same names
    changed = open_data(f"wds:file://{folder}", PREPROCESSING)
    assert changed.info.fingerprint != data.info.fingerprint
    assert pixels(changed, "train") != before


def test_shards_of_other_data_make_room_and_those_in_use_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write_shards(tmp_path / "first"), write_shards(tmp_path / "second", seed=1)
    size = (first / "train-0.tar").stat().st_size
    monkeypatch.setenv(LIMIT, str(2.5 * size / 2**30))
    data = open_data(f"wds:file://{first}", PREPROCESSING)
    assert kept(tmp_path / "cache") == ["train-0.tar", "train-1.tar"]  # no room for the third one
    before = pixels(data, "train"), pixels(data, "val")
    open_data(f"wds:file://{second}", PREPROCESSING)
    own = tmp_path / "cache/prunesweep/shards"
    assert [len(list(folder.glob("*.tar"))) for folder in sorted(own.iterdir(), key=lambda f: f.stat().st_mtime)] == [
        0,
        2,
    ]
    assert (pixels(data, "train"), pixels(data, "val")) == before  # by range requests, now that they are gone


def test_a_shard_that_is_read_again_and_again_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "shards")
    for shard in folder.iterdir():
        os.utime(shard, (time.time() - 60,) * 2)  # old enough that the index of the images is used again
    monkeypatch.setenv(LIMIT, "0")
    open_data(f"wds:file://{folder}", PREPROCESSING)
    monkeypatch.delenv(LIMIT)
    data = open_data(f"wds:file://{folder}", PREPROCESSING)
    images = data.split("val", augment=None)
    for i in range(shard_files.READS_TO_KEEP - 1):
        images[i]
    before = kept(tmp_path / "cache")
    images[IMAGES - 1]
    assert (before, kept(tmp_path / "cache")) == ([], ["val-0.tar"])


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


@pytest.mark.slow
def test_a_store_that_fails_for_a_while(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    folder, place = write_shards(tmp_path / "shards"), Objects(store.url("shards"))
    for shard in folder.iterdir():
        place.put(shard.name, shard)
    data = open_data(f"wds:{store.url('shards')}", PREPROCESSING)
    before = pixels(data, "val")
    assert data.info.fingerprint == open_data(f"wds:{folder}", PREPROCESSING).info.fingerprint
    begun = time.monotonic()
    store.fails = lambda *_: time.monotonic() < begun + 0.5
    assert pixels(data, "val") == before  # and no image counts as one that cannot be read
    monkeypatch.setattr(objects, "PATIENCE", 0.0)
    store.fails = lambda *_: True
    with pytest.raises(NotHere, match="the store has not answered for"):
        data.split("val", augment=None)[0]
    store.fails = lambda *_: False
    place.delete("val-0.tar")
    with pytest.raises(NotHere, match="val-0.tar is gone"):
        data.split("val", augment=None)[0]


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no storage is known as nowhere://"):
        open_data("wds:nowhere://host/shards", PREPROCESSING)
    with pytest.raises(UserError, match="must be a folder that this machine sees; from a URL read: wds:URL"):
        open_data("imagefolder:s3://bucket/images", PREPROCESSING)
    with pytest.raises(NotHere, match=r"no shard file://.*/nowhere/train\*.tar with images"):
        open_data(f"wds:file://{tmp_path}/nowhere", PREPROCESSING)
    folder = write_shards(tmp_path / "shards")
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(UserError, match=f"{LIMIT} = '{wrong}': must be a number of GiB"):
            open_data(f"wds:file://{folder}", PREPROCESSING)
    monkeypatch.setenv(LIMIT, "0")
    (folder / "train-1.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(UserError, match=r"train-1.tar is no tar file, or damaged"):
        open_data(f"wds:file://{folder}", PREPROCESSING)
