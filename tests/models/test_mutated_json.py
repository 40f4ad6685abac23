"""Whatever single thing is changed in a stored record, plan or decision: it is read as valid, or refused by name.

Every node of the JSON is replaced by values of every type, removed, doubled, or given an unknown key. A reader raises
``UserError``, or returns something that is valid and is written and read again unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from prunesweep.models import Arch, Cut, UserError, cost, cut_arch
from prunesweep.models.layers.token_merging import TokenPlan
from tests.generate import random_arch, random_cut

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "x",
    "",
    [],
    [[]],
    [1, "x"],
    {},
    {"x": 1},
)
Path = tuple[str | int, ...]


def paths(node: Any, at: Path = ()) -> Iterator[Path]:
    """The place of every node of a JSON value; of a long list only the first, the last, and one in between."""
    yield at
    if isinstance(node, dict):
        for key, value in node.items():
            yield from paths(value, (*at, key))
    elif isinstance(node, list):
        for i in sorted({0, len(node) // 2, len(node) - 1} if node else ()):
            yield from paths(node[i], (*at, i))


def mutations(data: Any) -> Iterator[tuple[str, Any]]:
    """Every single change of ``data``, with a name."""
    for path in paths(data):
        for value in VALUES:
            yield f"{path} = {value!r}", _changed(data, path, lambda parent, key, v=value: _put(parent, key, v))
        if path:
            yield f"{path} removed", _changed(data, path, lambda parent, key: parent.pop(key))
            yield f"{path} doubled", _changed(data, path, _double)
            yield f"{path} with an unknown key", _changed(data, path, _add_key)


def _changed(data: Any, path: Path, change: Callable[[Any, Any], Any]) -> Any:
    holder = {"root": copy.deepcopy(data)}
    parent: Any = holder
    for key in ("root", *path)[:-1]:
        parent = parent[key]
    change(parent, ("root", *path)[-1])
    return holder["root"]


def _put(parent: Any, key: Any, value: Any) -> None:
    parent[key] = value


def _double(parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.insert(key, parent[key])


def _add_key(parent: Any, key: Any) -> None:
    if isinstance(parent[key], dict):
        parent[key]["unknown"] = 1


def check(data: Any, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> int:
    """Read every mutation of ``data``; how many were refused."""
    data, refused = json.loads(json.dumps(data)), 0
    assert write(read(data)) == data
    for name, changed in mutations(data):
        try:
            found = read(changed)
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        else:
            assert write(read(write(found))) == write(found), name
    return refused


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2", "lm"])
def test_architecture_records(family: str) -> None:
    def read(data: Any) -> Arch:
        arch = Arch.from_dict(data)
        arch.validate()
        assert cost(arch).macs > 0
        assert len(arch.hash) == 16
        return arch

    for seed in range(3):
        arch = random_arch(Random(seed), family)
        assert check(arch.to_dict(), read, lambda arch: json.loads(arch.to_json())) > 100


def test_a_changed_character_gives_a_record_or_a_clear_error() -> None:
    text, random, refused = random_arch(Random(0), "vit").to_json(), Random(0), 0
    for _ in range(300):
        at = random.randrange(len(text))
        cut_off, without, more = text[:at], text[:at] + text[at + 1 :], random.choice('{}[]",:0x')
        try:
            Arch.from_json(random.choice((cut_off, without, text[:at] + more + text[at:]))).validate()
        except UserError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2", "lm"])
def test_decisions(family: str) -> None:
    for seed in range(3):
        random = Random(seed)
        arch = random_arch(random, family)
        decision = random_cut(random, arch)

        def read(data: Any, arch: Arch = arch) -> Cut:
            found = Cut.from_dict(data)
            cut_arch(arch, found).validate()
            return found

        assert check(decision.to_dict(), read, lambda found: json.loads(json.dumps(found.to_dict()))) > 50


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_token_plans(form: str) -> None:
    plan = TokenPlan(4, (0, 1, 2, -1, 2, 3, 3), (1.0, 0.5, 0.25, 0.0, 0.25, 1.0, 0.5), form)

    def read(data: Any) -> TokenPlan:
        found = TokenPlan.from_dict(data)
        found.check(7, 1)
        assert all(tensor.isfinite().all() for tensor in found.tensors().values())
        return found

    assert check(dataclasses.asdict(plan), read, lambda found: json.loads(json.dumps(dataclasses.asdict(found)))) > 50
