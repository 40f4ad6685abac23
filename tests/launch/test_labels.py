"""Commands that read labels: they take the order of the classes, and say where a source is no better than chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from prunesweep.models import load, save
from prunesweep.training import EVAL_BATCH, Recipe, evaluate, fit, open_data
from tests.launch.test_cli import call

FOLDERS = ("R", "Z", "acht", "k")  # torchvision's order; timm's is acht, k, R, Z
COLOURS = ("red", "lime", "blue", "white")
COMMANDS: dict[str, tuple[str, ...]] = {
    "eval": (),
    "score": ("--method", "taylor"),
    "prune": ("--method", "taylor", "--budget", "0.9"),
    "instant": ("--budgets", "0.9", "--images", "16"),
    "finetune": ("--epochs", "1", "--set", "batch_size=16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, each of a colour of its own with a dark spot."""
    root = tmp_path_factory.mktemp("labels") / "data"
    for split, images in (("train", 12), ("val", 4)):
        for c, name in enumerate(FOLDERS):
            for i in range(images):
                place = root / split / name / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (16, 16), COLOURS[c])
                image.paste((9, 9, 9), (i, i, i + 2, i + 2))
                image.save(place)
    return root


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, trained in torchvision's order of classes, saved with all their names, some of them, or none."""
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model: Any = load(save(timm.create_model("vit_tiny_patch16_224", **shape), home / "unnamed"))
    data = open_data(f"imagefolder:{folder}", model.pretrained_cfg, class_order="codepoint")
    fit(model, data, Recipe(epochs=25, batch_size=16, lr=3e-3, fixed_view=True))
    assert evaluate(model, data.val_loader(EVAL_BATCH))["top1"] == 100
    save(model, home / "named")
    save(model, home / "partly", classes=["R", "Z", "acht", "kay"])
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "label_names"}
    save(model, home / "unnamed")
    return home


@pytest.fixture
def command(
    folder: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run a command on one of the models; returns exit code, output and what it says to people."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, model: str, *options: str) -> tuple[int, str, str]:
        out = () if name in ("eval", "score") else ("--out", "out")
        taught = ("--teacher", str(models / model)) if name == "finetune" else ()
        given = ("--data", f"imagefolder:{folder}", *COMMANDS[name], *out, *taught, *options)
        return call(capsys, name, models / model, *given)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_source_in_another_order_is_told_and_the_order_is_taken(name: str, command: Any) -> None:
    code, _, err = command(name, "unnamed", "--class-order", "codepoint")
    assert code == 0, err
    assert "chance" not in err
    code, _, err = command(name, "unnamed", *(("--out", "other") if name not in ("eval", "score") else ()))
    assert code == 0, err
    assert "but 100.00 % with the classes in the order R .. k (class_order = 'codepoint')" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_names_that_match_in_part_are_refused_before_any_work(name: str, command: Any, tmp_path: Path) -> None:
    code, _, err = command(name, "partly")
    assert code == 2
    assert "3 of 4 classes have names of the model's classes ('R', 'Z', 'acht')" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = command(name, "partly", "--classes", "R,Z,acht,k")
    assert code == 0, err
    assert "chance" not in err


def test_an_order_against_the_names_is_refused(command: Any, tmp_path: Path) -> None:
    code, _, err = command("eval", "named", "--class-order", "natural")
    assert code == 2
    assert "--class-order) = 'natural': the model names its classes" in err
    code, out, err = command("eval", "named", "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == 100
    (tmp_path / "names.txt").write_text("acht\nk\nR\nZ\n")
    code, out, err = command("eval", "named", "--classes", "names.txt", "--json")
    assert json.loads(out)["top1"] == 0


def test_a_teacher_in_another_order_is_refused(command: Any, models: Path) -> None:
    for name in ("eval", "finetune"):
        code, _, err = command(name, "unnamed", "--teacher", str(models / "named"))
        assert code == 2
        assert "its classes are those of imagefolder:" in err
        assert "in another order, from 'R' to 'k' instead of from 'acht' to 'Z'" in err


def test_a_teacher_in_another_order_is_refused_without_labels_too(
    models: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(load(models / "named"), tmp_path / "turned", classes=["acht", "k", "R", "Z"])
    run = ("eval", models / "named", "--data", f"images:{folder / 'val'}", "--teacher")
    assert call(capsys, *run, models / "named")[0] == 0
    code, _, error = call(capsys, *run, tmp_path / "turned")
    assert (code, "in another order, from 'acht' to 'Z' instead of from 'R' to 'k'" in error) == (2, True)


def test_images_left_out_are_in_the_figures(
    models: Path, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "data"
    for split in ("train", "val"):
        for name in FOLDERS:
            (place / split / name).mkdir(parents=True)
            for file in (folder / split / name).iterdir():
                (place / split / name / file.name).symlink_to(file)
    (place / "val" / "k" / "broken.png").write_bytes(b"no image")
    code, out, err = call(capsys, "eval", models / "named", "--data", f"imagefolder:{place}")
    assert code == 0, err
    assert "16 images of 17, " in out
    assert out.count("\n") == 1
    assert err.count("evaluation leaves it out): ") == 1
    code, out, err = call(capsys, "eval", models / "named", "--data", f"imagefolder:{place}", "--json")
    assert json.loads(out)["images"] == 16
