"""Configurations of searches, changed in every way: refused in one message before anything is made, or fit to start."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from prunesweep.models import save
from prunesweep.search.config import load_config, parse_config
from prunesweep.search.execution.source import open_checked
from tests.conftest import TINY
from tests.generate import random_model
from tests.mutations.judging import Tally, files_below, rounds
from tests.mutations.mutators import VALUES, changed_bytes, changed_value
from tests.search.helpers import ARCH

WORDS = ("digits", "imagefolder:", "imagefolder:/nowhere", "wds:x", "vit_tiny_patch16_224", "resnet18", "local-dir:x")


def bases(source: Path) -> list[dict[str, Any]]:
    """Configurations that are right: of a source that is trained here, and of a saved one, with most tables."""
    full = copy.deepcopy(TINY)
    full["space"] |= {"conv": [0, 2], "conv3": [0, 1], "keep_rate": [0.5, 1.0], "merge_start": [0, 2]}
    full["space"] |= {"params": [0, 1e9]}
    full["search"] |= {"trials": 12, "rungs": [0, 1, 2], "reduction_factor": 2.0, "objectives": ["top1", "macs"]}
    full["search"] |= {"start_methods": ["uvc"], "start_neutral": 2, "sampler": "random", "screen_images": 64}
    full["start"] = {"uvc": {"budgets": [0.6], "recipe": {"epochs": 2}}}
    full["resources"] = {"cpus": 2, "workers_per_trial": 1, "cpus_per_trial": 1, "gpus_per_trial": 0}
    full["cluster"] = {"nodes": 2, "cpus": 4, "env": {"A": "b"}, "setup": ["true"], "time": "1:00:00"}
    full["finetune"] |= {"lr_by_share": [], "mixup": 0.1, "warmup_epochs": 0, "optimizer": "adamw"}
    saved = copy.deepcopy(TINY)
    saved["source"] = {"model": f"local-dir:{source}", "pretrained": True}
    saved["data"] |= {"loader_workers": 0, "search_split": 0.2, "unreadable": 0.01}
    saved["search"] |= {"objectives": ["agreement", "macs", "params"]}
    saved["search"] |= {"start": [{"budget": 0.5, "skip": 0, "lr": 1e-3}]}
    return [TINY, full, saved]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(ARCH, 0).float(), tmp_path_factory.mktemp("source") / "model")


def tried(folder: Path, source: Path, tally: Tally, numbers: Iterator[int]) -> None:
    file = folder / "c.toml"
    every = bases(source)
    for base in every:
        open_checked(parse_config(base, "base"))  # the ones that are changed are right
    for number in numbers:
        draw = random.Random(number)
        base, content = draw.choice(every), None
        if draw.random() < 0.25:
            how, content = changed_bytes(draw, tomli_w.dumps(base).encode())
        else:
            how, data = changed_value(draw, base, (*VALUES, *WORDS))
            try:
                content = tomli_w.dumps(data).encode("utf-8", "surrogatepass")
            except (TypeError, AttributeError, RecursionError):  # what TOML cannot hold: None, a list as the file
                if isinstance(data, dict):
                    tally.attempt(f"{number}: {how}", lambda data=data: open_checked(parse_config(data, "given")))
                continue
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(content)
        before = files_below(folder)
        tally.attempt(f"{number}: {how}", lambda: open_checked(load_config(file)), size=len(content or b""))
        tally.check(how, good=files_below(folder) == before, reason="something was written")


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_changed_configurations(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    tried(tmp_path, source, tally, rounds(seconds))
    tally.settle()
