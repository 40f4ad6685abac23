"""Change values and files at random, the same way for the same seed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

__all__ = ["changed_bytes", "changed_value", "places"]

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    7,
    10**9,
    10**12,
    10**30,
    0.5,
    -0.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "0.5",
    "../..",
    "[/x]",
    "a\0b",
    "\ud7ff\u202e",
    "n" * 3000,
    [],
    [[]],
    [0],
    [1, "x"],
    [0.5, 0.5],
    [0.9, 0.1],
    list(range(2000)),
    {},
    {"x": 1},
)
TEXTS = (b"'", b'"', b"[", b"{", b"}", b",", b"=", b"\\u", b"1e999", b"\xff")
Path = tuple[str | int, ...]


def places(node: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the place of every value in nested tables and lists, the whole first."""
    yield at
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*at, key))
    elif isinstance(node, list):
        for i, value in enumerate(node[:50]):
            yield from places(value, (*at, i))


def changed_value(random: Random, data: Any, values: tuple[Any, ...] = VALUES) -> tuple[str, Any]:
    """Return nested tables and lists with one to three things changed, and a line that says what.

    Args:
        random: what to draw from.
        data: tables and lists, as JSON and TOML give them; it is left as it is.
        values: what may take the place of a value.
    """
    holder: dict[str, Any] = {"": copy.deepcopy(data)}
    said = [_change(random, holder, values) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    return "; ".join(said), holder[""]


def _change(random: Random, holder: dict[str, Any], values: tuple[Any, ...]) -> str:
    every = [("", *path) for path in places(holder[""])]
    path = random.choice(every)
    if len(path) == 1 and random.random() < 0.8:
        path = random.choice(every)
    parent = _at(holder, path[:-1])
    key, name = path[-1], ".".join(map(str, path[1:])) or "all"
    own = parent[key]
    kinds = ("put", "put", "remove", "remove", "unknown", "other", "twice", "number", "number", "number", "nest")
    kind = random.choice(kinds)
    if kind == "number" and isinstance(own, (int, float)):
        parent[key] = random.choice(
            (own * 10 ** random.choice((1, 3, 9)), -own, float(own), str(own), own + 1, own - 1, bool(own), [own])
        )
    elif kind == "remove" and len(path) > 1:
        parent.pop(key)
        return f"{name} removed"
    elif kind == "unknown" and isinstance(own, dict):
        own[random.choice(("unknown", "", "x.y", "__class__"))] = 1
        return f"{name} with an unknown key"
    elif kind == "other":
        parent[key] = copy.deepcopy(_at(holder, random.choice(every)))
    elif kind == "twice" and isinstance(own, list):
        own += copy.deepcopy(own)
    elif kind == "nest":
        for _ in range(random.choice((1, 5, 200))):
            own = [own] if random.random() < 0.5 else {"x": own}
        parent[key] = own
    else:
        parent[key] = copy.deepcopy(random.choice(values))
    return f"{name} = {repr(parent[key])[:120]}"


def _at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key]
    return node


def changed_bytes(random: Random, data: bytes) -> tuple[str, bytes | None]:
    """Return a file's content changed as disks, tools and people change it, and a line that says how; None: gone."""
    at, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    kind = random.choice(
        ("bit", "bit", "cut", "zeros", "hole", "twice", "noise", "empty", "gone", "encoding", "blank", "text", "lines")
    )
    if kind == "bit" and data:
        at = random.randrange(len(data))
        return f"bit of byte {at}", data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == "encoding":
        name = random.choice(("utf-16", "utf-32", "utf-8-sig", "cp037"))
        return f"saved as {name}", data.decode("utf-8", "ignore").encode(name, "ignore")
    if kind == "lines":
        lines = data.split(b"\n")
        random.shuffle(lines)
        return "lines shuffled", b"\n".join(lines)
    changes: dict[str, bytes | None] = {
        "cut": data[:at],
        "zeros": data[:at] + bytes(len(data) - at),
        "hole": data[:at] + data[end:],
        "twice": data[:end] + data[at:],
        "noise": data[:at] + random.randbytes(random.choice((1, 8, 200))) + data[at:],
        "empty": b"",
        "gone": None,
        "blank": random.choice((b"\n", b"\0" * 64, b"null", b"[]", b"{}", b"[" * 50_000, b'{"x":' * 50_000)),
        "text": data[:at] + random.choice(TEXTS) + data[at:],
    }
    return f"{kind} at {at}..{end}", changes.get(kind, b"")


def as_json(value: Any) -> bytes:
    """Return JSON as Python writes it, NaN and infinities included."""
    return json.dumps(value).encode()
