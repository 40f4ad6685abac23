"""Connect to Ray, on this machine or a cluster, and run units of work with Ray Tune.

Tune only executes: it runs units in reused actors and restarts one whose process was lost. It has no scheduler and
restores nothing; which unit runs next is the coordinator's decision, which Tune asks for through a ``Searcher``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from prunesweep.models import UserError
from prunesweep.models.io.scratch import scratch_folder
from prunesweep.search.config import ClusterTable, ResourcesTable
from prunesweep.search.store.run import Task
from prunesweep.search.store.stored import StoredRun
from prunesweep.training.container import memory_kills, usable_cpus, usable_memory
from prunesweep.training.jobs.ray_session import RayDied, alive, joined, object_store_bytes, own_ray
from prunesweep.training.jobs.run_job import release_workers
from prunesweep.training.named_code import allow_modules, allowed_modules

from .coordinator import Coordinator, RunBroken, SearchFailed
from .growth import AHEAD, has_autoscaler

for name, value in {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # units write their own logs
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's, see search.driver
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # fifty lines for each; ``Losses`` says it in one
}.items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.exceptions import RayActorError, RayTaskError, RuntimeEnvSetupError  # noqa: E402
from ray.tune.schedulers import FIFOScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from .losses import Losses  # noqa: E402
from .task import run_task  # noqa: E402

__all__ = ["RayConnection", "execute", "max_concurrent", "node"]

RESTARTS = 2  # of a unit whose process was lost
PARKED = "parked"  # state of an actor on a node without room
PARKED_STEP = 5.0  # seconds until it says so again
ROOM = 256 * 2**20  # bytes that are free before a node works again whose disk was full
OWN_BYTES, PROCESS_BYTES = 3 * 2**29, 2**30  # memory of the driver with its Ray, and of every process that does trials
COUNT = 5.0  # seconds between two looks at the nodes of a cluster
PENDING = 10_000  # units that Tune may have waiting for places: the coordinator hands out no more than it should


def max_concurrent(
    resources: ResourcesTable, nodes: Sequence[Mapping[str, float]] | None = None, *, offered: str | None = None
) -> int:
    """Count the units that can run side by side on ``nodes``, by default on this machine.

    Args:
        resources: what a unit needs: ``workers_per_trial`` times ``cpus_per_trial`` and ``gpus_per_trial``.
        nodes: ``CPU`` and ``GPU`` of every node; a worker lies within one of them.
        offered: who offers them, and the verb, for the error.

    Raises:
        UserError: not even one unit fits.
    """
    own = nodes is None
    nodes = [_this_machine(resources)] if nodes is None else nodes
    cpus, gpus, workers = resources.cpus_per_trial, resources.gpus_per_trial, resources.workers_per_trial
    places = sum(_places(node, cpus, gpus) for node in nodes)
    if places < workers:
        where = offered or ("this machine offers" if own else f"the cluster's {len(nodes)} nodes offer")
        found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes[:8])
        later = "" if own or offered else "; cluster.max_nodes says how many more nodes come when asked"
        raise UserError(
            f"resources: a trial needs {workers} x (cpus_per_trial = {cpus}, gpus_per_trial = {gpus:g}), but {where} "
            f"{found}: room for {places} of {workers} workers{later}"
        )
    return places // workers


def node() -> str:
    """Ray's name of this process's node. Needs a ``RayConnection``."""
    return str(ray.get_runtime_context().get_node_id())


def _places(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Count the workers that a node has room for."""
    by_cpu = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    whole = int(node.get("GPU", 0))
    return min(by_cpu, int(whole // gpus) if gpus >= 1 else whole * int(1 / gpus))


def _this_machine(resources: ResourcesTable) -> dict[str, float]:
    found: dict[str, float] = {"CPU": _cpus(resources)}
    if resources.gpus_per_trial:
        import torch

        found["GPU"] = torch.cuda.device_count()
    return found


def _cpus(resources: ResourcesTable) -> int:
    return resources.cpus or min(usable_cpus(), _room(resources) * resources.cpus_per_trial)


def _room(resources: ResourcesTable) -> int:
    """Count the processes of trials that memory has room for, and no less than one trial has."""
    return max(resources.workers_per_trial, (usable_memory() - OWN_BYTES) // PROCESS_BYTES)


@contextlib.contextmanager
def _logging(level: int) -> Iterator[None]:
    """Let Ray's libraries log from a level on, for the time of a ``with`` block."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


class RayConnection:
    """A Ray of our own on this machine, or a running cluster, for the time of a ``with`` block.

    Where this process has a Ray already (``ray.init`` was called, as in a notebook), that is used, and goes on
    afterwards.

    ``on_death`` is called, in a thread maybe, should Ray die; it should end this process, and may be replaced
    meanwhile. The loss of a node that is not the head is no death.

    Nodes come when asked where ``cluster.max_nodes`` says so, or the cluster has an autoscaler: then units are handed
    out ahead, and as Ray finds no place for them, it asks for nodes; what is asked for ends with this process.

    Attributes:
        most: units that fit once all nodes are there; infinite where only the cluster knows how many may come, None
            where none come when asked.

    Raises:
        UserError: nothing answers at ``address``, or no unit fits, or none would on the nodes of ``cluster``.
        RayDied: a Ray of our own does not start.
    """

    def __init__(
        self,
        resources: ResourcesTable,
        *,
        address: str | None,
        verbose: bool,
        on_death: Callable[[], None],
        cluster: ClusterTable | None = None,
    ) -> None:
        self._resources, self._verbose, self.on_death = resources, verbose, on_death
        self._address, self._found = address, False
        self._session = contextlib.ExitStack()
        self._fitting, self._counted = 0, -math.inf
        self.most: float | None = None
        if address is not None and cluster is not None and cluster.max_nodes is not None:
            self.most = max_concurrent(
                resources,
                [{"CPU": float(cluster.cpus), "GPU": float(cluster.gpus)}] * cluster.max_nodes,
                offered="cluster.max_nodes, cluster.cpus and cluster.gpus offer",
            )

    @property
    def fitting(self) -> int:
        """How many units fit on the nodes that are there now, 0 if all are lost; counted every few seconds."""
        if not self._own and time.monotonic() - self._counted > COUNT:
            try:
                self._fitting = self._count()
            except UserError:
                self._fitting = 0
            self._counted = time.monotonic()
        return self._fitting

    @property
    def max_concurrent(self) -> int:
        """How many units may be handed out: those that fit now and, where nodes come when asked, as many again."""
        fitting = self.fitting
        return fitting if self.most is None else int(max(fitting, min(self.most, fitting + max(fitting, AHEAD))))

    @property
    def _own(self) -> bool:
        return self._address is None and not self._found

    def _count(self) -> int:
        if self._own:
            return max_concurrent(self._resources)
        there = max_concurrent(self._resources, [n["Resources"] for n in ray.nodes() if n["Alive"]])
        return min(there, max_concurrent(self._resources)) if self._found and self._resources.cpus else there

    def __enter__(self) -> RayConnection:
        level = logging.INFO if self._verbose else logging.ERROR
        if self._address is None and ray.is_initialized():
            self._found = True
            self._fitting = self._count()
            self._session.enter_context(_logging(level))
            return self
        logging.getLogger("ray").setLevel(level)
        options: dict[str, Any] = {"log_to_driver": self._verbose, "logging_level": level}
        if self._address is None:
            own = {"num_cpus": _cpus(self._resources), "object_store_memory": object_store_bytes()}
            # stopping a trial's own workers in mid-run takes Ray's state API, which the dashboard serves
            dashboard = self._resources.workers_per_trial > 1
            session = own_ray(lambda: self.on_death(), include_dashboard=dashboard, **own, **options)
        else:
            session = joined(self._address, lambda: self.on_death(), **options)
        with contextlib.ExitStack() as stack:
            stack.enter_context(session)
            if self._address is not None and self.most is None and has_autoscaler():
                self.most = math.inf
            if self.most is None:
                self._fitting = self._count()
            self._session = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)


class _Silent(tune.ProgressReporter):  # type: ignore[misc]
    """Reports nothing, where Tune has tables of its own whatever its verbosity: in notebooks."""

    def should_report(self, trials: Any, done: bool = False) -> bool:
        return False

    def report(self, trials: Any, done: bool, *sys_info: Any) -> None:
        """Do nothing."""


class _TaskActor(tune.Trainable):  # type: ignore[misc]
    """Runs one unit per step. Tune reuses the actor, so the next unit needs no new process.

    Where a node's own disk is full, the actor keeps its place there and does nothing until there is room: the unit, and
    those that follow, go to other nodes.
    """

    def setup(self, config: dict[str, Any]) -> None:
        import torch

        self.reset_config(config)
        torch.set_num_threads(config["threads"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._job, self._full = new_config, ""
        allow_modules(new_config["modules"])
        return True

    def step(self) -> dict[str, Any]:
        if self._full:
            return self._wait_for_room()
        further = {"files": self._job["files"]} if "files" in self._job else {}
        found = self._job["work"](Path(self._job["run"]), Task(**self._job["unit"]), **further)
        if found["state"] == "disk full" and found.get("disk"):
            self._full = found["disk"]
            return {
                "state": PARKED,
                "reason": f"{socket.gethostname()}: the disk of {self._full} is full",
                "done": False,
            }
        given = json.dumps(found) if found.get("elsewhere") else None
        return {"state": found["state"], "reason": found.get("reason"), "given": given, "done": True}

    def _wait_for_room(self) -> dict[str, Any]:
        """Look for a while; the unit is no longer this actor's."""
        deadline = time.monotonic() + PARKED_STEP
        while shutil.disk_usage(self._full).free < ROOM:
            if time.monotonic() > deadline:
                return {"state": PARKED, "done": False}
            time.sleep(min(1.0, PARKED_STEP))
        return {"state": "room", "done": True}

    def cleanup(self) -> None:
        """End the workers of trials of several, which stay from one to the next."""
        release_workers()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: Tune saves every trial that ends, but a unit's state is in its own folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing; see ``save_checkpoint``."""


class _Searcher(Searcher):  # type: ignore[misc]
    """Tune's view of the coordinator: asks it for units and tells it when they end."""

    def __init__(
        self,
        coordinator: Coordinator,
        on_change: Sequence[Callable[[], None]],
        count: Callable[[], int] | None,
        stored: StoredRun | None,
        note: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._stored, self._note = stored, note
        self._coordinator, self._on_change, self._count = coordinator, on_change, count
        self._units: dict[str, str] = {}
        self._parked = set[str]()  # Tune's trials whose actors wait for room on their nodes, without a unit
        self.errors: dict[str, Exception] = {}  # of Tune's trials that end by one
        self.failure: Exception | None = None
        self._kills = memory_kills()

    def _lost(self) -> str:
        """Say why a unit failed whose process was lost again and again."""
        if memory_kills() == self._kills:
            return f"the unit's process was lost {RESTARTS + 1} times (out of memory, or killed)"
        return (
            f"the unit's process was lost {RESTARTS + 1} times, and the kernel has killed processes for memory: there "
            f"are {usable_memory() / 2**30:.1f} GiB in all. Let fewer trials run side by side (resources.cpus), or "
            "train with smaller batches (finetune.batch_size)"
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self.count()
        try:
            unit = self._coordinator.next()
        except (UserError, OSError) as error:
            self._give_up(error)
            unit = None
        if unit is None:
            # so Tune lets go of actors that have nothing to do, and their nodes may go
            return Searcher.FINISHED if self._coordinator.exhausted else None
        self._units[trial_id] = unit.id
        self._changed()
        files = {} if self._stored is None else {"files": self._stored.files_of(unit)}
        return {"unit": asdict(unit), **files}

    def count(self) -> None:
        """Count again how many units can run side by side."""
        if self._count:
            self._coordinator.max_concurrent = self._count()

    def moved(self, trial_id: str, *, begins: bool) -> None:
        """A unit has begun in a process, or lost it."""
        try:
            run = self._coordinator.run
            (run.begins if begins else run.waits)(self._units[trial_id])
        except (UserError, OSError) as error:
            self._give_up(error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A unit could not be done for its node's disk is full: it goes elsewhere, if there is another node."""
        if result.get("state") != PARKED or trial_id in self._parked:
            return
        self._parked.add(trial_id)
        unit = self._units.pop(trial_id)
        if len(self._parked) >= self._coordinator.max_concurrent:
            self._give_up(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), result["reason"]))
        else:
            self._note(f"{result['reason']}: its trials go elsewhere until {ROOM // 2**20} MiB are free")
        try:
            self._coordinator.complete(unit)
            self._changed()
        except (SearchFailed, UserError, OSError) as failure:
            self._give_up(failure)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self._coordinator.done

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._parked:
            self._parked.discard(trial_id)
            return
        if error and not alive():  # nor did its candidate fail
            self._give_up(RayDied("Ray died"))
            return
        found = result or {}
        lost = self._lost() if error else None
        if found.get("state") == "disk full":
            self._give_up(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._coordinator.run.path)))
        elif found.get("state") == "broken":
            self._give_up(RunBroken(found["reason"]))
        elif never_began(raised := self.errors.pop(trial_id, None)):
            self._give_up(RunBroken(f"a process for trials cannot begin: {raised}"))
            lost = None
        try:
            if self._stored is not None and found.get("given"):
                self._stored.take(self._units[trial_id], json.loads(found["given"]))
        except (UserError, OSError) as failure:  # it is done again
            self._give_up(failure)
        try:
            self._coordinator.complete(self._units.pop(trial_id), error=lost)
            self._changed()
        except (SearchFailed, UserError, OSError) as failure:
            self._give_up(failure)

    def _changed(self) -> None:
        for tell in self._on_change:
            tell()

    def _give_up(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self._coordinator.stop()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: Tune snapshots its searcher, but everything of value is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its folder, not from Tune's state")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Steps(tune.Callback):  # type: ignore[misc]
    """Tells the searcher what happens to units, and lets it count again even when Tune needs no more of them."""

    def __init__(self, searcher: _Searcher) -> None:
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        self._searcher.count()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searcher.moved(trial.trial_id, begins=True)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searcher.moved(trial.trial_id, begins=False)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Tells the searcher by what a trial has ended, before Tune tells it that it has."""

    def __init__(self, searcher: _Searcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """End an actor that waits for room where all work is done; one that dies meanwhile does not begin again."""
        if result.get("state") != PARKED:
            return str(FIFOScheduler.CONTINUE)
        trial.max_failures = 0
        return str(FIFOScheduler.STOP if self._searcher.done else FIFOScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = trial.get_pickled_error()
        if error is not None:
            self._searcher.errors[trial.trial_id] = error


def never_began(error: BaseException | None) -> bool:
    """Whether by this error of Ray a process never came to its work: an import failed, or its environment is not there.

    What the work itself raises is caught by ``run_task``. Other errors of Ray mean that a process was lost.
    """
    started = isinstance(error, RayActorError) and not error.actor_init_failed
    return isinstance(error, RayActorError | RayTaskError | RuntimeEnvSetupError) and not started


def execute(
    coordinator: Coordinator,
    resources: ResourcesTable,
    on_change: Sequence[Callable[[], None]] = (),
    *,
    count: Callable[[], int] | None = None,
    note: Callable[[str], None] = lambda _: None,
    work: Callable[..., Mapping[str, Any]] = run_task,
    stored: StoredRun | None = None,
) -> None:
    """Run units until the coordinator is done. Needs a ``RayConnection``.

    Args:
        coordinator, resources: of the search.
        on_change: told of every start and end.
        count: returns how many units can run side by side now, as nodes come and go; ``coordinator.max_concurrent``
            throughout by default.
        note: is told of every unit whose process was lost.
        work: does a unit of the run at a path, in an actor.
        stored: where nodes do not see the run's folder: gives ``work`` the unit's small ``files``, and takes what comes
            back.

    Raises:
        SearchFailed: too many units failed.
        RunBroken: what every unit needs cannot be had, or their processes cannot begin.
        UserError: the space cannot be sampled.
    """
    searcher = _Searcher(coordinator, on_change, count, stored, note)
    # by default Tune asks for the second unit once the first one's process is up; they should start side by side
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(PENDING)
    own = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
    if resources.workers_per_trial > 1:  # its workers bring their own; the unit itself only waits for them, on the head
        own = {"cpu": 0, "node:__internal_head__": 0.001}
    trainable = tune.with_resources(_TaskActor, own)
    with scratch_folder() as scratch:
        tune.Tuner(
            trainable,
            param_space={
                "run": str(coordinator.run.path),
                "threads": resources.cpus_per_trial,
                "work": work,
                "modules": allowed_modules(),
            },
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=_Scheduler(searcher), num_samples=-1, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="units",
                storage_path=str(scratch),
                verbose=0,
                progress_reporter=_Silent(),
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[Losses(coordinator.run, note), _Steps(searcher)],
            ),
        ).fit()
    if searcher.failure:
        raise searcher.failure
