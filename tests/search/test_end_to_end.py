"""Whole searches on a real local Ray, and the ways in which they can be interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, UserError, build, load, num_params
from prunesweep.models.io.lock import Lock
from prunesweep.search import SearchResult, resume_search, run_search
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from tests.search.store.test_study import trials

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config() -> SearchConfig:
    from prunesweep.search.config import parse_config
    from tests.conftest import TINY

    return parse_config({**TINY, "resources": {"cpus": 1}}, "tiny")


@pytest.fixture(scope="module")
def finished(config: SearchConfig, runs: Path, request: pytest.FixtureRequest) -> tuple[Run, SearchResult, str]:
    """A small search with one worker, and what it printed; each module that takes it has its own."""
    text = StringIO()
    result = run_search(config, runs / f"first-{request.module.__name__}", console=Console(file=text, width=120))
    assert result is not None
    return Run(result.path), result, text.getvalue()


def test_all_trials_are_done_and_told(finished: tuple[Run, SearchResult, str]) -> None:
    run, result, _ = finished
    assert result.finished
    results = run.results()
    assert [r.trial for r in results] == [0, 1, 2, 3]
    told = trials(run / "study.journal")
    assert [t.values for t in told] == [[r.loss, float(r.macs)] for r in results]
    assert {p["trial"] for p in result.front} == {r.trial for r in run.ranking.front(results)}
    assert json.loads((run / "front.json").read_text()) == run.front()
    assert {(p["split"], p["images"], p["searched_images"], p["ranked_by"]) for p in run.front()} == {
        ("val", 450, 269, "loss")
    }
    assert Lock.holder(run.leases) is None


def test_it_says_what_it_does(finished: tuple[Run, SearchResult, str]) -> None:
    _, _, text = finished
    for words in (
        "source: vit_tiny_patch16_224",
        "search space",
        "budget window [0.3, 0.9]: all points can be built",
        "distinct candidates",
        "top-1 (%) ↑, before finetuning",
        "[4/4] trial 3",
        "Pareto front",
        "figures of 450 validation images, by which nothing was chosen; candidates were compared by loss on 269 images",
    ):
        assert words in text, words
    assert "ray" not in text.lower()


def test_saved_models_are_what_was_recorded(finished: tuple[Run, SearchResult, str]) -> None:
    _, result, _ = finished
    data = open_data("digits")
    assert result.front
    for point in result.front:
        model = load(point["model"])
        assert evaluate(model, data.val_loader(EVAL_BATCH))["top1"] == point["top1"]
        again = timm.create_model(f"local-dir:{point['model']}", pretrained=True).eval()
        x = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))


def test_costs_of_every_trial_are_exact(finished: tuple[Run, SearchResult, str]) -> None:
    run, _, _ = finished
    for result in run.results():
        arch = Arch.from_json((run.trial(f"r0-{result.trial:04d}") / "arch.json").read_text())
        assert arch.hash == result.arch_hash
        model = build(arch).eval()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(torch.randn(1, 1, 8, 8))
        assert result.macs == counter.get_total_flops() / 2
        assert result.params == num_params(model)
        assert result.macs <= result.point["budget"] * run.metadata()["source"]["macs"]


def test_the_folder_holds_everything(finished: tuple[Run, SearchResult, str]) -> None:
    run, _, text = finished
    assert (run / "search.toml").read_text().startswith('name = "tiny"')
    advice = json.loads((run / "advice.json").read_text())
    assert run.status()["advice"] == advice
    assert all(f"advice: {line}" in text for line in advice)
    page = (run / "report.html").read_text()
    assert "trial" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)  # self-contained
    assert list((run / "tb").glob("trial-0000/events*"))
    assert list((run / "tb" / "search").glob("events*"))
    events = [json.loads(line)["event"] for line in (run.trial("r0-0000") / "metrics.jsonl").open()]
    assert events == ["start", "epoch", "end"]
    assert not list((run / "trials").glob("*/state.safetensors"))


def test_an_existing_run_is_not_touched(config: SearchConfig, finished: tuple[Run, SearchResult, str]) -> None:
    run, _, _ = finished
    with pytest.raises(UserError, match="exists: go on with 'prunesweep resume"):
        run_search(config, run.path)


def test_same_seed_same_proposals_and_results(
    config: SearchConfig, finished: tuple[Run, SearchResult, str], runs: Path
) -> None:
    run, _, _ = finished
    again = run_search(config, runs / "second")
    assert again is not None

    def found(run: Run) -> list[tuple[object, ...]]:
        return [(r.trial, r.point, r.top1, r.arch_hash) for r in run.results()]

    assert found(Run(again.path)) == found(run)


def finished_units(run: Path) -> dict[str, float]:
    return {p.parent.name: p.stat().st_mtime for p in run.glob("trials/*/result.json")}


class Search:
    """``prunesweep`` in a process group of its own, as a terminal would start it."""

    def __init__(self, *arguments: str, cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "prunesweep", *arguments]
        # a file and no pipe: Ray's own helpers, which outlive a killed Ray by half a minute, would keep a pipe open
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this object)
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=self.output, start_new_session=True, cwd=cwd
        )

    def wait_for(self, run: Path, count: int) -> None:
        """Until so many units have finished, and this process told of one: those of a dead driver may end late."""
        deadline = time.monotonic() + 300
        while not self.told() or len(finished_units(run)) < count:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.1)

    def told(self) -> bool:
        """Whether it has written of a unit's end."""
        return b"] trial " in os.pread(self.output.fileno(), 2**20, 0)  # without moving where it writes

    def end(self) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        code = self.process.wait(timeout=120)
        self.output.seek(0)
        return code, self.output.read()

    def children(self) -> dict[str, int]:
        """Name and number of the processes that it started itself."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,comm=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return {name: int(pid) for pid, name in (line.split(None, 1) for line in listed.stdout.splitlines())}


@pytest.mark.timeout(900)  # four starts of Ray: two minutes here
def test_killed_in_every_way_and_resumed(tiny, runs: Path) -> None:
    """kill -9 of the driver, kill -9 of Ray, Ctrl-C: each time nothing finished is lost or repeated."""
    trials_ = 10
    file, run = runs / "killed.toml", runs / "killed"
    file.write_text(tiny(search={"trials": trials_}, finetune={"epochs": 4}).to_toml())

    search = Search("search", str(file), "--out", str(run))
    search.wait_for(run, 2)
    os.kill(search.process.pid, signal.SIGKILL)
    search.end()
    time.sleep(1)  # what was being written by the workers is written or torn now
    before = finished_units(run)

    search = Search("resume", str(run))
    search.wait_for(run, len(before) + 1)
    os.kill(search.children()["gcs_server"], signal.SIGKILL)
    code, output = search.end()
    assert code == 3, output
    assert f"Ray died. No finished trial is lost: prunesweep resume {run}" in output
    between = finished_units(run)
    assert before.items() <= between.items()

    search = Search("resume", str(run))
    search.wait_for(run, len(between) + 1)
    os.killpg(search.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    code, output = search.end()
    assert code == 130, output
    assert f"stopped; go on with: prunesweep resume {run}" in output
    assert "Traceback" not in output
    late = finished_units(run)
    assert between.items() <= late.items()
    assert len(late) < trials_, "nothing was left to interrupt"

    trials_ += 1  # and one more than was asked for at first
    code, output = Search("resume", str(run), "--trials", str(trials_)).end()
    assert code == 0, output
    assert late.items() <= finished_units(run).items()  # not one of them was written again
    found = Run(run)
    assert found.status()["requested"] == trials_
    assert found.status()["trials"] == {"finished": trials_, "running": 0, "pending": 0, "failed": 0}
    told = [t for t in trials(run / "study.journal") if t.state.name == "COMPLETE"]
    assert {t.number: t.values for t in told} == {r.trial: [r.loss, float(r.macs)] for r in found.results()}
    for folder in (run / "trials").iterdir():
        events = [json.loads(line)["event"] for line in (folder / "metrics.jsonl").open()]
        assert events.count("epoch") == 4 or events.count("start") > 1
        assert events.count("end") == 1
        assert events[-1] == "end"


def test_a_run_whose_data_are_gone_stops_and_nothing_is_booked(
    finished: tuple[Run, SearchResult, str], runs: Path
) -> None:
    """Every unit would fail: the run is broken, not its candidates; with the data in their place it goes on."""
    run = runs / "failing"
    shutil.copytree(finished[0].path, run)
    settings = (run / "search.toml").read_text()
    (run / "search.toml").write_text(settings.replace('name = "digits"', 'name = "imagefolder:/gone"'))
    code, output = Search("resume", str(run), "--trials", "12").end()
    assert code != 0
    assert "no folder /gone/train" in output
    assert "Traceback" not in output
    assert Run(run).failures() == {}
    assert len(Run(run).results()) == 4
    (run / "search.toml").write_text(settings)
    assert resume_search(run, trials=6).finished
    assert len(Run(run).results()) == 6


def test_failed_trials_are_named_and_done_again_where_that_is_wanted(
    finished: tuple[Run, SearchResult, str], runs: Path
) -> None:
    run = Run(runs / "failed")
    shutil.copytree(finished[0].path, run.path)
    for number, error in enumerate(["out of memory", "out of memory", "no such kernel", "out of memory"]):
        run.write_result(
            f"r0-{number:04d}", error=f"Traceback (most recent call last):\n  a line\nRuntimeError: {error}\n"
        )
    reasons = (
        "  3 x RuntimeError: out of memory (r0-0000, r0-0001, r0-0003)\n  1 x RuntimeError: no such kernel (r0-0002)\n"
    )
    code, output = Search("resume", str(run.path)).end()
    assert code == 1
    assert f"4 trials failed before (--retry-failed does them again):\n{reasons}" in output
    assert f"the search failed: no trial of {run.path} has a result that can be compared:\n{reasons}" in output
    assert f"prunesweep resume {run.path} --retry-failed" in output
    code, output = Search("resume", str(run.path), "--retry-failed").end()
    assert code == 0, output
    assert f"4 trials failed before: done again now\n{reasons}" in output
    assert run.failures() == {}
    assert [(r.trial, r.point, r.top1) for r in run.results()] == [
        (r.trial, r.point, r.top1) for r in finished[0].results()
    ]


def test_a_run_with_half_a_journal_and_a_damaged_result_goes_on(
    finished: tuple[Run, SearchResult, str], runs: Path
) -> None:
    """As where its folder was copied while it ran, to a disk that then failed."""
    run = Run(runs / "copied")
    shutil.copytree(finished[0].path, run.path)
    journal = run / "study.journal"
    entries = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(entries[: len(entries) // 2]))
    damaged = run.trial("r0-0001") / "result.json"
    before = {r.trial: r for r in run.results()}
    damaged.write_bytes(damaged.read_bytes()[:100] + bytes(200))
    text = StringIO()
    assert resume_search(run.path, trials=6, console=Console(file=text, width=500)).finished
    assert f"{damaged} is damaged" in text.getvalue()
    assert "kept as study.journal.outdated-1" in text.getvalue()
    after = {r.trial: r for r in run.results()}
    assert sorted(after) == [0, 1, 2, 3, 4, 5]
    assert all(after[trial] == result for trial, result in before.items() if trial != 1)
    assert (after[1].point, after[1].top1, after[1].key) == (before[1].point, before[1].top1, before[1].key)
    told = {t.number: t.values for t in trials(journal)}
    assert told == {r.trial: [r.loss, float(r.macs)] for r in after.values()}


JOINT = {
    "space": {
        "budget": [0.3, 0.9],
        "skip": [0, 1],
        "conv": [0, 1],
        "conv3": [0, 1],
        "keep_rate": [0.5, 1.0],
        "merge_start": [0, 2],
        "lr": [5e-4, 3e-3],
        "groups": {"embed": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 8},
    },
    "search": {"trials": 9, "rungs": [0, 1, 1], "reduction_factor": 3, "screen_images": 256},
    "resources": {"cpus": 2},
}


def test_all_axes_and_rungs_at_once(runs: Path) -> None:
    from prunesweep.search.config import parse_config
    from tests.conftest import TINY

    result = run_search(parse_config({**TINY, **JOINT, "name": "joint"}, "joint"), runs / "joint")
    assert result is not None
    run = Run(result.path)
    assert result.finished
    assert run.status()["rungs"] == [9, 3, 1]
    data = open_data("digits")
    for point in result.front:
        assert point["rung"] > 0  # what was only screened has no model
        assert evaluate(load(point["model"]), data.val_loader(EVAL_BATCH))["top1"] == point["top1"]
    assert {p.parent.name for p in (run / "trials").glob("*/model")} >= {
        f"r{p['rung']}-{p['trial']:04d}" for p in result.front
    }
    by_place = {(r.trial, r.rung): r for r in run.results()}
    for (trial, rung), found in by_place.items():
        assert found.epochs == [0, 1, 2][rung]
        if rung == 2:
            assert found.zero_shot == by_place[trial, 1].zero_shot
    more = resume_search(run.path, trials=12)
    assert Run(more.path).status()["rungs"] == [12, 4, 1]


def test_trials_start_from_recovered_models(runs: Path) -> None:
    from prunesweep.search.config import parse_config
    from tests.conftest import TINY

    source = {**TINY["source"], "train": {"epochs": 8, "lr": 3e-3, "batch_size": 64}}  # better than chance
    table = {"source": source, "search": {"trials": 3, "recover_images": 400}, "resources": {"cpus": 2}}
    config = parse_config({**TINY, **table, "name": "recovered"}, "recovered")
    result = run_search(config, runs / "recovered")
    assert result is not None
    assert result.finished
    run, data = Run(result.path), open_data("digits", search_split=0.2)
    zero_shot = {r.trial: r.zero_shot for r in run.results()}
    for recover in (True, False):
        asked = config.model_copy(update={"search": config.search.model_copy(update={"recover": recover})})
        cutter = Cutter(load(run / "source"), data, asked)
        made = {t: cutter.model(cut) for t in zero_shot if (cut := run.read_cut(t)) is not None}
        found = {t: evaluate(model, data.val_loader(EVAL_BATCH))["top1"] for t, model in made.items()}
        assert len(found) == 3
        assert (found == zero_shot) == recover


def test_a_trial_of_two_workers(runs: Path) -> None:
    from prunesweep.search.config import parse_config
    from tests.conftest import TINY

    table = {"search": {"trials": 1}, "resources": {"cpus": 2, "workers_per_trial": 2}, "name": "pair"}
    result = run_search(parse_config({**TINY, **table}, "pair"), runs / "pair")
    assert result is not None
    assert result.finished
    (point,) = result.front
    assert evaluate(load(point["model"]), open_data("digits").val_loader(EVAL_BATCH))["top1"] == point["top1"]
    assert {p.name for p in Path(point["model"]).parent.iterdir()} == {
        "arch.json",
        "cut.json",
        "metrics.jsonl",
        "model",
        "result.json",
        "validation.json",
        "spec.json",
    }


def test_a_resume_that_would_change_the_search_is_refused(finished: tuple[Run, SearchResult, str]) -> None:
    run, _, _ = finished
    with pytest.raises(UserError, match=r"space.budget: \[0.3, 0.9\], now \[0.2, 0.9\]"):
        resume_search(run.path, overrides=["space.budget=[0.2,0.9]"])
    assert resume_search(run.path, overrides=["resources.cpus=2"]).finished
