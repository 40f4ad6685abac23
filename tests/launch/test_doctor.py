"""What ``doctor`` makes of what nodes report; tests/launch/test_submit.py asks real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from prunesweep.launch.cluster.inspect_node import Node, inspect_node, versions
from prunesweep.launch.doctor import Finding, check_nodes
from tests.launch.head import AUTH
from tests.launch.test_cli import call

HERE: dict[str, str | None] = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.15.0",
    "timm": "1.0.31",
    "optuna": "5.0.0",
}


def node(host: str, **changes: Any) -> dict[str, Any]:
    found = {
        "address": "10.0.0.1",
        "host": host,
        "cpus": 8,
        "ray_gpus": 4,
        "gpus": 4,
        "versions": HERE,
        "skew": 0.01,
        "file_skew": -0.02,
        "data_problem": None,
        "storage_problem": None,
        "session": f"/tmp/{host}",
        "sharing": 1,
    }
    return {**found, **changes}


def judged(*nodes: dict[str, Any]) -> dict[str, Finding]:
    """What is not ok, by what it is about."""
    found = check_nodes(list(nodes), HERE, "/runs", "/data")
    return {finding.what: finding for finding in found if finding.state != "ok"}


def test_a_healthy_cluster_is_ok() -> None:
    assert judged(node("a"), node("b")) == {}


@pytest.mark.parametrize(
    ("changes", "what", "state", "text"),
    [
        ({"versions": {**HERE, "torch": "2.14.0"}}, "torch there", "wrong", "2.15.0 on a; 2.14.0 on b"),
        ({"versions": {**HERE, "timm": None}}, "timm there", "wrong", "1.0.31 on a; missing on b"),
        ({"gpus": 0}, "GPUs there", "wrong", "b: Ray has 4, torch sees 0"),
        ({"session": "/tmp/ray", "sharing": 2}, "Ray's folder", "warning", "2 nodes, on b, share /tmp/ray"),
        ({"skew": -40.0}, "clocks", "wrong", "b: 40.0 s apart"),
        ({"file_skew": 30.0}, "clocks", "wrong", "b: 30.0 s apart"),
        ({"data_problem": "/data: is empty"}, "data", "wrong", "b: /data: is empty"),
        ({"storage_problem": "cannot write: /runs"}, "storage", "wrong", "b: cannot write: /runs"),
        ({"error": "GetTimeoutError: x"}, "node 10.0.0.1", "wrong", "GetTimeoutError: x"),
    ],
)
def test_what_is_wrong_with_a_node_is_said_and_mended(
    changes: dict[str, Any], what: str, state: str, text: str
) -> None:
    found = judged(node("a"), node("b", **changes))
    assert list(found) == [what]
    assert (found[what].state, found[what].found) == (state, text)
    assert found[what].fix


def test_another_ray_than_the_cluster_s_is_a_warning() -> None:
    found = judged(node("a", versions={**HERE, "ray": "2.61.0"}))["ray there"]
    assert (found.state, found.found, found.fix) == ("warning", "2.61.0 on a; here 2.60.0", "pip install ray==2.61.0")


def test_a_node_reports_what_it_sees(tmp_path: Path) -> None:
    found = inspect_node(str(tmp_path))
    assert found["data_problem"] == f"{tmp_path}: is empty"
    (tmp_path / "file").touch()
    assert inspect_node(str(tmp_path))["data_problem"] is None
    assert inspect_node("/not/there")["data_problem"] == "/not/there: No such file or directory"
    assert inspect_node(None)["data_problem"] is None
    assert found["versions"] == versions()
    assert found["versions"]["ray"]
    assert found["gpus"] == torch.cuda.device_count()


def test_storage_that_is_not_shared_is_seen(tmp_path: Path) -> None:
    one, paths = Node(), {name: str(tmp_path / "probe" / name) for name in ("a", "b")}
    assert one.write(paths["a"], "a") is None
    assert one.read(paths) == [paths["b"]]
    assert one.write(paths["b"], "stale") is None
    assert one.read(paths) == [paths["b"]]
    assert abs(one.file_clock(paths["a"]) or 99) < 1
    assert "No such file" in str(one.write("/proc/absent/file", "a"))
    for path in paths.values():
        one.erase(path)
    assert not (tmp_path / "probe").exists()


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*AUTH, "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    code, out, _ = call(capsys, "doctor")
    assert code == 0, out
    assert "RAY_ADDRESS: head:6379, which commands take with --address auto alone" in out
    monkeypatch.delenv("RAY_ADDRESS")
    assert "none here; RAY_AUTH_MODE not set" in out
    token = tmp_path / "token"
    token.write_text("secret")
    os.chmod(token, 0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert f"chmod 600 {token}" in out
    assert "secret" not in out
    token.unlink()
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "cannot be read" in out
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    code, out, _ = call(capsys, "doctor", "--address", "http://127.0.0.1:1")
    assert code == 1
    assert "nothing answers at http://127.0.0.1:1" in out
