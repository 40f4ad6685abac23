"""Searches on a real Ray cluster of one node, by its job API, with and without a token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prunesweep.launch.cluster.client import Cluster
from prunesweep.launch.cluster.kuberay import kuberay
from prunesweep.launch.jobs import remote_page
from prunesweep.models import load
from prunesweep.models.io.lock import Lock
from prunesweep.search.config import ClusterTable, SearchConfig, load_config
from prunesweep.search.store.run import Run
from tests.launch.head import AUTH, ROOT, RunningHead, clean_environment, running_head
from tests.launch.test_cli import call
from tests.search.store.test_study import trials
from tests.search.test_end_to_end import finished_units

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def head(token_file: Path) -> Iterator[RunningHead]:
    with running_head(token_file=token_file, cpus=2) as found:
        yield found


@pytest.fixture
def with_token(monkeypatch: pytest.MonkeyPatch, token_file: Path) -> None:
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))


@pytest.fixture
def configured(tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file of a tiny search whose runs lie in ``runs``, as a cluster's storage would."""

    def make(name: str, **tables: object) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(tiny(name=name, cluster={"storage": str(runs)}, **tables).to_toml())
        return path

    return make


def on_kubernetes(config: SearchConfig) -> SearchConfig:
    """With what a manifest for KubeRay needs."""
    return config.model_copy(
        update={"cluster": ClusterTable(image="image", storage="/runs", storage_claim="runs", namespace="team")}
    )


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.usefixtures("with_token")
def test_submitted_followed_watched_and_fetched(
    head: RunningHead,
    configured: Callable[..., Path],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = ["--address", head.url]
    code, out, err = call(capsys, "submit", configured("far"), *at, "--follow")
    assert code == 0, out + err
    assert "run far, job far-a1" in out
    assert re.search(r"\[4/4\] trial [0-3]", out)  # which one ends last depends on the machine
    assert "far-a1: succeeded" in out

    found = json.loads(call(capsys, "status", "far", *at, "--json")[1])
    assert found["trials"] == {"finished": 4, "running": 0, "pending": 0, "failed": 0}
    assert (found["job"], found["state"]) == ("far-a1", "succeeded")
    jobs = json.loads(call(capsys, "jobs", *at, "--json")[1])
    assert [(job["run"], job["job"], job["folder"]) for job in jobs] == [("far", "far-a1", str(runs / "far"))]
    assert re.search(r"\[4/4\] trial [0-3]", call(capsys, "logs", "far", *at)[1])

    page = remote_page("far", head.url)  # what `watch --address` shows
    assert [level["finished"] for level in page["activity"]["tasks"]] == [4]

    code, out, _ = call(capsys, "fetch", "far", *at, "--out", tmp_path / "near")
    assert code == 0
    near, far = Run(tmp_path / "near"), Run(runs / "far")
    assert near.front() == far.front()
    assert near.results() == far.results()
    for point in near.front(absolute=True):
        load(point["model"])
    assert "<html" in (near / "report.html").read_text()
    assert len(list((near / "front").iterdir())) == len(near.front())
    assert call(capsys, "fetch", "far", *at, "--out", tmp_path / "near")[0] == 2

    code, _, err = call(capsys, "submit", configured("far"), *at)
    assert code == 2
    assert f"has a search far already (succeeded): go on with 'prunesweep resume far --address {head.url}'" in err
    code, _, err = call(capsys, "logs", "fra", *at)
    assert code == 2
    assert "knows no run 'fra'; known: far. did you mean 'far'?" in err

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call(capsys, "jobs", *at)
    assert (code, "wants a token" in err) == (2, True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    code, _, err = call(capsys, "jobs", *at)
    assert (code, "refuses the token of RAY_AUTH_TOKEN" in err) == (2, True)


@pytest.mark.usefixtures("with_token")
def test_killed_stopped_and_resumed(
    head: RunningHead, configured: Callable[..., Path], runs: Path, capsys: pytest.CaptureFixture[str], token_file: Path
) -> None:
    """kill -9 of the driver, then a clean stop: each time another attempt goes on, and nothing is done twice."""
    run, at = runs / "lost", ["--address", head.url]
    config = configured("lost", search={"trials": 9}, finetune={"epochs": 3})
    code, out, err = call(capsys, "submit", config, *at)
    assert code == 0, out + err
    assert "prunesweep logs lost" in out
    wait_for(lambda: len(finished_units(run)) >= 2, "no progress")
    code, _, err = call(capsys, "resume", "lost", *at)
    assert code == 2
    assert "lost-a1 is running" in err
    assert TOKEN not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    os.kill(Lock.holder(Run(run).leases).pid, signal.SIGKILL)
    cluster = Cluster(head.url)
    wait_for(lambda: cluster.status("lost-a1") == "FAILED", "the driver was killed, and its job goes on")
    time.sleep(1)  # what was being written by the workers is written or torn now
    before = finished_units(run)

    assert call(capsys, "resume", "lost", *at)[0] == 0
    wait_for(lambda: len(finished_units(run)) >= len(before) + 2, "no progress")
    code, out, _ = call(capsys, "stop", "lost", *at)
    assert "lost-a2 ends once its trials have saved their state" in out
    wait_for(lambda: cluster.status("lost-a2") == "STOPPED", "the job was stopped, and goes on")
    code, out, _ = call(capsys, "logs", "lost", "-f", *at)
    assert code == 130
    assert out.rstrip().endswith(f"go on with: prunesweep resume lost --address {head.url}")
    between = finished_units(run)
    assert before.items() <= between.items()
    assert len(between) < 9, "nothing was left to stop"
    assert "stopping: the running trials save their state" in cluster.logs("lost-a2")
    assert not (run / "lease.json").exists()

    assert call(capsys, "resume", "lost", *at, "--trials", "10")[0] == 0
    assert cluster.follow("lost-a3", lambda text: None) == "SUCCEEDED"
    assert between.items() <= finished_units(run).items()  # not one of them was written again
    found = Run(run)
    assert found.status()["trials"] == {"finished": 10, "running": 0, "pending": 0, "failed": 0}
    told = [t for t in trials(run / "study.journal") if t.state.name == "COMPLETE"]
    assert {t.number for t in told} == {r.trial for r in found.results()}
    assert [(a.job, a.status) for a in cluster.attempts("lost")] == [
        ("lost-a1", "FAILED"),
        ("lost-a2", "STOPPED"),
        ("lost-a3", "SUCCEEDED"),
    ]
    code, out, _ = call(capsys, "logs", "lost", "-f", *at)
    assert code == 0
    assert "has ended already: succeeded" in call(capsys, "stop", "lost", *at)[1]
    everything = [
        *run.rglob("*"),
        *head.folder.rglob("*.log"),
        *head.folder.rglob("*.out"),
        *head.folder.rglob("*.err"),
    ]
    assert [p for p in everything if p.is_file() and TOKEN.encode() in p.read_bytes()] == []


@pytest.mark.usefixtures("with_token")
def test_a_job_that_fails_says_why_and_ends_as_it_did(
    head: RunningHead, configured: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("absent", data={"name": "imagefolder:/not/there"})
    code, out, _ = call(capsys, "submit", config, "--address", head.url, "--follow")
    assert code == 2
    assert "/not/there" in out
    assert "absent-a1: failed, exit code 2" in out
    assert "go on with" not in out
    code, _, err = call(capsys, "status", "absent", "--address", head.url)
    assert code == 2
    assert "absent-a1 is failed; it has no run yet" in err
    code, _, err = call(capsys, "fetch", "absent", "--address", head.url)
    assert code == 2
    assert "is not a run on the cluster yet" in err


@pytest.mark.usefixtures("with_token")
def test_what_a_manifest_has_started_is_found(
    head: RunningHead, configured: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(configured("apple"))
    [_, job] = yaml.safe_load_all(kuberay(on_kubernetes(config)))
    (tmp_path / "empty").mkdir()
    Cluster(head.url).submit("apple-x7k2p", "true", tmp_path / "empty", {}, job["spec"]["metadata"])
    [found] = [
        one for one in json.loads(call(capsys, "jobs", "--json", "--address", head.url)[1]) if one["run"] == "apple"
    ]
    assert (found["job"], found["folder"]) == ("apple-x7k2p", "/runs/apple")
    assert 'name = "apple"' in Cluster(head.url).latest("apple").config


@pytest.mark.usefixtures("with_token")
def test_nodes_are_examined(
    head: RunningHead, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "image").touch()
    code, out, _ = call(capsys, "doctor", "--address", head.url, "--storage", runs, "--data", tmp_path)
    assert code == 0, out
    assert f"{head.url} answers with a token" in out
    assert f"{runs}, on 1 nodes" in out
    assert not list(runs.glob(".probe*"))
    code, out, _ = call(capsys, "doctor", "--address", head.url, "--storage", "/proc/x", "--data", "/not/there")
    assert code == 1
    assert "cannot write: /proc/x" in out
    assert "/not/there: No such file or directory" in out


def test_without_a_token(configured: Callable[..., Path], tmp_path: Path) -> None:
    with running_head() as head:
        command = [
            sys.executable,
            "-m",
            "prunesweep.launch.cli",
            "submit",
            str(configured("open")),
            "--address",
            head.url,
            "-f",
        ]
        environment = clean_environment(HOME=str(tmp_path))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "open-a1: succeeded" in done.stdout
        done = subprocess.run(
            command, env={**environment, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2
        assert "RAY_AUTH_MODE=token is set here, but no token is" in done.stderr
