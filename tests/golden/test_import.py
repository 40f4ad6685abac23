"""Importers against checkpoints in the layouts of the original projects, and what those projects compute with them."""

from __future__ import annotations

import importlib.util
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, cost, load, num_params, save
from prunesweep.models.importers import LAYOUTS, import_checkpoint

from .conftest import cases

# the others have tests of their own
IMAGES = LAYOUTS.keys() - {"fairseq", "timm", "torchvision", "transformers"}
MIXERS = {"msa": "attn", "skip": "none"}


class Case:
    def __init__(self, path: Path) -> None:
        self.path, self.data = Path(f"{path}.pth"), json.loads(Path(f"{path}.json").read_text())
        self.layout: str = self.data["layout"]
        self.method, _, self.form = self.layout.partition("_")
        self.facts, self.expected = self.data["arch"], self.data["expected"]
        self.refused_global: str | None = self.data.get("refused_global")

    @property
    def importable(self) -> bool:
        """No package is missing that the file's objects need."""
        return importlib.util.find_spec((self.refused_global or "torch.").split(".")[0]) is not None

    def read(self, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
        given = {"img_size": self.facts.get("img_size"), "heads": self.data["needs"].get("num_heads")}
        config = self.data.get("config")
        given |= {"config": config and self.path.with_name(config), "trust": self.refused_global is not None}
        return import_checkpoint(self.path, self.method, dtype=dtype, **{**given, **options})

    @cached_property
    def model(self) -> nn.Module:
        """As it is in the file, which is float32."""
        return self.read()

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))


def found() -> list[Case]:
    """Every JSON file that describes a checkpoint of a layout that is known here, of a model of images."""
    paths = [p for p in cases("import", ".json") if "layout" in json.loads(Path(f"{p}.json").read_text())]
    return [case for case in map(Case, paths) if case.method in IMAGES]


CASES = found()
IMPORTABLE = [case for case in CASES if case.importable]


def each(which: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", which, ids=lambda case: case.path.stem)


def test_every_layout_has_a_case() -> None:
    assert {case.method for case in IMPORTABLE} == IMAGES - {"t2t"}  # which is tested against its equations


@each(IMPORTABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits(case: Case, dtype: torch.dtype) -> None:
    tensors, tolerance = case.tensors(), case.data["tolerance"][str(dtype).removeprefix("torch.")]
    model = case.model if dtype == torch.float32 else case.read(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        logits = model(tensors["inputs"].to(dtype))
    torch.testing.assert_close(logits.double(), tensors["logits"], rtol=0, atol=tolerance)


@each([case for case in IMPORTABLE if "logits_ema" in case.tensors()])
def test_averaged_weights(case: Case) -> None:
    tensors = case.tensors()
    with torch.no_grad():
        logits = case.read(torch.float64, ema=True)(tensors["inputs"].double())
    torch.testing.assert_close(logits, tensors["logits_ema"], rtol=0, atol=case.data["tolerance"]["float64"])


@each(IMPORTABLE)
def test_saved_and_loaded_it_gives_the_same_logits(case: Case, tmp_path: Path) -> None:
    model, inputs = case.model, case.tensors()["inputs"]
    again = load(save(model, tmp_path / "model"))
    assert arch_of(again) == arch_of(model)
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))


@each(IMPORTABLE)
def test_costs(case: Case) -> None:
    arch = arch_of(case.model)
    spent = cost(arch)
    assert spent.macs == case.expected["macs"]
    assert spent.params == num_params(case.model)
    if "params_mixed_form" in case.expected:
        assert spent.params + mixed_form_adds(arch, case) == case.expected["params_mixed_form"]
    if case.form.split("_")[-1] not in ("mixed", "full") or case.method != "spvit":  # those count the mixed form
        assert spent.params == case.expected["params"]


def mixed_form_adds(arch: Arch, case: Case) -> int:
    """Parameters that convolutions have before they are frozen, less those that they have afterwards."""
    heads, more = case.facts["num_heads"], 0
    for s, stage in enumerate(arch.stages):
        C, H = stage.width, heads if isinstance(heads, int) else heads[s]
        d = C // H
        for block in stage.blocks:
            if k := block.conv_kernel:
                more += (2 * C * C + 2 * C + 9 * H + 2 * d) - (C * d * k * k + d + 2 * d + C * d + C)
    return more


@each(IMPORTABLE)
def test_record(case: Case) -> None:
    arch, facts = arch_of(case.model), case.facts
    assert arch.num_classes == facts["num_classes"]
    assert arch.norm_eps == facts.get("norm_eps", arch.norm_eps)
    assert arch.dist_token == case.data.get("distilled", facts.get("distilled", False))
    size = facts.get("img_size", case.data["needs"].get("img_size"))
    assert arch.img_size == (size, size)
    patch = facts.get("patch_size", case.data["needs"].get("patch_size", 4))
    assert arch.patch_size == (patch, patch)
    widths = facts.get("embed_dims", [facts.get("embed_dim", 0) * 2**s for s in range(len(arch.stages))])
    assert [stage.width for stage in arch.stages] == widths
    {"nvit": check_nvit, "uvc": check_uvc, "spvit": check_spvit}.get(case.method, check_uniform)(arch, facts)


def check_nvit(arch: Arch, facts: dict[str, Any]) -> None:
    assert arch.tokens == facts["tokens"]
    got = [{"num_heads": b.heads, "qk_dim": b.qk, "v_dim": b.v, "mlp_dim": b.mlp} for b in arch.blocks]
    assert got == facts["blocks"]
    assert {b.scale for b in arch.blocks} == {facts["attn_scale"]}
    assert all(b.token_scale for b in arch.blocks)


def check_uvc(arch: Arch, facts: dict[str, Any]) -> None:
    kept = [block for block in facts["blocks"] if block["keep"]]
    assert [b.src for b in arch.blocks] == [block["index"] for block in kept]
    assert [b.v_widths for b in arch.blocks] == [tuple(map(len, block["v_dims"])) for block in kept]
    assert [b.mlp for b in arch.blocks] == [block["mlp_units"] for block in kept]
    assert {b.scale for b in arch.blocks} == {facts["attn_scale"]}


def check_spvit(arch: Arch, facts: dict[str, Any]) -> None:
    assert [b.mixer for b in arch.blocks] == [MIXERS.get(choice, choice) for choice in facts["choices"]]
    assert [b.mlp for b in arch.blocks] == facts["mlp_hidden"]
    assert all(b.norm_residual == (b.mixer == "none") for b in arch.blocks)
    heads = facts["num_heads"]
    for s, stage in enumerate(arch.stages):
        H = heads if isinstance(heads, int) else heads[s]
        assert all(b.heads == H for b in stage.blocks if b.mixer == "attn")
        if "window_size" in facts:
            assert stage.window == (min(facts["window_size"], *stage.grid),) * 2


def check_uniform(arch: Arch, facts: dict[str, Any]) -> None:
    """UP-ViT and Prune-and-Merge: facts of the whole model, of its stages or of its blocks."""

    def by_block(name: str) -> list[int]:
        value = facts[name] if isinstance(facts[name], list) else [facts[name]] * len(arch.stages)
        if len(value) == arch.depth:
            return value
        return [own for own, stage in zip(value, arch.stages, strict=True) for _ in stage.blocks]

    depths = facts.get("depths", [facts.get("depth")])
    assert [len(stage.blocks) for stage in arch.stages] == depths
    assert [stage.sr_ratio for stage in arch.stages] == facts.get("sr_ratios", [1])
    assert [b.heads for b in arch.blocks] == by_block("num_heads")
    assert [b.mlp for b in arch.blocks] == by_block("mlp_hidden")
    merged = facts.get("merge_list", [])
    assert [i for i, b in enumerate(arch.blocks) if b.tokens is not None] == merged
    assert [b.tokens or arch.tokens for b in arch.blocks] == facts.get("channels", [arch.tokens] * arch.depth)


@each([case for case in CASES if case.refused_global])
def test_more_than_weights_is_refused_with_an_explanation(case: Case) -> None:
    with pytest.raises(UserError, match="If you trust") as refusal:
        case.read(trust=False)
    assert str(case.refused_global) in str(refusal.value)
    assert "--trust" in str(refusal.value)


@each([case for case in CASES if case.refused_global and not case.importable])
def test_a_missing_package_is_named(case: Case) -> None:
    with pytest.raises(UserError, match="Install that package") as refusal:
        case.read()
    assert str(case.refused_global).split(".")[0] in str(refusal.value)


@each([case for case in CASES if "patch_gating" in case.data.get("expect_importer", "")])
def test_trained_patch_gates_stay_as_factors_of_one_grid(case: Case) -> None:
    model: Any = case.model
    factor = model.get_buffer("patch_embed.factor")
    assert arch_of(model).patch_factors
    assert ((factor > 0) & (factor < 1)).all()
    with pytest.raises(UserError, match="has a factor for every patch of 32x32 images"):
        model.set_input_size((48, 48))
