"""Foreign checkpoints, changed: imported as a sound model, or refused in one clear error; nothing in them is run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from prunesweep.models import arch_of
from prunesweep.models.builder import example_input
from prunesweep.models.importers import LAYOUTS, import_checkpoint
from tests.models.importers.test_importers import CONFIG, NEEDS, content_of
from tests.mutations.judging import Tally, rounds
from tests.mutations.mutators import VALUES, changed_bytes, changed_value

KINDS = ("type", "shape", "gone", "odd", "odd", "value", "renamed", "many", "beside", "deep")
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)


def odd_tensors() -> list[Any]:
    """Tensors that are small in a file and strange or huge when they are used."""
    cycle: dict[str, Any] = {}
    cycle["x"] = cycle
    return [
        torch.zeros(1).expand(10**6, 10**5),
        torch.zeros(0, 3),
        torch.tensor(1.0),
        torch.zeros(2, 3).t(),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.full((3,), float("nan")),
        torch.empty(10**6, 10**6, device="meta"),
        torch.nn.Parameter(torch.ones(2)),
        cycle,
    ]


def changed(draw: Random, content: dict[str, Any]) -> tuple[str, Any]:
    """A checkpoint's content with some tensors, keys or entries changed."""
    weights = content.get("model", content)
    key = draw.choice(sorted(weights, key=str))
    own, kind = (
        weights[key],
        draw.choice(("type", "shape", "gone", "odd", "odd", "value", "renamed", "many", "beside", "deep")),
    )
    weights, beside = dict(weights), {k: v for k, v in content.items() if "model" in content and k != "model"}
    if not isinstance(own, torch.Tensor):
        kind = "value"
    if kind == "type":
        weights[key] = own.to(draw.choice(DTYPES))
    elif kind == "shape":
        sizes = [draw.choice((size, size + 1, size * 2, 1, 0)) for size in own.shape]
        weights[key] = torch.ones(sizes + [1] * draw.choice((0, 0, 1)))
    elif kind == "gone":
        del weights[key]
    elif kind == "odd":
        weights[key] = draw.choice(odd_tensors())
    elif kind == "value":
        weights[key] = draw.choice(VALUES)
    elif kind == "renamed":
        name = draw.choice((key.replace("0", "1"), f"module.{key}", f"blocks.{10**9}.x", 3, None, "", key + "." + key))
        weights[name] = weights.pop(key)
    elif kind == "many":
        weights |= {f"blocks.{i}.norm1.weight": torch.ones(1) for i in range(21_000)}
    elif kind == "beside":
        beside = changed_value(draw, {k: v for k, v in beside.items() if _plain(v)} or {"dim": {"EMB": 3}, "x": 1})[1]
        beside = beside if isinstance(beside, dict) else {"dim": beside}
    elif kind == "deep":
        weights = {"model": weights, "state_dict": {"model": weights}}
    return f"{kind} {str(key)[:60]}", {**beside, "model": weights} if "model" in content or beside else weights


def _plain(value: Any) -> bool:
    return isinstance(value, (dict, list, int, float, str))


def hostile(draw: Random) -> tuple[str, bytes]:
    """A file that is no checkpoint, or one that expands."""
    kind = draw.choice(("zip bomb", "pickle", "calls", "text"))
    if kind == "zip bomb":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as files:
            buffer = io.BytesIO()
            torch.save({"x": torch.zeros(4)}, buffer)
            with zipfile.ZipFile(buffer) as whole:
                for info in whole.infolist():
                    content = whole.read(info)
                    files.writestr(info.filename, bytes(10**8) if "/data/" in info.filename else content)
        return kind, file.getvalue()
    if kind == "pickle":
        return kind, pickle.dumps({"x": list(range(draw.randrange(100)))}, protocol=draw.choice((2, 4)))
    if kind == "calls":
        return kind, b"cos\nsystem\n(S'touch executed'\ntR."
    return kind, draw.choice((b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"version https://git-lfs", bytes(1000)))


def tried(folder: Path, tally: Tally, numbers: Iterator[int]) -> None:
    contents = {name: content_of(name) for name in NEEDS}
    file = folder / "file.pth"
    for number in numbers:
        draw = Random(number)
        name = draw.choice(sorted(NEEDS))
        options: dict[str, Any] = dict(NEEDS[name])
        part, size = draw.random(), 0
        if part < 0.65:
            how, content = changed(draw, contents[name])
            torch.save(content, file, _use_new_zipfile_serialization=draw.random() < 0.9)
        elif part < 0.8:
            torch.save(contents[name], file)
            how, data = changed_bytes(draw, file.read_bytes())
            file.write_bytes(data or b"")
        elif part < 0.9:
            how, data = hostile(draw)
            file.write_bytes(data)
        else:
            torch.save(contents[name], file)
            how, options = changed_value(draw, {k: v for k, v in options.items() if k != "config"} or {"heads": 3})
            if not isinstance(options, dict):
                continue
            options = {key: value for key, value in options.items() if key in ("heads", "img_size", "dtype", "config")}
            if "config" in NEEDS[name] and draw.random() < 0.8:
                options["config"] = folder / CONFIG[name.split("_")[1]].name
                how2, data = changed_bytes(draw, CONFIG[name.split("_")[1]].read_bytes())
                options["config"].write_bytes(data or b"")
                how += f", config {how2}"
        layout = draw.choice(sorted(LAYOUTS)) if draw.random() < 0.05 else name.split("_")[0]
        size = file.stat().st_size

        def work(layout: str = layout, options: dict[str, Any] = options) -> None:
            model = import_checkpoint(file, layout, **options)
            arch = arch_of(model)
            if max(arch.img_size) > 1000:  # some take images of any size
                return
            with torch.no_grad():
                model(example_input(arch, 1, 0).to(next(model.parameters()).dtype))

        tally.attempt(f"{number}: {name} as {layout}: {how}", work, size=size)
        tally.check(how, good=not (folder / "executed").exists(), reason="the file's code was run")


@pytest.mark.parametrize("seconds", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_changed_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    tried(tmp_path, tally, rounds(seconds))
    tally.settle()
