"""The command line answers at once: what takes seconds to load is loaded by the commands that compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunesweep.models.io.provenance import versions
from prunesweep.search.store.run import Result
from tests.search.helpers import make_run, make_space, put_model

HEAVY = ("torch", "timm", "torchvision", "ray", "optuna", "sklearn", "scipy", "plotly", "PIL")
MODULES = 800  # torch alone has more than a thousand
TELL = """
import contextlib, io, json, sys
from prunesweep.launch.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            codes.append(end.code or 0)
print(json.dumps([codes, len(sys.modules), [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one finished trial, whose model is in the front."""
    found = make_run(tmp_path / "run", trials=2)
    candidate = make_space().decode(point := {"budget": 0.5, "skip": 0, "lr": 1e-3})
    put_model(found.trial("r0-0000") / "model")
    found.write_result(
        "r0-0000",
        result=Result(0, 80.0, 50.0, candidate.cost.macs, candidate.cost.params, candidate.arch.hash, point, 1.0),
    )
    found.write_front()
    return found.path


def test_help_status_and_typing_errors_load_nothing_that_is_slow(run: Path) -> None:
    commands = [
        ["--help"],
        ["--version"],
        ["serach"],
        ["search", "--trails"],
        ["search", "--help"],
        ["status", str(run)],
        ["status", str(run / "absent")],
    ]
    done = python("-c", TELL, json.dumps(commands), json.dumps(HEAVY))
    assert done.returncode == 0, done.stderr
    codes, count, heavy = json.loads(done.stdout)
    assert codes == [0, 0, 2, 2, 0, 0, 2]
    assert heavy == []
    assert count < MODULES


def test_the_version_names_what_results_depend_on() -> None:
    done = python("-m", "prunesweep", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"prunesweep {versions()['prunesweep']} (python ")
    assert f"torch {versions()['torch']}" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m prunesweep search --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=100)
    assert done.stderr == ""


def test_a_shell_completes_commands() -> None:
    code = "import sys; sys.argv = ['prunesweep']; from prunesweep.launch.cli import main; main()"
    words = {"_PRUNESWEEP_COMPLETE": "complete_bash", "COMP_WORDS": "prunesweep fro", "COMP_CWORD": "1"}
    assert python("-c", code, **words).stdout.split() == ["front"]


def test_an_interruption_while_torch_is_loaded_ends_the_command(tmp_path: Path) -> None:
    """Torch's own imports turn a KeyboardInterrupt into an ImportError."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    input()\n"
        "except KeyboardInterrupt:\n    raise ImportError('torn') from None\n"
    )
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from prunesweep.launch.cli import main; main(['show', 'absent'])"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = python("-c", code, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (130, "")
