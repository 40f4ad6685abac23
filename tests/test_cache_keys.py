"""Whatever one input of a cache is changed, its key changes; and where nothing changed that counts, it does not.

Every cache is asked for its key, through its public function, with one input changed at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from prunesweep.launch.prune_request import Request
from prunesweep.models import Arch, Block, Stage, build, save
from prunesweep.models.builder import build_with
from prunesweep.pruners import METHODS
from prunesweep.search.config import parse_config
from prunesweep.search.execution.source import prepare
from prunesweep.training import Recipe, cache_logits, open_data
from prunesweep.training.jobs.deciding import Deciding
from prunesweep.training.jobs.finetune import Finetuning
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.prune_training import TrainedPruning
from prunesweep.training.jobs.recovery import Recovery
from prunesweep.training.jobs.scoring import Calibration, cached_scores

BLOCK = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=16)
ARCH = Arch(
    family="vit",
    source="test",
    img_size=(8, 8),
    patch_size=(4, 4),
    in_chans=3,
    num_classes=2,
    stages=(Stage(width=8, grid=(2, 2), blocks=(BLOCK, dataclasses.replace(BLOCK, src=1))),),
)
RECIPE = {"epochs": 1, "batch_size": 2, "lr": 1e-3, "fixed_view": True}


@dataclass
class Inputs:
    """What every cache depends on: a model, an image folder and settings, by the name of the cache."""

    home: Path  # where results and caches go
    model: Any
    data: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The data, as commands name them."""
        return f"imagefolder:{self.data}"

    @property
    def opened(self) -> Any:
        """The data, as the model expects them."""
        return open_data(self.name, self.model.pretrained_cfg)

    def saved(self) -> Path:
        """The model in a folder."""
        return save(self.model, self.home / "model")


def make_inputs(home: Path, data: Path) -> Inputs:
    """The same inputs every time."""
    torch.manual_seed(0)
    return Inputs(home, build(ARCH).eval(), data)


# --- caches ---


def fingerprint(own: Inputs) -> str:
    return str(own.opened.info.fingerprint)


def scores(own: Inputs) -> str:
    chosen = {"images": 4, "batch_size": 2, "seed": 0, **own.settings}
    method, calibration = chosen.pop("method", "nvit"), Calibration(**chosen)
    return cached_scores(own.model, method, own.opened, calibration, own.home / "scores", lambda *_: None).name


def projections(own: Inputs) -> str:
    """What projections of a source have in common."""
    recovery, folder = Recovery(**{"images": 4, "seed": 0, **own.settings}), Path(mkdtemp(dir=own.home))
    recovery.known(own.model, own.opened, recovery.calibration(own.opened), folder)
    (file,) = folder.iterdir()
    return file.name


def kept_source(own: Inputs) -> str:
    train = {**RECIPE, **own.settings.get("train", {})}
    config = {
        "name": "x",
        "data": {"name": own.name},
        "source": {"model": f"local-dir:{own.saved()}", "train": train},
        "scores": {"images": 4, "method": "magnitude"},
        "space": {"budget": [0.3, 0.9], "groups": {"embed": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 8}},
        "search": {"trials": 4},
        "finetune": RECIPE,
        "seed": own.settings.get("seed", 0),
    }
    return prepare(parse_config(config, "x"), own.home / "cache", lambda *_: None).folder.name


def teacher_logits(own: Inputs) -> str:
    recipe = Recipe(**RECIPE, distill=[{"cache_teacher": True}], **own.settings)
    (folder,) = cache_logits(own.model, own.opened, recipe, own.home / "logits", lambda *_: None)
    return folder.name


def finetuning(own: Inputs) -> str:
    recipe = Recipe(**{**RECIPE, **own.settings.get("recipe", {})})
    job = Finetuning(own.saved(), own.name, recipe, own.home / "out", seed=own.settings.get("seed", 0))
    return job.work.name


def taught_by(own: Inputs) -> str:
    """A finetuning of one student: the model is its teacher."""
    student = own.home / "student"
    if not student.exists():
        save(make_inputs(own.home, own.data).model, student)
    return Finetuning(student, own.name, Recipe(), own.home / "out", teacher=own.saved()).work.name


def deciding(own: Inputs) -> str:
    options = {"budgets": [0.6], "recipe": Recipe(**RECIPE), **own.settings}
    return TrainedPruning(own.model, own.name, "uvc", out=own.home / "out", **options).work.name


def decisions(own: Inputs) -> str:
    """What a search starts from."""
    usual = {"budgets": [0.6], "recipe": Recipe(**RECIPE), "options": {"warmup_epochs": 0}}
    (file,) = Deciding(own.model, own.opened, "uvc", **{**usual, **own.settings}).run(own.home / "d", lambda *_: None)
    return file.parent.name


def pruning(own: Inputs) -> str:
    usual: dict[str, Any] = {
        "source": str(own.saved()),
        "method": METHODS["nvit"],
        "data": own.name,
        "out": own.home / "out",
        "budgets": [0.5],
        "finetune": "quick",
        "calibration": Calibration(),
        "measure": "macs",
        "placement": Placement(),
        "cache": own.home,
        "console": Console(),
    }
    empty = {f.name: None for f in dataclasses.fields(Request)} | {"settings": [], "groups": {}, "floors": {}}
    request = Request(**{**empty, "second_stage": False, "seed": 0, **usual, **own.settings})
    return request.work(own.model, own.opened.info.fingerprint).folder.name


OF_MODELS = (scores, projections, kept_source, teacher_logits, finetuning, taught_by, deciding, decisions, pruning)


# --- changes ---


def another_weight(own: Inputs) -> None:
    with torch.no_grad():
        own.model.head.bias[0] += 1e-3


def another_record(own: Inputs, **changes: Any) -> None:
    """The weights stay as they are."""
    arch = dataclasses.replace(ARCH, **changes)
    own.model = build_with(arch, own.model.state_dict(), pretrained_cfg=own.model.pretrained_cfg).eval()


def other_heads(own: Inputs) -> None:
    blocks = tuple(dataclasses.replace(block, heads=1, qk=8, v=8) for block in ARCH.blocks)
    another_record(own, stages=(dataclasses.replace(ARCH.stages[0], blocks=blocks),))


def another_scale(own: Inputs) -> None:
    blocks = tuple(dataclasses.replace(block, scale=0.25) for block in ARCH.blocks)
    another_record(own, stages=(dataclasses.replace(ARCH.stages[0], blocks=blocks),))


MODELS: dict[str, Callable[[Inputs], None]] = {
    "weight": another_weight,
    "heads": other_heads,
    "scale": another_scale,
    "norm_eps": lambda own: another_record(own, norm_eps=1e-5),
    "pool": lambda own: another_record(own, pool="avg"),
    "source": lambda own: another_record(own, source="other"),
}


def preprocessing(**changes: Any) -> Callable[[Inputs], None]:
    def change(own: Inputs) -> None:
        own.model.pretrained_cfg |= changes

    return change


def another_pixel(own: Inputs) -> None:
    """A file of equal size, name and time."""
    file = own.data / "train" / "a" / "1.bmp"
    content = bytearray(file.read_bytes())
    content[-3] ^= 128
    file.write_bytes(content)


def two_pixels_exchanged(own: Inputs) -> None:
    """Every image is there as before, under the name of another."""
    first, second = (own.data / "val" / "a" / f"{i}.bmp" for i in range(2))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


DATA: dict[str, Callable[[Inputs], None]] = {
    "label": lambda own: (own.data / "train/a/0.bmp").rename(own.data / "train/b/9.bmp"),  # type: ignore[dict-item]
    "pixel": another_pixel,
    "order": lambda own: (own.data / "val/a/0.bmp").rename(own.data / "val/a/9.bmp"),  # type: ignore[dict-item]
    "exchanged images": two_pixels_exchanged,
    "an image less": lambda own: (own.data / "val/b/0.bmp").unlink(),
    "classes": lambda own: [(own.data / s / "b").rename(own.data / s / "c") for s in ("train", "val")],  # type: ignore[dict-item]
    "mean": preprocessing(mean=(0.4, 0.5, 0.5)),
    "std": preprocessing(std=(0.4, 0.5, 0.5)),
    "interpolation": preprocessing(interpolation="bilinear"),
    "crop_pct": preprocessing(crop_pct=0.5),
    "crop_mode": preprocessing(crop_mode="squash"),
}

SETTINGS: dict[Callable[[Inputs], str], list[dict[str, Any]]] = {
    scores: [{"method": "magnitude"}, {"images": 6}, {"batch_size": 4}, {"seed": 1}],
    projections: [{"images": 6}, {"seed": 1}],
    kept_source: [{"seed": 1}, {"train": {"lr": 2e-3}}, {"train": {"epochs": 2}}],
    teacher_logits: [{"amp": "bf16"}],
    finetuning: [{"seed": 1}, {"recipe": {"lr": 2e-3}}, {"recipe": {"mixup": 0.2, "fixed_view": False}}],
    deciding: [{"budgets": [0.5]}, {"seed": 1}, {"recipe": Recipe()}, {"options": {"skip": "01"}}],
    decisions: [
        {"budgets": [0.5]},
        {"seed": 1},
        {"recipe": Recipe(**{**RECIPE, "lr": 2e-3})},
        {"options": {"warmup_epochs": 0, "skip": "01"}},
    ],
    pruning: [
        {"method": METHODS["taylor"]},
        {"budgets": [0.6]},
        {"measure": "params"},
        {"drop": 1},
        {"groups": {"mlp": 4}},
        {"floors": {"mlp": 0.5}},
        {"settings": ["finetune.lr=1e-4"]},
        {"finetune": "spvit"},
        {"seed": 1},
        {"calibration": Calibration(images=32)},
        {"recover": False},
        {"project": True},
    ],
}

FORMATS: dict[Callable[[Inputs], str], str] = {
    scores: "training.jobs.scoring.FORMAT",
    projections: "training.jobs.recovery.FORMAT",
    kept_source: "search.execution.source.FORMAT",
    teacher_logits: "training.teacher_cache.FORMAT",
    finetuning: "training.jobs.work.FORMAT",
    taught_by: "training.jobs.work.FORMAT",
    deciding: "training.jobs.work.FORMAT",
    decisions: "training.jobs.deciding.FORMAT",
    pruning: "training.jobs.work.FORMAT",
}


def name_of(cache: Any) -> str:
    return str(cache.__name__)


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[[], Inputs]:
    """Makes the same inputs anew; the model goes into the same folder."""
    generator, data = np.random.default_rng(0), tmp_path / "data"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (data / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / label / f"{i}.bmp")
    return lambda: make_inputs(tmp_path, data)


@pytest.mark.parametrize("cache", OF_MODELS, ids=name_of)
@pytest.mark.parametrize("change", MODELS)
def test_a_model_is_in_the_key(cache: Callable[[Inputs], str], change: str, inputs: Callable[[], Inputs]) -> None:
    before, changed = cache(inputs()), inputs()
    MODELS[change](changed)
    assert cache(changed) != before
    assert cache(inputs()) == before


@pytest.mark.parametrize("cache", [fingerprint, *OF_MODELS], ids=name_of)
@pytest.mark.parametrize("change", DATA)
def test_data_and_preprocessing_are_in_the_key(
    cache: Callable[[Inputs], str], change: str, inputs: Callable[[], Inputs]
) -> None:
    before, changed = cache(inputs()), inputs()
    DATA[change](changed)
    assert cache(changed) != before


@pytest.mark.parametrize(
    ("cache", "setting"),
    [
        pytest.param(cache, setting, id=f"{cache.__name__}-{i}-{next(iter(setting))}")  # equal in every process
        for cache, settings in SETTINGS.items()
        for i, setting in enumerate(settings)
    ],
)
def test_every_setting_is_in_the_key(
    cache: Callable[[Inputs], str], setting: dict[str, Any], inputs: Callable[[], Inputs]
) -> None:
    before, changed = cache(inputs()), inputs()
    changed.settings = setting
    assert cache(changed) != before
    assert cache(inputs()) == before


@pytest.mark.parametrize("cache", FORMATS, ids=name_of)
def test_the_format_is_in_the_key(
    cache: Callable[[Inputs], str], inputs: Callable[[], Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache(inputs())
    monkeypatch.setattr(f"prunesweep.{FORMATS[cache]}", "a later one")
    assert cache(inputs()) != before


@pytest.mark.parametrize("cache", [fingerprint, *OF_MODELS], ids=name_of)
def test_what_does_not_count_is_not_in_the_key(cache: Callable[[Inputs], str], inputs: Callable[[], Inputs]) -> None:
    """Copies of files, hidden files, order of the keys, tuples that became lists, loader processes."""
    own = inputs()
    before = cache(own)
    copy = own.data.with_name("copy")
    shutil.copytree(own.data, copy)
    shutil.rmtree(own.data)
    copy.rename(own.data)  # other inodes and times
    (own.data / "train" / "a" / ".DS_Store").touch()
    own.model.pretrained_cfg = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in reversed(own.model.pretrained_cfg.items())
    }
    assert cache(own) == before
