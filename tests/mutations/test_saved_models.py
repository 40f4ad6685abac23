"""Saved models whose files were changed: the model that was saved, another sound one, or one clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunesweep.models import Arch, arch_of, load, load_provenance, read_arch, save
from prunesweep.models.builder import example_input
from prunesweep.models.io.provenance import digest
from prunesweep.models.io.store import CONFIG, DIGEST, SEAL, WEIGHTS, check_saved
from tests.generate import random_arch, random_model
from tests.mutations.judging import Tally, files_below, rounds
from tests.mutations.mutators import VALUES, as_json, changed_bytes, changed_value

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)


def changed_tensors(draw: Random, file: Path) -> str:
    """Rewrite a file of tensors with one of them changed."""
    tensors, name = load_file(file), ""
    with safe_open(file, "pt") as opened:
        metadata: dict[str, str] = dict(opened.metadata() or {})
    name = draw.choice(sorted(tensors))
    own = tensors[name]
    kind = draw.choice(("type", "shape", "gone", "more", "flat", "nan", "record", "empty", "renamed"))
    if kind == "type":
        tensors[name] = own.to(draw.choice(DTYPES))
    elif kind == "shape":
        tensors[name] = torch.zeros([size + draw.choice((0, 1)) for size in own.shape] + [1] * draw.choice((0, 1)))
    elif kind == "gone":
        del tensors[name]
    elif kind == "more":
        tensors[f"{name}.more"] = own.clone()
    elif kind == "flat":
        tensors[name] = own.reshape(-1).contiguous()
    elif kind == "nan":
        tensors[name] = own * float("nan") if own.is_floating_point() else own
    elif kind == "empty":
        tensors[name] = torch.zeros(0)
    elif kind == "renamed":
        tensors[draw.choice(("", "x" * 500, "a/b", "\0"))] = tensors.pop(name)
    else:
        metadata["arch"] = changed_value(draw, metadata["arch"])[1] if draw.random() < 0.5 else "["
        metadata = {key: str(value) for key, value in metadata.items()}
    save_file(tensors, file, metadata=metadata)
    return f"tensors: {kind} {name}"


def resealed(folder: Path, config: Any) -> None:
    """Write a configuration as ``save`` seals it, so that its values are looked at and not its digest alone."""
    if isinstance(config, dict):
        if (folder / WEIGHTS).is_file():
            config.pop(DIGEST, None)
        config.pop(SEAL, None)
        config[SEAL] = digest(config)
    (folder / CONFIG).write_bytes(as_json(config))


def change(draw: Random, folder: Path) -> str:
    kind = draw.choice(("config", "config", "record", "record", "tensors", "bytes", "config bytes", "folder"))
    if kind in ("config", "record"):
        config = json.loads((folder / CONFIG).read_text())
        if kind == "config":
            how, config = changed_value(draw, config)
        else:  # in both files, as a tool would change it
            how, config["model_args"] = changed_value(draw, config["model_args"], (*VALUES, "conv3x3", "swin", "relu"))
            record = json.dumps(config["model_args"].get("arch") if isinstance(config["model_args"], dict) else None)
            save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "arch": record})
        resealed(folder, config)
        return f"{kind}: {how}"
    if kind == "tensors":
        how = changed_tensors(draw, folder / WEIGHTS)
        resealed(folder, json.loads((folder / CONFIG).read_text()))
        return how
    if kind == "folder":
        name = draw.choice((CONFIG, WEIGHTS))
        (folder / name).unlink()
        make = draw.choice((Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)))
        make(folder / name)
        return f"{name} is no file"
    name = CONFIG if kind == "config bytes" else WEIGHTS
    how, content = changed_bytes(draw, (folder / name).read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    if draw.random() < 0.7 and name == WEIGHTS:
        resealed(folder, json.loads((folder / CONFIG).read_text()))
    return f"{name}: {how}"


def use(folder: Path) -> Arch:
    """All that is read of a saved model, and an answer of it."""
    load_provenance(folder)
    arch = read_arch(folder)
    check_saved(folder)
    model = load(folder)
    with torch.no_grad():
        kind = next(model.parameters()).dtype if arch.text is None else torch.int64
        answer = model(example_input(arch, 1, 0).to(kind))
    assert arch_of(model) == arch
    assert len(answer) == 1
    return arch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        save(random_model(random_arch(Random(seed), family), seed).float(), folder / f"{family}{seed}", {"top1": 90.0})
        for seed, family in enumerate(("vit", "swin", "pvt_v2", "lm", "vit"))
    ]


def tried(folder: Path, models: list[Path], tally: Tally, numbers: Iterator[int]) -> None:
    for one in models:
        use(one)
    for number in numbers:
        draw = Random(number)
        shutil.rmtree(folder, ignore_errors=True)
        source = draw.choice(models)
        shutil.copytree(source, folder)
        how = f"{number}: {source.name}: {change(draw, folder)}"
        before, size = files_below(folder.parent), sum(path.stat().st_size for path in source.iterdir())
        tally.attempt(how, lambda: use(folder), size=size)
        tally.check(how, good=files_below(folder.parent) == before, reason="something was written")


@pytest.mark.parametrize("seconds", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_changed_models(tmp_path: Path, models: list[Path], seconds: float) -> None:
    tally = Tally()
    tried(tmp_path / "model", models, tally, rounds(seconds))
    tally.settle()
