"""What it costs that all that a task keeps is on the disk before it has its name: ``python -m benchmarks.publish``.

A task is published again and again as a search does it: its facts, its decision and record, the state of every epoch,
the model, the result and the front; once as it is and once without waiting for the disk, in turns. Writes
benchmarks/results/publish.json.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import timm
import torch
from torch import nn

from benchmarks.record import begun, write_result
from prunesweep.models import arch_of, cost, save
from prunesweep.models.io.files import make_folder, write_text
from prunesweep.training.checkpoint import save_state

RESULT = Path(__file__).parent / "results" / "publish.json"
TEXTS = {"spec.json": 600, "cut.json": 20_000, "arch.json": 6_000}  # bytes, as of a DeiT
EPOCHS = 3


def publish_task(model: nn.Module, state: dict[str, object], folder: Path) -> None:
    """Write what a task of ``EPOCHS`` epochs leaves, as it does."""
    make_folder(folder)
    for name, size in TEXTS.items():
        write_text(folder / name, " " * size)
    for _ in range(EPOCHS):
        save_state(folder / "state.safetensors", state)
    save(model, folder / "model")
    (folder / "state.safetensors").unlink()
    write_text(folder / "result.json", " " * 1_500)
    write_text(folder.parent / "front.json", json.dumps([{}] * 20))


def seconds(model: nn.Module, folder: Path, tasks: int) -> dict[str, float]:
    """Median seconds of a task, with and without waiting for the disk, and of processor time where it waits."""
    moments = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    state: dict[str, object] = {"model": model.state_dict(), "first": moments, "second": moments}
    found: dict[str, list[float]] = {"durable_s": [], "not_durable_s": [], "durable_processor_s": []}
    for number in range(tasks):
        before, processor = time.monotonic(), time.process_time()
        publish_task(model, state, folder / f"{number}")
        found["durable_s"].append(time.monotonic() - before)
        found["durable_processor_s"].append(time.process_time() - processor)
        with mock.patch.object(os, "fsync", return_value=None):
            before = time.monotonic()
            publish_task(model, state, folder / f"{number}-not")
            found["not_durable_s"].append(time.monotonic() - before)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def main() -> None:
    given = begun(__doc__, tasks=5, folder=tempfile.gettempdir())
    rows = []
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224"):
        model = timm.create_model(name)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found = seconds(model, Path(folder), given.tasks)
        rows.append({"model": name, "params": cost(arch_of(model)).params, **found})
        print(rows[-1])
    write_result(RESULT, epochs=EPOCHS, tasks=given.tasks, load_average=round(os.getloadavg()[0], 2), rows=rows)


if __name__ == "__main__":
    main()
