"""``prunesweep`` is imported alike from any folder, and what is installed is nothing but ``prunesweep``."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

import prunesweep
from prunesweep.models import save
from prunesweep.search.config import SearchConfig
from tests.generate import random_arch, random_model
from tests.test_layering import LAYERS

ROOT = Path(__file__).parents[1]
HOSTILE = "raise RuntimeError(f'{__file__} was imported')\n"


def packages() -> Iterator[ModuleType]:
    """Import every package below ``prunesweep``, itself included."""
    yield prunesweep
    for found in pkgutil.walk_packages(prunesweep.__path__, "prunesweep."):
        if found.ispkg:
            yield importlib.import_module(found.name)


def test_no_name_of_a_package_hides_its_module() -> None:
    hidden = [
        f"{package.__name__}.{module.name}"
        for package in packages()
        for module in pkgutil.iter_modules(package.__path__)
        if not isinstance(getattr(package, module.name, package), ModuleType)
    ]
    assert hidden == []


@pytest.mark.parametrize("name", [package.__name__ for package in packages()])
def test_public_names_can_be_imported(name: str) -> None:
    package = importlib.import_module(name)
    public = getattr(package, "__all__", [])
    assert len(public) == len(set(public))
    exec(f"from {name} import {', '.join(public) or '*'}", {})


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose own modules have the names of our subpackages, as many vision repositories do."""
    folder = tmp_path / "elsewhere"
    for name in ("models.py", "search/__init__.py", "training.py", "launch/__init__.py", "pruners.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HOSTILE)
    return folder


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def readme_snippet(model: Path) -> str:
    """The README's lines that load a saved model, with the path of ``model``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    snippet = next(block for block in blocks if "timm.create_model" in block)
    code, count = re.subn(r"local-dir:[^\"]+", f"local-dir:{model}", snippet)
    assert count == 1
    return code


LOOKED_FOR = (
    "import importlib.util, prunesweep\nimportlib.util.find_spec('timm')\n"  # as packages ask what is installed
)


@pytest.mark.parametrize("first", ["", "import timm\n", "import timm.models\n", LOOKED_FOR])
def test_the_readme_loads_a_model_where_folders_have_our_names(hostile: Path, tmp_path: Path, first: str) -> None:
    model = random_model(random_arch(Random(0), "vit"), 0)
    saved = save(model, tmp_path / "model")
    code = f"{first}{readme_snippet(saved)}\nprint(type(small).__name__, sum(p.numel() for p in small.parameters()))"
    done = python("-c", code, folder=hostile)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [type(model).__name__, str(sum(p.numel() for p in model.parameters()))]


def test_the_hostile_folder_is_hostile(hostile: Path) -> None:
    for name in ("models", "search", "training", "launch", "pruners"):
        assert "was imported" in python("-c", f"import {name}", folder=hostile).stderr


def test_the_command_line_starts_where_folders_have_our_names(hostile: Path) -> None:
    done = python("-m", "prunesweep", "--help", folder=hostile)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_import_nothing_from_the_users_folder(
    hostile: Path, tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    """Not even where it has names of the standard library and of what torch imports: trials, and their own workers."""
    for name in ("types", "queue", "random", "datasets", "timm", "optuna"):
        (hostile / f"{name}.py").write_text(HOSTILE)
    config = tiny(search={"trials": 1}, resources={"cpus": 2, "workers_per_trial": 2})
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    # an empty entry would put the current folder on the path
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # -P: as with the command that is installed, the current folder is not on the driver's path
    command = ("-P", "-m", "prunesweep", "search", str(tmp_path / "tiny.toml"), "--out", "run")
    done = python(*command, folder=hostile, **paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1] trial 0" in done.stdout


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(hostile: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("prunesweep", "models", "pruners", "training", "search", "launch", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    built = python("-m", "pip", "wheel", str(source), "-w", str(tmp_path / "wheels"), *options, folder=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"prunesweep"}
    shipped = {str(path.relative_to(ROOT / "prunesweep")) for path in _data_files()}
    assert {
        "search/report/report.html",
        "search/report/views/main.js",
        "training/recipes/quick.toml",
        "examples/digits.toml",
        "py.typed",
    } <= shipped
    assert shipped <= {name.removeprefix("prunesweep/") for name in names}
    modules = {str(p.relative_to(ROOT)) for layer in LAYERS for p in (ROOT / layer).rglob("*.py")}
    assert modules <= {name.removeprefix("prunesweep/") for name in names}
    done = python("-m", "pip", "install", str(wheel), "--target", str(target), *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import prunesweep.models, prunesweep.search, prunesweep.launch.cli, sys;"
        "from prunesweep import Arch, run_search;"
        "print(*sorted({m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'prunesweep'}), sep='\\n')"
    )
    began = python("-P", "-m", "prunesweep", "init", "digits", folder=tmp_path, PYTHONPATH=str(target))
    assert "prunesweep search digits.toml" in began.stdout, began.stderr
    done = python("-c", code, folder=hostile, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(target) for line in done.stdout.splitlines())
    assert str(target / "prunesweep" / "models" / "arch.py") in done.stdout


def _data_files() -> Iterator[Path]:
    yield ROOT / "prunesweep" / "py.typed"
    yield from (ROOT / "prunesweep" / "examples").glob("*.toml")
    for layer in LAYERS:
        for pattern in ("*.html", "*.css", "*.js", "*.LICENSE.txt", "*.toml", "py.typed"):
            yield from (ROOT / "prunesweep" / layer).rglob(pattern)
