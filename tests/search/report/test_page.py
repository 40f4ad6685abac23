"""The report: its data, and its script in a browser's place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm

from prunesweep.models import Arch, arch_of, cost, save
from prunesweep.search.execution.promote import Promoted
from prunesweep.search.report.page import write_report
from prunesweep.search.store.run import Result, Run

# enough of a page to run the script: elements remember their text, rows and listeners
PAGE = """
class Element {
  constructor() { Object.assign(this, { textContent: "", children: [], dataset: {}, on: () => {} });
    this.classList = { toggle: (name, on) => { this[name] = on; } }; }
  append(child) { this.children.push(child); }
  add(child) { this.children.push(child); }
  insertRow() { const row = new Element(); this.children.push(row); return row; }
  insertCell() { return this.insertRow(); }
  addEventListener(name, call) { this["on" + name] = call; }
}
const elements = {}, plots = {};
const document = { getElementById: id => elements[id] ??= new Element(), createElement: () => new Element(),
  querySelectorAll: () => elements.rows.children };
class Option { constructor(text, value) { Object.assign(this, { text, value }); } }
const Plotly = { react: (id, traces, layout) => { plots[id] = { traces, layout }; } };
"""
SAY = """
const say = () => ({ text: Object.fromEntries(Object.entries(elements).map(([id, e]) => [id, e.textContent])),
  costs: elements.cost.children.map(o => o.value), heads: elements.heads.children.map(e => e.textContent),
  rows: elements.rows.children.map(row => row.children.map(e => e.textContent)), plots });
const first = say();
elements.cost.value = "params"; elements.cost.onchange(); elements.rows.children[0].onclick();
console.log(JSON.stringify([first, say()]));
"""


def make_run(path: Path, **quality: float) -> Run:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    arch = arch_of(model)
    spent = cost(arch)
    save(model, path / "source")
    facts = {"name": "small", "top1": 95.0, "macs": spent.macs, "params": spent.params, **quality}
    (path / "run.json").write_text(json.dumps({"source": facts, "scores": {}, "versions": {"torch": "2"}}))
    objectives = ["ppl", "macs"] if quality else ["top1", "macs"]
    (path / "search.toml").write_text(f"[search]\ntrials = 9\nobjectives = {json.dumps(objectives)}\n")
    run = Run(path)
    for trial, rung, share in ((0, 0, 0.8), (0, 1, 0.8), (1, 0, 0.5)):
        add(run, arch, trial, rung, share, {name: value + share for name, value in quality.items()})
    return run


def add(run: Run, arch: Arch, trial: int, rung: int, share: float, quality: dict[str, float]) -> None:
    whole = cost(arch)
    result = Result(
        trial=trial,
        top1=80 + 10 * share - rung,
        zero_shot=10.0,
        macs=round(share * whole.macs),
        params=round(share * whole.params),
        arch_hash=arch.hash,
        point={"budget": share, "method": "nvit", "skip": 1},
        seconds=1.0,
        key="",
        rung=rung,
        epochs=1 + rung,
        has_model=True,
        **quality,
    )
    run.model(result).mkdir(parents=True)
    (run.trial(result.id) / "arch.json").write_text(arch.to_json())
    run.write_result(result.id, result=result)


def shown(run: Run) -> list[dict[str, Any]]:
    return said(write_report(run))


def said(report: Path) -> list[dict[str, Any]]:
    """What a page says at first, and once another cost and the first row were chosen."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("the report's script needs Node.js to run here")
    page = report.read_text()
    data, script = re.findall(r"<script(?: id=\"data\" type=\"application/json\")?>(.*?)</script>", page, re.DOTALL)[
        -2:
    ]
    source = f"{PAGE}\ndocument.getElementById('data').textContent = {json.dumps(data)};\n{script}\n{SAY}"
    done = subprocess.run([node, "-"], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_point_and_a_row_show_their_blocks(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    promoted = Promoted("r0-0001", 89.5, 85.0, None, None, 5, 5, "quick", {"median_ms": 1.25, "batch": 1}, "model")
    (run / "promoted" / "r0-0001").mkdir(parents=True)
    (run / "promoted" / "r0-0001" / "promoted.json").write_text(json.dumps(asdict(promoted)))
    first, then = shown(run)
    assert "2 trained models, 0 failed trials, 2 on the front of top1, macs" in first["text"]["summary"]
    assert first["costs"] == ["macs", "params"]
    assert first["heads"][:7] == [
        "unit",
        "rung",
        "epochs",
        "top-1 (%)",
        "before finetuning (%)",
        "promoted",
        "measured (ms)",
    ]
    assert [row[:7] for row in first["rows"]] == [
        ["r0-0001", 0, 1, "85.00", "10.00", "89.50", "1.250"],
        ["r1-0000", 1, 2, "87.00", "10.00", "", ""],
    ]
    assert first["text"]["chosen"] == "Trial 0 on rung 1, block by block"
    assert "budget 0.8, method nvit, skip 1" in first["text"]["facts"]
    others, front, further, source = first["plots"]["scatter"]["traces"]
    assert (others["y"], front["y"], further["y"], source["y"]) == ([], [85, 87], [89.5], [95])
    assert first["plots"]["blocks"]["traces"][0]["y"] == [1, 1]
    assert then["text"]["chosen"] == "Trial 1 on rung 0, block by block"
    assert then["plots"]["scatter"]["layout"]["xaxis"]["title"]["text"] == "params (M)"


def test_figures_of_low_noise_are_shown_where_they_are_known(tmp_path: Path) -> None:
    heads = ["95 % interval", "loss", "KL", "agreement (%)", "images"]
    older = shown(make_run(tmp_path / "older"))[0]
    assert not {*heads} & {*older["heads"]}
    run = make_run(tmp_path / "run")
    (result,) = (r for r in run.results() if r.trial == 1)
    run.write_result(result.id, result=replace(result, loss=0.512345, kl=0.0123, agreement=96.5, images=400))
    first, _ = shown(run)
    assert first["heads"][5:10] == heads
    assert [row[5:10] for row in first["rows"]] == [
        ["81.2-88.2", "0.5123", "0.0123", "96.50", 400],
        ["", "", "", "", ""],
    ]


def test_texts_have_perplexity(tmp_path: Path) -> None:
    first, _ = shown(make_run(tmp_path, ppl=30.0))
    assert first["heads"][:4] == ["unit", "rung", "epochs", "perplexity"]
    assert first["rows"][0][:4] == ["r0-0001", 0, 1, "30.50"]
    assert first["plots"]["scatter"]["layout"]["yaxis"]["title"]["text"] == "perplexity"
    assert "perplexity 30.00" in first["text"]["summary"]
