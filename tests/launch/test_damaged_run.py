"""Commands on a run whose files are damaged: they say which file it is, what can be read, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError, cut_arch, save
from prunesweep.search.execution.promote import Promoted
from prunesweep.search.store.records import sealed
from prunesweep.search.store.run import Run, Task
from tests.generate import random_model
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


def edit(run: Path, **source: Any) -> None:
    """``run.json`` with other facts of the source than its digest is of."""
    file = run / "run.json"
    data = json.loads(file.read_text())
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
    "edited": (lambda run: edit(run, macs=7), "run.json is damaged: it has changed since it was written"),
    "no digest": (facts(lambda data: data.pop("digest")), "run.json is damaged: it has no digest"),
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


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What the commands that only show print, and what they warn of."""
    found = [call(capsys, *arguments) for arguments in shown_by(run)]
    assert [code for code, _, _ in found] == [0] * len(found), found
    return [out for _, out, _ in found], "".join(error for _, _, error in found)


def shown_by(run: Path) -> list[list[str | Path]]:
    return [["status", run, "--json"], ["status", run], ["front", run, "--json"], ["front", run], ["report", run]]


@pytest.mark.parametrize("damage", ["", "{", "\0\0", None])
@pytest.mark.parametrize("name", ["run.json", "search.toml"])
def test_what_another_file_knows_is_shown_in_the_place_of_one_that_is_damaged(
    run: Path, name: str, damage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "run.json"
    facts = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}
    settings = {"search": {"trials": 6, "objectives": ["top1", "macs"]}, "data": {"name": "digits"}}
    file.write_text(sealed({**facts, "settings": settings}))
    save(random_model(ARCH, 0), run / "source", {"top1": facts["source"]["top1"]})
    before, warned = shown(run, capsys)
    assert warned == ""
    if damage is None:
        (run / name).unlink()
    else:
        (run / name).write_text(damage)
    again, warned = shown(run, capsys)
    assert again == before
    assert f"{run / name} is damaged" in warned
    assert (f"what is shown of the source is from {run / 'source'}" in warned) == (name == "run.json")
    assert ("writes it again" in warned) == (name == "search.toml")


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


def without(file: Path, *keys: str) -> None:
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in keys}))


def test_files_without_a_digest_are_believed_in_runs_of_earlier_versions_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Run(run)
    found.write_task(Task(1, found.results()[1].point, "a" * 16, "b" * 16, seed=0))
    files = [run / "trials" / "r0-0001" / name for name in ("result.json", "spec.json")]
    for file in files:
        without(file, "digest")
    code, out, error = call(capsys, "front", run, "--json")
    assert (code, [p["trial"] for p in json.loads(out)]) == (0, [0, 2])
    assert f"{files[0]} is damaged: it has no digest, which every file of this run was written with; left out" in error
    with pytest.raises(UserError, match="it has no digest"):
        found.read_task("r0-0001")

    without(run / "run.json", "format", "digest")
    code, out, error = call(capsys, "front", run, "--json")
    assert (code, [p["trial"] for p in json.loads(out)]) == (0, [0, 1])
    assert error.count("an earlier version made it, without digests of some files: they are believed as they are") == 1
    assert Run(run).read_task("r0-0001").number == 1


def test_a_run_of_a_later_version_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without(run / "run.json", "digest")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(sealed({**facts, "format": 2}))
    for command, *options in COMMANDS:
        code, _, error = call(capsys, command, run, *options)
        assert (code, "format = 2: a later version of prunesweep made the run" in error) == (2, True), command


def test_the_report_needs_no_record_where_there_is_a_decision(
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    path.write_text(sealed(asdict(whole)))
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
