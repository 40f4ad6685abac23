"""A small space with made-up scores, and a run's folder without a search behind it."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
import torch

from prunesweep.models import Arch, Block, Stage, cost, save
from prunesweep.models.io.files import write_text
from prunesweep.pruners import GROUP_SIZES, Scores, vector_sizes
from prunesweep.pruners.nvit.saliency import KINDS
from prunesweep.search.config import SpaceTable
from prunesweep.search.space.space import Space
from prunesweep.search.store.records import FORMAT, sealed
from prunesweep.search.store.run import Run
from tests.generate import random_model

ARCH = Arch(
    family="vit",
    source="test",
    img_size=(8, 8),
    patch_size=(2, 2),
    in_chans=1,
    num_classes=10,
    stages=(
        Stage(
            width=16,
            grid=(4, 4),
            blocks=tuple(Block(src=i, heads=2, qk=8, v=8, scale=8**-0.5, mlp=64) for i in range(4)),
        ),
    ),
)


def make_space(**table: Any) -> Space:
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.rand(size, generator=generator, dtype=torch.float64)
        for name, size in vector_sizes(ARCH, KINDS).items()
    }
    settings = {"budget": (0.3, 0.9), "skip": (0, 2), "lr": (1e-4, 1e-2), "groups": dict.fromkeys(GROUP_SIZES, 4)}
    depth = Scores({"depth": torch.tensor([9.0, 1.0, 2.0, 5.0], dtype=torch.float64)})
    patches = {f"blocks.{i}.tokens": torch.rand(16, generator=generator, dtype=torch.float64) for i in range(4)}
    scores = {"nvit": Scores(vectors), "depth_kl": depth, "pmvit": Scores(patches)}
    return Space(SpaceTable(**{**settings, **table}), ARCH, scores)


_MODELS = tempfile.TemporaryDirectory(prefix="prunesweep-tests-")


@cache
def _saved_model() -> Path:
    return save(random_model(ARCH, 0), Path(_MODELS.name) / "model")


def put_model(path: Path) -> None:
    """Write a sound saved model, the same for whatever candidate."""
    shutil.copytree(_saved_model(), path, dirs_exist_ok=True)


def make_run(path: Path, trials: int = 12, **search: Any) -> Run:
    """A run's folder with nothing but its facts."""
    (path / "trials").mkdir(parents=True)
    spent = cost(ARCH)
    source = {"name": "test", "weights": "w", "top1": 90.0, "macs": spent.macs, "params": spent.params}
    write_text(path / "run.json", sealed({"format": FORMAT, "source": source, "scores": {}, "versions": {}}))
    write_text(path / "search.toml", tomli_w.dumps({"search": {"trials": trials, **search}}))
    return Run(path)


def make_older(run: Run) -> None:
    """Make a run one of an earlier version, whose facts have neither a format nor a digest."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("format", "digest")}))
