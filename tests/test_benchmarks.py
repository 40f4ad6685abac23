"""What benchmarks compare with, and that pictures are those of the results."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.corp import corp
from benchmarks.int8 import at_random, in_basis, principal
from benchmarks.pictures import DOCS, pictures, plot
from benchmarks.subspaces import RESULT, narrowed, peak_memory, with_writers, within
from prunesweep.models import Arch, Block, Stage, arch_of, block_views, build, cost
from prunesweep.pruners.subspaces import SourceStatistics, compress, compressed_arch

UNITS, WIDTH = 24, 8  # of an MLP, and of a head's queries


def vit() -> nn.Module:
    """A model of random weights, and biases and norms that are not at their defaults."""
    blocks = tuple(Block(src=i, heads=2, qk=WIDTH, v=WIDTH, scale=WIDTH**-0.5, mlp=UNITS) for i in range(2))
    stage = Stage(width=16, grid=(3, 3), blocks=blocks)
    arch = Arch(
        family="vit",
        source="toy",
        stages=(stage,),
        img_size=(12, 12),
        patch_size=(4, 4),
        in_chans=3,
        num_classes=7,
    )
    generator, model = torch.Generator().manual_seed(0), build(arch).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (0.5 if p.ndim == 1 else 0))
    return model


@pytest.fixture
def source() -> nn.Module:
    return vit()


@pytest.fixture
def images() -> list[torch.Tensor]:
    return list(torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16))


def error(model: nn.Module, source: nn.Module, images: list[torch.Tensor]) -> float:
    """Share of what the source's logits vary that a model gets wrong."""
    with torch.no_grad():
        wanted, got = (torch.cat([own(batch) for batch in images]) for own in (source, model))
    return ((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


def test_corp_at_full_widths_is_the_source(source: nn.Module, images: list[torch.Tensor]) -> None:
    assert error(corp(source, images, qk=WIDTH, mlp=UNITS), source, images) < 1e-10


def test_corp_makes_up_for_units_and_channels_that_others_repeat(
    images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = vit()
    half, few = UNITS // 2, WIDTH // 2
    for view in block_views(source):
        attention, mlp = view.attention, view.mlp
        assert attention is not None
        assert mlp is not None
        layer = mlp.inputs[0].layer
        for tensor in (layer.weight, layer.bias):
            tensor[half:] = tensor[:half]
        mlp.out.layer.weight[:, half:] *= 0.1  # of less energy, so they go
        for rows in (attention.q, attention.k):
            for tensor in (rows.weight, rows.bias):
                assert tensor is not None
                by_head = tensor.unflatten(0, (2, WIDTH))
                by_head[:, few:] = 0.3 * by_head[:, :few]
    made_up = corp(source, images, qk=few, mlp=half)
    assert {(block.qk, block.mlp) for block in arch_of(made_up).blocks} == {(few, half)}
    assert error(made_up, source, images) < 5e-4
    monkeypatch.setattr("benchmarks.corp.SHRINKAGE", 1e9)  # nothing is made up for
    assert error(corp(source, images, qk=few, mlp=half), source, images) > 5e-3


def test_readers_stay_as_projected_where_writers_alone_are_refitted(
    source: nn.Module, images: list[torch.Tensor]
) -> None:
    statistics = SourceStatistics.collect(source, images)
    widths = narrowed(
        arch_of(source), 0.75, ("embed", "qk", "mlp")
    )  # how values are projected follows the small stream
    projected = compress(source, widths, images, statistics=statistics, refit=False)
    written = with_writers(source, widths, images, statistics)
    mine, wanted = written.state_dict(), projected.state_dict()
    changed = {name for name in mine if not torch.allclose(mine[name], wanted[name], atol=1e-6)}
    assert {name.split(".")[-2] for name in changed} == {"proj", "fc2"}
    assert error(written, source, images) < error(projected, source, images)


def test_shares_of_some_spaces_leave_the_others_whole(source: nn.Module) -> None:
    arch = arch_of(source)
    small = compressed_arch(arch, narrowed(arch, 0.5, ("qk",)))
    assert {(block.qk, block.v, block.mlp) for block in small.blocks} == {(WIDTH // 2, WIDTH, UNITS)}
    assert small.stages[0].width == arch.stages[0].width
    found = within(arch, 0.6)
    assert found is not None
    assert 0.5 < cost(compressed_arch(arch, found)).macs / cost(arch).macs <= 0.6
    assert within(arch, 0.1, ("qk",)) is None


def test_a_rotated_model_is_the_same_function(source: nn.Module, images: list[torch.Tensor]) -> None:
    for rotation in (at_random(16), principal(source, images)):
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(rotation.sum(0), torch.ones(16, dtype=torch.float64))
        turned = in_basis(source, rotation)
        assert error(turned, source, images) < 1e-10
        assert not torch.allclose(turned.state_dict()["blocks.0.mlp.fc2.weight"], vit().blocks[0].mlp.fc2.weight)


def test_a_peak_of_memory_is_seen_after_it_has_gone() -> None:
    with peak_memory() as peak:
        torch.ones(25 * 2**18).sum()  # 25 MB
    assert 20 < peak() < 60


def test_a_plot_has_every_series_with_all_its_points_inside() -> None:
    drawn = plot("title", "MACs", {"a": [(0.1, 2.0), (1, 3e-4)], "b": [(0.5, 0.02)]}, (0.1, 1))
    found = ElementTree.fromstring(drawn)
    texts = [own.text for own in found.iter("{http://www.w3.org/2000/svg}text")]
    assert {"title", "MACs", "a", "b"} <= set(texts)
    dots = [own.attrib for own in found.iter("{http://www.w3.org/2000/svg}circle")]
    _, _, wide, high = map(float, found.attrib["viewBox"].split())
    assert len(dots) == 3
    assert all(0 < float(own["cx"]) < wide and 0 < float(own["cy"]) < high for own in dots)
    assert float(dots[0]["cy"]) < float(dots[2]["cy"]) < float(dots[1]["cy"])  # the larger KL is higher


def test_the_pictures_are_those_of_the_results() -> None:
    drawn = pictures(json.loads(RESULT.read_text())["seeds"])
    assert {name: (DOCS / name).read_text() for name in drawn} == drawn
