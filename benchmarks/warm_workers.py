"""What a trial of several workers takes: with a run of Ray Train for each, and with workers that stay.

``python -m benchmarks.warm_workers [--nodes 3]``: the smallest model, one epoch of the digits, ``gloo``, on a Ray of
its own on this machine, or on a cluster of a head and so many nodes, one worker on each, that this machine plays;
seconds from the start until the workers have begun, the epoch has ended, and the trial has. Writes
benchmarks/results/warm_workers.json, or warm_workers_3_nodes.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm

from prunesweep.models import save
from prunesweep.training import Recipe
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.ray_session import connected
from prunesweep.training.jobs.training_job import Reports, TrainingJob

from .record import write_result

RESULT = Path(__file__).parent / "results" / "warm_workers.json"
SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
WORKERS = 2


class Trial:
    """One job, and the seconds until its workers have begun, until its epoch has ended, and until it has."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.begun = job, time.monotonic()
        self.seconds: dict[str, float] = {}
        self.reports = Reports(on_epoch=lambda _: self._at("epoch_ends"), on_note=self._note)

    def _at(self, name: str) -> None:
        self.seconds.setdefault(name, round(time.monotonic() - self.begun, 2))

    def _note(self, text: str) -> None:
        if "workers: " in text:
            self._at("workers_begin")

    def ends(self) -> dict[str, float]:
        self._at("trial_ends")
        print(self.seconds, flush=True)
        return self.seconds


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[str | None]:
    """A head without CPUs and nodes of one each; the address, or None for no nodes."""
    if not nodes:
        yield None
        return
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**memory, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            found.add_node(num_cpus=1, **memory)
        yield str(found.address)
    finally:
        found.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="each way")
    parser.add_argument("--nodes", type=int, default=0, help="of a cluster, each with a worker; 0 for none")
    args = parser.parse_args()
    workers, out = args.nodes or WORKERS, RESULT
    if args.nodes:
        out = RESULT.with_name(f"warm_workers_{args.nodes}_nodes.json")
    recipe = Recipe(epochs=1, batch_size=77 * workers, optimizer="sgd", lr=0.005, fixed_view=True)
    found: dict[str, list[dict[str, float]]] = {"a_run_each": [], "staying": []}
    with (
        tempfile.TemporaryDirectory(prefix="prunesweep-") as name,
        cluster_of(args.nodes) as address,
        connected(address, cpus=workers, gpus=0),
    ):
        from prunesweep.training.jobs.ray_workers import train_on_ray
        from prunesweep.training.jobs.warm_workers import WarmWorkers

        folder = Path(name)
        model = save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE), folder / "model")
        job = TrainingJob(model=str(model), data="digits", recipe=recipe.model_dump(mode="json"))
        placement, load = Placement(workers), os.getloadavg()[0]
        warm = WarmWorkers(placement, folder / "workers")
        for i in range(args.trials):
            trial = Trial(job)
            warm.train(job, folder / f"b{i}", folder / f"b{i}.state", name=f"b{i}", reports=trial.reports)
            found["staying"].append(trial.ends())
        begun = time.monotonic()
        warm.close()
        closing = round(time.monotonic() - begun, 2)
        for i in range(args.trials):
            trial = Trial(job)
            storage = str(folder / "ray")
            train_on_ray(job, placement, folder / f"a{i}", storage=storage, name=f"a{i}", reports=trial.reports)
            found["a_run_each"].append(trial.ends())
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    write_result(out, workers=workers, backend="gloo", load_average=loads, seconds=found, closing_s=closing)


if __name__ == "__main__":
    main()
