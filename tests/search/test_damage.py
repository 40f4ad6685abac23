"""Every file of a run, damaged in every way: ``resume`` gives what it would have given, or names what is damaged.

Never another number, and never a traceback. The files are those that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import cut, load, save
from prunesweep.search import run_search
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.execution.source import open_space
from prunesweep.search.execution.task import WorkerContext
from prunesweep.search.store.run import Run
from tests.conftest import tiny_config
from tests.launch.test_cli import call
from tests.search.execution.test_task import nothing
from tests.search.in_process import without_ray

TABLES: dict[str, Any] = {
    "search": {"trials": 4, "rungs": [2, 2], "reduction_factor": 2, "recover_images": 64},
    "finetune": {"batch_size": 128, "distill": [{"cache_teacher": True}], "fixed_view": True},
}
NOT_READ = (
    "tb",
    "report.html",
    "advice.json",
    "metrics.jsonl",
    Run("").leases.name,
)  # shown only, and the lock


def flipped(data: bytes) -> bytes:
    """Data with another bit in one byte, somewhere; the same place for the same data."""
    place = zlib.crc32(data) % len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "byte": flipped,
    "absent": lambda data: None,
}


def files_of(run: Path) -> list[str]:
    found = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return [str(path) for path in found if not {*path.parts} & {*NOT_READ}]


def numbers(run: Path) -> Any:
    """What a run says of every trial, and the front; without seconds, and without the checksums of models' files.

    Files of equal weights differ: safetensors writes the entries of its metadata in any order.
    """
    facts = {
        r.id: {n: v for n, v in vars(r).items() if "seconds" not in n and n != "weights"} for r in Run(run).results()
    }
    return facts, Run(run).front()


@pytest.fixture(scope="module")
def without_processes() -> Iterator[list[int]]:
    """Holds the number of the trial in which a search is stopped."""
    most = [0]
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch, lambda: most[0])
        yield most


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, without_processes: list[int]) -> dict[str, Path]:
    """A run that has ended, and one that was stopped while a promoted candidate trained."""
    folder, config = tmp_path_factory.mktemp("damage"), tiny_config(**TABLES)
    kept = prepare_search(config, folder / "cache", nothing)
    candidate = open_space(config, kept).decode({"budget": 0.6, "skip": 0, "lr": 1e-3})
    save(cut(load(kept.folder), candidate.decision), folder / "own", {"method": "nvit"})
    config = tiny_config(**{**TABLES, "search": {**TABLES["search"], "start_from": [str(folder / "own")]}})
    for name, most in (("finished", 0), ("half", 5)):
        without_processes[0] = most
        run_search(config, folder / name)
    without_processes[0] = 0
    assert list((folder / "half").glob("trials/*/state.safetensors"))
    return {name: folder / name for name in ("finished", "half")}


@pytest.fixture(scope="module")
def expected(made: dict[str, Path]) -> dict[str, Any]:
    """What the runs give when they have ended."""
    from prunesweep.search import resume_search

    whole = made["half"].with_name("half-whole")
    shutil.copytree(made["half"], whole)
    assert resume_search(whole).finished
    return {"finished": numbers(made["finished"]), "half": numbers(whole)}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["finished", "half"])
def test_resume_gives_the_same_or_names_what_is_damaged(
    name: str, damage: str, made: dict[str, Path], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = list[str]()
    for file in files_of(made[name]):
        run = made[name].with_name("damaged")
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(made[name], run)
        path, data = run / file, DAMAGES[damage]((run / file).read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        WorkerContext.of.cache_clear()
        try:
            code, *said = call(capsys, "resume", run)
        except Exception as raised:
            wrong.append(f"{file}: a traceback of {type(raised).__name__}: {raised}")
            continue
        if code == 0 and numbers(run) != expected[name]:
            wrong.append(f"{file}: other numbers, and {said}")
        elif code != 0 and str(path) not in "".join(said) and f"{path.parent} is" not in "".join(said):
            wrong.append(f"{file}: is not named: {said}")
    assert not wrong, "\n".join(wrong)


def unseen(file: str, damage: str, run: Path) -> bool:
    """Whether nothing is wrong: what is gone is made again without a word, or a byte of the journal means nothing."""
    again = ("validation.json", "state.safetensors", "teacher_logits")
    begun = file.endswith("arch.json") and not (run / file).with_name("result.json").exists()
    gone = damage == "absent" and (begun or any(part in file for part in again))
    return gone or (file, damage) == ("study.journal", "byte")


def says_the_same(data: bytes | None, whole: bytes) -> bool:
    """Whether the content of a JSON file is what it was, as where the last digit of a number changed nothing."""
    try:
        return data is not None and json.loads(data) == json.loads(whole)
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finished", "half"])
def test_verify_names_every_file_that_is_damaged(
    name: str, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, wrong = made[name], list[str]()
    lost = {r.id: f"a result of {r.id if r.rung else f'trial {r.trial}'} that its files" for r in Run(run).results()}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert call(capsys, "verify", run) == (0, f"{run}: all is sound\n", "")
    for file in files_of(run):
        path = run / file
        whole = path.read_bytes()
        for damage in ("zeros", "byte", "absent"):
            if unseen(file, damage, run):
                continue
            data = DAMAGES[damage](whole)
            if says_the_same(data, whole):
                continue
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            code, out, _ = call(capsys, "verify", run)
            names = (path.name, str(path.parent), lost.get(path.parent.name, path.name))
            if code != 1 or not any(name in out for name in names):
                wrong.append(f"{file} {damage}: {code} {out}")
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
            os.utime(path, ns=(before[path], before[path]))
    assert not wrong, "\n".join(wrong)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before  # nothing is changed
