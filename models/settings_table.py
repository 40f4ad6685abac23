"""A table of settings that a user writes: unknown keys are refused, and values are what they look like."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler

__all__ = ["SettingsTable"]


def _take_as_written(schema: Any) -> None:
    """Make all numbers in a schema of pydantic's strict, and finite."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float", "bool"):
            schema["strict"] = True
        if schema.get("type") == "float":
            schema.setdefault("allow_inf_nan", False)
        for name, part in schema.items():
            if name not in ("default", "metadata"):
                _take_as_written(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _take_as_written(part)


class SettingsTable(BaseModel):
    """Base of the tables of a configuration, of recipes and of methods' settings.

    Numbers are taken as they are written: ``true``, ``"4"`` and ``4.0`` are no whole numbers, ``"0.5"`` and ``true``
    are no numbers, ``1`` is not ``true``, and no number is NaN or infinite, unless its field says ``allow_inf_nan``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> Any:
        """Return pydantic's schema with all numbers strict; its own strict mode refuses lists for tuples, too."""
        schema = handler(source)
        _take_as_written(schema)
        return schema
