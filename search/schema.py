"""What a schema of settings says of its keys: the type, the range, the default and the meaning, for people to read."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prunesweep.search.config import SearchConfig

__all__ = ["Key", "configuration_keys", "configuration_page", "describe", "key_lines", "keys_of", "written"]

BOUNDS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)
RECIPES = ("source.train", "gates.recipe", "start.NAME.recipe")  # their keys are those of ``finetune``
PAGE = """\
# The configuration of a search

Every key of the TOML file that `prunesweep search` takes, made from the schema by

    prunesweep config --explain --markdown > docs/configuration.md

`prunesweep config --explain search.rungs` shows one key, or the keys of a table. `prunesweep search --set KEY=VALUE`
sets one. A value that is "needed" has no default; "unset" is the default of a key that may be left out."""
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "unset"}


class Key(NamedTuple):
    """One key: its dotted name, what it may be, what it is where it is left out, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def describe(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """Say in words what values a field takes.

    Args:
        annotation: its type.
        metadata: the bounds that pydantic keeps beside the type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [rule for one in arguments[1:] for rule in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return describe(arguments[0], (*inner, *metadata))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(describe(one, metadata) for one in arguments if one is not type(None)))
    bounds = " and ".join(
        f"{sign} {getattr(rule, field)}" for rule in metadata for kind, field, sign in BOUNDS if isinstance(rule, kind)
    )
    if origin is Literal:
        kind = " | ".join(map(json.dumps, arguments))
    elif origin in (tuple, list):
        several = origin is list or arguments[-1] is Ellipsis
        one = describe(arguments[0])
        kind = f"list of: {one}" if several else f"[{', '.join(map(describe, arguments))}]"
    elif origin is dict:
        kind = f"table of: {describe(arguments[1])}" if arguments[1] is not Any else "table"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = "table"
    else:
        kind = WORDS.get(annotation, "any value")
    return f"{kind} {bounds}" if bounds else kind


def written(value: Any) -> str:
    """Write a value as it would stand in a TOML file; "unset" for None."""
    if isinstance(value, BaseModel):
        return written({name: own for name, own in value if name in value.model_fields_set})
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{name} = {written(own)}" for name, own in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(written, value))}]"
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "its keys' own"
    if isinstance(field.default, BaseModel) and not field.default.model_fields_set:
        return "its keys' own"
    return "needed" if field.default is PydanticUndefined else written(field.default)


def _tables(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables that a field's value may be, with what stands for a name that a user chooses."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _tables(arguments[0])
    elif origin is dict:
        yield from ((f".NAME{within}", model) for within, model in _tables(arguments[1]))
    elif origin in (tuple, list):
        yield from ((f"[]{within}", model) for within, model in _tables(arguments[0]))
    elif arguments and origin is not Literal:
        for one in arguments:
            yield from _tables(one)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """List all keys of a model's schema, those of tables within it too, in its order.

    Args:
        model: the settings, whose fields have descriptions.
        prefix: what stands before every key's name.
    """
    for name, field in model.model_fields.items():
        kind = describe(field.annotation, field.metadata)
        yield Key(f"{prefix}{name}", kind, _default(field), field.description or "")
        for within, table in _tables(field.annotation):
            yield from keys_of(table, f"{prefix}{name}{within}.")


def configuration_keys() -> list[Key]:
    """List all keys of a search's configuration; those of a recipe below ``finetune`` alone."""
    return [key for key in keys_of(SearchConfig) if not key.name.startswith(tuple(f"{name}." for name in RECIPES))]


def key_lines(key: Key) -> list[str]:
    """Write a key as lines of text: what it may be, its default, and its meaning."""
    default = "must be given" if key.default == "needed" else f"default: {key.default}"
    return [f"{key.name}: {key.kind}; {default}", *([f"    {key.meaning}"] if key.meaning else [])]


def configuration_page() -> str:
    """Write ``docs/configuration.md``."""
    keys, lines, table = configuration_keys(), [PAGE], None
    for key in keys:
        if any(other.name.startswith(f"{key.name}.") for other in keys):
            lines += ["", f"## `[{key.name}]`", "", key.meaning]
            continue
        within = key.name.rpartition(".")[0]
        if within != table:
            lines += ["", "| key | value | default | meaning |", "|---|---|---|---|"]
            table = within
        cells = (f"`{key.name}`", key.kind, key.default if key.default == "needed" else f"`{key.default}`", key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
