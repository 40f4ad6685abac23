from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from prunesweep.models import build, cost, save
from prunesweep.models.latency.table import LatencyTable
from tests.launch.test_cli import call
from tests.models.latency.test_table import BLOCK, vit

FAST = ("--seconds", "0", "--threads", "1")
SOURCE = vit(BLOCK, BLOCK)
SMALL = vit(dataclasses.replace(BLOCK, mlp=4))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return save(build(SOURCE), tmp_path / "source"), save(build(SMALL), tmp_path / "small")


def test_bench(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, small = folders
    file = tmp_path / "bench.json"
    options = ("--source", source, "--batch", "1,3", "--dtype", "bfloat16", "--json", file)
    code, out, _ = call(capsys, "bench", small, *options, *FAST)
    assert code == 0
    assert all(word in out for word in ("ms (IQR)", "images/s", "bfloat16", "CPU threads: 1", "1.00x"))
    found = json.loads(file.read_text())
    assert found["source"] == str(source)
    assert (found["device"], found["dtype"], found["compiled"], found["threads"]) == ("cpu", "bfloat16", False, 1)
    assert [m["model"] for m in found["models"]] == [str(source), str(small)]
    assert [(m["macs"], m["params"]) for m in found["models"]] == [
        (cost(arch).macs, cost(arch).params) for arch in (SOURCE, SMALL)
    ]
    first, second = (model["timings"] for model in found["models"])
    assert [t["batch"] for t in first] == [1, 3]
    assert all(t["speed_up"] == t["speed_up_per_macs_ratio"] == 1 for t in first)
    for mine, other in zip(second, first, strict=True):
        assert mine["latency_ms"] > 0
        assert mine["calls"] >= 10
        assert mine["throughput"] == pytest.approx(1e3 * mine["batch"] / mine["latency_ms"])
        assert mine["speed_up"] == pytest.approx(other["latency_ms"] / mine["latency_ms"])
        ratio = cost(SOURCE).macs / cost(SMALL).macs
        assert mine["speed_up_per_macs_ratio"] == pytest.approx(mine["speed_up"] / ratio)


def test_bench_shows_what_zeros_in_unequal_heads_are_worth(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = save(build(vit(dataclasses.replace(BLOCK, v=2), BLOCK)), tmp_path / "narrow")
    file = tmp_path / "bench.json"
    code, out, _ = call(capsys, "bench", folders[0], narrow, "--batch", "1,2", "--json", file, *FAST)
    assert code == 0
    assert "model 1 has heads of unequal widths; ms if no zeros fill them up in memory: " in out
    assert "source has heads" not in out
    source, other = (model["timings"] for model in json.loads(file.read_text())["models"])
    assert all(timing["unfilled_ms"] > 0 for timing in other)
    assert not any("unfilled_ms" in timing for timing in source)


def test_a_source_that_is_among_the_models_is_measured_once_and_shown_first(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, small = folders
    file = tmp_path / "bench.json"
    code, _, _ = call(capsys, "bench", small, source, "--source", source, "--batch", "1", "--json", file, *FAST)
    assert code == 0
    assert [m["model"] for m in json.loads(file.read_text())["models"]] == [str(source), str(small)]


def test_latency(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    options = ("--out", file, "--points", "2", "--batch", "2", "--check", "2", "--least", "qk=1")
    code, out, _ = call(capsys, "latency", folders[0], *options, *FAST)
    assert code == 0
    table = LatencyTable.load(file)
    assert table.source == SOURCE
    assert (table.setting.batch, table.setting.threads) == (2, 1)
    assert table.stages[0]["attn"].axes["qk"] == (1, 4)
    assert table.check is not None
    assert len(table.check["measured"]) == 2
    assert f"{table.check['median_error']:.1%} (median)" in out
    assert f"{table.predict(SOURCE):.2f} ms per batch of 2" in out


def test_latency_in_nvits_form(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, theirs, again = (tmp_path / name for name in ("table.json", "nvit.json", "again.json"))
    options = ("--points", "2", "--batch", "2", "--check", "0", *FAST)
    code, _, err = call(capsys, "latency", folders[0], "--out", file, "--to-nvit", theirs, *options)
    assert code == 0, err
    code, out, err = call(capsys, "latency", folders[0], "--out", again, "--from-nvit", theirs, "--batch", "2")
    assert code == 0, err
    assert f"table saved as {again}" in out.replace("\n", "")
    written, read = (LatencyTable.load(name).stages[0]["attn"] for name in (file, again))
    heads, qk, v = (written.axes[name].index(written.axes[name][-1]) for name in ("heads", "qk", "v"))
    assert read.axes["embed"][-1] == written.axes["embed"][-1]
    assert read.values[-1, -1, -1, -1, -1] == pytest.approx(written.values[-1, heads, qk, v, -1])
    code, _, err = call(capsys, "latency", folders[0], "--out", again, "--from-nvit", tmp_path / "none.json")
    assert code == 2
    assert "none.json: No such file" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["bench", "no/where"], "no/where is not a saved model"),
        (["bench", "resnet18"], "resnet18 is a ResNet"),
        (["bench", "{source}", "--batch", "1,x"], "--batch 1,x: must be whole numbers"),
        (["bench", "{source}", "--batch", "0"], "--batch 0: must be whole numbers of at least 1"),
        (["bench", "{source}", "--device", "cuda:99"], "this machine has"),
        (["bench", "{source}", "--dtype", "float31"], "did you mean 'float32'?"),
        (["bench", "{source}", "--json", "no/where.json"], "--json no/where.json: its folder does not exist"),
        (["latency", "{source}", "--out", "no/where.json"], "--out no/where.json: its folder does not exist"),
        (["latency", "{source}", "--out", "t.json", "--least", "qk"], "--least qk: must be AXIS=WIDTH"),
        (["latency", "{source}", "--out", "t.json", "--least", "kq=3"], "did you mean 'qk'?"),
        (["latency", "{source}", "--out", "t.json", "--check", "1"], "--check 1: a rank correlation needs"),
        (["latency", "{source}", "--out", "t.json", "--tokens", "1"], "token_points = 1"),
    ],
)
def test_user_errors(
    arguments: list[str],
    message: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *(a.replace("{source}", str(folders[0])) for a in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "source"]
