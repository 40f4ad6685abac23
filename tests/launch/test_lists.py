"""``prunesweep recipes``, ``methods`` and ``config --explain``: every setting that there is, with its meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunesweep.launch.cli import main
from prunesweep.pruners import METHODS
from prunesweep.search.config import SearchConfig
from prunesweep.search.schema import configuration_keys, configuration_page, keys_of
from prunesweep.training import Recipe, load_recipe, recipe_names

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_every_setting_has_a_meaning() -> None:
    keys = [*keys_of(SearchConfig), *(key for method in METHODS.values() for key in keys_of(method.settings()))]
    stages = [method.second_stage for method in METHODS.values() if method.second_stage is not None]
    keys += [key for stage in stages for key in keys_of(stage.settings())]
    assert [key.name for key in keys if not key.meaning] == []
    assert len(keys) > 200


def test_the_page_in_docs_is_current() -> None:
    assert PAGE.read_text() == configuration_page(), "prunesweep config --markdown > docs/configuration.md"


def test_a_key_has_its_type_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "config", "--explain", "search.reduction_factor")
    assert code == 0
    assert out.splitlines()[0] == "search.reduction_factor: number > 1; default: 3.0"
    found = {key.name: key for key in configuration_keys()}
    assert found["data.unreadable"].kind == "number >= 0 and < 1"
    assert found["data.class_order"].kind == '"natural" | "codepoint"'
    assert found["space.skip"].kind == "[whole number, whole number]"
    assert found["source.model"].default == "needed"
    assert found["finetune.distill[].kind"].default == '"soft"'
    assert found["start.NAME.budgets"].kind == "list of: number > 0 and < 1"
    assert call(capsys, "config", "search")[1].startswith("search: table")


def test_a_key_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "config", "--explain", "rungs")
    assert (code, error) == (2, "error: rungs: is no key of the configuration. did you mean 'search.rungs'?\n")
    assert call(capsys, "config")[0] == 2


def test_recipes_and_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "recipes")
    assert [line.partition(":")[0] for line in out.splitlines()[: len(recipe_names())]] == recipe_names()
    assert f"epochs = {load_recipe('uvc_stage1').epochs}, " in out
    _, out, _ = call(capsys, "recipes", "quick")
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.partition(" = ")[0] for line in lines] == list(Recipe.model_fields)
    assert lines[0] == "epochs = 3: whole number >= 0 and <= 100000; default: 1"
    assert call(capsys, "recipes", "quik")[0] == 2


def test_methods_and_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "methods")
    assert [name for name in METHODS if f"{name}: {METHODS[name].when}; " not in out] == []
    assert "ramp_steps = 500" in out
    _, out, _ = call(capsys, "methods", "pmvit")
    for name in METHODS["pmvit"].option_names:
        assert f"\n{name}: " in out
    assert "second_stage.train_weights: true or false; default: true" in out
    assert "keep_rate:" not in out
    assert call(capsys, "methods", "uvvc")[0] == 2
