"""Commands that have nothing to show because of damage end with exit code 1 and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prunesweep.launch import jobs
from prunesweep.launch.cluster.client import Attempt
from prunesweep.launch.nothing_left import NothingLeft, check_answers
from prunesweep.models import save
from prunesweep.search import Run
from prunesweep.training import EvalMetrics
from tests.generate import random_model
from tests.launch import test_cli
from tests.launch.test_cli import call
from tests.search.helpers import ARCH

run = test_cli.run  # the fixture
READING = (["status"], ["status", "--json"], ["front"], ["front", "--json"], ["front", "--csv"], ["report"])
DAMAGE: dict[str, Callable[[Path], object]] = {
    "damaged results": lambda trial: (trial / "result.json").write_text("null"),
    "models that are gone or damaged": lambda trial: (trial / "model" / "model.safetensors").write_bytes(b""),
    "lost results": lambda trial: (trial / "result.json").unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_of_which_nothing_is_left(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "trials" / "r0-0002")  # no member
    assert len(Run(run).write_front()) == 2
    for number in range(2):
        for command, *options in READING:
            assert call(capsys, command, run, *options)[0] == 0, command
        DAMAGE[what](run / "trials" / f"r0-{number:04d}")
    said = f"nothing of its front is left ({what}: r0-0000, r0-0001): 'prunesweep resume {run}' does them again"
    for command, *options in READING:
        code, _, error = call(capsys, command, run, *options)
        assert (code, said in error) == (1, True), command
    code, _, error = call(capsys, "promote", run, "--recipe", "quick")
    assert (code, said in error) == (2, True)


def test_a_run_that_has_no_front_yet_is_not_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        shutil.rmtree(run / "trials" / f"r0-{number:04d}")
    for command, *options in READING:
        code, out, error = call(capsys, command, run, *options)
        if [command, *options] == ["front"]:  # people are told; scripts get a front without models
            assert (code, out) == (1, "")
            assert f"{run}: its front has no model yet: 0 of 6 trials have finished, 0 are running" in error
        else:
            assert code == 0, command


def test_status_of_a_cluster_says_what_it_says_here(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is this command, run in this process in place of a cluster's."""

    def job(_cluster: object, _last: object, _what: str, arguments: list[str]) -> tuple[int, str]:
        code, out, error = call(capsys, *arguments[1:])
        return code, f"a line of the job's\n{error}{out}"

    class Head:
        def latest(self, name: str) -> Attempt:
            return Attempt(name, 1, f"{name}-1", "SUCCEEDED", str(run), "", None, None, "", pip=False)

    monkeypatch.setattr(jobs, "_cluster", lambda _: Head())
    monkeypatch.setattr(jobs, "_call", job)
    address = ("--address", "http://head:8265")
    assert call(capsys, "status", "r", *address)[0] == 0
    for number in range(3):
        DAMAGE["damaged results"](run / "trials" / f"r0-{number:04d}")
    code, out, error = call(capsys, "status", "r", *address, "--json")
    assert (code, json.loads(out)["trials"]["finished"]) == (1, 0)
    assert error.startswith(f"error: {run}: nothing of its front is left")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_weights_that_are_no_numbers_have_no_accuracy(
    value: float, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = random_model(ARCH, 0).float()
    with torch.no_grad():
        for name in ("blocks.1.mlp.fc1.bias", "blocks.2.mlp.fc1.bias"):
            broken.get_parameter(name)[0] = value
    code, out, error = call(capsys, "eval", save(broken, tmp_path / "broken"), "--data", "digits", *options)
    assert (code, out) == (1, "")
    assert (
        f"{tmp_path}/broken: blocks.1.mlp.fc1.bias has 1 values that are NaN or infinite, and 1 more tensors" in error
    )


def test_answers_that_are_no_numbers_have_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(ARCH, 0).float()
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(3e38)  # infinity minus infinity
    code, out, error = call(capsys, "eval", save(model, tmp_path / "model"), "--data", "digits")
    assert (code, out) == (1, "")
    assert f"{tmp_path}/model: an answer is NaN" in error
    check_answers(EvalMetrics(50.0, ppl=float("inf")), "a perplexity too large for a float")
    with pytest.raises(NothingLeft):
        check_answers(EvalMetrics(50.0, kl=float("nan")), "x")


def test_a_computed_front_whose_models_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "front"
    figures = {"budget": 1.0, "macs": 10, "params": 10, "macs_share": 1.0, "images": 4, "top1": 50.0}
    rows = [{**figures, "model": name} for name in (None, "0.6", "0.4")]
    for name in ("0.6", "0.4"):
        (folder / name).mkdir(parents=True)
    (folder / "front.json").write_text(json.dumps({"points": rows}))
    shutil.rmtree(folder / "0.4")
    code, out, error = call(capsys, "front", folder, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert f"warning: {folder}/0.4 is gone: 'prunesweep instant' makes it again" in error
    shutil.rmtree(folder / "0.6")
    for command, *options in (["front"], ["front", "--json"], ["show"]):
        code, out, error = call(capsys, command, folder, *options)
        assert (code, out) == (1, "")
        assert f"{folder}: none of its 2 models is left: run 'prunesweep instant' again" in error
