from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from prunesweep.models import Arch, Block, UserError, cost
from prunesweep.models.latency.building import macs_table
from prunesweep.models.latency.nvit_format import from_nvit, to_nvit
from prunesweep.models.latency.prediction import PredictionError, random_record
from prunesweep.models.latency.table import Grid, LatencyTable
from prunesweep.models.latency.timing import Setting
from tests.generate import FAMILIES, random_arch
from tests.golden.conftest import cases

BLOCK = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=16)
NONE = Block(src=0, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=0)


def vit(*blocks: Block, width: int = 8) -> Arch:
    """A ViT on 2x3 patches with a class token."""
    data = {
        "format": "prunesweep/arch/1",
        "family": "vit",
        "source": "test",
        "img_size": [4, 6],
        "patch_size": [2, 2],
        "in_chans": 1,
        "num_classes": 3,
        "stages": [{"width": width, "grid": [2, 3], "blocks": []}],
    }
    data["stages"][0]["blocks"] = [dataclasses.asdict(block) for block in blocks]  # type: ignore[index]
    return Arch.from_dict(data)


def random_grid(seed: int, **axes: tuple[int, ...]) -> Grid:
    return Grid(axes, np.random.default_rng(seed).random([len(points) for points in axes.values()]))


def synthetic(**grids: Grid) -> LatencyTable:
    """A table of random numbers for ``vit``, with blocks over all widths of ``BLOCK``."""
    attn = random_grid(0, embed=(4, 8), heads=(0, 1, 2), qk=(2, 4), v=(1, 2, 4), mlp=(0, 4, 16))
    return LatencyTable(
        setting=Setting(batch=2),
        device_name="none",
        torch="2",
        source=vit(BLOCK, BLOCK),
        overhead=Grid({"stages.0": (4, 8)}, np.array([3.0, 5.0])),
        stages=({"attn": attn, **grids},),
    )


# interpolation


def test_interpolation_is_exact_on_the_grid() -> None:
    grid = random_grid(1, a=(0, 3, 4), b=(5,), c=(1, 2, 7, 20))
    for i, j, k in product(range(3), range(1), range(4)):
        at = {"a": grid.axes["a"][i], "b": grid.axes["b"][j], "c": grid.axes["c"][k], "other": -1}
        assert grid("x", at) == grid.values[i, j, k]


def test_interpolation_reproduces_functions_linear_in_every_axis() -> None:
    def f(a: float, b: float, c: float) -> float:
        return (2 + 3 * a) * (1 - b) * (0.5 + c) + a * b

    axes = {"a": (0, 2, 7), "b": (1, 10), "c": (3, 4, 9, 30)}
    grid = Grid(axes, np.array([f(*x) for x in product(*axes.values())]).reshape(3, 2, 4))
    random = Random(0)
    for _ in range(50):
        at = {name: random.uniform(points[0], points[-1]) for name, points in axes.items()}
        assert grid("x", at) == pytest.approx(f(**at), rel=1e-12)


def test_between_two_points_it_is_their_mix() -> None:
    grid = Grid({"a": (10, 20, 40)}, np.array([1.0, 3.0, 4.0]))
    assert [grid("x", {"a": x}) for x in (10, 15, 20, 25, 40)] == [1, 2, 3, 3.25, 4]


@pytest.mark.parametrize("x", [9, 41])
def test_out_of_range_names_axis_value_and_range(x: int) -> None:
    grid = Grid({"qk": (10, 20, 40)}, np.zeros(3))
    with pytest.raises(UserError, match=rf"blocks\[3\]\.qk = {x}: outside 10\.\.40"):
        grid("blocks[3]", {"qk": x})
    assert not grid.covers({"qk": x})


# predictions


def test_a_prediction_is_the_hand_sum_of_blocks_and_overhead() -> None:
    conv, residual = random_grid(2, embed=(4, 8), conv=(1, 5)), random_grid(3, embed=(4, 8))
    table = synthetic(conv3x3=conv, norm_residual=residual)
    attn = table.stages[0]["attn"].values
    blocks = (
        dataclasses.replace(BLOCK, heads=1, v=2, mlp=4),
        dataclasses.replace(BLOCK, v=(1, 3)),  # mean 2
        dataclasses.replace(NONE, mixer="conv3x3", v=3, mlp=16),
        dataclasses.replace(NONE, norm_residual=True, mlp=4),
    )
    want = [
        attn[1, 1, 1, 1, 1],
        attn[1, 2, 1, 1, 2],
        attn[1, 0, 0, 0, 2] + conv.values[1].mean(),
        attn[1, 0, 0, 0, 1] + residual.values[1],
    ]
    assert table.predict(vit(*blocks)) == pytest.approx(5 + sum(want), rel=1e-12)
    assert table.predict(vit(BLOCK, width=6)) == pytest.approx(4 + attn[:, 2, 1, 2, 2].mean(), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
def test_a_table_of_macs_predicts_macs(family: str, seed: int) -> None:
    """Every width, mixer, window, reduction and stage: MACs are linear in each, so interpolation must be exact.

    But for tokens, and for heads that are mixed: of these at the measured points alone.
    """
    source = random_arch(Random(seed), family)
    plans = any(block.tokens is not None for block in source.blocks)
    table = macs_table(source, ms_per_gmac=1e9, batch=2, token_points=2 if plans else 0)
    for arch in [source, *(random_record(table, Random(i)) for i in range(5))]:
        heads = table.stages[0]["attn"].axes["heads"] if family == "cait" else range(10)
        tokens = (None, arch.tokens, arch.prefix_tokens + 1)
        if all(block.tokens in tokens and (not block.heads or block.heads in heads) for block in arch.blocks):
            assert table.predict(arch) == pytest.approx(2 * cost(arch).macs, rel=1e-9), arch.to_json()


def test_token_plans_are_an_axis_of_their_own() -> None:
    plan = dataclasses.replace(BLOCK, tokens=4, merge="dense")
    with pytest.raises(UserError, match=r"blocks\[1\] needs 'merge_dense' latencies of stage 0"):
        macs_table(vit(BLOCK), ms_per_gmac=1).predict(vit(BLOCK, plan))
    table = macs_table(vit(BLOCK), ms_per_gmac=1e9, token_points=6)
    assert table.stages[0]["attn"].axes["tokens"] == (2, 4, 6, 7)
    assert table.predict(vit(BLOCK, plan)) == pytest.approx(cost(vit(BLOCK, plan)).macs)


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_gains_are_backward_differences(family: str) -> None:
    source = random_arch(Random(5), family, ragged=False, missing=False, extras=False)
    table = macs_table(source, ms_per_gmac=1e9)
    gains, macs = table.unit_gains(source), cost(source).macs
    assert {name for name in gains if name.endswith("embed")} == {
        f"stages.{s}.embed" for s in range(len(source.stages))
    }
    index = 0
    for s, stage in enumerate(source.stages):
        narrower = dataclasses.replace(stage, width=stage.width - 1)
        assert gains[f"stages.{s}.embed"] == pytest.approx(macs - cost(_with_stage(source, s, narrower)).macs)
        for b, block in enumerate(stage.blocks):
            attends = block.mixer == "attn"
            own = {"attn": ["heads", "qk", "v"], "sepconv": ["v"], "xca": ["heads"]}.get(block.mixer, [])
            for kind in (*own, "mlp", *(["sr"] if block.sr else [])):
                less = getattr(block, kind) - 1
                want = 0.0
                if less or kind in ("heads", "mlp"):
                    change: dict[str, Any] = {kind: less}
                    if kind == "heads" and less == 0:
                        gone = {"mixer": "none", "heads": 0, "qk": 0, "v": 0, "scale": 0.0, "sr": 0}
                        change = {**gone, "shifted": False, "whole_map": False}
                    blocks = (*stage.blocks[:b], dataclasses.replace(block, **change), *stage.blocks[b + 1 :])
                    want = macs - cost(_with_stage(source, s, dataclasses.replace(stage, blocks=blocks))).macs
                assert gains[f"blocks.{index}.{kind}"] == pytest.approx(want), kind
            if attends:
                both = gains[f"blocks.{index}.qk"] + source.qk_rows * gains[f"blocks.{index}.v"]
                assert gains[f"blocks.{index}.attn"] == pytest.approx(both / block.heads)
            index += 1


def _with_stage(arch: Arch, s: int, stage: Any) -> Arch:
    return dataclasses.replace(arch, stages=(*arch.stages[:s], stage, *arch.stages[s + 1 :]))


def test_gains_are_never_negative_and_0_at_the_edge() -> None:
    table = synthetic()
    table.stages[0]["attn"].values[:, :, :, :, 2] = 0  # the widest MLP measures as fastest
    gains = table.unit_gains(vit(BLOCK, dataclasses.replace(BLOCK, qk=2, mlp=4)))
    assert gains["blocks.0.mlp"] == 0
    assert gains["blocks.1.qk"] == 0
    assert gains["blocks.1.mlp"] >= 0
    assert min(gains.values()) >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "swin"}, "family = 'swin': the latency table was measured with 'vit'"),
        ({"img_size": (8, 12), "patch_size": (4, 4)}, "img_size = (8, 12)"),
        ({"qk_norm": True}, "qk_norm = True"),
    ],
)
def test_records_of_another_kind_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        synthetic().predict(dataclasses.replace(vit(BLOCK), **change))
    assert message in str(error.value)


def test_another_number_of_classes_is_no_other_kind() -> None:
    table = synthetic()
    assert table.predict(dataclasses.replace(vit(BLOCK), num_classes=9)) == table.predict(vit(BLOCK))


# files


def test_a_saved_table_is_the_same(tmp_path: Path) -> None:
    error = PredictionError((1.0, 2.0, 4.0), (1.0, 2.5, 3.0))
    table = dataclasses.replace(
        macs_table(random_arch(Random(3), "swin"), ms_per_gmac=1e9, batch=4), check=error.to_dict()
    )
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again.to_dict() == table.to_dict()
    assert (again.setting, again.source, again.check) == (table.setting, table.source, table.check)
    arch = random_record(table, Random(0))
    assert again.predict(arch) == table.predict(arch)


def edit(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(synthetic().to_dict()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edit(lambda d: d.update(uint="s")), "unknown key 'uint'; known: format, unit"),
        (edit(lambda d: d.update(format="prunesweep/latency/9")), "this version reads 'prunesweep/latency/1'"),
        (edit(lambda d: d.update(unit="s")), "table.unit = 's'"),
        (edit(lambda d: d.pop("overhead")), "table lacks overhead"),
        (edit(lambda d: d["setting"].update(bath=1)), "did you mean 'batch'?"),
        (edit(lambda d: d["setting"].update(batch=0)), "batch = 0"),
        (edit(lambda d: d["stages"].append({})), "one entry for each of 1 stages"),
        (edit(lambda d: d["stages"][0].update(conv5x5={})), "did you mean 'conv"),
        (edit(lambda d: d["stages"][0]["attn"]["axes"].pop("qk")), "table.stages[0].attn.axes lacks qk"),
        (
            edit(lambda d: d["stages"][0]["attn"]["axes"].update(qk=[4, 2])),
            "axes.qk = [4, 2]: must be a list of rising",
        ),
        (edit(lambda d: d["stages"][0]["attn"]["axes"].update(qk=[4])), "has shape (2, 3, 2, 3, 3): its axes need"),
        (edit(lambda d: d["overhead"].update(values=[1, math.nan])), "all finite"),
        (edit(lambda d: d["overhead"].update(values=["a", 1])), "nested list of numbers"),
        ([], "table: must be a JSON object, got list"),
    ],
)
def test_a_damaged_table_says_where(data: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        LatencyTable.from_dict(data)
    assert message in str(error.value)


def test_a_missing_table_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the latency table"):
        LatencyTable.load(tmp_path / "none.json")


# NViT's files


def made_up() -> dict[str, Any]:
    random = Random(0)

    def mlps() -> dict[str, float]:
        return {f"MLP_{m}": random.random() for m in (1, 8, 16)}

    return {
        f"EMB_{e}": {f"QK_{h}_{q}": {f"V_{v}": mlps() for v in (1, 4)} for h in (1, 2) for q in (1, 2, 4)}
        for e in (4, 8)
    }


def test_nvits_format_round_trip() -> None:
    data = made_up()
    table = from_nvit(data, source=vit(BLOCK, BLOCK), setting=Setting(batch=256), device_name="V100")
    axes = {"embed": (0, 4, 8), "heads": (1, 2), "qk": (1, 2, 4), "v": (1, 4), "mlp": (0, 8, 16)}
    assert table.stages[0]["attn"].axes == axes
    again = to_nvit(table)
    assert _leaves(again).keys() == _leaves(data).keys()
    assert list(_leaves(again).values()) == pytest.approx(list(_leaves(data).values()), rel=1e-15)


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in data.items():
        found |= _leaves(value, f"{prefix}/{key}") if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return found


def test_nvits_seconds_are_milliseconds_here_mlp_1_is_none_and_width_0_costs_nothing() -> None:
    data = made_up()
    table = from_nvit(data, source=vit(BLOCK, BLOCK), setting=Setting(batch=256), device_name="V100")
    cell = data["EMB_8"]["QK_2_4"]["V_4"]
    whole = vit(BLOCK, dataclasses.replace(BLOCK, mlp=0))
    assert table.predict(whole) == pytest.approx(1e3 * (cell["MLP_16"] + cell["MLP_1"]))
    half = 1e3 * data["EMB_4"]["QK_2_4"]["V_4"]["MLP_16"] / 2
    assert table.predict(vit(BLOCK, width=2)) == pytest.approx(half)
    with pytest.raises(UserError, match=r"blocks\[0\].heads = 0: outside 1\.\.2"):
        table.predict(vit(dataclasses.replace(NONE, mlp=8)))


def test_what_nvits_format_cannot_say_is_left_out_or_refused() -> None:
    table = synthetic()
    written = _leaves(to_nvit(table))
    assert len(written) == 2 * 2 * 2 * 3 * 3  # heads = 0 is left out
    assert written["/EMB_8/QK_2_4/V_4/MLP_1"] == pytest.approx(table.stages[0]["attn"].values[1, 2, 1, 2, 0] / 1e3)
    with pytest.raises(UserError, match="this table has embed, tokens"):
        to_nvit(macs_table(vit(BLOCK), ms_per_gmac=1, token_points=2))
    with pytest.raises(UserError, match="MLPs of width 1"):
        to_nvit(macs_table(vit(BLOCK), ms_per_gmac=1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"EMB_4": {"QK_1": {}}}, "key 'QK_1': must be QK_N_N"),
        ({"EMB_x": {}}, "key 'EMB_x': must be EMB_N"),
        ({"EMB_4": {"QK_1_1": 3.0}}, "must have objects down to V, got float"),
        ({"EMB_4": {"QK_1_1": {"V_1": {"MLP_1": "fast"}}}}, "has 'fast' at {'embed': 4"),
        (
            {"EMB_4": {"QK_1_1": {"V_1": {"MLP_1": 1.0}}, "QK_2_2": {"V_1": {"MLP_1": 1.0}}}},
            "needs all crossings, got 2",
        ),
    ],
)
def test_a_damaged_nvit_table_says_where(data: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_nvit(data, source=vit(BLOCK), setting=Setting(batch=1), device_name="x")
    assert message in str(error.value)


@pytest.mark.parametrize("path", cases("nvit", "_latency.json"), ids=lambda path: path.name)
def test_interpolation_and_gains_equal_the_original_codes(path: Path) -> None:
    data = json.loads(path.with_name(f"{path.name}_latency.json").read_text())
    tensors = load_file(path.with_name(f"{path.name}.safetensors"))
    table = from_nvit(data, source=vit(BLOCK), setting=Setting(batch=8), device_name="golden")
    queries = zip(tensors["lat_query"].tolist(), tensors["lat_value"], tensors["lat_unit_gain"], strict=True)
    for (embed, heads, qk, v, mlp), value, differences in queries:
        arch = vit(Block(src=0, heads=heads, qk=qk, v=v, scale=1.0, mlp=mlp), width=embed)
        assert table.predict(arch) / 1e3 == pytest.approx(float(value), abs=1e-12)
        gains = table.unit_gains(arch)
        names = ("stages.0.embed", *(f"blocks.0.{kind}" for kind in ("heads", "qk", "v", "mlp")))
        for name, difference in zip(names, differences.nan_to_num(0).tolist(), strict=True):  # NaN: off the grid
            assert gains.get(name, 0.0) / 1e3 == pytest.approx(max(difference, 0), abs=1e-12), name
