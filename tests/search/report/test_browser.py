"""The page of a run in a real browser: Playwright with Debian's Chromium, skipped where they are not installed."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from prunesweep.launch.cli import app
from prunesweep.models import cost, load, save
from prunesweep.search.report.page import VIEWS, render, write_report
from prunesweep.search.report.page_data import page_data
from prunesweep.search.report.server import Feed, page_server
from prunesweep.search.store.records import Speed
from prunesweep.search.store.run import Run
from tests.generate import random_arch, random_model
from tests.search.helpers import ARCH, make_run, put_model
from tests.search.report.test_page import HOSTILE, add, change_facts, changed, small_run

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
# every element with text of its own: the smallest contrast with what is behind it (WCAG 2.2, relative luminance)
CONTRAST = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = rgb(text).map(x => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const own = getComputedStyle(e).backgroundColor;
      if ((rgb(own)[3] ?? 1) > 0) return own;
    }
    return "rgb(255, 255, 255)";
  };
  const told = e => e.offsetParent && !["SCRIPT", "OPTION"].includes(e.tagName)
    && Array.from(e.childNodes).some(n => n.nodeType === 3 && n.data.trim());
  return Array.from(document.querySelectorAll("body *")).filter(told).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName + " " + e.textContent.slice(0, 40)];
  }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; what it asked for is ``page.asked``. An error in its script, or a dialog, fails the test."""
    contexts, wrong = list[Any](), list[str]()

    def visit(place: Path | str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.asked = list[str]()
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(place.as_uri() if isinstance(place, Path) else place)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [text for text in wrong if "example.org" not in text and "ERR_CONNECTION" not in text]


def until(page: Any, condition: str) -> None:
    """Wait for a condition; the page's policy keeps Playwright's own way of waiting from it."""
    for _ in range(150):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"it never held: {condition}")


def whys(page: Any) -> dict[str, str]:
    """The cards that say why they are empty."""
    pairs = "l => l.map(e => [e.parentElement.id, e.textContent])"
    return dict(page.eval_on_selector_all(".card > .why:not([hidden])", pairs))


def rows(page: Any, table: str) -> list[list[str]]:
    return page.eval_on_selector_all(
        f"#{table} tbody tr", "l => l.map(r => Array.from(r.cells, c => c.innerText.replace(/\\s+/g, ' ')))"
    )


def varied_run(path: Path) -> Run:
    """A front of five, each with something else done to block 1."""
    run = make_run(path, objectives=["top1", "macs"], rank_by="objective", recover=False)
    put_model(run / "source")
    change_facts(run, source={"images": 400}, settings={"data": {"name": "digits"}})
    (stage,) = ARCH.stages
    dropped = replace(ARCH, stages=(replace(stage, blocks=tuple(b for b in stage.blocks if b.src != 1)),))
    kinds = [
        changed(tokens=9),
        changed(mixer="conv3x3", heads=0, qk=0, v=4, scale=0.0),
        changed(mixer="none", heads=0, qk=0, v=0, scale=0.0, tokens=9),
        changed(mlp=0, qk=4, v=4),
        dropped,
    ]
    for trial, arch in enumerate(sorted(kinds, key=lambda arch: -cost(arch).macs)):
        add(run, arch, trial, top1=90.0 - 2 * trial, loss=0.5, kl=0.01 * (trial + 1))
    run.write_front()
    return run


def test_every_mixer_and_token_plan_is_visible_and_figures_are_those_of_the_files(
    tmp_path: Path, visit: Callable[..., Any]
) -> None:
    run = varied_run(tmp_path / "run")
    page = visit(write_report(run))
    blocks = {row[0]: row[2] for row in rows(page, "mosaic")}
    assert len(blocks) == 5
    said = " | ".join(blocks.values())
    for words in ("9 tokens", "conv3x3", "9 tokens no attention", "no MLP", "dropped"):
        assert words in said
    assert page.is_visible("#mosaic >> text=conv3x3")
    front = json.loads((run / "front.json").read_text())
    heads = page.eval_on_selector_all("#heads th", "l => l.map(e => e.textContent)")
    shown = [dict(zip(heads, row, strict=True)) for row in rows(page, "table")]
    assert [(s["model"], s["top-1 (%)"], s["loss"], s["KL"]) for s in shown] == [
        (f"r0-000{p['trial']}", f"{p['top1']:.2f}", f"{p['loss']:.4f}", f"{p['kl']:.4f}") for p in front
    ]
    assert [s["share of MACs"] for s in shown] == [f"{p['macs'] / cost(ARCH).macs:.3f}" for p in front]
    drawn = page.evaluate("scatter.data.filter(t => t.name === 'front').flatMap(t => t.y)")
    assert sorted(drawn) == sorted(p["top1"] for p in front)
    assert "not told apart" in page.inner_text("#tiles")
    assert set(whys(page)) == {"view-spectrum", "view-speed", "view-activity"}
    alone = page.evaluate("Object.fromEntries(trials.map(t => [t.unit, alone(t)]))")
    assert sorted(map(str, alone.values())) == ["None", "None", "blocks", "mixers", "tokens"]
    told = page.evaluate(
        "scatter.data.filter(t => t.name === 'front').flatMap(t => t.customdata.map((c, i) => [c, t.text[i]]))"
    )
    assert {unit for unit, text in told if "<br>only " in text} == {unit for unit, kind in alone.items() if kind}
    assert not page.evaluate("scatter.data.some(t => t.name.endsWith('alone'))")  # a member of the front needs no cross


def test_what_one_kind_of_change_gives_beside_the_front_is_marked(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = varied_run(tmp_path / "run")
    add(run, changed(tokens=12), 5, top1=50.0, loss=0.5, kl=1.0)
    run.write_front()
    page = visit(write_report(run))
    assert page.evaluate("scatter.data.find(t => t.name.endsWith('alone')).customdata") == ["r0-0005"]


def test_measured_speed_and_published_models_are_shown(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = varied_run(tmp_path / "run")
    first, second = run.members()[:2]
    where = ("cpu", "a <b>CPU</b>", "float32", 2)
    run.write_speed([Speed(r.id, r.arch_hash, *where, batch, 2.0, 5.0) for r in (first, second) for batch in (1, 64)])
    page = visit(write_report(run))
    assert page.inner_text("#device") == "Measured on a <b>CPU</b>, float32, threads: 2."
    promised = f"{cost(ARCH).macs / first.macs:.2f} x"
    assert rows(page, "speed")[1] == [first.id, "64", "2.000", "5.000", "2.50 x", promised]
    assert len(rows(page, "speed")) == 4
    row = {"name": "small <b>", "paper": "a paper", "top1": 80.5, "macs": cost(ARCH).macs // 2, "params": 10}
    page.evaluate("row => { page.published = [row]; drawAll(['view-front']); }", row)
    (shown,) = page.evaluate("scatter.data.filter(t => t.name.startsWith('published')).map(t => [t.x[0], t.y[0]])")
    assert shown == [pytest.approx(0.5, rel=0.01), 80.5]
    assert "view-front" not in whys(page)


def test_all_stages_of_a_pyramid_are_shown(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = make_run(tmp_path / "run", objectives=["top1", "macs"], rank_by="objective")
    arch = random_arch(Random(3), "swin", ragged=False, missing=False, extras=False)
    save(random_model(arch, 0), run / "source")
    change_facts(run, source={"macs": cost(arch).macs, "params": cost(arch).params})
    add(run, arch, 0)
    (row,) = rows(visit(write_report(run)), "mosaic")
    assert len(row) == arch.depth + 2
    assert row[-1] == "/".join(str(stage.width) for stage in arch.stages)


def test_hostile_names_are_text_and_no_request_leaves(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = small_run(tmp_path / HOSTILE.replace("/", "\u2215"))
    change_facts(run, source={"name": HOSTILE}, settings={"data": {"name": HOSTILE}, "space": {HOSTILE: HOSTILE}})
    add(run, ARCH, 6, top1=91.0, point={HOSTILE: "=1+1", "budget": 0.5})
    report = write_report(run)
    page = visit(report, accept_downloads=True)
    assert page.asked == [report.as_uri()]
    assert page.inner_text("#name").startswith(run.path.name)
    assert HOSTILE in page.inner_text("#summary")
    titles = page.eval_on_selector_all(".modebar-btn", "l => l.map(e => e.dataset.title)")
    assert titles
    assert not [title for title in titles if re.search("cloud|edit|upload|plotly", title, re.IGNORECASE)]
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    page.asked.clear()
    with page.expect_download() as download:
        page.click("[data-saves=failures]")
    saved = list(csv.reader(Path(download.value.path()).read_text().splitlines()))
    assert saved == [["failed", "why"], ["r0-0003", "ValueError: no <b>room</b>"]]
    cells = "<tr><td>=1+1</td><td>-2</td></tr>"
    made = f"csv(Object.assign(document.createElement('table'), {{ innerHTML: '{cells}' }}))"
    assert page.evaluate(made) == "'=1+1,-2\r\n"


def test_nothing_finished_one_result_and_eight_hundred(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = make_run(tmp_path / "run")
    put_model(run / "source")
    run.trial("r0-0000").mkdir()
    run.write_result("r0-0000", error="RuntimeError: out of luck")
    page = visit(write_report(run))
    assert "all 1 that ended have failed" in whys(page)["view-front"]
    assert rows(page, "failures") == [["r0-0000", "RuntimeError: out of luck"]]
    assert not page.is_visible("#scatter")
    add(run, ARCH, 1)
    page = visit(write_report(run))
    assert page.is_visible("#scatter")
    assert "lines of two" in whys(page)["view-variables"]
    add(run, changed(mlp=8), 2, top1=70.0)
    data = page_data(run)
    one = next(t for t in data["trials"] if t["trial"] == 2)
    many = [{**one, "unit": f"r0-{i:04d}", "trial": i, "front": False, "top1": 60 + i % 20 / 2} for i in range(3, 801)]
    many[0] = {**many[0], "top1": 0.1, "macs": 40 * one["macs"]}  # far off
    data["trials"] += many
    (tmp_path / "many.html").write_text(render("report.html", "many", data, scripts=VIEWS))
    page = visit(tmp_path / "many.html")
    assert page.evaluate("scatter.data.filter(t => t.mode === 'markers').flatMap(t => t.y).length") >= 800
    low, high = page.evaluate("scatter.layout.yaxis.range")
    assert 60 < low < high < 100  # the front's
    assert page.evaluate("scatter.layout.xaxis.range")[1] < 2
    page.select_option("#model", "r0-0700")
    assert "trial 700 on rung 0" in page.inner_text("#chosen")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_the_keyboard_does_all(scheme: str, tmp_path: Path, visit: Callable[..., Any]) -> None:
    page = visit(write_report(varied_run(tmp_path / "run")), color_scheme=scheme)
    page.eval_on_selector_all("details", "l => l.forEach(d => { d.open = true; })")
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    page.focus("#rows tr:nth-child(1)")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    second = page.inner_text("#rows tr:nth-child(2) td")
    assert page.inner_text("#chosen").startswith(second)
    page.focus("#rows tr:nth-child(4)")
    page.keyboard.press("Space")
    assert page.inner_text("#chosen").startswith(page.inner_text("#rows tr:nth-child(4) td"))
    page.fill("#filters input[aria-label='quality at least']", "86")
    assert page.evaluate("document.getElementById('view-front').dataset.points") == "3"
    page.focus("#unbrush")
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('view-front').dataset.points") == "5"


# whether a plot takes a finger's touch for itself: then the browser does not scroll
TAKEN = """() => {
  const layer = scatter.querySelector(".nsewdrag"), { x, y } = layer.getBoundingClientRect();
  const at = { clientX: x + 60, clientY: y + 60 };
  const touch = new Touch({ identifier: 1, target: layer, ...at });
  const details = { bubbles: true, cancelable: true, touches: [touch], changedTouches: [touch] };
  const event = type => new TouchEvent(type, details);
  const taken = ["touchstart", "touchmove", "touchend"].some(type => !layer.dispatchEvent(event(type)));
  return taken || getComputedStyle(layer).touchAction === "none";
}"""


def test_on_a_phone_nothing_is_too_wide_and_a_plot_leaves_swipes_to_the_page(
    tmp_path: Path, visit: Callable[..., Any]
) -> None:
    phone = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True}
    page = visit(write_report(varied_run(tmp_path / "run")), **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(TAKEN) is False
    page.evaluate("Plotly.relayout('scatter', { dragmode: 'zoom' })")  # as on a desk
    assert page.evaluate(TAKEN) is True


def test_shown_commands_do_what_they_say(
    tmp_path: Path, visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = varied_run(tmp_path / "a run")
    kept, gone = run.results()[0], run.results()[4]
    shutil.rmtree(run.model(gone))
    page = visit(write_report(run))

    def commands(unit: str) -> list[str]:
        page.select_option("#model", unit)
        return page.eval_on_selector_all("#commands pre", "l => l.map(e => e.textContent)")

    folder, python, *shell = commands(kept.id)
    assert (tmp_path / folder).is_dir()
    scope: dict[str, Any] = {}
    exec(python, scope)
    assert sum(p.numel() for p in scope["model"].parameters()) == cost(ARCH).params  # as every model here
    extra = {"finetune": ["--epochs", "0"], "bench": ["--seconds", "0", "--batch", "1"]}
    for line in shell:
        program, name, *arguments = shlex.split(line)
        assert program == "prunesweep"
        if name == "export":  # ONNX takes long
            arguments = ["timm" if word == "onnx" else word for word in arguments]
        app([name, *arguments, *extra.get(name, [])], standalone_mode=False)
    assert load(tmp_path / f"{kept.id}-finetuned")
    assert [made for made in commands(gone.id) if "import" in made]
    assert "was not kept" in page.inner_text("#commands")


def test_a_page_that_is_fed_keeps_what_was_chosen(tmp_path: Path, visit: Callable[..., Any]) -> None:
    run = varied_run(tmp_path / "run")
    with page_server(Feed(run), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        page = visit(f"http://127.0.0.1:{server.server_address[1]}/")
        page.select_option("#model", "r0-0003")
        area = page.locator("#scatter .nsewdrag").bounding_box()
        page.mouse.move(area["x"] + 20, area["y"] + 40)
        page.mouse.down()
        page.mouse.move(area["x"] + 160, area["y"] + 160, steps=4)
        page.mouse.up()
        whole = "scatter.layout.yaxis.autorange || scatter._fullLayout.yaxis.range[1] > 92"
        until(page, f"!({whole})")
        zoomed = page.evaluate("scatter._fullLayout.yaxis.range")
        with run.lock():
            add(run, changed(mlp=16, qk=4, v=4), 8, top1=89.0)
            until(page, "page.trials.length === 6")
            assert "A driver is alive" in page.inner_text("#driver")
        until(page, "!page.activity.driver")  # it ended, or was killed
        assert "No driver is alive" in page.inner_text("#driver")
        assert page.inner_text("#chosen").startswith("r0-0003")
        assert page.evaluate("scatter._fullLayout.yaxis.range") == zoomed
        server.shutdown()
        thread.join()
    until(page, "document.getElementById('feed').textContent.includes('does not answer')")
