"""A real head of a Ray cluster on this machine, with dashboard and jobs, for the time of a ``with`` block."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what says how Ray is reached."""
    own = {name: value for name, value in os.environ.items() if name not in AUTH}
    return {**own, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class RunningHead:
    url: str
    gcs: str
    folder: Path  # Ray's own: logs are below it
    environment: Mapping[str, str]
    metrics: str  # address of what Prometheus reads


@contextlib.contextmanager
def running_head(
    *, token_file: Path | None = None, cpus: int = 1, comes: tuple[int, int] | None = None
) -> Iterator[RunningHead]:
    """Start a head.

    Args:
        token_file: with the token that it asks for; None asks for none.
        cpus: of the head.
        comes: CPUs of a node that its autoscaler starts when asked, and how many of them there may be. They are
            processes of this machine, and go after nine seconds without work.
    """
    folder = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))  # short: Ray's sockets lie below it
    port, dashboard, client, agent, metrics = free_ports(5)
    auth = {"HOME": str(folder)}  # nothing says how, and no token lies there: Ray asks for none
    if token_file is not None:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    environment = clean_environment(RAY_TMPDIR=str(folder), RAY_USAGE_STATS_ENABLED="0", **auth)
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-host": "127.0.0.1",
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        "num-cpus": cpus,
        "object-store-memory": 100_000_000,
        "temp-dir": folder,
    }
    if comes is not None:
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        environment["RAY_metrics_report_interval_ms"] = "1000"
        environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
        options |= {"node-ip-address": "127.0.0.1", "autoscaling-config": folder / "autoscaler.json"}
        (folder / "autoscaler.json").write_text(json.dumps(_autoscaler(f"127.0.0.1:{port}", *comes)))
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait(url, process, folder)
        yield RunningHead(url, f"127.0.0.1:{port}", folder, environment, f"http://127.0.0.1:{metrics}/metrics")
    finally:
        process.send_signal(signal.SIGTERM)  # it ends what it has started
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        for pid in _session(process.pid):  # the nodes that its autoscaler has started
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _autoscaler(gcs: str, cpus: int, count: int) -> dict[str, Any]:
    """The settings of an autoscaler whose nodes are processes of this machine."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": count,
        "provider": {"type": "fake_multinode", "gcs_address": gcs, "use_node_id_as_ip": True, "launch_multiple": True},
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": cpus, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": count,
            },
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.15,
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def _session(leader: int) -> list[int]:
    """Processes of the session that a process leads."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


def _wait(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "start.log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/api/version", timeout=5) as answer:
                assert "ray_version" in json.loads(answer.read())
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return  # it wants a token
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no dashboard: {(folder / 'start.log').read_text()}")
