"""Folders of unfinished work: one for everything that the work depends on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from prunesweep.models import load, save
from prunesweep.models.errors import Interrupted, UserError
from prunesweep.models.io.files import make_folder
from prunesweep.training.data import Data, open_data
from prunesweep.training.jobs.finetune import Finetuning
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.prune_training import TrainedPruning
from prunesweep.training.jobs.scoring import Calibration
from prunesweep.training.jobs.training_job import TrainingJob, load_job
from prunesweep.training.jobs.work import FACTS, Work
from prunesweep.training.recipe import Recipe
from prunesweep.training.second_stage import SecondStageJob

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1}


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "num_heads": 2, **changes})
    model.pretrained_cfg |= {"mean": (0.3053,), "std": (0.376,)}
    return model


def variants() -> dict[str, Any]:
    """The same model, and models that differ in one respect each."""
    weight, preprocessing = make(), make()
    with torch.no_grad():
        weight.head.bias[0] += 1e-3
    preprocessing.pretrained_cfg |= {"mean": (0.5,)}
    return {"weight": weight, "record": make(num_heads=4), "preprocessing": preprocessing}


def test_everything_that_finetuning_depends_on_is_in_the_key(tmp_path: Path) -> None:
    """One input is changed at a time."""
    save(make(), tmp_path / "model")
    job = Finetuning(tmp_path / "model", "digits", Recipe(), tmp_path / "out", teacher=tmp_path / "model")
    jobs = [
        job,
        dataclasses.replace(job, teacher=None),
        dataclasses.replace(job, recipe=Recipe(lr=1e-4)),
        dataclasses.replace(job, seed=1),
        dataclasses.replace(job, second_stage=SecondStageJob("pmvit")),
    ]
    for name, model in variants().items():
        jobs.append(dataclasses.replace(job, model=save(model, tmp_path / name)))
        jobs.append(dataclasses.replace(job, teacher=tmp_path / name))
    assert len({one.work for one in jobs}) == len(jobs)
    save(make(), tmp_path / "copy")
    assert dataclasses.replace(job, model=tmp_path / "copy").work == job.work


def test_changed_data_of_the_same_name_are_in_the_key(image_folder: Path, tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_classes": 2, "embed_dim": 16, "depth": 1}
    folder = save(timm.create_model("vit_tiny_patch16_224", **shape), tmp_path / "model")
    job = Finetuning(folder, f"imagefolder:{image_folder}", Recipe(), tmp_path / "out")
    before = job.work
    assert dataclasses.replace(job).work == before
    (image_folder / "train" / "red" / "0.jpg").rename(image_folder / "train" / "blue" / "new.jpg")
    assert dataclasses.replace(job).work != before


def test_workers_find_data_that_were_named_from_another_folder(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_classes": 2, "embed_dim": 16, "depth": 1}
    model: Any = timm.create_model("vit_tiny_patch16_224", **shape)
    folder, name = save(model, tmp_path / "model"), f"imagefolder:{image_folder}"
    monkeypatch.chdir(image_folder.parent)
    relative = f"imagefolder:{image_folder.name}"
    job = Finetuning(folder, relative, Recipe(), tmp_path / "out")
    run = TrainedPruning(model, relative, "uvc", [0.6], Recipe(), tmp_path / "out")
    assert job.described.data == run.described(Placement()).data == name
    assert job.work == dataclasses.replace(job, data=name).work
    assert run.work == dataclasses.replace(run, data_name=name).work


@pytest.mark.parametrize(
    "options", [{"class_order": "codepoint"}, {"classes": ["Violet", "red"]}, {"unreadable": 0.5, "loader_workers": 1}]
)
def test_workers_open_the_data_that_the_driver_has(
    options: dict[str, Any], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        (image_folder / split / "blue").rename(image_folder / split / "Violet")  # timm sorts it behind red
    shape = {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_classes": 2, "embed_dim": 16, "depth": 1}
    model: Any = timm.create_model("vit_tiny_patch16_224", **shape)
    folder, name = save(model, tmp_path / "model"), f"imagefolder:{image_folder}"
    job = Finetuning(folder, name, Recipe(), tmp_path / "out", data_options=options)
    run = TrainedPruning(load(folder), name, "uvc", [0.6], Recipe(), tmp_path / "out", data_options=options)
    asked = []

    def opened(*given: Any, **options: Any) -> Data:
        asked.append(options)
        return open_data(*given, **options)

    monkeypatch.setattr("prunesweep.training.jobs.training_job.open_data", opened)
    for described, here in ((job.described, job.opened), (run.described(Placement()), run.opened)):
        sent = json.loads(json.dumps(dataclasses.asdict(described))) | {"model": str(folder)}
        assert load_job(TrainingJob(**sent), "cpu").data.info == here.info
    assert asked == [options, options]


def test_everything_that_a_deciding_run_depends_on_is_in_the_key(tmp_path: Path) -> None:
    run = TrainedPruning(make(), "digits", "uvc", [0.6], Recipe(), tmp_path / "out")
    changes: list[dict[str, Any]] = [
        {"method": "spvit"},
        {"budgets": [0.5]},
        {"recipe": Recipe(epochs=3)},
        {"options": {"skip": "1"}},
        {"calibration": Calibration(images=32)},
        {"seed": 1},
        *({"model": model} for model in variants().values()),
    ]
    runs = [run, *(dataclasses.replace(run, **change) for change in changes)]
    assert len({one.work for one in runs}) == len(runs)
    assert dataclasses.replace(run, model=make()).work == run.work


@pytest.mark.parametrize("inside", [None, "{}", '{"format": "prunesweep/work/0"}'])
def test_a_folder_that_does_not_say_what_it_is_of_is_made_anew(tmp_path: Path, inside: str | None) -> None:
    work = Work.beside(tmp_path / "out", {"seed": 0})
    work.claim()
    (work.folder / "state.safetensors").write_text("half done")
    work.claim()
    assert (work.folder / "state.safetensors").exists()
    if inside is None:
        (work.folder / FACTS).unlink()
    else:
        (work.folder / FACTS).write_text(inside)
    work.claim()
    assert [path.name for path in work.folder.iterdir()] == [FACTS]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def begun(work: Work) -> Work:
    """Work with a part in it, and logs of both."""
    work.claim()
    for file in ("metrics.jsonl", "tb/events", "source/model.safetensors", "part/metrics.jsonl", "part/tb/e", "part/s"):
        (work.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (work.folder / file).touch()
    return work


def test_logs_go_into_the_result_and_nothing_else_stays(tmp_path: Path) -> None:
    work, out = begun(Work.beside(tmp_path / "out", {"seed": 0})), tmp_path / "out"
    part = Work(work.folder / "part", {})
    part.release()
    logs = {"metrics.jsonl", "tb/events", "part/metrics.jsonl", "part/tb/e"}
    assert files(work.folder) == logs | {FACTS, "source/model.safetensors"}
    out.mkdir()
    work.release()
    assert files(out / "logs") == logs
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_logs_stay_where_there_is_no_result(tmp_path: Path) -> None:
    work = begun(Work.beside(tmp_path / "out", {"seed": 0}))
    work.release()
    assert files(work.folder) == {"metrics.jsonl", "tb/events", "part/metrics.jsonl", "part/tb/e"}
    bare = Work.beside(tmp_path / "bare", {})
    bare.claim()
    bare.release()
    assert not bare.folder.exists()


@pytest.mark.parametrize(
    ("left", "stays", "said"),
    [
        ([], False, "nothing was saved yet"),
        (["ray/out/.validate_storage_marker"], False, "nothing was saved yet"),
        (["ray/out/checkpoint_1/state.safetensors"], True, "goes on from what is saved in .*out-"),
    ],
)
def test_ctrl_c_says_how_to_go_on_and_keeps_only_what_can_go_on(
    tmp_path: Path, left: list[str], stays: bool, said: str
) -> None:
    work = Work.beside(tmp_path / "out", {"seed": 1})
    with pytest.raises(Interrupted, match=said), work.held():
        for name in left:
            make_folder((work.folder / name).parent)
            (work.folder / name).write_text("")
        raise KeyboardInterrupt
    assert work.folder.exists() == stays
    with pytest.raises(UserError) as error, work.held():
        raise UserError("it cannot be done")
    assert work.folder.exists() == stays
    assert getattr(error.value, "__notes__", []) == [f"logs and unfinished work are in {work.folder}"] * stays
    with work.held():
        (work.folder / "metrics.jsonl").write_text("")
        make_folder(work.folder / "ray")
    assert [path.name for path in work.folder.iterdir()] == ["metrics.jsonl"]
