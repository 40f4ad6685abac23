"""Names, paths and contradictions are refused before a model is loaded or anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import prunesweep.models
from prunesweep.launch import bench as bench_command
from prunesweep.models import arch_of, load, save
from prunesweep.training.jobs import one_shot
from tests.generate import random_model
from tests.launch.digits_model import digits_model
from tests.launch.test_cli import call
from tests.models.test_in_other_code import KINDS

PRUNE = ("prune", "{m}", "--method", "magnitude", "--budget", "0.5")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(random_model(KINDS["attention"], 0, torch.float32), tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{m}", "--data", "digitz"], "data.name = 'digitz': must be"),
        (["eval", "{m}", "--data", "imagefolder:{t}/no"], "no does not exist"),
        (["eval", "{m}", "--data", "digits", "--teacher", "vit_smal"], "nor a timm model. did you mean"),
        (["eval", "{m}", "--data", "digits", "--quality", "f1"], "--quality = 'f1': must be knn, probe or python:"),
        (["eval", "vit_smal", "--data", "digits"], "'vit_smal' is neither the folder of a saved model nor a timm"),
        (["score", "{m}", "--method", "nvitt", "--data", "digits"], "nvitt"),
        (["score", "{m}", "--method", "nvit", "--data", "digitz"], "data.name = 'digitz'"),
        (["instant", "{m}", "--data", "digitz", "--out", "{t}/out"], "data.name = 'digitz'"),
        (["instant", "{m}", "--data", "digits", "--out", "{t}/out", "--protect", "mpl"], "'mpl' is none of"),
        ([*PRUNE, "--data", "digits", "--out", "{t}/out", "--scores", "{t}/no"], "there is no such file; prunesweep"),
        (["export", "{m}", "--to", "onnx", "--precision", "int4"], "precision = 'int4'"),
        (["export", "{m}", "--to", "onnx", "--data", "digitz"], "data.name = 'digitz'"),
        (["export", "vit_smal", "--to", "timm"], "neither the folder of a saved model nor a timm model"),
        (["show", "vit_smal"], "neither the folder of a saved model nor a timm model"),
        (["show", "vit_tiny_patch16_224", "--tokens", "x.png"], "a token plan is a saved model's"),
        (["bench", "{m}", "{t}/no"], "no"),
        (["bench", "{m}", "--table", "{t}/no.json"], "no.json"),
        (["latency", "{m}", "--out", "{t}/t.json", "--least", "qk=x"], "--least qk=x"),
        (["latency", "{m}", "--out", "{t}/t.json", "--from-nvit", "{t}/no.json"], "no.json: No such file"),
        (["import", "{t}/no.pth", "--as", "nvitt", "--out", "{t}/out"], "layout = 'nvitt'"),
        (["import", "{t}/no.pth", "--as", "nvit", "--out", "{t}/out"], "no.pth is not a file"),
        (["promote", "{t}/run", "--recipe", "quik"], "unknown recipe 'quik'"),
        (["resume", "{t}/run", "--set", "resources.cpus"], "is not a run"),
    ],
)
def test_nothing_is_loaded_or_written(
    arguments: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    for place in (prunesweep.models, one_shot):
        monkeypatch.setattr(place, "load", refuse)
    monkeypatch.setattr(one_shot.timm, "create_model", refuse)
    monkeypatch.setattr(bench_command, "open_model", refuse)
    code, out, err = call(capsys, *(a.replace("{m}", str(model)).replace("{t}", str(tmp_path)) for a in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_show_describes_a_timm_model_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "show", "vit_small_patch16_224")
    assert code == 0
    assert "22,050,664 params" in out


def test_scores_are_used_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = digits_model(tmp_path / "source")
    given = [str(source), "--method", "magnitude", "--data", "digits", "--images", "16", "--cache", str(tmp_path / "c")]
    code, out, _ = call(capsys, "score", *given)
    assert code == 0
    (file,) = (tmp_path / "c").glob("*.safetensors")
    assert f"prunesweep prune {source} --method magnitude --budget 0.5 --data digits --out DIR --scores {file}" in out
    _, out, _ = call(capsys, "score", *given)
    assert f"scores from the cache: {file}" in out

    def prune(out: str, scores: Path, model: Path = source) -> tuple[int, str]:
        options = [
            "--data",
            "digits",
            "--budget",
            "0.8",
            "--group",
            "mlp=4",
            "--group",
            "embed=2",
            "--no-recover",
            "--cache",
            str(tmp_path / "other"),
        ]
        code, _, err = call(
            capsys, "prune", str(model), "--method", "magnitude", *options, "--scores", str(scores), "--out", out
        )
        return code, err

    assert prune(str(tmp_path / "small"), file)[0] == 0
    assert not (tmp_path / "other").exists()
    again = [
        "--budget",
        "0.8",
        "--group",
        "mlp=4",
        "--group",
        "embed=2",
        "--no-recover",
        "--out",
        str(tmp_path / "found"),
    ]
    assert call(capsys, "prune", *given, *again)[0] == 0
    assert arch_of(load(tmp_path / "small")) == arch_of(load(tmp_path / "found"))
    other = save(random_model(arch_of(load(source)), 1, torch.float32), tmp_path / "other_model")
    code, err = prune(str(tmp_path / "no"), file, other)
    assert code == 2
    assert "is of a model with other weights" in err
    assert not (tmp_path / "no").exists()


def test_bench_shows_what_a_table_predicts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, found = tmp_path / "table.json", tmp_path / "found.json"
    fast = ("--seconds", "0", "--threads", "1")
    measuring = ("--batch", "2", "--points", "2", "--check", "0")
    assert call(capsys, "latency", model, "--out", table, *measuring, *fast)[0] == 0
    code, out, _ = call(capsys, "bench", model, "--batch", "1,2", "--table", table, "--json", found, *fast)
    assert code == 0
    assert "by table" in out
    first, second = json.loads(found.read_text())["models"][0]["timings"]
    assert "predicted_ms" not in first
    assert second["predicted_ms"] > 0
    code, _, err = call(capsys, "bench", model, "--batch", "1", "--table", table, *fast)
    assert code == 2
    assert "was measured with batch 2: give --batch accordingly" in err
