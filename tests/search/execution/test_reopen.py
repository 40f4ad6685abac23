"""A run goes on with the settings, and on the data, that it was made with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prunesweep.models import UserError, load, load_provenance, save
from prunesweep.models.latency.building import macs_table
from prunesweep.search import resume_search
from prunesweep.search.config import SearchConfig, SearchTable, load_run_config, parse_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.promote import promote
from prunesweep.search.execution.reopen import check_data, reopen, space_of
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.store.records import sealed
from prunesweep.search.store.run import Run, Task
from prunesweep.search.store.study import Study
from prunesweep.training import Recipe
from tests.conftest import TINY
from tests.launch.test_cli import call
from tests.search.execution.test_task import SHAPE, begin, folder_config, nothing, small_timm, sources
from tests.training.data.test_data import shards  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def made(runs: Path) -> Run:
    """A run on digits with one result."""
    run, coordinator = begin(parse_config(TINY, "tiny"), runs / "cache", runs / "reopened")
    unit = coordinator.next()
    assert unit is not None
    run_task(run.path, unit)
    coordinator.complete(unit.id)
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    shutil.copytree(made.path, tmp_path / "run")
    return Run(tmp_path / "run")


def edit(run: Run, old: str, new: str) -> None:
    text = (run / "search.toml").read_text()
    assert old in text
    (run / "search.toml").write_text(text.replace(old, new, 1))


EDITS = {
    "another method": ('method = "nvit"', 'method = "taylor"', r"scores.method: 'nvit', now 'taylor'"),
    "an added method": (
        "methods = []",
        'methods = ["nvit", "taylor"]',
        r"space.methods: .*, now \['nvit', 'taylor'\]",
    ),
    "other groups": ("qk = 2", "qk = 4", "space.groups.qk: 2, now 4"),
    "other epochs": ("[finetune]\nepochs = 1", "[finetune]\nepochs = 2", "finetune.epochs: 1, now 2"),
    "another seed": ("\nseed = 0", "\nseed = 1", "seed: 0, now 1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_settings_are_refused_by_name(run: Run, name: str) -> None:
    old, new, message = EDITS[name]
    edit(run, old, new)
    with pytest.raises(UserError, match=message) as refused:
        resume_search(run.path)
    assert "search.toml was edited since the run was made" in str(refused.value)
    with pytest.raises(UserError, match=message):
        promote(run, run.front()[0], "quick", Recipe(epochs=1))
    assert not (run / "promoted").exists()
    edit(run, new, old)
    reopen(run)


def test_what_changes_no_result_may_be_edited_and_overridden(run: Run) -> None:
    edit(run, "trials = 4", "trials = 9")
    edit(run, "workers_per_trial = 1", "workers_per_trial = 2")
    config = reopen(run, ["data.loader_workers=1", 'cluster.time="1:00:00"'])
    assert (config.search.trials, config.data.loader_workers) == (9, 1)
    with pytest.raises(UserError, match=r"finetune.lr: .*, now 0.5"):
        reopen(run, ["finetune.lr=0.5"])


def torn(run: Run) -> None:
    file = run / "search.toml"
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2] + b'\n"')


FILES: dict[str, Callable[[Run], Any]] = {
    "torn": torn,
    "empty": lambda run: (run / "search.toml").write_text(""),
    "zeros": lambda run: (run / "search.toml").write_bytes(bytes(900)),
    "latin-1": lambda run: (run / "search.toml").write_bytes(b'name = "\xe4"'),
    "lost": lambda run: (run / "search.toml").unlink(),
}


@pytest.mark.parametrize("name", FILES)
def test_lost_settings_are_written_again(run: Run, name: str) -> None:
    before = load_run_config(run.path)
    FILES[name](run)
    notes: list[str] = []
    assert reopen(run, on_note=notes.append) == before
    assert "written again as it was when the run was made" in notes[0]
    assert ("kept as search.toml.damaged-1" in notes[0]) == (run / "search.toml.damaged-1").exists() == (name != "lost")
    assert load_run_config(run.path) == before


def test_a_run_of_before_settings_were_kept_goes_on(run: Run) -> None:
    facts = run.metadata()
    del facts["settings"], facts["format"]
    (run / "run.json").write_text(json.dumps(facts))
    run = Run(run.path)
    assert reopen(run) == load_run_config(run.path)
    check_data(run, reopen(run))


def test_another_source_in_a_runs_folder_is_refused(run: Run) -> None:
    model = load(run / "source")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save(model, run / "source")  # intact, and of the same architecture
    for use in (lambda: check_data(run, reopen(run)), lambda: resume_search(run.path, trials=99)):
        with pytest.raises(UserError, match="source holds another model than the one that the run was made with"):
            use()


def test_a_score_that_the_facts_do_not_name_is_missed_before_any_work(run: Run) -> None:
    facts = run.metadata()
    (run / "run.json").write_text(sealed({**facts, "scores": {}}))
    with pytest.raises(UserError, match=r"run.json is damaged: scores does not name the file of nvit") as refused:
        resume_search(run.path)
    assert "put the file back from a copy of the run" in str(refused.value)


def test_facts_without_settings_do_not_hide_an_edit(run: Run) -> None:
    edit(run, "qk = 2", "qk = 4")
    facts = json.loads((run / "run.json").read_text())
    for settings in ({"settings": None}, {}):
        (run / "run.json").write_text(json.dumps({**{k: v for k, v in facts.items() if k != "settings"}, **settings}))
        with pytest.raises(UserError, match=r"run.json is damaged: (settings = None|it has changed since)"):
            resume_search(run.path)


def test_a_latency_table_moves_with_its_run(tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path) -> None:
    macs_table(prepare(tiny(), runs / "cache", nothing).arch, ms_per_gmac=1000.0).save(tmp_path / "table.json")
    begin(tiny(space={"latency_table": str(tmp_path / "table.json")}), runs / "cache", tmp_path / "first")
    for name in ("second", "third"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        run = Run(tmp_path / name)
        shutil.rmtree(tmp_path / "first")
        config = reopen(run)
        assert config.space.latency_table == str(run.latency_table)
        (run / "search.toml").write_text(config.to_toml())
        shutil.copytree(tmp_path / name, tmp_path / "first")
    with pytest.raises(UserError, match="space.latency_table: .*, now '/other.json'"):
        reopen(run, ["space.latency_table=/other.json"])


def swap_labels(folder: Path, split: str) -> None:
    """One image of each class becomes one of the other."""
    (folder / split / "red" / "1.jpg").rename(folder / split / "blue" / "9.jpg")
    (folder / split / "blue" / "1.jpg").rename(folder / split / "red" / "1.jpg")


def rename_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "red").rename(folder / split / "rot")


def another_pixel(folder: Path) -> None:
    file = folder / "val" / "red" / "0.jpg"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def another_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "green").mkdir()
        Image.new("RGB", (9, 9)).save(folder / split / "green" / "0.png")


DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "labels": (
        lambda folder: (folder / "train/red/1.jpg").rename(folder / "train/blue/9.jpg"),
        "train: as many images, with other labels",
    ),
    "labels of val": (
        lambda folder: (folder / "val/red/1.jpg").rename(folder / "val/blue/9.jpg"),
        "val: as many images, with other labels",
    ),
    "swapped": (lambda folder: swap_labels(folder, "train"), "their bytes, names or order are not the same"),
    "pixel": (another_pixel, "their bytes, names or order are not the same"),
    "count": (lambda folder: (folder / "train/red/1.jpg").unlink(), "train: 12 images, now 11"),
    "class": (another_class, "classes: 'green' new"),
    "name of a class": (rename_class, "classes: 'red' gone; 'rot' new"),
    "gone": (shutil.rmtree, "no folder .*If they were moved, give their new place: resume --set data.name="),
}


@pytest.fixture
def on_folder(image_folder: Path, tmp_path: Path) -> Run:
    save(small_timm(), tmp_path / "ours")
    config = folder_config(image_folder, {"model": f"local-dir:{tmp_path / 'ours'}"})
    run, _ = begin(config, tmp_path / "cache", tmp_path / "run")
    return run


@pytest.mark.parametrize("name", DATA)
def test_changed_data_are_refused_with_what_changed(on_folder: Run, image_folder: Path, name: str) -> None:
    change, message = DATA[name]
    change(image_folder)
    before = {path: path.stat().st_mtime_ns for path in on_folder.path.rglob("*")}
    with pytest.raises(UserError, match=f"(?s){message}"):
        resume_search(on_folder.path)
    assert before == {path: path.stat().st_mtime_ns for path in on_folder.path.rglob("*")}
    with pytest.raises(UserError, match=f"(?s){message}"):
        promote(on_folder, {"trial": 0, "rung": 0}, "quick", Recipe(epochs=1))


def test_data_that_change_while_a_search_runs_break_the_run(on_folder: Run, image_folder: Path) -> None:
    """As where a node of a cluster has other data than the rest."""
    another_pixel(image_folder)
    found = run_task(on_folder.path, Task(0, {}, "", "", 0))
    assert found["state"] == "broken"
    assert "is not what" in found["reason"]


def test_moved_data_can_be_given_again_and_no_others(on_folder: Run, image_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    shutil.rmtree(image_folder)
    config = reopen(on_folder, [f"data.name=imagefolder:{moved}"])
    assert check_data(on_folder, config).info.fingerprint == on_folder.metadata()["data"]
    with pytest.raises(UserError, match="digits is not what .* was made on"):
        check_data(on_folder, reopen(on_folder, ["data.name=digits"]))
    with pytest.raises(UserError, match="classes: the same names in another order"):
        check_data(on_folder, reopen(on_folder, [f"data.name=imagefolder:{moved}", 'data.classes=["red", "blue"]']))


def test_swapped_labels_of_shards_are_seen(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    save(small_timm(), tmp_path / "ours")
    config = folder_config(shards, {"model": f"local-dir:{tmp_path / 'ours'}"}, data={"name": f"wds:{shards}"})
    run, _ = begin(config, tmp_path / "cache", tmp_path / "run")
    check_data(run, reopen(run))
    whole = (shards / "val-0.tar").read_bytes()
    at = next(i for i in range(1024, len(whole), 512) if whole[i : i + 1] == b"0" and not any(whole[i + 1 : i + 512]))
    (shards / "val-0.tar").write_bytes(whole[:at] + b"1" + whole[at + 1 :])
    with pytest.raises(UserError, match="val: as many images, with other labels"):
        resume_search(run.path)


def test_relative_data_become_absolute(image_folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(image_folder.parent)
    for kind in ("imagefolder", "wds", "wikitext", "images"):
        config = folder_config(
            image_folder, {"model": "deit_tiny_patch16_224", "pretrained": True}, data={"name": f"{kind}:x/y"}
        )
        assert config.data.name == f"{kind}:{image_folder.parent / 'x' / 'y'}"


def test_data_are_the_same_for_every_form_of_the_source(image_folder: Path, tmp_path: Path) -> None:
    """The fingerprint has the preprocessing, which the saved source gives when a run is opened again."""
    trained = {"model": "deit_tiny_patch16_224", "args": SHAPE, "train": {"epochs": 1, "batch_size": 4}}
    for number, source in enumerate([*sources(tmp_path).values(), trained]):
        run, _ = begin(folder_config(image_folder, source), tmp_path / "cache", tmp_path / f"run{number}")
        check_data(run, reopen(run))


def test_other_images_to_compare_by_are_refused(on_folder: Run) -> None:
    with pytest.raises(UserError, match=r"data.search_split: 0.2, now 0.3"):
        reopen(on_folder, ["data.search_split=0.3"])
    assert reopen(on_folder, ["data.unreadable=0.5"]).data.search_split == 0.2


def test_promoting_and_measuring_take_moved_data(
    on_folder: Run, image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    config = reopen(on_folder)
    space = space_of(on_folder, config)
    study = Study(on_folder / "study.journal", space.distributions, 0, rank_by=config.search.rank_by)
    coordinator = Coordinator(on_folder, study, space, SearchTable(trials=1), max_concurrent=1, seed=0)
    unit = coordinator.next()
    assert unit is not None
    run_task(on_folder.path, unit)
    coordinator.complete(unit.id)
    code, out, error = call(capsys, "eval", on_folder.path, "--json")
    assert code == 0, error
    (measured,) = json.loads(out)
    assert measured["top1"] == coordinator.results[0].top1
    assert (measured["split"], measured["images"], measured["measured"]["images"]) == ("search", 2, 5)
    assert call(capsys, "eval", on_folder.path, "--data", "digits")[0] == 2
    for option in (["--test"], ["--class-order", "codepoint"], ["--teacher", "x"]):
        assert "of a run only --data and --json" in call(capsys, "eval", on_folder.path, *option)[2]
    assert "--data is missing" in call(capsys, "eval", on_folder.path / "source")[2]
    image_folder.rename(tmp_path / "moved")
    code, out, _ = call(capsys, "eval", on_folder.path, "--data", f"imagefolder:{tmp_path / 'moved'}")
    assert code == 0
    assert re.match(r"trial 0, rung 0: top-1 [\d.]+ % \(.*, 5 images; top-1 [\d.]+ % in the search; [\d,]+ MACs", out)
    command = ["promote", on_folder.path, "--recipe", "quick", "--set", "epochs=1", "--set", "batch_size=4"]
    code, _, error = call(capsys, *command)
    assert code == 2
    assert "give their new place" in error
    code, _, error = call(capsys, *command, "--data", f"imagefolder:{tmp_path / 'moved'}")
    assert code == 0, error
    (model,) = on_folder.path.glob("promoted/*/model")
    moved = check_data(on_folder, reopen(on_folder, [f"data.name=imagefolder:{tmp_path / 'moved'}"]))
    assert moved.info.fingerprint == on_folder.metadata()["data"]
    assert load_provenance(model)["data"] == moved.report.info.fingerprint  # promoted on all training images
    save(load(on_folder / "source"), on_folder / measured["model"])  # intact, and another one than the trial's
    code, _, error = call(capsys, "eval", on_folder.path, "--data", f"imagefolder:{tmp_path / 'moved'}")
    assert (code, "holds another model: its weights are not those" in error) == (1, True), error
