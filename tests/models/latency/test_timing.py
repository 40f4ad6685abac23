from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from prunesweep.models import Arch, UserError, build
from prunesweep.models.latency.building import build_table, macs_table
from prunesweep.models.latency.prediction import PredictionError, kendall, prediction_error, random_record, spearman
from prunesweep.models.latency.timing import ROUNDS, Setting, Timing, measure, measure_all, time_calls
from tests.generate import FAMILIES, random_arch
from tests.models.latency.test_table import BLOCK, NONE, vit


def test_measure_leaves_the_model_and_the_threads_as_they_were() -> None:
    model, threads = build(vit(BLOCK)).train(), torch.get_num_threads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    model.norm.register_forward_hook(
        lambda *_: seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
    )
    found = measure(model, batch=3, dtype=torch.bfloat16, threads=threads + 1, warmup=1, repeats=5, min_seconds=0)
    assert seen
    assert set(seen) == {(threads + 1, True)}
    assert (torch.get_num_threads(), model.training, torch.is_inference_mode_enabled()) == (threads, True, False)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert found.batch == 3
    assert found.median_ms > 0
    assert found.iqr_ms >= 0
    assert found.calls >= 5


def test_a_timing_is_the_median_and_the_distance_of_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:  # takes 1, 2, 3, ... ms
        call.calls += 1  # type: ignore[attr-defined]
        clock[0] += call.calls / 1e3  # type: ignore[attr-defined]

    call.calls = -2  # type: ignore[attr-defined]  # one call to warm up, one to see how long it takes
    monkeypatch.setattr("prunesweep.models.latency.timing.time.perf_counter", lambda: clock[0])
    (found,) = time_calls([call], Setting(batch=6), warmup=1, repeats=5, min_seconds=0)
    assert found == Timing(6, pytest.approx(3), pytest.approx(2), 5)
    assert found.throughput == pytest.approx(2000)


def test_models_take_turns_and_progress_says_so() -> None:
    order: list[str] = []
    steps: list[tuple[int, int]] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    options: dict[str, Any] = {"warmup": 1, "repeats": 2 * ROUNDS, "min_seconds": 0}
    time_calls(calls, Setting(batch=1), progress=lambda *step: steps.append(step), **options)
    assert "".join(order) == "aabb" * (ROUNDS + 1)
    total = 2 * (ROUNDS + 1)
    assert steps == [(i, total) for i in range(1, total + 1)]


def test_calls_go_on_until_enough_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 0.01

    monkeypatch.setattr("prunesweep.models.latency.timing.time.perf_counter", lambda: clock[0])
    (found,) = time_calls([call], Setting(batch=1), warmup=1, repeats=1, min_seconds=0.5)
    assert found.calls == 50


def test_out_of_memory_is_a_user_error() -> None:
    def call() -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with pytest.raises(UserError, match="batch = 4096: does not fit into the memory of cpu"):
        time_calls([call], Setting(batch=4096))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch = 0: must be a whole number of at least 1"),
        ({"device": "tpu"}, "device = 'tpu': must be cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device = 'cuda:99': this machine has"),
        ({"dtype": torch.int8}, "dtype = 'int8': must be one of float32, bfloat16, float16"),
        ({"threads": 0}, "threads = 0"),
    ],
)
def test_impossible_conditions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        measure(build(vit(BLOCK)), **{"batch": 1, **options})
    assert message in str(error.value)


def sources() -> list[Arch]:
    """One small record of each family with all that is measured apart."""
    swin = random_arch(Random(2), "swin", missing=False, extras=False)
    stage = dataclasses.replace(swin.stages[0], blocks=(dataclasses.replace(swin.blocks[0], shifted=True),))
    candidates = (random_arch(Random(seed), "pvt_v2") for seed in range(99))
    pvt = next(arch for arch in candidates if len(arch.stages) == 2 and any(block.sr for block in arch.blocks))
    return [vit(BLOCK, BLOCK), dataclasses.replace(swin, stages=(stage,)), pvt]


@pytest.mark.parametrize("source", sources(), ids=lambda arch: arch.family)
def test_a_measured_table_covers_its_family(source: Arch) -> None:
    steps: list[tuple[int, int]] = []
    table = build_table(
        source,
        Setting(batch=2, threads=1),
        points=2,
        token_points=2 if source.family == "vit" else 0,
        repeats=1,
        min_seconds=0,
        progress=lambda *step: steps.append(step),
    )
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    grids = table.stages[0]
    expected = {"vit": {"merge_sparse", "merge_dense"}, "swin": {"attn_shifted"}}.get(source.family, set())
    assert grids.keys() == {"attn", "conv1x1", "conv3x3", "norm_residual"} | expected
    for stage in table.stages:
        values = np.moveaxis(stage["attn"].values, list(stage["attn"].axes).index("heads"), 0)
        assert (values[0, ..., 0] == 0).all()  # neither attention nor MLP
        assert (values[1:] > 0).all()
        assert (values[0, ..., 1:] > 0).all()
        assert all((grid.values > 0).all() for name, grid in stage.items() if "attn" not in name)
    assert (table.overhead.values > 0).all()
    assert table.predict(source) > 0
    found = prediction_error(table, n=3, repeats=1, min_seconds=0)
    assert len(found.measured) == 3
    assert min(found.predicted + found.measured) > 0
    assert 0 <= found.median_error <= found.max_error


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_source_without_attention_and_the_number_of_threads_in_the_header() -> None:
    source = vit(dataclasses.replace(NONE, mlp=16))
    table = build_table(source, Setting(batch=1), points=2, repeats=1, min_seconds=0)
    assert table.setting.threads == 1
    assert table.stages[0]["attn"].axes == {"embed": (2, 8), "heads": (0,), "qk": (0,), "v": (0,), "mlp": (0, 4, 16)}
    assert table.predict(source) == table.overhead.values[1] + table.stages[0]["attn"].values[1, 0, 0, 0, 2]
    with pytest.raises(UserError, match="heads = 2: outside 0..0"):
        table.predict(vit(BLOCK))


def test_axes_start_at_a_group_end_at_the_source_and_hold_what_is_absent() -> None:
    source = Arch.from_timm("deit_tiny_patch16_224")
    axes = macs_table(source, ms_per_gmac=1).stages[0]["attn"].axes
    assert axes == {"embed": (1, 192), "heads": (0, 1, 3), "qk": (1, 64), "v": (1, 64), "mlp": (0, 1, 768)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "points = 1: must be at least 2"),
        ({"token_points": 1}, "token_points = 1"),
        ({"least": {"qkv": 3}}, "did you mean 'qk'?"),
        ({"least": {"qk": 0}}, "least.qk = 0: must be at least 1"),
    ],
)
def test_impossible_tables(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_table(vit(BLOCK), Setting(batch=1), **options)
    assert message in str(error.value)


# the check


def test_errors_of_a_prediction() -> None:
    found = PredictionError((1.0, 3.0, 2.2, 8.0), (1.0, 2.0, 2.0, 10.0))
    assert found.median_error == pytest.approx(0.15)
    assert found.max_error == pytest.approx(0.5)
    assert found.bias == pytest.approx(0.05)
    assert found.to_dict()["predicted"] == [1.0, 3.0, 2.2, 8.0]


def test_rank_correlations() -> None:
    x = [3.0, 1.0, 2.0, 10.0]
    assert spearman(x, [30, 10, 20, 21]) == pytest.approx(0.8)
    assert kendall(x, [30, 10, 20, 21]) == pytest.approx(4 / 6)
    for correlation in (spearman, kendall):
        assert correlation(x, [math.exp(value) for value in x]) == pytest.approx(1)
        assert correlation(x, [-value for value in x]) == pytest.approx(-1)
    assert kendall([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_records_can_be_built_and_predicted(family: str) -> None:
    table = macs_table(random_arch(Random(8), family, extras=False), ms_per_gmac=1)
    archs = [random_record(table, Random(seed)) for seed in range(40)]
    for arch in archs:
        arch.validate()
        assert table.predict(arch) > 0
    assert len({arch.hash for arch in archs}) > 5
    assert random_record(table, Random(3)) == archs[3]


def test_several_models_give_one_timing_each() -> None:
    found = measure_all([build(vit(BLOCK)), build(vit(BLOCK, BLOCK))], Setting(batch=2), repeats=1, min_seconds=0)
    assert [timing.batch for timing in found] == [2, 2]
