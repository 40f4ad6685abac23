"""Backbones without a head: their output is features, and stays as wide where the residual stream is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import onnxruntime
import pytest
import timm
import torch

from prunesweep.models import (
    Arch,
    BlockCut,
    Cut,
    UserError,
    arch_of,
    build,
    cost,
    cut,
    cut_arch,
    load,
    load_provenance,
    save,
)
from prunesweep.models.builder import num_params
from prunesweep.models.io.export import export
from prunesweep.models.io.hub import card
from tests.generate import FAMILIES, random_arch, random_cut, random_images, random_model
from tests.models.test_counting import counted_macs
from tests.oracle import masked

TIMM = [
    ("vit_small_patch14_dinov2", {"img_size": 28, "depth": 2}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    ("vit_small_patch16_224.dino", {"img_size": 32, "depth": 2}),
    ("vit_base_patch16_224.mae", {"img_size": 32, "depth": 2}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 3)}),
    ("pvt_v2_b0", {"embed_dims": (8, 10, 20, 16), "num_heads": (1, 2, 5, 8)}),
]


def headless(family: str, seed: int) -> Arch:
    """A backbone whose features are those of its stream: a neck has its own, however narrow that is."""
    return dataclasses.replace(random_arch(Random(seed), family), num_classes=0, neck=0)


def narrowed(family: str, seed: int) -> Cut:
    """A cut of the last stage's stream, whatever else."""
    arch = headless(family, seed)
    decision = random_cut(Random(seed), arch)
    last = tuple(range(arch.stages[-1].width - 1))
    return dataclasses.replace(decision, embed=(*(decision.embed or ())[:-1], last))


@pytest.mark.parametrize(("name", "options"), TIMM)
def test_full_record_is_the_same_function(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=0, **options).double().eval()
    arch = Arch.from_timm(model)
    assert arch.headless
    assert not arch.feature_head
    assert Arch.from_json(arch.to_json()) == arch
    ours = build(arch).double().eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    x = random_images(arch, 0)
    with torch.no_grad():
        assert model(x).shape == (3, arch.outputs)
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


def test_timm_s_names_of_backbones_are_read() -> None:
    assert Arch.from_timm("vit_small_patch14_dinov2").num_classes == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
def test_masked_source_equals_cut_model(family: str, seed: int) -> None:
    """In the source's features: those of channels that went are 0 in both."""
    arch = headless(family, seed)
    model, x, decision = random_model(arch, seed), random_images(arch, seed), random_cut(Random(seed), arch)
    small = cut(model, decision)
    record = arch_of(small)
    assert record == cut_arch(arch, decision)
    assert record.feature_head == (record.stages[-1].width < arch.outputs)
    kept = range(arch.outputs) if (last := (decision.embed or (None,))[-1]) is None else last
    with torch.no_grad(), masked(model, decision):
        wanted = torch.zeros(3, arch.outputs, dtype=x.dtype).index_copy(1, torch.tensor(kept), model(x)[:, list(kept)])
    with torch.no_grad():
        torch.testing.assert_close(small(x), wanted, rtol=1e-9, atol=1e-9)
        again = random_cut(Random(seed + 1), record)
        assert cut(small, again)(x).shape == (3, arch.outputs)
    assert (num_params(small), counted_macs(small.float(), record)) == (cost(record).params, cost(record).macs)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_saved_bit_equal(family: str, tmp_path: Path) -> None:
    arch = headless(family, 3)
    small = cut(random_model(arch, 3, torch.float32), narrowed(family, 3))
    assert arch_of(small).feature_head
    x = random_images(arch, 0, dtype=torch.float32)
    for number, model in enumerate((random_model(arch, 3, torch.float32), small)):
        folder = save(model, tmp_path / str(number))
        ours, theirs = load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert arch_of(ours) == arch_of(theirs) == arch_of(model)
        with torch.no_grad():
            assert torch.equal(ours(x), model(x))
            assert torch.equal(theirs(x), model(x))


@pytest.mark.parametrize(("family", "to"), [("vit", "onnx"), ("swin", "torch-export"), ("pvt_v2", "timm")])
def test_features_are_exported(family: str, to: str, tmp_path: Path) -> None:
    small = cut(random_model(headless(family, 3), 3, torch.float32), narrowed(family, 3))
    assert export(small, tmp_path / "small", to) < 1e-5
    if to == "onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "small"))
        assert [output.name for output in session.get_outputs()] == ["features"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_classifier_replaces_the_features(family: str, tmp_path: Path) -> None:
    """Also through timm's ``num_classes``; taking the classifier away again gives the narrow features."""
    arch = headless(family, 3)
    model: Any = cut(random_model(arch, 3, torch.float32), narrowed(family, 3))
    path = save(model, tmp_path / "model")
    narrow = arch_of(model).stages[-1].width
    given: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=narrow + 5)
    model.reset_classifier(narrow + 5)
    for other in (given, model):
        assert (arch_of(other).num_classes, arch_of(other).headless) == (narrow + 5, False)
    model.reset_classifier(0)
    assert (arch_of(model).num_classes, arch_of(model).outputs, arch_of(model).headless) == (0, narrow, True)
    assert load(save(model, tmp_path / "bare"))(random_images(arch, 0, dtype=torch.float32)).shape == (3, narrow)


def test_a_whole_stream_needs_no_map() -> None:
    arch = headless("vit", 3)
    assert cut_arch(arch, Cut(blocks=(BlockCut(),) * arch.depth)) == arch


def test_impossible_heads_are_refused() -> None:
    arch = headless("vit", 3)
    with pytest.raises(UserError, match="num_classes = 0: must be a whole number of at least 1"):
        dataclasses.replace(arch, feature_head=True).validate()
    with pytest.raises(UserError, match="num_classes = -1: must be a whole number of at least 0"):
        dataclasses.replace(arch, num_classes=-1).validate()
    text = random_arch(Random(0), "lm")
    with pytest.raises(UserError, match="num_classes"):
        dataclasses.replace(text, num_classes=0).validate()


def test_figures_of_features_go_with_the_weights_that_had_them(tmp_path: Path) -> None:
    facts = {"method": "subspaces", "cosine": 0.95, "relative_error": 0.1, "images": 75}
    model: Any = load(save(random_model(headless("vit", 3), 3, torch.float32), tmp_path / "model", facts))
    assert load_provenance(save(model, tmp_path / "same")) == facts
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(1.1)
    assert load_provenance(save(model, tmp_path / "other")) == {"method": "subspaces"}


def test_the_card_speaks_of_features() -> None:
    arch = cut_arch(headless("vit", 3), narrowed("vit", 3))
    text = card("me/small", arch, {"cosine": 0.95})
    assert f"| features | {arch.num_classes} |" in text
    assert "| cosine to the source's features | 0.95 |" in text
    assert "pipeline_tag: image-feature-extraction" in text
