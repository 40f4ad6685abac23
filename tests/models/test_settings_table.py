"""Values of settings are what they look like, in every table that users write."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners.settings import NViTSettings
from prunesweep.search.config import ResourcesTable, SpaceTable
from prunesweep.training import Recipe


class Settings(SettingsTable, BaseModel):
    count: int = 1
    share: float | None = 0.5
    on: bool = False
    pair: tuple[float, int] = (0.5, 1)
    named: dict[str, int] = {}


@pytest.mark.parametrize("value", [True, 4.0, "4", None, math.nan])
def test_whole_numbers(value: Any) -> None:
    for fields in ({"count": value}, {"pair": [0.5, value]}, {"named": {"x": value}}):
        with pytest.raises(ValidationError, match="integer"):
            Settings(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, "0.5", math.nan, math.inf, -math.inf])
def test_numbers(value: Any) -> None:
    for fields in ({"share": value}, {"pair": [value, 1]}):
        with pytest.raises(ValidationError, match="number"):
            Settings(**fields)


@pytest.mark.parametrize("value", [1, "true", 0.0])
def test_switches(value: Any) -> None:
    with pytest.raises(ValidationError, match="boolean"):
        Settings(on=value)


def test_what_toml_gives_is_taken() -> None:
    found = Settings(count=3, share=1, on=True, pair=[1, 2], named={"x": 1})  # type: ignore[arg-type]
    assert (found.share, found.pair) == (1.0, (1.0, 2))
    assert Settings(share=None).share is None


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (Recipe, {"epochs": True}),
        (Recipe, {"lr": "1e-3"}),
        (Recipe, {"lr_by_share": [[0.5, math.inf]]}),
        (NViTSettings, {"interval": 10.0}),
        (SpaceTable, {"budget": [0.5, True]}),
        (SpaceTable, {"groups": {"mlp": "8"}}),
        (ResourcesTable, {"gpus_per_trial": math.nan}),
    ],
)
def test_tables_of_every_package(table: type[SettingsTable], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        table(**fields)
