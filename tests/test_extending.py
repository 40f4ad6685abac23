"""A model family, a pruning method and a search variable from outside the package, and a search that uses them all.

This file is what CONTRIBUTING's "add a family", "add a method" and "add an axis" describe, each in one class or object.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer, register_model
from torch import nn

from prunesweep.models import Arch, arch_of, cost, cut, families, load, num_params, read_arch, save
from prunesweep.models.families.vit import HeteroBlock, VisionTransformerFamily
from prunesweep.pruners import METHODS, Scores, WidthMethod, baselines, vector_sizes
from prunesweep.pruners import register as register_method
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.task import run_task
from prunesweep.search.space import axes
from tests.generate import random_cut, random_images
from tests.models.test_counting import counted
from tests.oracle import masked
from tests.search.execution.test_task import begin


class MirrorViT(VisionTransformer):
    """A ViT that sees its images mirrored."""

    def forward_features(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return super().forward_features(x.flip(-1), **options)


@register_model
def mirror_vit(pretrained: bool = False, **options: Any) -> MirrorViT:
    """Make a small source of the family, under a name that timm knows."""
    known = {name: value for name, value in options.items() if not name.startswith(("pretrained", "cache"))}
    model = MirrorViT(**{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3} | known)
    middle = (0.5,) * model.patch_embed.proj.in_channels
    model.pretrained_cfg = {"architecture": "mirror_vit", "mean": middle, "std": middle}
    return model


class MirrorFamily(VisionTransformerFamily):
    """Another module of timm's shape: its tensors, spaces and costs are those of a ViT."""

    name = "mirror"
    timm_classes = (MirrorViT,)
    capabilities = frozenset({"images", "width", "depth", "global_attention", "mixed_heads"})

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> MirrorViT:
        (stage,) = arch.stages

        def block_fn(*, depth: int, drop_path: float, act_layer: Any, norm_layer: Any, **_: Any) -> HeteroBlock:
            layers = {"act_layer": act_layer, "norm_layer": norm_layer}
            return HeteroBlock(arch, stage.blocks[depth], drop_path=drop_path, **layers)

        return MirrorViT(
            img_size=arch.img_size,
            patch_size=arch.patch_size,
            in_chans=arch.in_chans,
            num_classes=arch.num_classes,
            embed_dim=stage.width,
            depth=len(stage.blocks),
            num_heads=1,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=arch.norm_eps),
            block_fn=block_fn,
        )


def score_by_place(model: nn.Module, batches: Any, *, progress: Any = None) -> Scores:
    """The later a unit, the more important it is."""
    arch = arch_of(model)
    sizes = vector_sizes(arch, baselines.KINDS)
    ranks = {name: torch.arange(1, size + 1, dtype=torch.float64) for name, size in sizes.items()}
    return Scores(ranks, {"method": "by-place", "arch": arch.hash})


METHOD = WidthMethod(
    name="by-place",
    description="keeps the last units of every vector",
    paper="a test",
    families=("mirror", "vit"),
    score=score_by_place,
    kinds=baselines.KINDS,
)


class HeadWeight(axes.Axis):
    """A factor on the saliency of heads: what is above 1 keeps heads, and gives MLP units for them."""

    def apply(self, draft: axes.Draft, point: Any, source: axes.ScoredSource) -> axes.Draft:
        return dataclasses.replace(draft, weights=(*draft.weights, ("heads", float(point[self.name]))))


AXIS = HeadWeight(
    name="head_weight",
    meaning="factor on the saliency of heads",
    default=(1.0, 1.0),
    limits=axes.POSITIVE,
    neutral=1.0,
    log=True,
)


@pytest.fixture
def extended() -> Iterator[None]:
    families.register(MirrorFamily())
    register_method(METHOD)
    axes.register(AXIS)
    try:
        yield
    finally:
        axes.unregister(AXIS.name)
        del METHODS[METHOD.name]
        del families.FAMILIES[MirrorFamily.name]


def test_a_family_from_outside_is_read_built_counted_cut_and_stored(extended: None, tmp_path: Path) -> None:
    model = timm.create_model("mirror_vit", num_classes=5)
    model = model.double().eval()
    arch = Arch.from_timm(model)
    assert arch.family == "mirror"
    assert Arch.from_json(arch.to_json()) == arch
    x = random_images(arch, 0)
    assert cost(arch).params == num_params(model)
    assert cost(arch).macs == counted(model, x[:1])
    decision = random_cut(Random(0), arch)
    small = cut(model, decision)
    assert type(small) is MirrorViT
    with torch.no_grad(), masked(model, decision):
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-9)
    again = load(save(small.float(), tmp_path / "small"))
    assert read_arch(tmp_path / "small").family == "mirror"
    with torch.no_grad():
        assert torch.equal(again.eval()(x.float()), small.eval()(x.float()))


def test_two_candidates_of_a_search_with_a_family_a_method_and_an_axis_from_outside(
    extended: None, tiny: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    source = {"model": "mirror_vit", "args": {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}}
    config = tiny(
        source=source,
        scores={"method": "by-place"},
        space={"skip": [0, 0], "head_weight": [0.1, 10.0]},
        search={"trials": 2},
    )
    run, coordinator = begin(config, tmp_path / "cache", tmp_path / "run")
    while (unit := coordinator.next()) is not None:
        assert 0.1 <= unit.point["head_weight"] <= 10
        assert run_task(run.path, unit)["state"] == "finished"
        coordinator.complete(unit.id)
    assert coordinator.done
    assert len(run.results()) == 2
    for result in run.results():
        arch = Arch.from_json((run.trial(result.id) / "arch.json").read_text())
        assert (arch.family, arch.hash) == ("mirror", result.arch_hash)
        assert cost(arch).macs == result.macs < run.metadata()["source"]["macs"]
    front = json.loads((run / "front.json").read_text())
    assert front
    assert all(isinstance(load(run / point["model"]), MirrorViT) for point in front)
    assert run.metadata()["scores"].keys() == {"by-place"}


def test_what_was_added_can_be_taken_away(tiny: Callable[..., SearchConfig]) -> None:
    assert "mirror" not in families.FAMILIES
    assert "by-place" not in METHODS
    assert "head_weight" not in axes.AXES
