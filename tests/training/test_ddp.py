"""Several workers compute what one would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import Dataset, TensorDataset

from training import Data, DataInfo, Recipe, fit

SHAPE = {"img_size": 4, "patch_size": 2, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "depth": 2, "num_heads": 2}


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


def train(out: Path, **fields: Any) -> None:
    """Three epochs; writes the losses, accuracies and weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE).double()
    epochs: list[Any] = []
    recipe = Recipe(**{"epochs": 3, "batch_size": 8, "lr": 1e-3, **fields})
    fit(model, Noise(), recipe, seed=1, on_epoch=epochs.append)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        found = {"loss": [e.loss for e in epochs], "top1": [e.top1 for e in epochs], "model": model.state_dict()}
        torch.save(found, out)


def worker(rank: int, size: int, meeting: str, out: Path, fields: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    train(out, **fields)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"accumulate": 2}, {"ema": 0.9, "clip_grad": 0.1, "mixup": 0.0, "repeats": 2}])
def test_two_workers_equal_one(tmp_path: Path, fields: dict[str, Any]) -> None:
    train(tmp_path / "one.pt", **{**fields, "accumulate": 1})
    mp.spawn(worker, (2, str(tmp_path / "meeting"), tmp_path / "two.pt", fields), nprocs=2)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-10)
    assert two["top1"] == one["top1"]
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-9)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    for parts in (1, 4):
        train(tmp_path / f"{parts}.pt", accumulate=parts)
    one, four = (torch.load(tmp_path / f"{parts}.pt") for parts in (1, 4))
    assert four["loss"] == pytest.approx(one["loss"], abs=1e-12)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(four["model"][name], tensor, rtol=0, atol=1e-10)
