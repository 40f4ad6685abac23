"""Several workers compute what one would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from prunesweep.models import Arch, Block, Stage, build
from prunesweep.pruners.hook import Hook
from prunesweep.training import Data, DataInfo, Recipe, World, evaluate, fit

BLOCK = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=16)
ARCH = Arch(
    family="vit",
    source="test",
    img_size=(4, 4),
    patch_size=(2, 2),
    in_chans=1,
    num_classes=3,
    stages=(Stage(width=8, grid=(2, 2), blocks=(BLOCK, replace(BLOCK, src=1))),),
)
CONVOLUTION = Block(src=1, mixer="conv3x3", heads=0, qk=0, v=4, scale=0.0, mlp=16)
WITH_CONVOLUTION = replace(ARCH, stages=(replace(ARCH.stages[0], blocks=(BLOCK, CONVOLUTION)),))


class Noise(Data):
    """Random float64 images with labels that follow from them, without augmentation."""

    def __init__(self, images: int = 52) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(images, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.tensors = TensorDataset(x, x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1)
        facts: dict[str, Any] = {"input_size": (1, 4, 4), "mean": (0.0,), "std": (1.0,)}
        self.info = DataInfo(name="noise", num_classes=3, fingerprint="", **facts)

    @property
    def train_images(self) -> int:
        return len(self.tensors)

    def train_labels(self) -> torch.Tensor:
        return self.tensors.tensors[1]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset:
        return self.tensors


class Tight(nn.Module):
    """A device that holds ``limit`` images at most; ``backward``: it is the backward pass that does not fit."""

    def __init__(self, limit: int, *, backward: bool = False) -> None:
        super().__init__()
        self.limit, self.backward = limit, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.backward:
            self._check(x)
        if self.training and self.backward:
            x.register_hook(self._check)
        return x

    def _check(self, x: torch.Tensor) -> None:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError(f"{len(x)} images, limit {self.limit}")


class Route(Hook):
    """A parameter that is in the loss alone, one that is nowhere, and a gate that only the first worker passes."""

    def wrap(self, model: nn.Module) -> None:
        self.model = model
        for name in ("price", "unused", "gate"):
            model.register_parameter(name, nn.Parameter(torch.ones(2, dtype=torch.float64)))

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        gate = self.model.gate.square().sum() if World.current().first else 0.0
        return terms["loss"] + (self.model.price - 3).square().sum() + gate


class Counted(nn.Module):
    """A teacher that knows how many images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model, self.images = build(ARCH).double(), 0
        self.num_classes, self.pretrained_cfg = 3, self.model.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return self.model(x)


def train(case: str, cache: Path | None = None, **fields: Any) -> dict[str, Any]:
    """Three epochs; the losses, accuracies and weights."""
    world, notes, epochs = World.current(), list[str](), list[Any]()
    torch.manual_seed(world.rank if case == "own weights" else 0)
    model = build(WITH_CONVOLUTION if case == "convolution" else ARCH).double()
    if case == "no memory":  # the last of the workers has less than the others
        model.norm_pre = Tight(1 if world.rank == world.size - 1 else 3)
    if case == "unused":
        model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    recipe = Recipe(**{"epochs": 3, "batch_size": 8, "lr": 1e-3, **fields})
    hook = Route() if case == "hook" else None
    teacher = Counted() if recipe.distill else None
    reports: dict[str, Any] = {"on_epoch": epochs.append, "on_note": notes.append}
    fit(model, Noise(), recipe, teacher=teacher, seed=1, hook=hook, teacher_cache=cache, **reports)
    found = {"loss": [e.loss for e in epochs], "top1": [e.top1 for e in epochs], "model": model.state_dict()}
    seen = None if teacher is None else teacher.images
    return {**found, "notes": notes, "seen": seen, "own": evaluate(model, Noise().val_loader(52))}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "averaged": {"ema": 0.9, "clip_grad": 0.1, "repeats": 2},
    "no memory": {"accumulate": 1},
    "unused": {},
    "hook": {},
    "convolution": {},
    "own weights": {},
    "closest": {"lr": 0.3, "keep": "best", "held_out": 0.2, "distill": [{}]},
    "cached": {"fixed_view": True, "distill": [{"cache_teacher": True, "weight": 3.0}]},
}


def worker(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    found = {case: train(case, folder / "cache", **fields) for case, fields in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers found in every case; they are started once."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (2, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-10)
    assert found["top1"] == wanted["top1"]
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "accumulated", "averaged", "unused", "closest"])
def test_two_workers_equal_one(workers: list[dict[str, Any]], case: str) -> None:
    wanted = train(case, **{**CASES[case], "accumulate": 1})
    for found in workers:
        assert_equal(found[case], wanted)


@pytest.mark.slow
def test_workers_agree_on_what_fits_into_memory(workers: list[dict[str, Any]]) -> None:
    wanted = train("plain")
    for found in workers:
        assert_equal(found["no memory"], wanted)
        assert [note.partition(",")[0] for note in found["no memory"]["notes"]] == [
            "out of memory with 4 images at a time: going on with 2",
            "out of memory with 2 images at a time: going on with 1",
        ]


@pytest.mark.slow
def test_hooks_may_use_what_they_like(workers: list[dict[str, Any]]) -> None:
    """Parameters in the loss alone, nowhere, and on one worker alone: half of its gradient counts."""
    first, second = (found["hook"]["model"] for found in workers)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (first["price"] > 1).all()
    assert (first["gate"] < 1).all()
    assert torch.equal(first["unused"], torch.ones(2, dtype=torch.float64))


@pytest.mark.slow
def test_running_statistics_are_averaged(workers: list[dict[str, Any]]) -> None:
    """BatchNorm normalises by each worker's own images; all workers evaluate and keep the same model."""
    first, second = (found["convolution"] for found in workers)
    assert any("running_mean" in name for name in first["model"])
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    assert first["top1"] == second["top1"]
    assert first["own"]["top1"] == first["top1"][-1]
    assert first["loss"][-1] < first["loss"][0]


@pytest.mark.slow
def test_all_start_from_the_first_worker_s_weights(workers: list[dict[str, Any]]) -> None:
    wanted = train("plain")
    for found in workers:
        assert_equal(found["own weights"], wanted)


@pytest.mark.slow
def test_workers_share_the_teacher_s_work(workers: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = train("cached", fixed_view=True, distill=[{"weight": 3.0}])
    for found in workers:
        assert_equal(found["cached"], wanted)
        assert found["cached"]["seen"] == 26  # of 52 images
    assert wanted["seen"] == 3 * 48


def test_accumulation_changes_nothing() -> None:
    one, four = train("plain"), train("accumulated", accumulate=4)
    assert four["loss"] == pytest.approx(one["loss"], abs=1e-12)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(four["model"][name], tensor, rtol=0, atol=1e-10)
