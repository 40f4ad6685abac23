"""Examples are written where one works, and read there."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunesweep.search import load_config
from tests.launch.test_cli import call


@pytest.mark.parametrize("name", ["digits", "glyphs", "imagenet", "imagenet_deit_small", "pydocs", "wikitext103"])
def test_an_example_is_written_and_can_be_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "init", name)
    assert code == 0
    assert f"prunesweep {'import' if name == 'wikitext103' else 'search'} " in out
    assert "examples/" not in (tmp_path / f"{name}.toml").read_text()
    assert load_config(f"{name}.toml").search.trials
    code, out, err = call(capsys, "init", name)
    assert (code, out) == (2, "")
    assert f"{name}.toml is there already" in err


def test_examples_are_listed_and_a_wrong_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "digits: A search on scikit-learn's digits" in call(capsys, "init")[1]
    code, _, err = call(capsys, "init", "digit")
    assert code == 2
    assert "did you mean 'digits'" in err
    assert list(tmp_path.iterdir()) == []
