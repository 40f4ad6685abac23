from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prunesweep.search.config import SearchConfig, parse_config

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits"},
    "source": {
        "model": "vit_tiny_patch16_224",
        "pos_embed_std": 0.5,
        "args": {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2},
        "train": {"epochs": 1, "lr": 2e-3, "batch_size": 128},
    },
    "scores": {"images": 64},
    "space": {
        "budget": [0.3, 0.9],
        "skip": [0, 1],
        "lr": [5e-4, 3e-3],
        "groups": {"embed": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 8},
    },
    "search": {"trials": 4, "recover_images": 128},
    "finetune": {"epochs": 1, "batch_size": 128, "distill": [{}]},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray or other processes mostly waits for them: it runs first, in two rows side by side."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("slow"):
            row = "searches" if {"search", "jobs"} & set(item.path.parts) else "commands"
            item.add_marker(pytest.mark.xdist_group(row))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models here are tiny, and two processes of tests share two cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., SearchConfig]:
    """The smallest useful search, with tables replaced: ``tiny(search={"trials": 6})``."""
    return tiny_config


def tiny_config(**tables: Any) -> SearchConfig:
    """What the fixture ``tiny`` gives."""
    merged = {k: {**v, **tables.get(k, {})} if isinstance(v, dict) else v for k, v in TINY.items()}
    return parse_config({**tables, **merged} | {k: v for k, v in tables.items() if not isinstance(v, dict)}, "tiny")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs; they share one cache, so the tiny source is trained once for the whole session."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Red and blue JPEGs: 7 + 5 for training, 3 + 2 for validation."""
    generator, folder = np.random.default_rng(0), tmp_path / "images"
    for split, counts in {"train": (7, 5), "val": (3, 2)}.items():
        for label, count in enumerate(counts):
            place = folder / split / ("red", "blue")[label]
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (40, 48, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 150
                Image.fromarray(pixels).save(place / f"{i}.jpg")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices and texts are kept in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
