"""Finetuning on Ray Train, and what can be lost meanwhile: a worker, a node, more nodes than there is room for.

Images look the same in every epoch (``fixed_view``), so that any number of workers computes what one process does, and
plain SGD keeps the rounding of sums small. A run that lost its optimizer's state, an epoch or an image on the way would
end with other weights.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import timm
import torch
from ray.cluster_utils import Cluster
from torch import nn

from prunesweep.models import load, save
from prunesweep.training import Diverged, Epoch, Recipe, fit, open_data
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.metrics_log import MetricsLog
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.run_job import run_job
from prunesweep.training.jobs.training_job import CannotBegin, TrainingJob

pytestmark = pytest.mark.slow

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
# long enough that what happens early on is noticed before the end
RECIPE = Recipe(epochs=24, batch_size=24, optimizer="sgd", lr=0.005, weight_decay=0.0, fixed_view=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE)
    torch.nn.init.trunc_normal_(model.pos_embed, std=0.5)
    return save(model, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> nn.Module:
    model = load(source)
    fit(model, open_data("digits"), RECIPE)
    return model


class Watch:
    """Hears of epochs and workers, and lets something happen after given epochs."""

    def __init__(self, accidents: dict[int, Callable[[Watch], None]]) -> None:
        self.accidents = accidents
        self.epochs: list[Epoch] = []
        self.workers: list[list[int]] = []  # process ids by rank, of every start

    def on_epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        accident = self.accidents.pop(epoch.epoch, None)
        if accident:
            accident(self)

    def on_note(self, note: str) -> None:
        if re.match(r"\d+ workers?: ", note):
            self.workers.append([int(pid) for pid in re.findall(r"process (\d+)", note)])


def job(source: Path, out: Path) -> Finetuning:
    return Finetuning(model=source, data="digits", recipe=RECIPE, out=out)


def run(source: Path, out: Path, watch: Watch, **options: Any) -> None:
    finetune(job(source, out), Placement(2, **options), on_epoch=watch.on_epoch, on_note=watch.on_note)


def assert_same_weights(out: Path, wanted: nn.Module) -> None:
    found = load(out).state_dict()
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


def test_weights_tell_what_was_lost(source: Path, undisturbed: nn.Module) -> None:
    """The comparison that the tests below rest on can fail."""
    model = load(source)
    fit(model, open_data("digits"), RECIPE.model_copy(update={"epochs": 5}))
    assert (model.head.weight - undisturbed.head.weight).abs().max() > 1e-3


def test_a_worker_that_misses_its_model_says_so_and_divergence_keeps_its_name(source: Path, tmp_path: Path) -> None:
    """Neither is a fault of the workers, which are many kinds and end alike."""
    data, log = open_data("digits"), MetricsLog.beside(tmp_path)
    options: dict[str, Any] = {"data": data, "placement": Placement(2), "log": log, "provenance": {}}
    gone = TrainingJob(str(source), "digits", RECIPE.model_dump(mode="json"), teacher=str(tmp_path / "gone"))
    with pytest.raises(CannotBegin, match=r"process \d+: .*gone"):
        run_job(gone, tmp_path / "model", tmp_path / "work", **options)
    wild = RECIPE.model_copy(update={"optimizer": "sgd", "lr": 100.0, "clip_grad": 0.0, "epochs": 2})
    with pytest.raises(Diverged, match="the loss is nan"):
        run_job(
            TrainingJob(str(source), "digits", wild.model_dump(mode="json")), tmp_path / "model", tmp_path, **options
        )
    assert not (tmp_path / "model").exists()


def test_a_killed_worker_and_storage_by_uri(source: Path, undisturbed: nn.Module, tmp_path: Path) -> None:
    """Training goes on from the last whole checkpoint; two of them stay, at a place of their own."""
    watch = Watch({6: lambda watch: os.kill(watch.workers[-1][1], signal.SIGKILL)})
    storage = tmp_path / "elsewhere"
    torn = storage / job(source, tmp_path / "out").name / "checkpoint_2999-01-01_00-00-00.000000"
    torn.mkdir(parents=True)
    (torn / "state.safetensors").write_bytes(b"half")
    run(source, tmp_path / "out", watch, storage=f"file://{storage}")
    assert_same_weights(tmp_path / "out", undisturbed)
    assert len(watch.workers) == 2
    assert not set(watch.workers[0]) & set(watch.workers[1])
    seen = [epoch.epoch for epoch in watch.epochs]
    # where it went on: from the last checkpoint, of which the killed worker may not have told
    again = [i for i in range(1, len(seen)) if seen[i] != seen[i - 1] + 1]
    assert seen[:6] == [1, 2, 3, 4, 5, 6]
    assert seen[-1] == RECIPE.epochs
    assert len(again) <= 1
    assert all(2 <= seen[i] <= seen[i - 1] + 2 for i in again), seen  # not from the start
    kept = [path for path in torn.parent.glob("checkpoint_*") if path.is_dir()]
    assert len(kept) == 2  # nor what was being written when the worker died
    assert torn not in kept
    assert not list(tmp_path.glob(".out-*/ray"))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes with room for one worker each."""
    options = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    for _ in range(2):
        found.add_node(**options)
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lose_a_node(cluster: Cluster) -> Callable[[Watch], None]:
    """Kills a node with a worker on it, but not the head."""

    def accident(watch: Watch) -> None:
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
        busy = [raylets[parent(pid)] for pid in watch.workers[-1] if parent(pid) in raylets]
        if busy:
            cluster.remove_node(busy[0], allow_graceful=False)
        else:  # of a node that was lost a moment ago a worker goes on until it finds that out
            watch.accidents[watch.epochs[-1].epoch + 1] = accident

    return accident


@pytest.mark.timeout(400)
def test_lost_nodes(source: Path, undisturbed: nn.Module, cluster: Cluster, tmp_path: Path) -> None:
    """The third node takes over; once it is lost too, training goes on with the one worker that there is room for."""
    watch = Watch({2: lose_a_node(cluster), 4: lose_a_node(cluster)})
    run(source, tmp_path / "out", watch, min_workers=1, address=cluster.address)
    assert_same_weights(tmp_path / "out", undisturbed)
    assert len(watch.workers[0]) == 2
    assert len(watch.workers[-1]) == 1
    assert len(cluster.worker_nodes) == 0
    assert watch.epochs[-1].epoch == RECIPE.epochs
