"""Tensors of all images in bounded memory, and what is computed from them when they lie in a file."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import prunesweep
from prunesweep.models import arch_of, block_views
from prunesweep.models.families import family_of
from prunesweep.pruners.subspaces import SourceStatistics, compress, equal_shares, rank_units, recover
from prunesweep.pruners.subspaces.batches import Batches
from prunesweep.pruners.subspaces.calibration import images_of
from prunesweep.pruners.subspaces.streams import SourceStreams
from tests.generate import random_cut
from tests.pruners.subspaces.test_compress import images, made, vit
from tests.pruners.subspaces.test_families import batches_of, by_family, outputs, source_of


def files_without_a_name() -> int:
    """Open files of this process whose name is gone."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(link).endswith("(deleted)")
        except OSError:  # the listing's own
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_what_is_beyond_the_limit_lies_in_a_file_that_goes_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()  # files of other tests
    before = files_without_a_name()
    tensors = [torch.randn(5, 3), torch.randn(2, 3, 4).mT, torch.arange(6), torch.randn(1, 3).bfloat16()]
    found = Batches(iter(tensors), limit=60)
    assert (found.in_memory, files_without_a_name() - before, list(tmp_path.iterdir())) == (60, 1, [])
    assert (len(found), found.lengths) == (4, [5, 2, 6, 1])
    for some, wanted in (
        (found, tensors),
        (found[1:3], tensors[1:3]),
        (found[2:] + found[:1], [*tensors[2:], tensors[0]]),
    ):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(some, wanted, strict=True))
    part = found[3:]
    del found, some
    gc.collect()
    assert files_without_a_name() == before + 1
    assert torch.equal(part[0], tensors[3])
    del part
    gc.collect()
    assert files_without_a_name() == before


@by_family
def test_what_is_computed_from_files_is_the_same(family: str, monkeypatch: Any) -> None:
    source = source_of(family, 0)
    batches, decision = batches_of(source, 4), random_cut(Random(1), arch_of(source))
    shares = equal_shares(arch_of(source), 0.6)

    def computed() -> list[torch.Tensor]:
        statistics, units = SourceStatistics.collect(source, iter(batches)), rank_units(source, iter(batches))
        small = compress(source, shares, iter(batches), statistics=statistics, units=units)
        points = prunesweep.instant(source, iter(batches), budgets=(0.6,)) if family != "lm" else []
        models = [recover(source, decision, iter(batches)), small, *(point.model for point in points)]
        return [outputs(model) for model in models]

    wanted = computed()
    monkeypatch.setattr(Batches, "IN_MEMORY", 0)
    for got, own in zip(computed(), wanted, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-9)  # the layout in memory may be another


def test_images_of_a_loader_are_checked_and_written_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(Batches, "IN_MEMORY", 0)
    given = images(20, 8)
    kept = images_of(((batch, torch.zeros(len(batch))) for batch in given), vit())
    assert (kept.in_memory, kept.lengths) == (0, [8, 8, 4])
    assert images_of(kept, vit()) is kept
    in_memory = images_of(given, vit())
    assert in_memory.in_memory == sum(batch.nbytes for batch in given)
    single = images_of(iter(torch.cat([*given] * 4)), vit())
    assert single.lengths == [64, 16]


@by_family
def test_streams_are_those_of_the_model_whatever_is_kept(family: str) -> None:
    """Forgotten, dropped and kept streams are those that the source's blocks give, one after the other."""
    source = source_of(family, 1)
    arch, inputs = arch_of(source), batches_of(source, 2, 4)
    kept, passing = (SourceStreams(source, inputs, keep=keep) for keep in (True, False))
    with torch.no_grad():
        last = [kept.last(s) for s in range(len(arch.stages))]
        stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
        for i in (0, arch.depth - 1):
            passing.forget(i)
            assert all(map(torch.equal, passing.front(i), kept.front(i)))
            assert all(map(torch.equal, passing.middle(i), kept.middle(i)))
        family_ = family_of(arch)
        for i, view in enumerate(block_views(source, arch)):
            follows = kept.front(i + 1) if stage_of[i + 1 : i + 2] == [stage_of[i]] else last[stage_of[i]]
            for x, y in zip(kept.front(i), follows, strict=True):
                torch.testing.assert_close(family_.run_block(arch, arch.stages[stage_of[i]], view.module, x), y)
        for x, batch in zip(last[-1], inputs, strict=True):
            torch.testing.assert_close(family_.finish(source, arch, x), source(batch))


def test_models_of_one_source_share_its_streams() -> None:
    """The same models as from the images; of the source, only what reads the stream runs for the second one."""
    source, given = made(vit()).train(), images()
    decision, widths = random_cut(Random(2), arch_of(source)), equal_shares(arch_of(source), 0.5)
    streams = SourceStreams(source, Batches(given), keep=True)
    statistics, runs = SourceStatistics.collect(source, given), list[None]()
    source.get_submodule("blocks.0.mlp.act").register_forward_hook(lambda *_: runs.append(None))
    x = torch.cat(given)
    for expected in (len(given), 0):
        runs.clear()
        mended = recover(source, decision, streams)
        small = compress(source, widths, streams, statistics=statistics)
        assert len(runs) == expected
        with torch.no_grad():
            torch.testing.assert_close(mended(x), recover(source, decision, given)(x), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(small(x), compress(source, widths, given)(x), rtol=1e-9, atol=1e-9)
    assert source.training
