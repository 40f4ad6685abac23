"""Folders of runs whose files were changed: commands say what is damaged, show the rest, and never fail bare."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from prunesweep.launch.cli import main
from prunesweep.models import UserError
from prunesweep.models.io.provenance import digest
from prunesweep.search import run_search
from prunesweep.search.execution.task import WorkerContext
from tests.conftest import tiny_config
from tests.launch import test_cli
from tests.mutations.judging import Tally, files_below, rounds
from tests.mutations.mutators import VALUES, as_json, changed_bytes, changed_value
from tests.search.in_process import without_ray

run = test_cli.run  # the fixture
READING = (["status"], ["status", "--json"], ["front"], ["front", "--json"], ["front", "--csv"], ["report"])
ALL = (*READING, ["verify"], ["verify"], ["resume"], ["promote", "--recipe", "quick", "--epochs", "1"])


def listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "tb" not in path.parts)


def change(draw: Random, folder: Path) -> str:
    """Change one or two files of a run."""
    return "; ".join(_change(draw, folder) for _ in range(draw.choice((1, 1, 2))))


def _change(draw: Random, folder: Path) -> str:
    file = draw.choice(listed(folder))
    name, kind = str(file.relative_to(folder)), draw.random()
    if kind < 0.05:
        file.unlink()
        draw.choice((file.mkdir, lambda: file.symlink_to(file), lambda: os.mkfifo(file)))()
        return f"{name} is no file"
    if kind < 0.1 and file.parent != folder:
        shutil.rmtree(file.parent)
        return f"{file.parent.relative_to(folder)} is gone"
    if kind < 0.6 and file.suffix == ".json":
        with contextlib.suppress(ValueError):
            how, data = changed_value(draw, json.loads(file.read_text()), (*VALUES, "finished", "failed", "r9-9999"))
            if isinstance(data, dict) and "digest" in data and draw.random() < 0.7:
                data.pop("digest")
                data["digest"] = digest(data)  # so that its values are looked at, and not its digest alone
            file.write_bytes(as_json(data))
            return f"{name}: {how}"
    how, content = changed_bytes(draw, file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{name}: {how}"


def command(arguments: Sequence[str]) -> None:
    """Call a command; its exit code 2, and 1 where damage left nothing to show, are a UserError."""
    try:
        main(list(arguments))
    except SystemExit as end:
        if end.code in (1, 2):
            raise UserError(f"exit code {end.code}") from end
        if end.code not in (0, None):
            raise


def tried(whole: Path, folder: Path, commands: Sequence[Sequence[str]], tally: Tally, numbers: Iterator[int]) -> None:
    for number in numbers:
        draw = Random(number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        how = change(draw, folder)
        name, *options = draw.choice(commands)
        before, size = files_below(folder), sum(path.stat().st_size for path in listed(whole))
        WorkerContext.of.cache_clear()
        tally.attempt(f"{number}: {name}: {how}", partial(command, [name, str(folder), *options]), size=size)
        if name in ("status", "front", "verify"):
            tally.check(f"{number}: {name}: {how}", good=files_below(folder) == before, reason="something was written")


def test_commands_that_read_a_changed_run(run: Path, tmp_path: Path) -> None:
    tally = Tally()
    tried(run, tmp_path / "changed", READING, tally, rounds(2))
    tally.settle()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a search, made in this process."""
    tables: dict[str, Any] = {
        "search": {"trials": 3, "rungs": [0, 1], "reduction_factor": 2, "recover_images": 32, "screen_images": 64},
        "finetune": {"batch_size": 128, "distill": [{"cache_teacher": True}], "fixed_view": True},
    }
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch, lambda: 0)
        yield run_search(tiny_config(**tables), tmp_path_factory.mktemp("searched") / "run").path


@pytest.mark.slow
def test_commands_that_work_on_a_changed_run(searched: Path) -> None:
    tally = Tally()
    tried(searched, searched.with_name("changed"), ALL, tally, rounds(20))
    tally.settle()
