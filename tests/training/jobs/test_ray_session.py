"""Starting Ray, whoever starts it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesweep.launch.cli import main
from prunesweep.models import UserError
from prunesweep.search import run_search
from prunesweep.search.config import ResourcesTable, SearchConfig
from prunesweep.search.execution.runtime import RayConnection
from prunesweep.training.jobs import ray_session
from prunesweep.training.jobs.ray_session import RayDied, check_starts, connected


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT raises: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def for_units() -> RayConnection:
    return RayConnection(ResourcesTable(cpus=1), address=None, verbose=False, on_death=lambda: None)


@pytest.mark.parametrize("begin", [lambda: connected(None, cpus=1, gpus=0), for_units], ids=["workers", "units"])
def test_ctrl_c_while_ray_starts_is_not_lost(begin: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts processes, and Python forgets an exception that meets a hook of ``os.fork``: a logger's, mostly."""

    started: list[bool] = []

    def init(**_: Any) -> None:
        armed = [True]

        def hook() -> None:
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGINT)

        os.register_at_fork(after_in_parent=hook)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        started.append(True)
        raise ConnectionError("there is no Ray in this test")

    monkeypatch.setattr(ray_session.ray, "init", init)
    with pytest.raises(KeyboardInterrupt), begin():
        pass
    assert started


@pytest.mark.slow
def test_a_ray_of_our_own_listens_to_this_machine_alone() -> None:
    import psutil  # Ray brings it along
    import ray

    with for_units():
        ray.get(ray.remote(lambda: None).remote())  # a worker has begun
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        found = [(p.name(), c.laddr.ip) for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {address.removeprefix("::ffff:") for _, address in found} == {"127.0.0.1"}


@pytest.mark.parametrize("begin", [lambda: connected(None, cpus=1, gpus=0), for_units], ids=["workers", "units"])
def test_a_ray_that_does_not_start_is_said_in_one_line(
    begin: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where its raylet or its GCS is killed meanwhile."""

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nSome more lines.")

    def command(_arguments: Any) -> None:
        with begin():
            pass

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_session, "LONGEST_PLACE", 4096)
    with pytest.raises(RayDied, match="^Ray died while it started: The current node timed out during startup$"):
        command([])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("prunesweep.launch.cli.app", command)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_that_ray_cannot_do_without_and_dies_while_it_starts_is_noticed_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(shutil.which("sleep") or "")
    noticed = threading.Event()

    def init(**_: Any) -> None:
        process = subprocess.Popen([tmp_path / name, "60"])
        assert not noticed.wait(0.3)
        process.kill()
        assert noticed.wait(5)
        process.wait()
        raise ConnectionError("there is no Ray in this test")

    monkeypatch.setattr(ray_session.ray, "init", init)
    with pytest.raises(RayDied), ray_session.own_ray(noticed.set):
        pass


STUCK = """
import ctypes, os, subprocess, sys
from prunesweep.training.jobs import ray_session

def init(**_):
    process = subprocess.Popen([sys.argv[1], "60"])
    ctypes.pythonapi.usleep(300_000)
    process.kill()
    if "ends" in sys.argv:
        os._exit(1)
    ctypes.pythonapi.usleep(60_000_000)  # holds the interpreter's lock all the time

ray_session.ray.init = init
with ray_session.own_ray(lambda: None):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("how", "code"), [("waits", 3), ("ends", 1)])
def test_a_ray_that_dies_while_nothing_of_python_can_run_is_said(how: str, code: int, tmp_path: Path) -> None:
    """As ``ray.init`` waits for a GCS that is gone: for a minute, and then it ends the process with exit code 1."""
    (tmp_path / "gcs_server").symlink_to(shutil.which("sleep") or "")
    begun, environment = time.monotonic(), {**os.environ, "TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    process = [sys.executable, "-c", STUCK, str(tmp_path / "gcs_server"), how]
    ended = subprocess.run(process, capture_output=True, text=True, env=environment, timeout=50)  # until all is closed
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1), ended.stderr
    assert ended.stderr.startswith("error: Ray died; the same command goes on")
    assert time.monotonic() - begun < 40
    assert [path.name for path in tmp_path.iterdir()] == ["gcs_server"]


def test_where_ray_s_sockets_do_not_fit_another_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    short = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))
    try:
        monkeypatch.setattr(ray_session, "PLACES", ("/nowhere", str(short)))
        places = list[Path]()
        with monkeypatch.context() as patch:
            patch.setattr(ray_session.ray, "init", lambda **options: places.append(Path(options["_temp_dir"]).parent))
            with ray_session.own_ray(lambda: None):
                pass
        assert places == [short]
        monkeypatch.setattr(ray_session, "PLACES", ("/nowhere",))
        with pytest.raises(UserError, match=r"deep: Ray's sockets need a folder .* at most 34 bytes.*RAY_TMPDIR"):
            check_starts(1)
    finally:
        short.rmdir()


def test_too_few_open_files_are_said_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 256))
    check_starts(4)
    with pytest.raises(UserError, match=r"may have 256 files open .* Ray needs 484 for 32 processes .*ulimit -Hn 968"):
        check_starts(32)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, resource.RLIM_INFINITY))
    check_starts(32)


def test_a_search_and_training_check_that_before_their_work(
    tiny: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(UserError, match="64 files open"):
        run_search(tiny(), tmp_path / "run")
    with pytest.raises(UserError, match="64 files open"), connected(None, cpus=2, gpus=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_ray_that_this_process_has_is_used_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook."""
    nodes = [{"Alive": True, "Resources": {"CPU": 5.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_session.ray, "nodes", lambda: nodes)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray_session.ray, name, lambda *_, **__: pytest.fail("it is someone else's"))
    for given, expected in (({}, 5), ({"cpus": 2}, 2), ({"cpus_per_trial": 2}, 2)):
        options: dict[str, Any] = {"address": None, "verbose": False, "on_death": lambda: None}
        with RayConnection(ResourcesTable(**given), **options) as connection:
            assert connection.fitting == expected
    with connected(None, cpus=2, gpus=0):
        pass


def test_an_address_that_is_not_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray_session.ray, "init", lambda **_: None)
    said = pytest.warns(UserWarning, match="RAY_ADDRESS = head:6379 is not used: .* --address auto")
    with said, ray_session.own_ray(lambda: None):
        pass


WAITS = """
import os, ray, time
from ray._private import worker
from prunesweep.training.jobs.ray_session import connected

@ray.remote
class Waits:
    def pid(self):
        return os.getpid()

    def wait(self):
        import time
        time.sleep(600)

with connected(None, cpus=1, gpus=0):
    waits = Waits.remote()
    pids = {p.process.pid for found in worker._global_node.all_processes.values() for p in found}
    names = {name: found[0].process.pid for name, found in worker._global_node.all_processes.items()}
    pid = ray.get(waits.pid.remote())
    children = open(f"/proc/{names['raylet']}/task/{names['raylet']}/children").read()  # agents among them
    print(names["raylet"], names["gcs_server"], pid, *pids, children, flush=True)
    time.sleep(0.5)
    ray.get(waits.wait.remote())
"""


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1], ids=["raylet", "gcs"])
def test_a_ray_that_dies_ends_its_process_at_once_and_leaves_nothing(dead: int) -> None:
    place = tempfile.mkdtemp(prefix="ps", dir="/tmp")  # short: Ray's sockets lie below it
    environment = {**os.environ, "TMPDIR": place}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )
    try:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) > 3
        assert [path.name[:11] for path in Path(place).iterdir()] == ["prunesweep-"]
        os.kill(pids[dead], signal.SIGKILL)
        begun = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 3
        assert time.monotonic() - begun < 15
        assert output == "error: Ray died; the same command goes on from what is saved\n"
        deadline = time.monotonic() + 5  # by itself, some of it stays for half a minute
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        assert list(Path(place).iterdir()) == []
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_a_list_of_checkpoints_that_was_being_written_does_not_stop_a_run_for_good(place: str, tmp_path: Path) -> None:
    from prunesweep.training.jobs.ray_workers import SNAPSHOT, drop_torn_snapshot

    for name, content, stays in (("torn", "", False), ("half", '{"a": [', False), ("whole", "{}", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / SNAPSHOT).write_text(content)
        drop_torn_snapshot(place.format(tmp_path), name)
        assert (tmp_path / name / SNAPSHOT).exists() == stays
    drop_torn_snapshot(place.format(tmp_path), "new")


BEFORE = """
import ray
from prunesweep.training.jobs.ray_session import own_ray
options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False}
ray.init(address="local", **options)
ray.shutdown()
with own_ray(lambda: None, **options):
    print(ray.get(ray.remote(lambda: "works").remote()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_ray_that_a_process_had_before_is_in_nobodys_way(mode: str, tmp_path: Path) -> None:
    """Ray keeps the token, or that there was none, of the first one."""
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
    ended = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, env=environment, timeout=100)
    assert ended.stdout.split() == ["works"], ended.stderr
