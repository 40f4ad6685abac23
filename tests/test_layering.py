"""Imports run one way: models <- pruners <- training <- search <- launch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["models", "pruners", "training", "search", "launch"]
# the first layer that may import a package; everything else that is not named here is free
FIRST = {"ray": "training", "ray.train": "training", "ray.tune": "search", "optuna": "search", "typer": "launch"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, inside functions too."""
    package = ("prunesweep", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def offences(layer: str, names: Iterator[tuple[int, str]]) -> Iterator[str]:
    rank = LAYERS.index(layer)
    for line, name in names:
        top, _, rest = name.partition(".")
        if top in LAYERS:
            yield f"line {line}: imports {name}; the package is prunesweep.{top}"
        top = rest.split(".")[0] if top == "prunesweep" else ""
        if top in LAYERS and LAYERS.index(top) > rank:
            yield f"line {line}: {layer} imports {name}, a layer above it"
        for package, first in FIRST.items():
            if (name == package or name.startswith(f"{package}.")) and LAYERS.index(first) > rank:
                yield f"line {line}: {layer} imports {name}; only {first} and above may"


@pytest.mark.parametrize("path", sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py")), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert list(offences(path.relative_to(ROOT).parts[0], imports(path))) == []


def test_the_test_sees_offences() -> None:
    names = iter(
        [(3, "prunesweep.search.store.run"), (4, "optuna"), (5, "ray.tune.Tuner"), (6, "torch"), (7, "models.Arch")]
    )
    assert len(list(offences("training", names))) == 4


def test_models_and_pruners_do_not_load_ray_or_optuna() -> None:
    import subprocess

    names = ("ray", "optuna", "pydantic", "typer")
    code = f"import prunesweep.models, prunesweep.pruners, sys; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
