from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch

import prunesweep
from prunesweep.models import arch_of, build, cost, load, load_provenance, save
from prunesweep.training import open_data
from tests.launch.test_cli import call
from tests.pruners.subspaces.test_compress import vit


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = vit(width=16, depth=2)
    stage = dataclasses.replace(arch.stages[0], grid=(4, 4))
    shape = {"img_size": (8, 8), "patch_size": (2, 2), "in_chans": 1, "num_classes": 10}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("instant") / "source"
    save(build(dataclasses.replace(arch, stages=(stage,), **shape)), path)
    return path


def test_a_front_is_computed_and_every_point_loads(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "front"
    options = ("--data", "digits", "--images", "128", "--budgets", "0.7,0.4", "--out", out, "--json")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    found = json.loads(text[text.index("{") :])
    assert found == json.loads((out / "front.json").read_text())
    first, *points = found["points"]
    assert (first["kl"], first["agreement"], first["macs_share"]) == (0, 100, 1)
    assert [row["budget"] for row in points] == [0.7, 0.4]
    whole = cost(arch_of(load(source)))
    data = open_data("digits", load(source).pretrained_cfg)
    for row in points:
        model = timm.create_model(f"local-dir:{out / row['model']}", pretrained=True)
        unit = 2 * arch_of(model).tokens * arch_of(model).stages[0].width  # MACs of a hidden unit
        assert row["budget"] * whole.macs - unit < row["macs"] <= row["budget"] * whole.macs
        assert cost(arch_of(model)).macs == row["macs"] == round(row["macs_share"] * whole.macs)
        right = seen = 0
        with torch.no_grad():
            for images, labels in data.val_loader(64):
                right, seen = right + int((model(images).argmax(1) == labels).sum()), seen + len(labels)
        assert (row["images"], row["top1"]) == (seen, pytest.approx(100 * right / seen))
        assert load_provenance(out / row["model"])["method"] == "subspaces"


def test_the_table_names_the_folders(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--images", "64", "--budgets", "0.5,0.0001", "--out", tmp_path / "front")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    assert " source " in text
    assert "budget 0.0001: the smallest widths cost more" in text
    assert sorted(p.name for p in (tmp_path / "front").iterdir()) == ["0.5", "front.json"]


def test_a_budget_that_is_missed_says_why(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--images", "64", "--budgets", "0.6", "--align", "8", "--out", tmp_path / "front")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    spent = load_provenance(tmp_path / "front" / "0.6")["spent"]
    assert spent["cost"] == cost(arch_of(load(tmp_path / "front" / "0.6"))).macs < 0.995 * spent["limit"]
    share = f"{spent['cost_share']:.3f}"
    expected = (
        f"the budget, 0.6 of the source's MACs, is not met, {share} are spent: the next widths, in steps of 8, cost"
    )
    assert expected in " ".join(text.split())


def test_an_untrained_source_is_warned_of_in_one_line(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    options = ("--data", "digits", "--images", "32", "--budgets", "0.5", "--out", tmp_path / "front")
    code, _, err = call(capsys, "instant", source, *options)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "hardly depend on the image" in line]
    assert line.startswith("warning: toy: its answers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--budgets", "1.5"],
            "budget 1.5: must be a share of the source's macs, in (0, 1]; did you mean 1.5M or 1.5G?",
        ),
        (["--budgets", "half"], "--budgets half: must be numbers separated by commas"),
        (["--objective", "top1"], "objective 'top1': must be one of macs, params"),
    ],
)
def test_bad_options_write_nothing(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, err = call(capsys, "instant", source, "--data", "digits", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_size_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(build(dataclasses.replace(vit(), num_classes=10)), tmp_path / "source")
    code, _, err = call(capsys, "instant", tmp_path / "source", "--data", "digits", "--out", tmp_path / "out")
    assert code == 2
    assert "(3, 12, 12)" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("facts", [{"qk_norm": True}, {"pre_norm": True}, {"layer_scale": True, "qkv_bias": False}])
def test_spaces_that_cannot_be_projected_stay_whole(facts: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = build(vit(**facts)).eval()
    (point,) = prunesweep.instant(model, list(torch.randn(48, 3, 12, 12).split(12)), budgets=(0.6,))
    small, arch = arch_of(point.model), arch_of(model)
    assert point.share <= 0.6
    assert not facts.get("pre_norm") or small.stages[0].width == arch.stages[0].width
    assert not facts.get("qk_norm") or {block.qk for block in small.blocks} == {arch.blocks[0].qk}


def test_a_model_and_a_list_of_tensors_in_python() -> None:
    torch.manual_seed(0)
    model = build(vit()).eval()
    batches = list(torch.randn(64, 3, 12, 12).split(16))
    half, fifth = prunesweep.instant(model, batches, budgets=(0.5, 0.2), objective="params")
    for point in (half, fifth):
        params = sum(p.numel() for p in point.model.parameters())
        assert point.share == params / sum(p.numel() for p in model.parameters())
        assert point.budget * 0.98 <= point.share <= point.budget
    assert half.kl < fifth.kl
    assert half.images == 16
