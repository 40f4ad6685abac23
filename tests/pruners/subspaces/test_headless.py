"""Backbones without a head: small models give the source's features, by a linear map where the stream is narrower."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import arch_of, cost, cut, cut_arch, export, load, save
from prunesweep.models.families import family_of
from prunesweep.pruners import feature_quality
from prunesweep.pruners.subspaces import (
    Widths,
    compress,
    compressed_arch,
    equal_shares,
    instant,
    recover,
)
from prunesweep.pruners.subspaces.calibration import check_features
from tests.generate import FAMILIES as IMAGES
from tests.generate import random_cut, random_model
from tests.pruners.subspaces.test_compress import VARIANTS, images, made, vit
from tests.pruners.subspaces.test_families import batches_of, outputs, source_of, whole

FAMILIES = [family for family in IMAGES if family_of(family).supports("streams")]
SEEDS = range(5)


def backbone_of(family: str, seed: int) -> nn.Module:
    return random_model(dataclasses.replace(arch_of(source_of(family, seed)), num_classes=0), seed)


def relative_error(source: nn.Module, small: nn.Module) -> float:
    return feature_quality(outputs(source), outputs(small)).relative_error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_full_widths_are_the_source(family: str, seed: int, tmp_path: Path) -> None:
    source = backbone_of(family, seed)
    arch, batches, wanted = arch_of(source), batches_of(source, 4), outputs(source)
    for same in (recover(source, whole(arch), batches), compress(source, Widths.uniform(arch), batches)):
        assert arch_of(same) == arch
        torch.testing.assert_close(outputs(same), wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(outputs(load(save(same, tmp_path / "same"))), outputs(same))


@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_of_a_vit_keeps_its_features(facts: dict[str, Any]) -> None:
    """At full widths exactly; with one channel of the stream less, nearly, and nearer with refits."""
    source = made(dataclasses.replace(vit(**facts), num_classes=0))
    same = compress(source, Widths.uniform(arch_of(source)), images())
    assert arch_of(same) == arch_of(source)
    x = images(16, 16, 2)[0]
    with torch.no_grad():
        torch.testing.assert_close(same(x), source(x), rtol=1e-9, atol=1e-9)
        small = compress(source, Widths.uniform(arch_of(source), embed=23), images(400, 40))
        plain = compress(source, Widths.uniform(arch_of(source), embed=23), images(400, 40), refit=False)
        fitted, projected = (feature_quality(source(x), own(x)) for own in (small, plain))
    assert arch_of(small).feature_head
    assert small(x).shape == (16, 24)
    assert fitted.relative_error < 0.2
    assert fitted.relative_error < projected.relative_error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_part_of_the_model(family: str, tmp_path: Path) -> None:
    """Its record and cost are those of a cut of the same widths; it is saved, loaded and exported as any model."""
    source = backbone_of(family, 1)
    arch = arch_of(source)
    widths = equal_shares(arch, 0.75)
    small = compress(source, widths, batches_of(source))
    record = arch_of(small)
    assert record == compressed_arch(arch, widths)
    assert record.feature_head
    assert record.num_classes == arch.stages[-1].width == outputs(small).shape[1]
    bare = dataclasses.replace(record, num_classes=0, feature_head=False)
    assert cost(record).macs - cost(bare).macs == record.stages[-1].width * record.num_classes * (1 + arch.dist_token)
    assert torch.equal(outputs(load(save(small, tmp_path / "small"))), outputs(small))
    assert export(small.float(), tmp_path / "small.pt2", "torch-export") < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_refits_bring_features_nearer_to_the_source_s(family: str) -> None:
    projected, chosen = [], []
    for seed in SEEDS:
        source, decision = backbone_of(family, seed), random_cut(Random(seed), arch_of(backbone_of(family, seed)))
        widths, batches = equal_shares(arch_of(source), 0.75), batches_of(source)
        plain, fitted = (relative_error(source, compress(source, widths, batches, refit=r)) for r in (False, True))
        projected.append(fitted / plain)
        mended = recover(source, decision, batches)
        assert arch_of(mended) == cut_arch(arch_of(source), decision)
        chosen.append(relative_error(source, mended) / relative_error(source, cut(source, decision).eval()))
    assert median(projected) < 0.6
    assert median(chosen) < {"diff": 0.6}.get(family, 0.4)  # values that go change the norm of those that stay


@pytest.mark.parametrize("family", FAMILIES)
def test_a_front_of_features(family: str) -> None:
    source = backbone_of(family, 2)
    batches = batches_of(source)
    points = instant(source, batches, (0.8, 0.5))
    for point in points:
        assert (point.kl, point.agreement) == (None, None)
        assert point.share <= point.budget
        assert outputs(point.model).shape == outputs(source).shape
        assert point.cosine is not None
        assert -1 <= point.cosine <= 1
    assert [point.budget for point in points] == [0.8, 0.5]
    large, small = points
    assert (large.relative_error or 0) < (small.relative_error or 0)


def test_features_that_do_not_depend_on_the_image_are_told() -> None:
    constant = torch.ones(20, 8) + 1e-4 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="toy: its features hardly depend on the image"):
        check_features(constant, "toy")


def test_quality_is_what_it_says() -> None:
    """Of features twice as far from their mean as the source's, the cosine is 1, and the error is as large as they."""
    source = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    mean = source.mean(0)
    assert feature_quality(source, mean + 2 * (source - mean)) == (pytest.approx(1), pytest.approx(1))
    assert feature_quality(source, source) == (pytest.approx(1), 0)
    assert feature_quality(source, mean - (source - mean)).cosine == pytest.approx(-1)
    assert feature_quality(source, mean.expand_as(source)).relative_error == pytest.approx(1)
