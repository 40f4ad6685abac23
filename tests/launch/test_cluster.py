"""What is shipped to a cluster and how it is found there, without a cluster."""

from __future__ import annotations

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunesweep.launch import jobs
from prunesweep.launch.cluster import entrypoint, package, page
from prunesweep.launch.cluster.auth import find_token, greet
from prunesweep.launch.cluster.pack import chosen
from prunesweep.launch.jobs import unpack
from prunesweep.models import UserError
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.report.page_data import page_data
from tests.launch.head import AUTH, clean_environment
from tests.launch.test_cli import call
from tests.search.helpers import make_run
from tests.search.report.test_page import small_run

ROOT = Path(__file__).parents[2]


PLOTLY = "prunesweep/search/report/vendor/plotly-cartesian.min.js"  # half of the bytes: reports are made there, too


@pytest.fixture(autouse=True)
def _no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_code_and_configuration_are_shipped_and_run_alone(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    config = tiny(cluster={"data": "/mnt/imagenet"}, data={"name": "imagefolder:/home/me/imagenet"})
    with package.staged(config) as folder:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {
            "prunesweep/__init__.py",
            "prunesweep/models/arch.py",
            "prunesweep/launch/cluster/inspect_node.py",
            "prunesweep/search/report/report.html",
            "prunesweep/search/report/views/main.js",
            PLOTLY,
            "prunesweep/training/recipes/quick.toml",
        } <= names
        assert not [name for name in names if "pycache" in name or name.startswith(("tests", "docs", "runs", "."))]
        sizes = package.sizes(folder)
        assert sum(sizes.values()) - sizes[PLOTLY] < 3 * 2**20
        assert sizes[PLOTLY] < 2 * 2**20
        shipped = load_config(folder / "search.toml")
        assert shipped.data.name == "imagefolder:/mnt/imagenet"
        code = (
            "import prunesweep.models.io.files, prunesweep.models.io.provenance, prunesweep.launch.cluster.entrypoint;"
            "from importlib.metadata import distribution as d;"
            "print(prunesweep.models.__file__, d('prunesweep').locate_file('').absolute());"
            "print(prunesweep.models.io.provenance.versions()['prunesweep'])"
        )
        environment = clean_environment(PYTHONPATH=str(folder))  # as Ray sets it in a job
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        module, facts, number = out.stdout.split()
        assert module == str(folder / "prunesweep" / "models" / "__init__.py")
        assert facts == str(folder)
        assert number == version("prunesweep")


def test_files_can_be_left_behind() -> None:
    with package.staged(exclude=["*.html", "prunesweep/pruners/upvit/*.py"]) as folder:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert "prunesweep/search/report/page.py" in names
        assert "prunesweep/search/report/report.html" not in names
        assert "prunesweep/pruners/upvit/importance.py" not in names
        assert "prunesweep/pruners/nvit/saliency.py" in names


def test_a_local_source_is_shipped_and_what_is_too_large_is_named(
    tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    (source / "config.json").write_text("{}")
    config = tiny(source={"model": f"local-dir:{source}"})
    with package.staged(config) as folder:
        assert (folder / "source" / "config.json").read_text() == "{}"
        table = tomllib.loads((folder / "search.toml").read_text())
        assert table["source"]["model"] == "local-dir:source"
    with (source / "model.safetensors").open("wb") as file:
        file.truncate(101 * 2**20)
    too_large = r"a head takes 100 MiB(.|\n)*101\.0 MiB  source/model\.safetensors"
    with pytest.raises(UserError, match=too_large), package.staged(config):
        pass
    elsewhere = tiny(source={"model": "local-dir:/not/on/this/machine"})
    assert package.on_cluster(elsewhere).source.model == "local-dir:/not/on/this/machine"


def test_a_local_latency_table_is_shipped(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    table = tmp_path / "cpu.json"
    table.write_text("{}")
    config = tiny(space={"latency_table": str(table)})
    with package.staged(config) as folder:
        assert (folder / "latency_table.json").read_text() == "{}"
        assert load_config(folder / "search.toml").space.latency_table == "latency_table.json"
    elsewhere = tiny(space={"latency_table": "/on/the/nodes.json"})
    assert package.on_cluster(elsewhere).space.latency_table == "/on/the/nodes.json"


def test_pip_installs_what_the_cluster_need_not_have() -> None:
    names = {re.split(r"[<>=\[]", text)[0] for text in package.requirements()}
    assert {"timm", "optuna", "pydantic", "safetensors"} <= names
    assert not names & {"ray", "torch", "torchvision", "pytest"}
    table = load_config(ROOT / "examples" / "digits.toml").cluster or package.ClusterTable(env={"NCCL_DEBUG": "INFO"})
    assert "pip" not in package.environment(table, pip=False)
    assert package.environment(table, pip=True)["pip"] == package.requirements()
    assert package.environment(table, pip=False)["env_vars"]["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_secrets_are_not_taken(tiny: Callable[..., SearchConfig], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} looks like a secret"):
        tiny(cluster={"env": {name: "x"}})


def test_a_driver_begins_once_and_then_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    assert entrypoint.command("c.toml", str(run), "auto", 9, ["resources.cpus=2"]) == [
        *("search", "c.toml", "--out", str(run), "--address", "auto"),
        *("--set", "resources.cpus=2", "--set", "search.trials=9"),
    ]
    run.mkdir()
    (run / "search.toml").touch()  # not yet whole
    assert entrypoint.command("c.toml", str(run), "auto", None, [])[0] == "search"
    (run / "run.json").touch()
    wanted = ["resume", str(run), "--address", "auto", "--trials", "9", "--set", "resources.cpus=2"]
    assert entrypoint.command("c.toml", str(run), "auto", 9, ["resources.cpus=2"]) == wanted
    words = shlex.split(package.driver("c.toml", str(run), again=True, trials=9, overrides=["a.b='x y'"]))
    assert words == [
        "python",
        "-m",
        "prunesweep.launch.cluster.entrypoint",
        "c.toml",
        str(run),
        "--trials",
        "9",
        "--set",
        "a.b='x y'",
    ]
    assert "prunesweep search" in package.driver("c.toml", str(run), again=False)
    assert entrypoint.command("c.toml", str(run), "auto", None, [], retry_failed=True)[-1] == "--retry-failed"
    assert shlex.split(package.driver("c.toml", str(run), again=True, retry_failed=True))[-1] == "--retry-failed"


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does; ``server.token`` opens it."""

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        token: str | None = self.server.token  # type: ignore[attr-defined]
        given = self.headers.get("Authorization")
        status = 200 if token is None or given == f"Bearer {token}" else 401 if given is None else 403
        body = self.server.body if status == 200 else b"no"  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Endpoint)
    server.token, server.body, server.seen = None, json.dumps({"ray_version": "2.60.0"}).encode(), []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url_of(server: http.server.HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_token_is_sent_only_where_it_is_wanted(endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hidden")
    head = greet(url_of(endpoint) + "/")
    assert (head.ray, head.headers, endpoint.seen) == ("2.60.0", {}, [None])
    endpoint.token = "hidden"
    head = greet(url_of(endpoint))
    assert head.headers == {"Authorization": "Bearer hidden"}
    assert "hidden" not in repr(head)
    endpoint.token = "other"
    with pytest.raises(UserError, match="refuses the token of RAY_AUTH_TOKEN") as error:
        greet(url_of(endpoint))
    assert "hidden" not in str(error.value)


def test_tokens_are_found_where_ray_finds_them(endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint.token = "t"
    with pytest.raises(UserError, match="wants a token: set RAY_AUTH_TOKEN_PATH"):
        greet(url_of(endpoint))
    default = tmp_path / "home" / ".ray" / "auth_token"
    default.parent.mkdir(parents=True)
    default.write_text("in home\n")
    assert find_token() == ("in home", str(default))
    named = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    with pytest.raises(UserError, match=f"RAY_AUTH_TOKEN_PATH={named}: cannot be read"):
        find_token()
    named.write_text("in a file")
    assert find_token() == ("in a file", str(named))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert find_token() == ("t", "RAY_AUTH_TOKEN")
    assert greet(url_of(endpoint)).ray == "2.60.0"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=disabled is set here"):
        greet(url_of(endpoint))


def test_what_is_no_head_is_said_to_be_none(endpoint) -> None:
    endpoint.body = b"<html>"
    with pytest.raises(UserError, match="not as Ray's dashboard does"):
        greet(url_of(endpoint))
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(UserError, match=r"nothing answers at http://127\.0\.0\.1"):
        greet(url_of(endpoint))
    with pytest.raises(UserError, match="must be the http address"):
        greet("10.0.0.1:6379")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a front of two models, and a third model that is not on it."""
    run = make_run(tmp_path / "run")
    front = []
    for trial, top1 in ((0, 80.0), (1, 90.0), (2, 85.0)):
        folder = run.trial(f"r0-{trial:04d}")
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(bytes([trial]) * 100_000)
        (folder / "result.json").write_text("{}")
        (folder / "state.safetensors").write_text("large")
        if trial < 2:
            front.append({"trial": trial, "top1": top1, "model": f"trials/r0-{trial:04d}/model"})
    (run / "front.json").write_text(json.dumps(front))
    return run.path


def pack(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prunesweep.launch.cluster.pack", str(run), "--limit", "1000000", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(("options", "models"), [([], {0, 1}), (["--top", "1"], {1}), (["--top", "0"], set())])
def test_what_is_packed_comes_out(run: Path, options: list[str], models: set[int]) -> None:
    import io
    import tarfile

    done = pack(run, *options)
    assert done.returncode == 0, done.stderr
    noise = f"a warning of Ray\n{done.stdout}and another"
    with tarfile.open(fileobj=io.BytesIO(unpack(noise)), mode="r:gz") as archive:
        names = set(archive.getnames())
        for trial in models:
            member = archive.extractfile(f"trials/r0-000{trial}/model/model.safetensors")
            assert member is not None
            assert member.read() == bytes([trial]) * 100_000
    assert {name for name in names if "model/" in name} == {
        f"trials/r0-000{trial}/model/model.safetensors" for trial in models
    }
    assert {"run.json", "search.toml", "front.json", "trials/r0-0002/result.json"} <= names
    assert not [name for name in names if "state" in name]


class Answering:
    """In the place of a cluster, whose short jobs print ``output``."""

    def __init__(self, output: str, code: int = 0) -> None:
        self.answer = (code, output)

    def latest(self, run: str) -> Any:
        return SimpleNamespace(folder=run, job=f"{run}-1", status="RUNNING")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Let commands find a cluster whose jobs print this and end so."""

    def answer(output: str, code: int = 0) -> None:
        monkeypatch.setattr(jobs, "_cluster", lambda _: Answering(output, code))
        monkeypatch.setattr(jobs, "_call", lambda cluster, *_: cluster.answer)

    return answer


def test_what_is_fetched_has_links_to_the_front_at_its_places(
    run: Path, tmp_path: Path, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = json.loads((run / "front.json").read_text())
    (run / "front.json").write_text(json.dumps([{**point, "rung": 0} for point in listed]))
    for model in run.glob("trials/*/model"):
        (model / "config.json").write_text("{}")
    answering(pack(run, "--top", "1").stdout)
    assert call(capsys, "fetch", "run", "--out", tmp_path / "here")[0] == 0
    (link,) = (tmp_path / "here" / "front").iterdir()
    assert (link.name, link.readlink()) == ("02", Path("../trials/r0-0001/model"))  # the second of the front
    assert (link / "config.json").is_file()
    (run / "front.json").write_text(json.dumps([{**listed[0], "rung": "../../../..", "trial": 0}]))
    answering(pack(run).stdout)
    assert call(capsys, "fetch", "run", "--out", tmp_path / "hostile")[0] == 0
    assert not (tmp_path / "hostile" / "front").exists()


def test_the_page_of_a_run_on_a_cluster_is_what_its_files_say(
    tmp_path: Path, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    found = small_run(tmp_path / "run")
    assert page.main(str(found.path)) == 0
    output = f"a warning of Ray\n{capsys.readouterr().out}"
    answering(output)
    assert jobs.remote_page("run", "http://head") == json.loads(json.dumps(page_data(found)))
    for broken in (output.replace("A", "B"), "nothing"):
        answering(broken)
        with pytest.raises(UserError, match="length or checksum"):
            jobs.remote_page("run", "http://head")
    assert page.main(str(tmp_path / "none")) == 2
    answering(capsys.readouterr().out, 2)
    with pytest.raises(UserError, match="run-1 is running: .*none is not a run"):
        jobs.remote_page("run", "http://head")


def test_torn_and_altered_archives_are_refused(run: Path) -> None:
    output = pack(run).stdout
    lines = output.splitlines()
    altered = lines[1][:50] + ("A" if lines[1][50] != "A" else "B") + lines[1][51:]
    for broken in (
        "\n".join(lines[:-2]),
        "\n".join([lines[0], altered, *lines[2:]]),
        "\n".join([lines[0], "§", *lines[2:]]),
        "",
    ):
        with pytest.raises(UserError, match="length or checksum"):
            unpack(broken)


def test_archives_are_bounded_and_need_a_run(run: Path, tmp_path: Path) -> None:
    too_large = pack(run, "--limit", "100")
    assert too_large.returncode == 2
    assert "exceeds the limit" in json.loads(too_large.stdout)["error"]
    absent = pack(tmp_path / "absent")
    assert absent.returncode == 2
    assert "is not a run on the cluster yet" in json.loads(absent.stdout)["error"]


def test_models_that_are_fetched_first_are_best_by_what_the_search_ranks(tmp_path: Path) -> None:
    lucky = {"model": "trials/r0-0000/model", "top1": 99.0, "agreement": 99.0, "loss": 0.1, "searched_loss": 0.3}
    better = {"model": "trials/r0-0001/model", "top1": 98.0, "agreement": 90.0, "loss": 0.2, "searched_loss": 0.1}
    for point in (lucky, better):
        (tmp_path / str(point["model"])).mkdir(parents=True)
        (tmp_path / str(point["model"]) / "config.json").write_text("{}")
        (tmp_path / str(point["model"])).with_name("validation.json").write_text("{}")
    for ranked, first in (({"ranked_by": "loss"}, better), ({"ranked_by": "top1"}, lucky), ({}, lucky)):
        (tmp_path / "front.json").write_text(json.dumps([{**p, **ranked} for p in (lucky, better)]))
        sent = {str(path.relative_to(tmp_path)) for path in chosen(tmp_path, 1)}
        assert {name for name in sent if name.endswith("config.json")} == {f"{first['model']}/config.json"}
        assert sent >= {"trials/r0-0000/validation.json", "trials/r0-0001/validation.json"}


def test_a_failure_that_would_come_again_ends_a_job_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """KubeRay builds another cluster for every job that fails."""
    arguments = ["entrypoint", str(tmp_path / "absent.toml"), str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        entrypoint.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--once"])
    entrypoint.main()
    assert "FAILED, exit code 2" in capsys.readouterr().err


def test_a_folder_that_is_gone_from_under_a_process(tmp_path: Path) -> None:
    """Ray removes a job's folder where nodes share a temporary folder."""
    code = (
        "import os; from pathlib import Path; from prunesweep.search.store.run import Run\n"
        "from prunesweep.training.jobs.ray_session import _job_config\n"
        f"os.rmdir({str(tmp_path)!r}); print(Run('/runs/x').shown); _job_config()"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout == "/runs/x\n", found.stderr
