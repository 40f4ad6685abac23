"""What the training loop, Ray Train, the data loader and distillation cost, in images per second.

python benchmarks/training_speed.py  prints, and writes benchmarks/results/training.json

A small ViT on the digits, in float32 on one thread; where there is a GPU, DeiT-S on random images instead, in bfloat16
and compiled. What is compared runs in turns, an epoch each. On a CPU, ratios are also given of the time that a process
had on the processor, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset, TensorDataset

from prunesweep.models import Arch, arch_of, cost, load, save
from prunesweep.models.io.files import write_text
from prunesweep.models.latency.timing import device_name
from prunesweep.training import Data, DataInfo, Distill, Recipe, World, fit, open_data, seeded
from prunesweep.training.batches import EpochBatches

RESULT = Path(__file__).parent / "results" / "training.json"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
AMP = "bf16" if ON_GPU else "off"
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 4, "num_heads": 4}
RECIPE = Recipe(epochs=1, batch_size=256 if ON_GPU else 64, lr=1e-3, fixed_view=True, amp=AMP, compile=ON_GPU)
SKIPPED = 10 if ON_GPU else 2  # first updates, which compile, allocate and warm up

Clock = Callable[[], tuple[float, float]]


class Random(Data):
    """Images of noise, in memory."""

    def __init__(self, images: int, size: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.tensors = TensorDataset(torch.randn(images, *size), torch.randint(classes, (images,)))
        stats: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        self.info = DataInfo(name="random", num_classes=classes, input_size=size, fingerprint="random", **stats)

    @property
    def train_images(self) -> int:
        return len(self.tensors)

    def train_labels(self) -> torch.Tensor:
        return self.tensors.tensors[1]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Any]:
        return self.tensors


def make() -> Any:
    with seeded(0):
        if ON_GPU:
            return timm.create_model("deit_small_patch16_224").to(DEVICE)
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
    return model


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process on the processor."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def ours(data: Data, recipe: Recipe, **options: Any) -> tuple[float, float]:
    """Images per second of ``fit``, by the clock and by the processor, from update ``SKIPPED`` to the last."""
    marks: dict[int, tuple[float, float]] = {}
    fit(make(), data, recipe, on_step=lambda done, total, loss: marks.update({done: now()}), **options)
    return rate(marks, recipe.batch_size)


def bare(data: Data, recipe: Recipe) -> tuple[float, float]:
    """The same model, batches, optimizer, clipping and precision in the shortest loop that PyTorch allows."""
    model: Any = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    forward = torch.compile(model) if recipe.compile else model
    batches = EpochBatches(data.train_images, recipe.batch_size, World())
    batches.start(0)
    marks = {}
    for done, (x, y) in enumerate(data.train_loader(batches, recipe), start=1):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=recipe.amp == "bf16"):
            loss = F.cross_entropy(forward(x.to(DEVICE, non_blocking=True)), y.to(DEVICE, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        if not ON_GPU or done % 20 == 1:  # as often as ``fit`` looks at the loss
            loss.item()
            marks[done] = now()
    return rate(marks, recipe.batch_size)


def rate(marks: dict[int, tuple[float, float]], batch_size: int) -> tuple[float, float]:
    counted = [done for done in marks if done > SKIPPED]
    first, last = counted[0], counted[-1]
    clock, processor = (b - a for a, b in zip(marks[first], marks[last], strict=True))
    images = (last - first) * batch_size
    return images / clock, images / processor


def in_turns(candidates: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, Any]:
    """Median rates, and the median over rounds of each candidate's rate over the first one's."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            found[name].append(call())
    base = np.array(next(iter(found.values())))
    result = {}
    for name, rates in found.items():
        ratios = np.median(np.array(rates) / base, axis=0)
        result[name] = {
            "images_per_s": float(np.median([clock for clock, _ in rates])),
            "ratio": float(ratios[0]),
            "ratio_cpu_time": None if ON_GPU else float(ratios[1]),
        }
    return result


def loader_alone(data: Data, recipe: Recipe) -> float:
    """Images per second of the data loader, with nobody else to wait for."""
    batches = EpochBatches(data.train_images, recipe.batch_size, World())
    batches.start(0)
    start = time.perf_counter()
    images = sum(len(x) for x, _ in data.train_loader(batches, recipe))
    return images / (time.perf_counter() - start)


def photographs(folder: Path, images: int = 128) -> Data:
    """JPEGs of 500 x 375 pixels, as large as ImageNet's, of nothing in particular."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        place = folder / split / "class"
        place.mkdir(parents=True)
        for i in range(images if split == "train" else 1):
            coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            coarse.resize((500, 375)).save(place / f"{i}.jpg")
    return open_data(f"imagefolder:{folder}", {"input_size": (3, 224, 224)})


def on_ray(workers: int, folder: Path) -> dict[str, float]:
    """Training on Ray Train's workers: speed, and seconds until they start and after they are done."""
    from prunesweep.training.jobs.finetune import Finetuning, finetune
    from prunesweep.training.jobs.placement import Placement

    rates, marks = [], {"call": time.perf_counter()}
    recipe = RECIPE.model_copy(update={"epochs": 4})
    job = Finetuning(model=folder / "model", data="digits", recipe=recipe, out=folder / f"on{workers}")

    def on_epoch(epoch: Any) -> None:
        rates.append(epoch.images_per_s)
        marks["last"] = time.perf_counter()

    finetune(
        job,
        Placement(workers, min_workers=workers, gpus=int(ON_GPU)),
        on_epoch=on_epoch,
        on_note=lambda note: marks.setdefault("start", time.perf_counter()),
    )
    return {
        "images_per_s": float(np.median(rates[1:])),
        "startup_s": marks["start"] - marks["call"],
        "end_s": time.perf_counter() - marks["last"],
    }


def ray_train(folder: Path) -> dict[str, Any]:
    """The digits, in this process and on one and two workers of Ray Train."""
    save(timm.create_model("vit_tiny_patch16_224", **SMALL), folder / "model")
    data, rates = open_data("digits"), []
    recipe = RECIPE.model_copy(update={"epochs": 4})
    model = load(folder / "model").to(DEVICE)
    fit(model, data, recipe, on_epoch=lambda epoch: rates.append(epoch.images_per_s))
    found: dict[str, Any] = {"no Ray": {"images_per_s": float(np.median(rates[1:]))}}
    for workers in range(1, (torch.cuda.device_count() if ON_GPU else 2) + 1):
        found[f"{workers} worker{'s' if workers > 1 else ''}"] = on_ray(workers, folder)
    return found


def matmul_flops() -> float:
    """FLOP per second of a large matrix product in the dtype that training has."""
    size, dtype = (8192, torch.bfloat16) if ON_GPU else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        start = now()[0]
        a @ b
        best = max(best, 2 * size**3 / (now()[0] - start))
    return best


def table(title: str, rows: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    found = Table(title=title, title_justify="left")
    found.add_column("")
    for name in names:
        found.add_column(name, justify="right")
    for what, row in rows.items():
        found.add_row(what, *("" if row.get(name) is None else f"{row[name]:,.3f}" for name in names))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5, help="turns of every comparison")
    options.add_argument("--note", default="", help="what a reader of the numbers should know")
    given = options.parse_args()
    torch.set_num_threads(1)
    data = Random(256 * 40, (3, 224, 224), 1000) if ON_GPU else open_data("digits")
    plain, teacher = RECIPE, make()
    distilled, cached = (
        RECIPE.model_copy(update={"distill": (Distill(cache_teacher=kept),)}) for kept in (False, True)
    )
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "teacher_logits"
        loops = in_turns({"bare PyTorch": lambda: bare(data, plain), "fit": lambda: ours(data, plain)}, given.rounds)
        taught = {"teacher": teacher, "teacher_cache": cache}
        distillation = in_turns(
            {
                "no teacher": lambda: ours(data, plain),
                "teacher": lambda: ours(data, distilled, **taught),
                "cached logits": lambda: ours(data, cached, **taught),
            },
            given.rounds,
        )
        deit = Recipe(batch_size=64, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
        loaders = {
            "digits, with augmentation": {"images_per_s": loader_alone(open_data("digits"), Recipe())},
            "JPEGs, DeiT's augmentation": {"images_per_s": loader_alone(photographs(folder / "jpegs"), deit)},
        }
        workers = ray_train(folder)
    peak, arch = matmul_flops(), arch_of(make())
    share = 3 * 2 * cost(arch).macs * loops["fit"]["images_per_s"] / peak  # backward is twice the forward pass
    report({"loop": loops, "distillation": distillation, "loader": loaders, "ray": workers}, arch, peak, share, given)


def report(results: dict[str, Any], arch: Arch, peak: float, share: float, given: argparse.Namespace) -> None:
    console = Console()
    for title, rows in results.items():
        console.print(table(title, rows))
    console.print(f"fit does {share:.1%} of the {peak / 1e9:,.0f} GFLOP/s of a matrix product", highlight=False)
    facts = {
        "device": DEVICE.type,
        "device_name": device_name(DEVICE.type),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "dtype": "bfloat16" if ON_GPU else "float32",
        "compile": RECIPE.compile,
        "batch_size": RECIPE.batch_size,
        "model": arch.source,
        "macs": cost(arch).macs,
        "rounds": given.rounds,
        "note": given.note,
        "versions": {name: version(name) for name in ("torch", "timm", "ray")},
        "matmul_flops": peak,
        "share_of_matmul": share,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
