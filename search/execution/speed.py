"""How fast the members of a front are beside their source: measured, at batch 1 and at a large batch."""

from __future__ import annotations

from pathlib import Path

import torch

from prunesweep.models import load
from prunesweep.models.latency.timing import Setting, device_name, measure_all
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.records import Speed
from prunesweep.search.store.run import Run
from prunesweep.training.jobs.scoring import Progress

__all__ = ["measure_speed"]

BATCHES = (1, 64)
SECONDS = 1.0  # that every model is measured for, at each batch size


def measure_speed(path: Path, config: SearchConfig, progress: Progress) -> None:
    """Measure the front of a run as ``prunesweep bench`` does, and keep it in ``speed.json``.

    Nothing is measured where all members were, on a device of the same name.

    Args:
        path: the run's folder.
        config: its configuration.
        progress: called with what is being done and the share of it done.

    Raises:
        UserError: a model is damaged, or a batch does not fit into the device's memory.
    """
    run = Run(path)
    members = run.members()
    device = "cuda" if config.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"
    name, threads = device_name(device), torch.get_num_threads() if device == "cpu" else None
    known = {(row.unit, row.arch_hash) for row in run.speed() if row.device_name == name}
    if not members or known == {(r.id, r.arch_hash) for r in members}:
        return
    models = [load(run / "source"), *(load(run.model(result)) for result in members)]
    rows = []
    for batch in BATCHES:

        def on_turn(done: int, total: int, what: str = f"measuring speed, batch {batch}") -> None:
            progress(what, done / total, "done" if done == total else "")

        setting = Setting(batch=batch, device=device, threads=threads)
        first, *others = measure_all(models, setting, min_seconds=SECONDS, progress=on_turn)
        for result, timing in zip(members, others, strict=True):
            where = (result.id, result.arch_hash, device, name, setting.dtype, threads)
            rows.append(Speed(*where, batch, timing.median_ms, first.median_ms))
    run.write_speed(rows)
