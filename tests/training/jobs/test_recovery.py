"""What projections of a source have in common is computed once, and kept."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import BlockCut, Cut, arch_of, build, weights_digest
from prunesweep.training import Data, open_data
from prunesweep.training.jobs.recovery import Known, Recovery
from tests.pruners.subspaces.test_compress import vit

RECOVERY = Recovery(images=96, project=True)


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits")


@pytest.fixture
def source() -> nn.Module:
    arch = vit(width=16, depth=2)
    stage = dataclasses.replace(arch.stages[0], grid=(4, 4))
    torch.manual_seed(0)
    shape = {"img_size": (8, 8), "patch_size": (2, 2), "in_chans": 1, "num_classes": 10}
    return build(dataclasses.replace(arch, stages=(stage,), **shape)).eval()


def contents(known: Known) -> dict[str, Any]:
    sums = {name: dict(own) for name, own in vars(known.statistics).items() if isinstance(own, dict)}
    return {**sums, "counts": (known.statistics.images, known.statistics.rows), "units": dict(known.units)}


def test_it_is_read_from_the_file_and_computed_again_where_that_is_damaged(
    source: nn.Module, data: Data, tmp_path: Path
) -> None:
    images, cache = list(RECOVERY.calibration(data)), tmp_path / "cache"
    computed = RECOVERY.known(source, data, images, None)
    assert not cache.exists()
    first = RECOVERY.known(source, data, images, cache)
    (file,) = cache.iterdir()
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    again = RECOVERY.known(source, data, (), cache)  # no image is read
    assert file.stat().st_mtime_ns == written
    for found in (first, again):
        torch.testing.assert_close(contents(found), contents(computed), rtol=0, atol=0)
    for damaged in (whole[:-8] + b"12345678", whole[:100], b""):
        file.write_bytes(damaged)
        RECOVERY.known(source, data, images, cache)
        found = RECOVERY.known(source, data, (), cache)
        torch.testing.assert_close(contents(found), contents(computed), rtol=0, atol=0)
    other = dataclasses.replace(RECOVERY, seed=1)
    other.known(source, data, other.calibration(data), cache)
    assert len(list(cache.iterdir())) == 2


def test_a_file_of_another_key_is_not_believed(source: nn.Module, data: Data, tmp_path: Path) -> None:
    other = dataclasses.replace(RECOVERY, images=64)
    for one in (RECOVERY, other):
        one.known(source, data, one.calibration(data), tmp_path)
    first, second = tmp_path.iterdir()
    first.write_bytes(second.read_bytes())
    for one in (RECOVERY, other):
        assert one.known(source, data, one.calibration(data), tmp_path).statistics.images == one.images


def test_parts_of_several_processes_add_up(source: nn.Module, data: Data, tmp_path: Path) -> None:
    """They are the sums of one process but for rounding, whoever makes them and in whatever order."""
    recovery = dataclasses.replace(RECOVERY, images=300)
    assert recovery.batches(data) == 5
    whole = recovery.known(source, data, recovery.calibration(data), None)
    told, weights = list[tuple[int, int]](), weights_digest(source)
    for part in (2, 0, 1):
        assert not recovery.is_summed(source, data, tmp_path, weights)
        recovery.sum_part(source, data, tmp_path, part, 3, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2), (1, 1), (1, 2), (2, 2)]
    assert recovery.is_summed(source, data, tmp_path, weights)
    found = recovery.known(source, data, (), tmp_path)  # no image is read
    assert len(list(tmp_path.iterdir())) == 1
    assert (found.statistics.images, found.statistics.rows) == (300, whole.statistics.rows)
    assert found.statistics.tokens == whole.statistics.tokens
    for name in ("streams", "heads", "hidden"):
        own, one = getattr(found.statistics, name), getattr(whole.statistics, name)
        assert own.keys() == one.keys()
        for block, tensor in own.items():
            torch.testing.assert_close(tensor, one[block], rtol=0, atol=1e-14 * one[block].abs().max().item())
    torch.testing.assert_close(dict(found.units), dict(whole.units), rtol=0, atol=0)


@pytest.mark.parametrize("gone", ["1-of-3", "1-of-3/statistics.safetensors", "1-of-3/units-1.safetensors"])
def test_parts_that_are_not_whole_are_not_believed(gone: str, source: nn.Module, data: Data, tmp_path: Path) -> None:
    recovery = dataclasses.replace(RECOVERY, images=192)
    for part in range(3):
        recovery.sum_part(source, data, tmp_path, part, 3)
    (parts,) = tmp_path.iterdir()
    if gone.endswith("safetensors"):
        (parts / gone).write_bytes((parts / gone).read_bytes()[:-8] + b"12345678")
    else:
        shutil.rmtree(parts / gone)
    images = list(recovery.calibration(data))
    found = recovery.known(source, data, images, tmp_path)
    torch.testing.assert_close(contents(found), contents(Known.of(source, images)), rtol=0, atol=0)
    assert not parts.exists()


def test_a_model_is_the_same_from_the_file(source: nn.Module, data: Data, tmp_path: Path) -> None:
    decision = Cut(embed=(tuple(range(10)),), blocks=(BlockCut(mlp=tuple(range(12))), BlockCut()))
    images = list(RECOVERY.calibration(data))
    models = []
    for _ in range(2):
        known = RECOVERY.known(source, data, images, tmp_path)
        models.append(RECOVERY.model(source, decision, images, known=known))
    models.append(RECOVERY.model(source, decision, images))
    assert arch_of(models[0]).stages[0].width == 10
    x = torch.cat([x for x, _ in images])
    with torch.no_grad():
        wanted, *got = (model(x) for model in models)
    assert all(torch.equal(one, wanted) for one in got)
