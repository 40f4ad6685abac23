"""The report of a computed front: its data, and its script in a browser's place."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import Arch, cost
from prunesweep.search.report.computed_page import write_computed_report
from tests.search.helpers import ARCH

# enough of a page to run the script: elements remember their text, rows and listeners
PAGE = """
class Element {
  constructor() { Object.assign(this, { textContent: "", children: [], dataset: {}, on: () => {} });
    this.classList = { toggle: (name, on) => { this[name] = on; } }; }
  append(child) { this.children.push(child); }
  add(child) { this.children.push(child); }
  replaceChildren() { this.children = []; }
  insertRow() { const row = new Element(); this.children.push(row); return row; }
  insertCell() { return this.insertRow(); }
  addEventListener(name, call) { this["on" + name] = call; }
}
const elements = {}, plots = {};
const getComputedStyle = () => ({ getPropertyValue: () => "#000" });
const matchMedia = () => ({ matches: false });
const document = { getElementById: id => elements[id] ??= new Element(), createElement: () => new Element(),
  querySelectorAll: () => elements.rows.children,
  documentElement: null };
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


def narrow(share: float) -> Arch:
    (stage,) = ARCH.stages
    blocks = tuple(dataclasses.replace(block, mlp=int(share * block.mlp)) for block in stage.blocks)
    return dataclasses.replace(ARCH, stages=(dataclasses.replace(stage, blocks=blocks),))


def written(folder: Path, **measured: Any) -> Path:
    archs = [ARCH, narrow(0.5), narrow(0.25)]
    points = [
        {
            "budget": share,
            "macs": cost(arch).macs,
            "params": cost(arch).params,
            "macs_share": cost(arch).macs / cost(ARCH).macs,
            "latency_ms": None,
            "latency": None,
            "top1": 90.0 * share,
            "kl": 1 - share,
            "agreement": 100.0 * share,
            "images": 450,
            "model": None if share == 1 else f"{share:g}",
            **measured,
        }
        for share, arch in zip((1.0, 0.8, 0.7), archs, strict=True)
    ]
    facts = {"source": "SOURCE </script>", "data": "digits", "objective": "macs", "images": 512, "seed": 0}
    return write_computed_report(folder, {**facts, "points": points}, archs)


def test_a_point_and_a_row_show_their_blocks(tmp_path: Path) -> None:
    first, then = said(written(tmp_path))
    assert "2 models computed from SOURCE" in first["text"]["summary"]
    assert "on 512 images of digits" in first["text"]["summary"]
    assert "450 validation images" in first["text"]["summary"]
    assert first["costs"] == ["macs", "params"]
    assert first["heads"] == [
        "model",
        "MACs (M)",
        "params (M)",
        "of the source's MACs",
        "KL to the source (nats)",
        "agreement with the source (%)",
        "top-1 (%)",
        "blocks",
        "width",
    ]
    assert [[row[0], *row[4:]] for row in first["rows"]] == [
        ["0.8", "0.2000", "80.00", "72.00", 4, "16"],
        ["0.7", "0.3000", "70.00", "63.00", 4, "16"],
    ]
    (line,) = first["plots"]["scatter"]["traces"]
    assert line["y"] == pytest.approx([0.2, 0.3])
    assert first["plots"]["scatter"]["layout"]["yaxis"]["type"] == "log"
    assert first["text"]["chosen"] == "Model 0.7, block by block"
    assert then["text"]["chosen"] == "Model 0.8, block by block"
    assert then["plots"]["blocks"]["traces"][2]["y"] == [0.5] * 4
    assert then["plots"]["scatter"]["layout"]["xaxis"]["title"]["text"] == "params (M)"


def test_measured_and_predicted_latency_and_features_are_said_where_they_are(tmp_path: Path) -> None:
    timing = {"median_ms": 1.5, "batch": 8}
    nothing = dict.fromkeys(("top1", "kl", "agreement"))
    first, _ = said(written(tmp_path, latency_ms=2.5, latency=timing, cosine=0.9, relative_error=0.1, **nothing))
    assert first["costs"] == ["macs", "params", "latency_ms", "measured_ms"]
    assert first["heads"][-4:-2] == ["cosine of features with the source's", "relative error of features"]
    assert first["rows"][0][3:5] == ["2.500", "1.500"]


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = re.sub(r"<script>.*?</script>", "", written(tmp_path).read_text(), count=1, flags=re.DOTALL)  # plotly itself
    assert not re.search(r"(?:src|href)\s*=|https?://", page)
    assert json.loads(re.findall(r'application/json">(.*?)</script>', page, re.DOTALL)[0])["source"]["model"] is None
