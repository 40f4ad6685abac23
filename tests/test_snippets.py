"""Every piece of Python in README and docs is run, as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import tomli_w
import torch
from torch.utils.data import TensorDataset

from prunesweep.models import BlockCut, Cut, arch_of, save
from prunesweep.search import run_search
from prunesweep.search.config import parse_config
from tests.conftest import TINY
from tests.generate import random_model
from tests.models.test_in_other_code import KINDS
from tests.search.in_process import without_ray

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pair() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 3
    return TensorDataset(x, y), TensorDataset(x[:16], y[:16])


def prepared(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a document takes as given, in small: names, and files in the folder."""
    if document.name == "README.md":
        save(random_model(KINDS["attention"], 0, torch.float32), folder / "runs/digits/front/01")
        (folder / "examples").mkdir()
        (folder / "examples/digits.toml").write_text(tomli_w.dumps({**TINY, "search": {"trials": 2}}))
        return {}
    if document.name == "trust.md":
        run_search(parse_config({**TINY, "search": {"trials": 1}}, document.name), folder / "runs/digits")
        return {}
    if document.name == "python.md":
        (folder / "pictures.py").write_text(
            "from prunesweep.training import Data, own_data\nfrom tests.test_snippets import pair\n\n"
            "@own_data\ndef pictures():\n    return Data.of(*pair(), classes=['cat', 'dog', 'owl'])\n"
        )
        own = document.read_text(encoding="utf-8").split("    @own_quality", 1)[1].split("\n\n")[0]
        (folder / "measures.py").write_text(
            "import torch\nfrom prunesweep.training import own_quality\n\n" + textwrap.dedent("    @own_quality" + own)
        )
        monkeypatch.syspath_prepend(str(folder))
        for module in ("pictures", "measures"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.import_module("pictures")
        train, val = pair()
        return {"train": train, "val": val}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    batches = list(pair()[0].tensors[0].split(16))
    cut = Cut(embed=(None,), blocks=(BlockCut(mlp=tuple(range(384))),))
    return {"model": model, "arch": arch_of(model), "batches": batches, "images_or_loader": batches, "cut": cut}


def documents_with_python() -> list[Path]:
    return [document for document in DOCUMENTS if snippets(document)]


def test_there_are_snippets() -> None:
    assert {document.name for document in documents_with_python()} == {
        "README.md",
        "python.md",
        "subspaces.md",
        "trust.md",
    }


@pytest.mark.slow
@pytest.mark.parametrize("document", documents_with_python(), ids=lambda document: document.name)
def test_python_of_documents_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without_ray(monkeypatch)
    names = prepared(document, tmp_path, monkeypatch)
    for number, snippet in enumerate(snippets(document), start=1):
        exec(compile(snippet, f"{document.name}, snippet {number}", "exec"), names)
