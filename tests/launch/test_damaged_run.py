"""Commands on a run whose files are damaged: they say which file it is, what can be read, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import cut_arch
from prunesweep.search.execution.promote import Promoted
from prunesweep.search.store.records import sealed
from tests.launch import test_cli
from tests.launch.test_cli import call
from tests.search.helpers import ARCH, make_space

run = test_cli.run  # the fixture
COMMANDS = (["status"], ["status", "--json"], ["front"], ["report"], ["promote", "--recipe", "quick"], ["resume"])


def facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        data = json.loads((run / "run.json").read_text())
        change(data)
        (run / "run.json").write_text(json.dumps(data))

    return damage


def reseal(run: Path, **source: Any) -> None:
    """``run.json`` with its digest, and then with other facts of the source."""
    file = run / "run.json"
    data = json.loads(sealed(json.loads(file.read_text())))
    data["source"] |= source
    file.write_text(json.dumps(data))


def settings(text: str | bytes) -> Callable[[Path], Any]:
    return lambda run: (run / "search.toml").write_bytes(text.encode() if isinstance(text, str) else text)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "facts lost": (lambda run: (run / "run.json").unlink(), "run.json is damaged or missing"),
    "facts torn": (lambda run: (run / "run.json").write_text('{"source": {"ma'), "run.json is damaged"),
    "facts null": (lambda run: (run / "run.json").write_text("null"), "run.json is damaged: no JSON object"),
    "facts zeros": (lambda run: (run / "run.json").write_bytes(bytes(100)), "run.json is damaged"),
    "no source": (facts(lambda data: data.pop("source")), "run.json is damaged: it has no source"),
    "no scores": (facts(lambda data: data.pop("scores")), "run.json is damaged: it has no scores"),
    "no macs": (facts(lambda data: data["source"].pop("macs")), "run.json is damaged: it has no source.macs"),
    "no number": (facts(lambda data: data["source"].update(top1="x")), "run.json is damaged: source.top1 = 'x': "),
    "null scores": (facts(lambda data: data.update(scores=None)), "run.json is damaged: scores = None: "),
    "a score": (facts(lambda data: data["scores"].update(nvit=3)), "run.json is damaged: scores.nvit = 3: "),
    "no versions": (facts(lambda data: data.pop("versions")), "run.json is damaged: it has no versions"),
    "data": (facts(lambda data: data.update(data=["digits"])), "run.json is damaged: data = ['digits']: "),
    "content": (facts(lambda data: data.update(content=None)), "run.json is damaged: content = None: "),
    "null settings": (facts(lambda data: data.update(settings=None)), "run.json is damaged: settings = None: "),
    "edited": (lambda run: reseal(run, macs=7), "run.json is damaged: it has changed since it was written"),
    "settings lost": (lambda run: (run / "search.toml").unlink(), "search.toml"),
    "settings empty": (settings(""), "search.toml"),
    "settings torn": (settings('[search]\ntrials = 6\nobjectives = ["to'), "search.toml"),
    "settings zeros": (settings(bytes(100)), "search.toml"),
    "settings latin-1": (settings(b'name = "\xe4"'), "search.toml"),
    "rungs": (settings('[search]\ntrials = 6\nrungs = "null"'), "search.toml"),
    "a rung": (settings("[search]\ntrials = 6\nrungs = 3"), "search.toml"),
    "no trials": (settings("[search]\nrungs = [1]"), "search.toml"),
    "objectives": (settings('[search]\ntrials = 6\nobjectives = ["speed"]'), "search.toml"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_damaged_file_is_named(
    run: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, message = FILES[name]
    damage(run)
    for command, *options in COMMANDS:
        code, out, error = call(capsys, command, run, *options)
        assert code == 2, (command, out, error)
        assert error.startswith("error: ")
        assert message in error
        if command != "resume":
            assert f"Results and models in {run / 'trials'} do not need it" in error
            assert "prunesweep" in error  # what to do
    assert not (run / "promoted").exists()


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        (["status"], ""),
        (["front"], "null"),
        (["front", "--json"], '{"state": "finished", "result": {"rung": null}}'),
        (["front"], '{"state": "lost", "error": "x"}'),
        (["report"], "\0\0\0"),
    ],
)
def test_a_damaged_result_is_named_and_the_others_are_shown(
    run: Path, command: list[str], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "trials" / "r0-0001" / "result.json"
    path.write_text(damage)
    code, out, error = call(capsys, command[0], run, *command[1:])
    assert code == 0
    assert f"warning: {path} is damaged" in error
    assert f"'prunesweep resume {run}' does the trial again" in error
    assert out
    assert [p["trial"] for p in json.loads(call(capsys, "front", run, "--json")[1])] == [0, 2]
    assert json.loads(call(capsys, "status", run, "--json")[1])["trials"]["finished"] == 2


def test_the_report_needs_no_record_where_there_is_a_decision(
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prunesweep.search.store.run import Run

    candidate = make_space().decode(Run(run).results()[0].point)
    path = run / "trials" / "r0-0000" / "arch.json"
    for damage in (lambda: path.write_text(path.read_text()[:50]), path.unlink):
        damage()
        code, _, error = call(capsys, "report", run)
        assert code == 2
        assert f"{path} is damaged or missing, and so is the decision (cut.json)" in error
    Run(run).write_cut(0, candidate.decision)
    assert call(capsys, "report", run)[0] == 0
    assert cut_arch(ARCH, candidate.decision).hash == candidate.arch.hash


def test_a_damaged_lease_stops_nobody_from_looking(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damage in (b"", b"null", b"\xff\xfe", b'{"host": "here"}'):
        (run / ".leases").mkdir(exist_ok=True)
        (run / ".leases" / "000000001").write_bytes(damage)
        assert call(capsys, "status", run)[0] == 0


def test_promoted_figures_that_are_damaged_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "promoted" / "r0-0000" / "promoted.json"
    path.parent.mkdir(parents=True)
    whole = Promoted("r0-0000", 90.0, 80.0, None, None, 10, 10, "quick", None, "promoted/r0-0000/model")
    path.write_text(json.dumps(asdict(whole)))
    assert call(capsys, "front", run)[0] == 0
    wrong = json.dumps({**asdict(whole), "top1": "high"})
    for damage in ("{}", "null", '{"unit": "r0', wrong):
        path.write_text(damage)
        code, _, error = call(capsys, "front", run)
        assert code == 2
        assert f"{path} is damaged" in error
        assert ("top1 = 'high'" in error) == (damage == wrong)
    shutil.rmtree(path.parent)
    assert call(capsys, "front", run)[0] == 0
