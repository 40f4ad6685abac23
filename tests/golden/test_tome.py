"""ToMe against what the original code computes: matchings, sizes, block outputs, logits and schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from prunesweep.models.tome import Schedule, apply_tome, tome_schedule

from .conftest import cases


def facts_of(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.json").read_text())


CASES = [path for path in cases("pmvit", ".safetensors") if "parse_r_table" in facts_of(path)["meta"]]
TAGS = [(path, tag) for path in CASES for tag, facts in facts_of(path)["meta"].items() if "r_per_layer" in facts]
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)


def test_there_is_a_case() -> None:
    assert CASES, "no golden case of tome was found"


def stock_model(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    config = facts_of(path)["config"]
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=config["img"],
        patch_size=config["patch"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        mlp_ratio=config["mlp"],
        num_classes=len(tensors["sd.head.weight"]),
    ).to(dtype)
    model.load_state_dict({n.removeprefix("sd."): t for n, t in tensors.items() if n.startswith("sd.")}, strict=True)
    return model.eval()


def schedule(r: Any) -> Schedule:
    """JSON has no tuples: two numbers, the second a float, are (r, inflect)."""
    return tuple(r) if isinstance(r, list) and len(r) == 2 and isinstance(r[1], float) else r


@pytest.mark.parametrize(("path", "tag"), TAGS, ids=lambda value: getattr(value, "name", value))
@DTYPES
def test_merging(path: Path, tag: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors, facts = load_file(f"{path}.safetensors"), facts_of(path)["meta"][tag]
    want = {name.removeprefix(f"{tag}."): t for name, t in tensors.items() if name.startswith(f"{tag}.")}
    seen = {"tokens_after", "source", "logits"}

    def close(got: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(got.double(), want[name], rtol=tolerance, atol=tolerance)
        seen.add(name)

    tome = apply_tome(stock_model(path, tensors, dtype), schedule(facts["r"]), proportional=facts["prop_attn"])
    assert tome.r == facts["r_per_layer"]
    images = tensors["images"].to(dtype)
    source = torch.eye(tome.record.tokens).expand(len(images), -1, -1)
    after = []
    with torch.no_grad():
        torch.testing.assert_close(tome.model(images).double(), tensors["dense.logits"], rtol=tolerance, atol=tolerance)
        for i, step in enumerate(tome.steps(images)):
            after.append(step.x.shape[1])
            close(step.x, f"out.{i}")
            close(step.size[..., 0], f"size.{i}") if f"size.{i}" in want else None
            if step.matching is not None:
                close(step.metric, f"metric.{i}")
                source = step.matching.sum(source)
                for name, index in zip(("src", "unm", "dst"), step.matching[:3], strict=True):
                    assert torch.equal(index, want[f"{name}_idx.{i}"])
                    seen.add(f"{name}_idx.{i}")
        close(tome(images), "logits")
    assert after == want["tokens_after"].tolist() == facts["tokens_after"]
    assert torch.equal(source.to(torch.uint8), want["source"])
    assert seen == set(want)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_schedules(path: Path) -> None:
    table = facts_of(path)["meta"]["parse_r_table"]
    assert table
    for key, want in table.items():
        depth, _, text = key.partition(",")
        values, _, times = text.replace("(", "[").replace(")", "]").partition("*")
        r = json.loads(values)
        r = r * int(times) if times else tuple(r) if text.startswith("(") else r
        assert tome_schedule(int(depth), r) == want, key
