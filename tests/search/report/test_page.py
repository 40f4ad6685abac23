"""The report: what its page is given, and that nothing in it can act in a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from prunesweep.models import Arch, cost
from prunesweep.models.counting import block_cost
from prunesweep.models.published import published_arch
from prunesweep.pruners import Scores
from prunesweep.search.report.headline import least_alike, told_apart
from prunesweep.search.report.importance import importance
from prunesweep.search.report.page import write_report
from prunesweep.search.report.page_data import page_data
from prunesweep.search.report.published_rows import published_rows
from prunesweep.search.report.savings import CAUSES, picture, savings
from prunesweep.search.store.front import Ranking
from prunesweep.search.store.records import sealed
from prunesweep.search.store.run import Result, Run, Task
from tests.generate import random_arch
from tests.search.helpers import ARCH, make_run, put_model

HOSTILE = "a'\"&<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def changed(arch: Arch = ARCH, **blocks: Any) -> Arch:
    """``ARCH`` with other values of some fields in block 1."""
    (stage,) = arch.stages
    own = tuple(replace(block, **blocks) if block.src == 1 else block for block in stage.blocks)
    return replace(arch, stages=(replace(stage, blocks=own),))


def add(run: Run, arch: Arch, trial: int, rung: int = 0, top1: float = 80.0, **values: Any) -> Result:
    """Finish a task of a run, with a model where the result says so."""
    spent = cost(arch)
    facts: dict[str, Any] = {
        "zero_shot": 40.0,
        "point": {"budget": 0.5 + trial / 100, "method": "nvit", "skip": trial % 2},
        "seconds": 2.0,
        "epochs": 1 + rung,
        "images": 400,
        **values,
    }
    result = Result(trial, top1, macs=spent.macs, params=spent.params, arch_hash=arch.hash, rung=rung, **facts)
    run.trial(result.id).mkdir(parents=True, exist_ok=True)
    (run.trial(result.id) / "arch.json").write_text(arch.to_json())
    if result.has_model:
        put_model(run.model(result))
    run.write_result(result.id, result=result)
    return result


def change_facts(run: Run, **changes: Any) -> None:
    """Write ``run.json`` with other values; those of a table are added to it."""
    facts = json.loads((run / "run.json").read_text())
    del facts["digest"]
    for name, value in changes.items():
        facts[name] = {**facts.get(name, {}), **value}
    (run / "run.json").write_text(sealed(facts))


def small_run(path: Path) -> Run:
    """Three candidates, the first on two rungs, worse on the long one; one task failed."""
    run = make_run(path, objectives=["top1", "macs"], rungs=[1, 1], rank_by="objective")
    put_model(run / "source")
    add(run, ARCH, 0, top1=89.0)
    add(run, ARCH, 0, rung=1, top1=85.0)
    add(run, changed(mlp=32), 1, top1=84.0)
    add(run, changed(mixer="conv3x3", heads=0, qk=0, v=4, scale=0.0), 2, top1=70.0, loss=1.25, kl=0.5)
    run.trial("r0-0003").mkdir()
    run.write_result("r0-0003", error="Traceback (most recent call last):\n  at\nValueError: no <b>room</b>")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return small_run(tmp_path / "run")


def test_figures_are_those_of_the_files(run: Run) -> None:
    run.write_front()
    data, front = page_data(run), json.loads((run / "front.json").read_text())
    shown = {t["unit"]: t for t in data["trials"]}
    assert [u for u, t in shown.items() if t["front"]] == [f"r{p['rung']}-{p['trial']:04d}" for p in reversed(front)]
    for unit, trial in shown.items():
        result = json.loads((run.trial(unit) / "result.json").read_text())["result"]
        names = ("top1", "loss", "kl", "images", "macs", "params", "epochs", "zero_shot", "point", "seconds")
        assert {name: trial[name] for name in names} == {name: result[name] for name in names}
        assert trial["model"] == run.model(Result(**result)).is_dir()
    assert data["hypervolume"] == run.status()["hypervolume"] == data["growth"][-1][2]
    assert data["source"]["macs"] == cost(ARCH).macs
    assert data["spent"] == {"epochs": 4, "seconds": 8.0, "tasks": 4}


def test_a_candidate_has_a_figure_for_every_rung_and_one_as_cut(run: Run) -> None:
    """What it gave before training stays that, and its latest rung is what it is worth, better or worse."""
    first = page_data(run)["trials"][0]
    assert (first["unit"], first["top1"], first["zero_shot"]) == ("r1-0000", 85.0, 40.0)
    assert [(r["unit"], r["epochs"], r["top1"]) for r in first["rungs"]] == [("r0-0000", 1, 89.0), ("r1-0000", 2, 85.0)]


STATES = ("planned", "finished", "running", "waiting", "interrupted", "pending", "failed")


def test_what_failed_runs_and_is_pending_is_told(run: Run) -> None:
    run.trial("r0-0004").mkdir()
    run.write_task(Task(number=4, point={}, arch_hash="a", key="k", seed=0))
    log = run.trial("r0-0004") / "metrics.jsonl"
    epoch = {"time": 5.0, "event": "epoch", "epoch": 2, "epochs": 9, "loss": 0.25}
    log.write_text(f'{json.dumps(epoch)}\n{{"time": 6.0, "eve')  # a line is being written
    now = page_data(run)["activity"]
    first, second = now["tasks"]
    assert (now["driver"], now["requested"]) == (None, 12)
    assert [first[name] for name in STATES] == [12, 3, 0, 0, 1, 7, 1]
    assert [second[name] for name in STATES] == [3, 1, 0, 0, 0, 2, 0]  # of 11 that leave a result, one in three
    assert now["failures"] == [["r0-0003", "ValueError: no <b>room</b>"]]
    (task,) = now["handed_out"]
    assert {**epoch, **task} == {**task, "time": 5.0, "event": "epoch"}
    with run.lock():
        now = page_data(run)["activity"]
        run.begins("r0-0004")
        begun = page_data(run)["activity"]["tasks"][0]
    assert now["driver"]["pid"] > 0
    assert [now["tasks"][0][name] for name in STATES] == [12, 3, 0, 1, 0, 7, 1]
    assert [begun[name] for name in STATES] == [12, 3, 1, 0, 0, 7, 1]


def test_nothing_finished_and_all_failed_is_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    put_model(run / "source")
    for number in range(5):
        run.trial(f"r0-000{number}").mkdir()
        run.write_result(f"r0-000{number}", error="RuntimeError: out of luck")
    data = page_data(run)
    assert (data["trials"], data["hypervolume"], data["growth"]) == ([], 0.0, [])
    assert data["activity"]["tasks"][0]["failed"] == 5
    assert data["headline"] == {"alike": None, "within": None, "least": None, "split": None, "images": None}
    assert "out of luck" in write_report(run).read_text()


def test_a_damaged_result_and_no_numbers_are_counted(run: Run) -> None:
    (run.trial("r0-0001") / "result.json").write_text("{")
    add(run, ARCH, 5, top1=float("nan"))
    with pytest.warns(UserWarning, match="damaged"):
        data = page_data(run)
    assert (data["damaged"], data["diverged"], len(data["trials"])) == (["r0-0001"], 1, 2)
    with pytest.warns(UserWarning, match="damaged"):
        assert "NaN" not in re.findall(r'application/json">(.*?)</script>', write_report(run).read_text())[0]


def test_names_are_text_and_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    """Of a folder's name, of the data and of errors nothing can become an element or a script."""
    run = small_run(tmp_path / HOSTILE.replace("/", "\u2215"))
    change_facts(run, source={"name": HOSTILE})
    page = write_report(run).read_text()
    assert page.count("<script") == page.count("</script>") == 3
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    data = json.loads(re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)[0])
    assert data["source"]["name"] == HOSTILE
    assert "connect-src 'none'; base-uri 'none'; form-action 'none'" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)
    assert len(page) < 2_500_000


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
def test_savings_are_exact_and_add_up(family: str) -> None:
    source = random_arch(Random(1), family, ragged=False, missing=False, extras=False)
    assert savings(source, source) == [0.0] * len(CAUSES) + [1.0]
    stage = next(i for i, stage in enumerate(source.stages) if len(stage.blocks) > 1 or i == len(source.stages) - 1)
    own = source.stages[stage]
    gone, *rest = own.blocks
    small = replace(own, blocks=tuple(replace(block, mlp=block.mlp // 2) for block in rest))
    arch = replace(source, stages=tuple(small if s == stage else one for s, one in enumerate(source.stages)))
    found, whole = savings(arch, source), cost(source).macs
    assert sum(found) == pytest.approx(1)
    assert found[0] == pytest.approx(block_cost(source, own, gone).macs / whole)
    assert found[-1] == pytest.approx(cost(arch).macs / whole)
    halves = sum(
        block_cost(source, own, b).macs - block_cost(arch, small, replace(b, mlp=b.mlp // 2)).macs for b in rest
    )
    assert found[CAUSES.index("fewer units")] == pytest.approx(halves / whole)
    left = picture(arch, source)
    assert left["stages"] == [len(one.blocks) for one in source.stages]
    assert len(left["widths"]) == len(source.stages)
    dropped = [i for i, block in enumerate(left["blocks"]) if block is None]
    assert dropped == [gone.src]


def test_every_cause_has_its_own_share() -> None:
    """One change after another, each saves what it saves alone in the model that those before have left."""
    steps = [
        ("attention replaced", changed(mixer="conv1x1", heads=0, qk=0, v=4, scale=0.0)),
        ("tokens merged", changed(tokens=9)),
        ("fewer ranks", changed(qk=4, v=2)),
        ("fewer units", changed(mlp=8)),
        ("narrower stream", replace(ARCH, stages=(replace(ARCH.stages[0], width=8),))),
        ("blocks dropped", changed(mixer="none", heads=0, qk=0, v=0, scale=0.0)),  # half of one
    ]
    for cause, arch in steps:
        found = dict(zip((*CAUSES, "kept"), savings(arch, ARCH), strict=True))
        saved = 1 - cost(arch).macs / cost(ARCH).macs
        assert saved > 0.005
        assert found == pytest.approx({**dict.fromkeys(CAUSES, 0.0), cause: saved, "kept": 1 - saved}), cause


def test_what_cannot_be_told_apart() -> None:
    assert not told_apart(0.98, 0.98, 450)
    assert not told_apart(0.97, 0.985, 450)
    assert told_apart(0.90, 0.985, 450)
    assert told_apart(0.985, 0.90, 450)
    assert not told_apart(0.90, 0.985, 40)  # few images
    least = least_alike(0.985, 450)
    assert not told_apart(least, 0.985, 450)
    assert told_apart(least - 1 / 450, 0.985, 450)
    assert least_alike(0.001, 10) == 0.0


def test_the_headline_names_the_cheapest_of_the_front(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", objectives=["top1", "macs"], rank_by="objective")
    put_model(run / "source")
    change_facts(run, source={"images": 400})
    for trial, (mlp, top1) in enumerate([(64, 90.0), (32, 89.5), (16, 87.0), (8, 60.0)]):
        add(run, changed(mlp=mlp), trial, top1=top1)
    head = page_data(run)["headline"]
    assert (head["alike"], head["within"], head["images"]) == ([2, 0], [1, 0], 400)
    assert 83 < head["least"] < 87


def test_a_variable_that_decides_explains_much_and_others_little() -> None:
    generator = torch.Generator().manual_seed(0)
    other = torch.rand(60, generator=generator).tolist()
    results = [
        Result(
            trial=i,
            top1=50 + 20 * (i % 3) + other[i],
            zero_shot=0.0,
            macs=1000 + i,
            params=1,
            arch_hash="a",
            point={"skip": i % 3, "noise": float(torch.rand(1, generator=generator)), "method": "nvit"},
            seconds=1.0,
        )
        for i in range(60)
    ]
    found = importance(results, Ranking(("top1", "macs")))
    assert (found["rung"], found["candidates"]) == (0, 60)
    shares = dict(found["shares"])
    assert shares["skip"] > 0.8
    assert shares["noise"] < 0.15
    assert importance(results[:5], Ranking(("top1", "macs"))) == {"rung": None, "candidates": 5, "shares": []}


def test_spectra_say_what_lies_beyond_every_width(run: Run) -> None:
    change_facts(run, scores={"subspaces": "s.safetensors"})
    assert page_data(run)["spectra"] == []  # the file is gone
    (run / "scores").mkdir()
    vectors = {"blocks.1.qk": torch.tensor([4.0, 2, 1, 1, 0, 0, 0, 0]), "stages.0.embed": torch.ones(16)}
    Scores(vectors).save(run / "scores" / "s.safetensors")
    first, second = page_data(run)["spectra"]
    assert (first["name"], first["size"], first["widths"]) == ("blocks.1.qk", 8, [*range(9)])
    assert first["lost"] == pytest.approx([1, 0.5, 0.25, 0.125, 0, 0, 0, 0, 0])
    assert (second["name"], second["lost"][8]) == ("stages.0.embed", pytest.approx(0.5))


def test_published_forms_of_the_source_stand_beside_the_front() -> None:
    """Those of the same source only, with their exact cost, where the figures are of the same thousand classes."""
    source = published_arch("deit_small_patch16_224")
    found = {row["name"]: row for row in published_rows(source, ("top1", "macs"))}
    assert {"spvit_deit_small", "uvc_deit_small_r50_skips", "pm_vit_small_kr06"} == set(found)
    spent = cost(published_arch("spvit_deit_small"))
    assert found["spvit_deit_small"]["top1"] == 78.3
    assert (found["spvit_deit_small"]["macs"], found["spvit_deit_small"]["params"]) == (spent.macs, spent.params)
    assert published_rows(source, ("agreement", "macs")) == []
    assert published_rows(replace(source, num_classes=10), ("top1", "macs")) == []
