from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from prunesweep.launch.cli import main
from prunesweep.models import cost, cut_arch, save
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.store.run import Result, Run, Task
from prunesweep.training import EvalMetrics
from tests.generate import random_model
from tests.search.helpers import ARCH, make_run, make_space, put_model


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    code = end.value.code
    return (0 if code is None else int(code)), out.out, out.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three finished trials, one of them dominated, and one failed."""
    found = make_run(tmp_path / "runs" / "r", trials=6)
    space = make_space()
    save(random_model(ARCH, 0), found / "source")
    for number, (budget, top1) in enumerate([(0.4, 80.0), (0.6, 90.0), (0.8, 85.0)]):
        point = {"budget": budget, "skip": number % 2, "lr": 1e-3}
        candidate = space.decode(point)
        result = Result(number, top1, 50.0, candidate.cost.macs, candidate.cost.params, candidate.arch.hash, point, 1.0)
        folder = found.trial(f"r0-{number:04d}")
        folder.mkdir()
        (folder / "spec.json").write_text("{}")
        (folder / "arch.json").write_text(cut_arch(ARCH, candidate.decision).to_json())
        put_model(folder / "model")
        found.write_result(f"r0-{number:04d}", result=result)
    found.trial("r0-0003").mkdir()
    (found.trial("r0-0003") / "spec.json").write_text("{}")
    found.write_result("r0-0003", error="boom")
    return found.path


def test_ctrl_c_while_the_process_ends_is_no_traceback() -> None:
    code = (
        "import atexit, os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from prunesweep.launch.cli import main; "
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1))); main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")
    assert "resume" in ended.stdout


def test_status(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "status", run, "--json")
    assert code == 0
    found = json.loads(out)
    assert found.pop("hypervolume") > 0
    assert found.pop("seconds") >= 0
    spent = cost(ARCH)
    level = {"planned": 6, "finished": 3, "failed": 1, "running": 0, "interrupted": 0, "waiting": 0, "pending": 2}
    assert found == {
        "requested": 6,
        "driver": None,
        "tasks": [{"rung": 0, "epochs": None, **level}],
        "handed_out": [],
        "worker_seconds": 3.0,
        "seconds_left": None,
        "objectives": ["top1", "macs"],
        "rungs": [3],
        "trials": {"finished": 3, "running": 0, "pending": 2, "failed": 1},
        "source": {"top1": 90.0, "macs": spent.macs, "params": spent.params},
        "advice": [],
    }
    Run(run).write_advice(["widen it"])
    assert json.loads(call(capsys, "status", run, "--json")[1])["advice"] == ["widen it"]
    code, out, _ = call(capsys, "status", run)
    assert "advice: widen it" in out
    assert "3 of 6 trials finished, 0 running, 2 pending, 1 failed" in out
    assert f"no search is running, go on with: prunesweep resume {run}" in out
    assert "from 0 % top-1 at the source's MACs" in out


def test_status_names_what_runs_on_every_rung(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One task of the second rung runs, another one has no worker yet: that is not "0 running, 0 pending"."""
    run = make_run(tmp_path / "run", trials=6, rungs=[1, 3], reduction_factor=2)
    for number in range(6):
        run.trial(f"r0-000{number}").mkdir()
        point = {"budget": 0.5}
        result = Result(number, 80.0, 50.0, 10, 10, "a", dict(point), 4.0, f"k{number}", epochs=1, has_model=False)
        run.write_task(Task(number, dict(point), "a", f"k{number}", 0))
        run.write_result(result.id, result=result)
    for number in range(2):
        unit = Task(number, {"budget": 0.5}, "a", f"k{number}", 0, rung=1)
        run.trial(unit.id).mkdir()
        run.write_task(unit)
    epoch = {"time": 1.0, "event": "epoch", "epoch": 2, "epochs": 3, "loss": 0.125}
    log = run.trial("r1-0001") / "metrics.jsonl"
    log.write_text(json.dumps(epoch) + "\n")
    run.begins("r1-0001")
    with run.lock():
        found = json.loads(call(capsys, "status", run.path, "--json")[1])
        out = call(capsys, "status", run.path)[1]
    assert found["trials"] == {"finished": 6, "running": 1, "pending": 2, "failed": 0}
    # three tasks of three epochs at 4 s each, one after the other, just begun
    assert 33 < found["seconds_left"] <= 36
    assert [(task["unit"], task["waiting"]) for task in found["handed_out"]] == [("r1-0000", True), ("r1-0001", False)]
    assert "searching, process" in out
    assert "6 of 6 trials finished, 1 running, 2 pending (1 of them waiting for a worker), 0 failed" in out
    assert "rung 1 (3 epochs): 0 of 3 finished, 1 running, 1 waiting, 1 pending" in out
    assert "trial 0 on rung 1, waiting for a worker for 00:0" in out
    assert "trial 1 on rung 1, epoch 2 of 3, loss 0.125, 00:0" in out
    with run.lock(), log.open("a") as file:
        file.write('{"time": 2.0, "event": "waiting", "workers": 2}\n')
        file.flush()
        assert run.status()["trials"]["running"] == 0  # those that train it have not begun
    out = call(capsys, "status", run.path)[1]
    assert "0 running, 3 pending" in out
    assert "trial 0 on rung 1, interrupted" in out


def test_front(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "front", run, "--json")
    points = json.loads(out)
    assert [p["trial"] for p in points] == [0, 1]
    assert {"trial", "rung", "top1", "macs", "params", "arch_hash", "model", "promoted_top1"} <= set(points[0])
    assert points[0]["model"] == str(run / "trials/r0-0000/model")
    _, out, _ = call(capsys, "front", run, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [float(r["top1"]) for r in rows] == [80.0, 90.0]
    _, out, _ = call(capsys, "front", run)
    assert "Pareto front" in out


def test_a_front_of_which_a_part_is_validated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search that was resumed and stopped: new members are not measured yet."""
    with (run / "search.toml").open("a") as file:
        file.write("\n[data]\nsearch_split = 0.2\n")
    found = Run(run)
    found.write_validation(found.members()[1], EvalMetrics(70.0, loss=0.5, images=400))
    code, out, _ = call(capsys, "front", run, "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    figures = [(r["split"], r["top1"], r["searched_top1"]) for r in rows]
    assert figures == [("search", "80.0", ""), ("val", "70.0", "90.0")]
    assert float(rows[1]["top1_low"]) < 70 < float(rows[1]["top1_high"])
    assert "95 %" in call(capsys, "front", run)[1]


def test_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "report", run)
    assert code == 0
    page = Path(out.strip()).read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert [t["front"] for t in data["trials"]] == [True, True, False]
    dropped = [t["arch"]["blocks"].count(None) for t in data["trials"]]
    assert dropped == [0, 1, 0]
    assert [block["macs"] for block in data["source"]["arch"]["blocks"]] == [1.0] * 4


def test_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(random_model(ARCH, 0).float(), tmp_path / "model")
    code, out, _ = call(capsys, "eval", path, "--data", "digits", "--json")
    assert code == 0
    found = json.loads(out)
    figures = {"top1", "top1_low", "top1_high", "balanced", "recall", "loss", "images", "macs", "params"}
    assert found.keys() == figures
    assert sum(found["recall"]) / 10 == pytest.approx(found["balanced"])
    assert found["top1_low"] < found["top1"] < found["top1_high"]
    assert (found["macs"], found["params"]) == (cost(ARCH).macs, cost(ARCH).params)
    text = call(capsys, "eval", path, "--data", "digits")[1]
    assert text.startswith(f"top-1 {found['top1']:.2f} %")
    assert f"recall by class, the worst first: {found['recall'].index(min(found['recall']))} 0.0 %" in text


def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no markup of the terminal's."""
    model, scores = dataclasses.replace(ARCH, source="[/x]"), tmp_path / "[bold]scores"
    path = save(random_model(model, 0).float(), tmp_path / "model[/b]")
    code, out, _ = call(capsys, "show", path)
    assert code == 0
    assert out.startswith("[/x], family vit")
    options = ("--method", "magnitude", "--data", "digits", "--images", "16", "--cache", scores)
    code, out, _ = call(capsys, "score", path, *options)
    assert code == 0
    assert f"{scores}/magnitude-" in out
    groups = ("--group", "mlp=8", "--group", "embed=4", "--group", "heads=1")
    options = (*options, "--budget", "0.6", *groups)
    code, out, _ = call(capsys, "prune", path, *options, "--out", tmp_path / "[red]small")
    assert code == 0
    assert f"saved as {tmp_path}/[red]small" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "absent.toml"], "cannot read the configuration absent.toml"),
        (["search", "{toml}", "--set", "search.trails=3"], "did you mean 'trials'?"),
        (["search", "{toml}", "--set", "data.name=cifar"], "data.name = 'cifar': must be "),
        (["search", "{toml}", "--set", "source.model=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["search", "{toml}", "--set", "source.args.num_heads=5"], "cannot be made"),
        (["search", "{toml}", "--set", "source.args.num_classes=7"], "source.model has 7 classes, digits has 10"),
        (["search", "{toml}", "--set", "space.skip=[0,3]"], "the source has 3 blocks, so it must not exceed 2"),
        (["search", "{toml}", "--set", "space.budget=[0.0001, 0.0002]"], "cannot be met"),
        (["search", "{toml}", "--set", "resources.cpus_per_trial=999"], "this machine offers"),
        (["search", "{toml}", "--set", "resources.gpus_per_trial=64"], "this machine offers"),
        (["resume", "nowhere"], "nowhere is not a run"),
        (["status", "nowhere"], "nowhere is not a run"),
        (["front", "nowhere"], "nowhere is not a run"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["eval", "nowhere", "--data", "digits"], "'nowhere' is neither the folder of a saved model nor a timm model"),
    ],
)
def test_user_errors_are_one_message_exit_code_2_and_nothing_created(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    tiny,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "tiny.toml"
    toml.write_text(tiny().to_toml())
    code, out, err = call(capsys, *(a.replace("{toml}", str(toml)) for a in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"]


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "serach")[0] == 2
    assert call(capsys, "eval", "model")[0] == 2


def test_a_dry_run_takes_a_saved_source(runs: Path, tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = prepare_search(tiny(), runs / "cache", lambda *_: None).folder
    config = tiny().model_dump(mode="json", exclude_none=True)
    config["source"] = {"model": f"local-dir:{saved}", "pretrained": True}
    (tmp_path / "saved.toml").write_text(tomli_w.dumps(config))
    code, out, error = call(capsys, "search", tmp_path / "saved.toml", "--out", tmp_path / "dry", "--dry-run")
    assert code == 0, error
    assert "distinct candidates" in out


def test_a_dry_run_makes_nothing(
    tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    """It says what a search would make first, and what that comes to; where the source is there, of its scores."""
    (tmp_path / "tiny.toml").write_text(tiny(search={"rungs": [0, 2], "trials": 6}).to_toml())
    kept = prepare_search(tiny(), runs / "cache", lambda *_: None).folder
    for name in ("fit", "evaluate_on"):
        monkeypatch.setattr(f"prunesweep.search.execution.source.{name}", None)
    dry = ("search", tmp_path / "tiny.toml", "--out", tmp_path / "dry", "--dry-run")
    code, out, error = call(capsys, *dry)
    assert code == 0, error
    text = " ".join(out.split())
    assert "first: the source is not in the cache: it is trained for 1 epoch, measured on 450 images" in text
    assert "plan: 2 rungs: 6 candidates untrained, then the best 2 for 2 epochs; 4 epochs in all" in text
    assert "estimate: training sees 4,312 images" in text  # twice of 1,078 images each
    assert "side by side on 1 CPU each, by the time of one pass of the source here; computing and" in text
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    shutil.copytree(kept, tmp_path / "cache" / "sources" / kept.name)
    code, out, error = call(capsys, *dry)
    assert code == 0, error
    assert "first: scores of nvit are not in the cache: they take 64 images; scores of" in " ".join(out.split())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sources"]


def test_a_dry_run_shows_the_space_and_makes_no_run(
    runs: Path, tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    toml = tmp_path / "tiny.toml"
    toml.write_text(tiny().to_toml())
    code, out, _ = call(capsys, "search", toml, "--out", runs / "dry", "--dry-run")
    assert code == 0
    assert "distinct candidates" in out
    assert not (runs / "dry").exists()
    (runs / "dry").mkdir()
    assert call(capsys, "search", toml, "--out", runs / "dry", "--dry-run")[0] == 0
    assert list((runs / "dry").iterdir()) == []
    code, _, error = call(capsys, "search", toml, "--out", runs / "dry")
    assert (code, "dry exists: and is no run, so nothing can go on there" in error) == (2, True)
    (runs / "dry").rmdir()
