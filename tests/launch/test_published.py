from __future__ import annotations

import json

import pytest

from prunesweep.launch.cli import main
from prunesweep.models import cost
from prunesweep.models.published.comparison import PUBLISHED, published_arch


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["published", *arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(output(capsys, "--json"))}
    assert list(rows) == list(PUBLISHED)
    found, spent = rows["spvit_deit_tiny"], cost(published_arch("spvit_deit_tiny"))
    assert (found["macs"], found["params"]) == (spent.macs, spent.params)
    assert found["arch_hash"] == published_arch("spvit_deit_tiny").hash
    assert (found["method"], found["top1"], found["top1_distilled"]) == ("spvit", 70.7, 73.2)
    params, macs = found["figures"]
    assert (params["what"], params["printed"], params["exact"], params["by_paper"]) == (
        "params_m",
        "4.9",
        4.774808,
        4.873422,
    )
    assert macs["difference"] == pytest.approx(spent.macs / 1e9 - 1.0)
    assert params["difference_by_paper"] == pytest.approx(4.873422 / 4.9 - 1)
    assert rows["nvit_base"]["macs"] is rows["nvit_base"]["figures"][0]["exact"] is None
    assert rows["nvit_base"]["speeds"][0] == {"value": 1.86, "unit": "x", "device": "V100", "batch": 256}


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # whatever the width, nothing is cut off
    out = output(capsys)
    lines = {words[0]: words for line in out.splitlines() if (words := line.split())}
    assert set(PUBLISHED) <= set(lines)
    assert lines["deit_base_patch16_224"][1:3] == ["86,567,656", "17,563,828,224"]
    assert "78.3 / 80.3 params M 16.4 * -3.23 % * -1.73 %" in " ".join(lines["spvit_deit_small"])
    assert lines["up_deit_small"][6:] == ["params", "M", "22.1", "-0.22", "%"]
    mark = lines["uvc_deit_small_r50_skips"][-1]
    assert " ".join(lines[mark]).startswith(f"{mark} Only which blocks UVC dropped (8 and 10, from 0)")
