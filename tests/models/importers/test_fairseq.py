from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunesweep.models import Arch, UserError
from prunesweep.models.families.lm import lm_arch
from prunesweep.models.importers import import_checkpoint
from tests.generate import random_images, random_model

Weights = dict[str, torch.Tensor]


def model_of(tied: str) -> nn.Module:
    arch = lm_arch(words=30, cutoffs=(6, 15), width=16, depth=2, heads=4, mlp=24, source="fairseq")
    arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, tied=tied))
    return random_model(arch, 0, torch.float32)


def layout(model: nn.Module) -> Weights:
    """fairseq's names; a projection that the softmax has to itself is an ordinary linear layer, (d, D)."""
    arch: Arch = model.arch
    weights = {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.tensor([0.0])}
    for b in range(len(arch.bands)):
        weights[f"decoder.embed_tokens.embeddings.{b}.0.weight"] = model.words.tables[b].weight
        weights[f"decoder.embed_tokens.embeddings.{b}.1.weight"] = model.words.projections[b].weight
    softmax = "decoder.adaptive_softmax."
    weights |= {f"{softmax}head.word_proj.weight": model.table(0), f"{softmax}version": torch.tensor([1])}
    weights[f"{softmax}head.class_proj.weight"] = model.clusters.weight
    for j in range(len(arch.bands) - 1):
        projection = model.projection(j + 1)
        weights[f"{softmax}tail.{j}.0.weight"] = projection if arch.text.tied == "all" else projection.T
        weights[f"{softmax}tail.{j}.2.weight"] = model.table(j + 1)
    names = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "attn.proj": "self_attn.out_proj"}
    names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for i, block in enumerate(model.blocks):
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                weights[f"decoder.layers.{i}.{theirs}.{kind}"] = getattr(block.get_submodule(ours), kind)
            for part, own in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                weights[f"decoder.layers.{i}.self_attn.{part}_proj.{kind}"] = own
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def written(path: Path, weights: Weights, **beside: object) -> Path:
    torch.save({"model": weights, **beside}, path / "lm.pt")
    return path / "lm.pt"


@pytest.mark.parametrize("tied", ["all", "tables", "none"])
@torch.no_grad()
def test_what_is_shared_is_found_out(tied: str, tmp_path: Path) -> None:
    model = model_of(tied)
    found = import_checkpoint(written(tmp_path, layout(model)), "fairseq", heads=4)
    assert found.arch == model.arch
    words = random_images(model.arch, 0)
    torch.testing.assert_close(found(words), model(words), rtol=0, atol=1e-6)


def test_options_of_a_trusted_file_are_used(tmp_path: Path) -> None:
    options = {
        "decoder_attention_heads": 8,
        "tokens_per_sample": 64,
        "activation_fn": "gelu",
        "no_scale_embedding": True,
    }
    file = written(tmp_path, layout(model_of("all")), args=argparse.Namespace(**options))
    arch = import_checkpoint(file, "fairseq", trust=True).arch
    assert (arch.blocks[0].heads, arch.tokens, arch.act, arch.text.embed_scale) == (8, 64, "gelu", 1.0)
    with pytest.raises(UserError, match="heads = 4: the file's options say 8"):
        import_checkpoint(file, "fairseq", trust=True, heads=4)


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Weights], Weights]:
    def edit(weights: Weights) -> Weights:
        new = change(weights.pop(f"decoder.{key}"))
        return weights if new is None else {**weights, f"decoder.{key}": new}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changed("layers.0.fc2.bias", lambda _: None), "no key 'decoder.layers.0.fc2.bias'"),
        (
            changed("adaptive_softmax.tail.1.2.weight", lambda t: t + 1),
            "shares some tables with the input and others not",
        ),
        (changed("adaptive_softmax.tail.0.0.weight", lambda t: t + 1), r"has shape \[16, 4\], expected \[4, 16\]"),
        (changed("layers.0.self_attn.v_proj.weight", lambda t: t[1:]), r"has shape \[15, 16\], expected \[16, 16\]"),
        (lambda w: {**w, "decoder.layer_norm.weight": torch.ones(16)}, "does not know: decoder.layer_norm.weight"),
        (lambda w: {**w, "cls_token": torch.ones(1, 1, 4)}, "does not know: cls_token"),
    ],
)
def test_what_does_not_fit_is_named(edit: Callable[[Weights], Weights], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_checkpoint(written(tmp_path, edit(layout(model_of("all")))), "fairseq", heads=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give heads"),
        ({"heads": 3}, "heads = 3: must divide the width of the attention, 16"),
        ({"heads": (4, 4)}, "one number of heads for all blocks"),
        ({"heads": 4, "img_size": 224}, "layout 'fairseq' is of texts"),
    ],
)
def test_what_is_said_must_fit(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_checkpoint(written(tmp_path, layout(model_of("all"))), "fairseq", **given)


def test_other_kinds_of_model_are_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(decoder_attention_heads=4, decoder_learned_pos=True)
    file = written(tmp_path, layout(model_of("all")), args=options)
    with pytest.raises(UserError, match="option decoder_learned_pos is True: only models with False"):
        import_checkpoint(file, "fairseq", trust=True)
