"""``-m prunesweep.launch.cluster.inspect_node``: print what every node of a cluster sees as JSON, for ``doctor``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "inspect_node", "inspect_nodes", "versions"]

PACKAGES = ("ray", "torch", "timm", "optuna", "pydantic", "safetensors")
MARK = ".prunesweep-node-"  # begins the names of files in the folders of Ray's sessions
ROUNDS = 5  # requests for the time; the quickest answer counts
PATIENCE = 120.0  # seconds for a process to start on a node


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages here; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def inspect_node(data: str | None) -> dict[str, Any]:
    """Describe this machine: host, versions, the GPUs that torch sees, and why it cannot read ``data``, if so."""
    gpus: int | None = None
    with contextlib.suppress(ImportError):
        import torch

        gpus = torch.cuda.device_count()
    return {"host": socket.gethostname(), "versions": versions(), "gpus": gpus, "data_problem": _unreadable(data)}


def _session_folder() -> Path:
    """The folder of this node's processes of Ray: logs, sockets and the working directories of jobs."""
    from ray._private.worker import global_worker

    return Path(global_worker.node.get_session_dir_path())


def _unreadable(data: str | None) -> str | None:
    if data is None:
        return None
    try:
        first = next(os.scandir(data), None)
        if first is not None and first.is_file():
            Path(first.path).open("rb").close()
    except OSError as error:
        return f"{data}: {error.strerror}"
    return None if first is not None else f"{data}: is empty"


class Node:
    """An actor on a node that reads and writes files in the folder that all nodes should share."""

    def time(self) -> float:
        """Return this node's time, in seconds since 1970."""
        return time.time()

    def inspect(self, data: str | None) -> dict[str, Any]:
        """Describe this node; see ``inspect_node``."""
        return inspect_node(data)

    def mark(self, name: str) -> str | None:
        """Make an empty file in the folder of Ray's session here; return that folder, None where it cannot."""
        folder = _session_folder()
        try:
            (folder / f"{MARK}{name}").touch()
        except OSError:
            return None
        return str(folder)

    def marks(self) -> list[str]:
        """Return the names that this and other nodes have marked the folder of Ray's session with."""
        return sorted(path.name.removeprefix(MARK) for path in _session_folder().glob(f"{MARK}*"))

    def unmark(self, name: str) -> None:
        """Delete the file of ``mark``."""
        (_session_folder() / f"{MARK}{name}").unlink(missing_ok=True)

    def write(self, path: str, text: str) -> str | None:
        """Write a file and the folders above it; return the reason if this node cannot, otherwise None.

        Args:
            path: the file.
            text: its content.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        except OSError as error:
            return f"{error.filename or path}: {error.strerror}"
        return None

    def read(self, paths: dict[str, str]) -> list[str]:
        """Return the paths whose contents on this node differ from what was written; ``paths`` maps text to path."""
        return [path for text, path in paths.items() if _text(path) != text]

    def erase(self, path: str) -> None:
        """Delete a file, and its folder if that is empty."""
        Path(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder still has other nodes' files
            Path(path).parent.rmdir()

    def file_clock(self, path: str) -> float | None:
        """Return the seconds that the storage's clock is ahead of this node's; None if the file cannot be written."""
        try:
            Path(path).touch()
            return Path(path).stat().st_mtime - time.time()
        except OSError:
            return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def inspect_nodes(address: str, storage: str | None, data: str | None) -> dict[str, Any]:
    """Inspect every living node of a cluster from a process on it.

    Args:
        address: address of the cluster.
        storage: folder that all nodes should share; None leaves it unchecked.
        data: folder of the data set on every node; None leaves it unchecked.

    Returns:
        ``ray``, the version, and ``nodes``. A node has its address, its CPUs and GPUs as Ray counts them, the result of
        ``inspect_node``, ``skew`` (seconds that its clock is ahead of the driver's), ``session`` (the folder of Ray's
        session), ``sharing`` (how many nodes write to that folder) and ``storage_problem``; or ``error`` if no process
        could be started on it.
    """
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    actors = {
        node["NodeID"]: ray.remote(Node)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in nodes
    }
    found = {node["NodeID"]: {"address": node["NodeManagerAddress"], **_offer(node["Resources"])} for node in nodes}
    looks = {key: actor.inspect.remote(data) for key, actor in actors.items()}  # all nodes at the same time
    for key, actor in actors.items():
        try:
            found[key] |= ray.get(looks[key], timeout=PATIENCE)
            found[key]["skew"] = _skew(ray, actor)
        except Exception as error:  # any error means that something is wrong with the node
            found[key]["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    healthy = {key: actor for key, actor in actors.items() if "error" not in found[key]}
    sessions = _all(ray, {key: actor.mark.remote(key) for key, actor in healthy.items()})
    seen = _all(ray, {key: actor.marks.remote() for key, actor in healthy.items()})
    for key in healthy:
        found[key] |= {"session": sessions[key], "sharing": len({*seen[key]} & {*healthy})}
    _all(ray, {key: actor.unmark.remote(key) for key, actor in healthy.items()})
    if storage is not None:
        for key, problem in _check_storage(ray, healthy, found, storage):
            found[key]["storage_problem"] = problem
    ray.shutdown()
    return {"ray": version("ray"), "nodes": list(found.values())}


def _offer(resources: dict[str, float]) -> dict[str, float]:
    return {"cpus": resources.get("CPU", 0), "ray_gpus": resources.get("GPU", 0)}


def _skew(ray: Any, actor: Any) -> float:
    best = (float("inf"), 0.0)
    for _ in range(ROUNDS):
        asked = time.time()
        there = ray.get(actor.time.remote(), timeout=PATIENCE)
        took = time.time() - asked
        best = min(best, (took, there - asked - took / 2))
    return best[1]


def _check_storage(
    ray: Any, actors: dict[str, Any], found: dict[str, dict[str, Any]], storage: str
) -> Iterator[tuple[str, str | None]]:
    """Let every node write a file and read those of the others; yield each node and its problem, or None."""
    folder = Path(storage) / f".probe-{uuid.uuid4().hex[:8]}"
    paths = {key: str(folder / key) for key in actors}
    wrote = _all(ray, {key: actor.write.remote(paths[key], key) for key, actor in actors.items()})
    written = {key: path for key, path in paths.items() if wrote[key] is None}
    unseen = _all(ray, {key: actor.read.remote(written) for key, actor in actors.items()})
    clocks = _all(ray, {key: actor.file_clock.remote(paths[key]) for key, actor in actors.items()})
    for key in actors:
        found[key]["file_skew"], missing = clocks[key], unseen[key]
        if wrote[key] is not None:
            yield key, f"cannot write: {wrote[key]}"
        elif missing:
            hosts = sorted({found[Path(path).name]["host"] for path in missing})
            yield key, f"does not see what {', '.join(hosts)} wrote there: it is not the same storage"
        else:
            yield key, None
    _all(ray, {key: actors[key].erase.remote(path) for key, path in written.items()})


def _all(ray: Any, answers: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(answers, ray.get(list(answers.values())), strict=True))


def main() -> int:
    """Inspect all nodes as the command line says, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="auto")
    parser.add_argument("--storage")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    print(json.dumps(inspect_nodes(arguments.address, arguments.storage, arguments.data)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
