from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import prunesweep
from prunesweep.models import arch_of, build, cost, load, load_provenance, save
from prunesweep.models.latency.building import macs_table
from prunesweep.models.latency.table import Grid
from prunesweep.models.latency.timing import Setting
from prunesweep.pruners import latency
from prunesweep.training import EvalMetrics, open_data, open_text
from tests.generate import random_model
from tests.launch.digits_model import digits_model
from tests.launch.test_cli import call
from tests.pruners.subspaces.test_compress import vit
from tests.pruners.subspaces.test_families import source_of
from tests.training.data.test_text import tiny_model, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_model(tmp_path_factory.mktemp("instant") / "source")


def test_a_front_is_computed_and_every_point_loads(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "front"
    options = ("--data", "digits", "--images", "128", "--budgets", "0.7,0.4", "--out", out, "--json")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    found = json.loads(text[text.index("{") :])
    kept = json.loads((out / "front.json").read_text())
    assert kept == {**found, "digest": kept["digest"]}
    assert 50 < found["peak_memory_mib"]["cpu"] < 100_000
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
        kept = load_provenance(out / row["model"])
        assert (kept["method"], kept["calibration_images"]) == ("subspaces", 128)
        assert EvalMetrics.of(kept) == EvalMetrics.of(row)


def test_the_table_names_the_folders(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--images", "64", "--budgets", "0.5,0.0001", "--out", tmp_path / "front")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    assert " source " in text
    assert "agree %" in text
    assert "…" not in text, "a figure is cut off"
    assert re.search(r"peak memory [\d,]+ MiB \(cpu\)", text)
    assert "budget 0.0001: the smallest widths cost more" in text
    assert sorted(p.name for p in (tmp_path / "front").iterdir()) == ["0.5", "front.json", "report.html"]


def test_budgets_that_no_model_meets_are_an_error(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    options = ("--data", "digits", "--images", "64", "--budgets", "0.0001", "--out", tmp_path / "front")
    code, _, error = call(capsys, "instant", source, *options)
    assert code == 2
    assert "--budgets 0.0001: the smallest widths, in steps of 1" in error
    assert list(tmp_path.iterdir()) == []


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


def test_budgets_in_latency_are_met_and_latency_is_measured_where_asked(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    arch = arch_of(load(source))
    table = macs_table(arch, ms_per_gmac=1000, batch=8)
    table.save(tmp_path / "table.json")
    latency = ("--objective", "latency_ms", "--table", tmp_path / "table.json", "--measure", "latency_ms")
    options = ("--data", "digits", "--images", "64", "--budgets", "0.7,0.4", "--out", tmp_path / "front")
    code, text, _ = call(capsys, "instant", source, *options, *latency)
    assert code == 0
    for share in ("0.7", "0.4"):
        small, kept = arch_of(load(tmp_path / "front" / share)), load_provenance(tmp_path / "front" / share)
        assert float(share) * 0.97 * table.predict(arch) < table.predict(small) <= float(share) * table.predict(arch)
        assert kept["spent"]["cost"] == kept["latency_ms"] == pytest.approx(table.predict(small))
        assert (kept["latency"]["batch"], kept["latency"]["device"]) == (8, "cpu")
        assert f"{kept['latency']['median_ms']:.3f}" in text
    assert "predicted" in text
    assert "…" not in text, "a figure is cut off"
    assert "latency measured: ms per batch of 8, float32" in text


def test_a_table_of_a_device_that_is_not_here_is_refused_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    table = macs_table(arch_of(load(source)), ms_per_gmac=1000)
    dataclasses.replace(table, setting=Setting(batch=8, device="cuda:99")).save(tmp_path / "table.json")
    latency = ("--objective", "latency_ms", "--table", tmp_path / "table.json")
    options = ("--data", "digits", "--images", "64", "--budgets", "0.5", "--out", tmp_path / "front")
    code, text, err = call(capsys, "instant", source, *options, *latency, "--measure", "latency_ms")
    assert code == 2
    assert "device = 'cuda:99': this machine has" in " ".join(err.split())
    assert "reading the source" not in text
    assert not (tmp_path / "front").exists()


def test_widths_outside_a_latency_table_are_never_chosen() -> None:
    torch.manual_seed(0)
    model = build(vit()).eval()
    arch = arch_of(model)
    whole = macs_table(arch, ms_per_gmac=1000)
    narrow = dataclasses.replace(whole, stages=tuple(_from(grids, mlp=12) for grids in whole.stages))
    batches = list(torch.randn(48, 3, 12, 12).split(12))
    for table, least in ((whole, 1), (narrow, 12)):
        (point,) = prunesweep.instant(model, batches, budgets=(0.5,), objective=latency(table, arch))
        widths = [block.mlp for block in arch_of(point.model).blocks]
        assert min(widths) >= least
        assert table.predict(arch_of(point.model)) <= 0.5 * table.predict(arch)
    assert prunesweep.instant(model, batches, budgets=(0.001,), objective=latency(narrow, arch)) == []


def _from(grids: Mapping[str, Grid], mlp: int) -> dict[str, Grid]:
    """Grids whose hidden units begin at ``mlp``."""
    found = {}
    for name, grid in grids.items():
        low = {axis: mlp if axis == "mlp" else points[0] for axis, points in grid.axes.items()}
        axes = {axis: (low[axis], points[-1]) for axis, points in grid.axes.items()}
        values = [grid("", dict(zip(axes, at, strict=True))) for at in product(*axes.values())]
        found[name] = Grid(axes, np.array(values).reshape([2] * len(axes)))
    return found


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2"])
def test_widths_are_multiples_or_whole(align: int, family: str) -> None:
    model = source_of(family, 0)
    arch = arch_of(model)
    images = list(torch.randn(24, arch.in_chans, *arch.img_size).split(8))
    for point in prunesweep.instant(model, images, budgets=(0.7, 0.35), align=align):
        small = arch_of(point.model)
        pairs = [(stage.width, own.width) for stage, own in zip(arch.stages, small.stages, strict=True)]
        for block, own in zip(arch.blocks, small.blocks, strict=True):
            pairs += [(getattr(block, name), getattr(own, name)) for name in ("qk", "mlp", "sr")]
            pairs += zip(block.v_widths, own.v_widths, strict=True)
        assert all(width == full or width % align == 0 for full, width in pairs)
        assert point.share <= point.budget


def test_more_images_than_there_are_is_said(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--images", "5000", "--budgets", "0.5", "--out", tmp_path / "front")
    code, text, _ = call(capsys, "instant", source, *options)
    assert code == 0
    assert "--images 5000: there are 1,347 training images, all are used" in text
    assert json.loads((tmp_path / "front" / "front.json").read_text())["images"] == 1347


def test_the_front_is_shown_again(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "front"
    options = ("--data", "digits", "--images", "64", "--budgets", "0.7,0.4", "--out", out)
    _, first, _ = call(capsys, "instant", source, *options)
    text = ""
    for command in ("front", "show"):
        code, text, _ = call(capsys, command, out)
        assert code == 0
        assert text in first
        assert "report.html" in text
    points = json.loads(call(capsys, "front", out, "--json")[1])
    assert [cost(arch_of(load(point["model"]))).macs for point in points] == [point["macs"] for point in points]
    lines = list(csv.DictReader(io.StringIO(call(capsys, "front", out, "--csv")[1])))
    assert [line["budget"] for line in lines] == ["0.7", "0.4"]
    assert [int(line["macs"]) for line in lines] == [point["macs"] for point in points]
    for command in ("status", "report"):
        code, _, err = call(capsys, command, out)
        assert (code, f"is no run, but a front of 'prunesweep instant': 'prunesweep front {out}' shows it" in err) == (
            2,
            True,
        )
    code, _, err = call(capsys, "show", out, "--tokens", tmp_path / "image.png")
    assert code == 2
    assert "is a front of several models; name one" in err
    assert call(capsys, "verify", out) == (0, f"{out}: all is sound\n", "")
    written = (out / "front.json").read_text()
    facts = json.loads(written)
    (out / "front.json").write_text(json.dumps({**facts, "images": 65}))
    for command, expected in (("verify", 1), ("front", 2), ("show", 2)):
        code, said, err = call(capsys, command, out)
        assert (code, "front.json is damaged: it has changed since it was written" in said + err) == (expected, True)
    (out / "front.json").write_text(written)
    save(random_model(arch_of(load(out / "0.4")), 0, torch.float32), out / "0.4")
    (out / "report.html").unlink()
    code, said, _ = call(capsys, "verify", out)
    assert (code, len(said.splitlines())) == (1, 2)
    assert f"{out / '0.4'} holds another model: its weights are not those" in said
    assert f"{out / 'report.html'} is lost" in said
    del facts["digest"]
    for row in facts["points"]:  # of an earlier version
        row.pop("weights_sha256", None)
        del row["ppl"], row["cosine"], row["relative_error"], row["loss"], row["latency"], row["latency_ms"]
    (out / "front.json").write_text(json.dumps(facts))
    assert call(capsys, "front", out)[:2] == (0, text)
    del facts["points"][1]["macs"]
    for damaged, message in (
        ({"points": 3}, "it has no points"),
        (facts, "points[1].macs is no number"),
        ({"points": facts["points"][1:]}, "points[0].model is not that of the source"),
    ):
        (out / "front.json").write_text(json.dumps(damaged))
        code, _, err = call(capsys, "front", out)
        assert code == 2
        assert f"front.json is damaged: {message}" in " ".join(err.split())


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
        (["--budgets", "0.5,0.50"], "--budgets 0.5,0.50: names one twice"),
        (["--objective", "top1"], "--objective top1: must be one of macs, params, latency_ms"),
        (["--objective", "latency_ms"], "--objective latency_ms and --table TABLE go together"),
        (["--table", "t.json"], "--objective latency_ms and --table TABLE go together"),
        (["--measure", "params"], "--measure params: must be latency_ms; what budgets are counted in is --objective"),
    ],
)
def test_bad_options_write_nothing(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, err = call(capsys, "instant", source, "--data", "digits", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_subspaces_is_told_what_cuts_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, text = call(capsys, "instant", "pit_ti_224", "--data", "digits", "--out", str(tmp_path / "front"))
    assert code == 2
    assert "it lacks 'streams'" in text
    assert "prunesweep prune pit_ti_224 --method taylor (or nvit, isomorphic, magnitude)" in text
    assert not (tmp_path / "front").exists()


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


def test_progress_rises_to_its_end_in_every_phase() -> None:
    torch.manual_seed(0)
    told: dict[str, list[float]] = {}
    prunesweep.instant(
        build(vit()).eval(),
        list(torch.randn(48, 3, 12, 12).split(16)),
        budgets=(0.7, 0.4, 0.0001),
        progress=lambda what, done, total: told.setdefault(what, []).append(done / total),
    )
    assert set(told) == {"reading the source", "narrowing block by block", "computing models"}
    for shares in told.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1
    assert len(set(told["computing models"])) > 5


@pytest.mark.parametrize(
    "where", ["prunesweep.pruners.subspaces.instant", "prunesweep.search.report.computed_page.write_computed_report"]
)
def test_an_interrupt_leaves_nothing(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    options = ("--data", "digits", "--images", "32", "--budgets", "0.5", "--out", tmp_path / "front")
    code, _, err = call(capsys, "instant", source, *options)
    assert (code, err.splitlines()[-1]) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_front_of_a_language_model_has_perplexities(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [f"w{int(n)}" for n in np.random.default_rng(0).integers(0, 20, 900)]
    text = {name: " ".join(words[at : at + 300]) + "\n" for at, name in ((0, "train"), (300, "valid"), (600, "test"))}
    data = f"wikitext:{write(tmp_path / 'wiki', **text)}"
    save(tiny_model(open_text(data, {}, length=6)), tmp_path / "source")
    options = ("--data", data, "--images", "40", "--budgets", "0.6", "--out", tmp_path / "front")
    code, shown, _ = call(capsys, "instant", tmp_path / "source", *options)
    assert code == 0
    small = json.loads((tmp_path / "front" / "front.json").read_text())["points"][1]
    assert small["kl"] > 0
    assert f"{small['ppl']:.2f}" in shown
    assert "ppl" in shown
    code, evaluated, _ = call(capsys, "eval", tmp_path / "front" / "0.6", "--data", data, "--json")
    assert json.loads(evaluated)["ppl"] == pytest.approx(small["ppl"])
