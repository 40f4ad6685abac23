"""Commands that take a run's URL in the place of its folder; manifests and jobs for runs on an object store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunesweep.launch.cluster.entrypoint import command
from prunesweep.launch.cluster.kuberay import kuberay
from prunesweep.launch.cluster.ray_launcher import ray_launcher
from prunesweep.launch.cluster.slurm import slurm
from prunesweep.launch.doctor import check_nodes
from prunesweep.models import UserError
from prunesweep.models.io.objects import Objects
from prunesweep.search.config import SearchConfig
from prunesweep.search.report.server import Feed
from prunesweep.search.store.run import Run
from prunesweep.search.store.stored import StoredRun, view
from tests.launch.test_cli import call
from tests.launch.test_doctor import HERE, node
from tests.object_store import Store, serving
from tests.search.helpers import ARCH
from tests.search.report.test_page import add, small_run


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


@pytest.fixture
def stored(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRun:
    """A run that a driver has made, and left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "driver"))
    run = StoredRun(store.url(f"{tmp_path.name}/small"), print, print, new=True).__enter__()
    small_run(run.path).write_front()
    run.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "laptop"))
    return run


def test_what_shows_a_run_takes_its_url(
    stored: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, own = stored.url, Run(stored.path)
    code, out, err = call(capsys, "status", url, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["hypervolume"] == own.status()["hypervolume"]
    code, out, _ = call(capsys, "front", url, "--json")
    assert code == 0
    points = own.front()
    assert [(p["trial"], p["model"]) for p in json.loads(out)] == [(p["trial"], f"{url}/{p['model']}") for p in points]
    brought = [p.parent.parent.name for p in (tmp_path / "laptop").rglob("trials/*/model/model.safetensors")]
    assert sorted(brought) == sorted(f"r{p['rung']}-{p['trial']:04d}" for p in points)  # not those of others

    before = Objects(url).stamp("front.json")
    code, out, _ = call(capsys, "report", url)
    assert (code, out.strip()) == (0, f"{url}/report.html")
    assert b"<html" in Objects(url).read("report.html")
    assert Objects(url).stamp("front.json") == before

    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "fetch", url)
    assert (code, out.startswith("runs/small: ")) == (0, True)
    assert Run(Path("runs/small")).front() == points
    assert Path("runs/small/front/01/config.json").is_file()
    code, out, _ = call(capsys, "stop", url)
    assert (code, f"{url}: no driver works on it" in out) == (0, True)
    code, _, err = call(capsys, "status", "s3://nowhere/run")
    assert (code, "there is no such bucket; make it first (nowhere)" in err) == (2, True)


def test_the_page_of_a_run_far_away_is_of_what_was_published_since(
    stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunesweep.search.report.server.BRING", 0.0)
    feed = Feed(Run(view(stored.url, whole=False)), lambda: view(stored.url, whole=False))
    _, tag = feed.read()
    assert feed.read()[1] == tag
    with StoredRun(stored.url, print, print, new=False) as driver:
        add(Run(driver.path), ARCH, 7, top1=99.0)
    text, later = feed.read()
    assert later != tag
    assert '"unit": "r0-0007"' in text.replace('"unit":"', '"unit": "')


def test_manifests_of_a_run_on_an_object_store_mount_nothing_for_it(
    tiny: Callable[..., SearchConfig], stored: StoredRun
) -> None:
    table: dict[str, Any] = {"image": "registry/prunesweep:1", "storage": "s3://bucket/runs", "hosts": ["a", "b"]}
    config = tiny(name="deep", cluster=table)
    _, job = yaml.safe_load_all(kuberay(config))
    assert "search.toml s3://bucket/runs/deep --once" in job["spec"]["entrypoint"]
    assert "storage" not in str(job["spec"]["rayClusterSpec"])
    assert "s3://bucket/runs/deep" in slurm(config)
    assert "s3://" not in str(yaml.safe_load(ray_launcher(config)).get("docker"))
    assert command("c.toml", stored.url, "auto", None, [])[:2] == ["resume", stored.url]
    assert command("c.toml", f"{stored.url}-other", "auto", None, [])[0] == "search"
    with pytest.raises(UserError, match="storage"):
        tiny(name="deep", cluster={**table, "storage": "runs/here"})


def test_doctor_looks_whether_the_store_is_there(store: Store) -> None:
    found = {f.found: f.state for f in check_nodes([node("a")], HERE, store.url("runs"), None) if f.what == "storage"}
    assert found == {"s3://bucket/runs, from this machine": "ok"}
    (wrong,) = (f for f in check_nodes([node("a")], HERE, "s3://nowhere/runs", None) if f.what == "storage")
    assert (wrong.state, "there is no such bucket" in wrong.found) == ("wrong", True)
