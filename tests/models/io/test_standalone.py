"""Models as one file of plain PyTorch: it runs without prunesweep and timm, and computes the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from prunesweep.models.builder import example_input
from prunesweep.models.families import FAMILIES
from prunesweep.models.io.export import export
from prunesweep.models.io.standalone import open_standalone
from tests.generate import random_arch, random_model, random_pooled_vit

ALONE = """
import sys
sys.path = [path for path in sys.path if path]  # not this folder, in which prunesweep lies
for name in ("prunesweep", "timm"):
    sys.modules[name] = None  # importing them fails
sys.path.insert(0, sys.argv[1])
import model, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
given = load_file(sys.argv[2])
with torch.no_grad():
    torch.testing.assert_close(model.load(sys.argv[1])(given["x"]), given["y"])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_same_bits(family: str, tmp_path: Path) -> None:
    arch = random_arch(Random(3), family)
    model = random_model(arch, 3, torch.float32).eval()
    assert export(model, tmp_path / "alone", "standalone") < 1e-5  # also of one image, which may take other kernels
    x = example_input(arch, 5, seed=7)
    with torch.no_grad():
        assert torch.equal(open_standalone(tmp_path / "alone")(x), model(x))
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "model.py",
        "model.safetensors",
        "arch.json",
        "preprocessing.json",
    }


def test_an_attention_pool_takes_any_number_of_images(tmp_path: Path) -> None:
    arch = random_pooled_vit(Random(0))
    assert arch.attn_pool is not None
    assert export(random_model(arch, 0, torch.float32).eval(), tmp_path / "alone", "standalone") < 1e-5


def test_it_runs_without_this_package(tmp_path: Path) -> None:
    arch = random_arch(Random(1), "vit")
    model = random_model(arch, 1, torch.float32).eval()
    export(model, tmp_path / "alone", "standalone")
    x = example_input(arch, 2, seed=7)
    with torch.no_grad():
        save_file({"x": x, "y": model(x)}, tmp_path / "known.safetensors")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "alone"), str(tmp_path / "known.safetensors")]
    subprocess.run(command, check=True, cwd=tmp_path)
