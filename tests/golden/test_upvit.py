"""UP-ViT against what the original scripts compute for DeiT, and against the method's equations for PVTv2."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prunesweep.models import Arch, Block, BlockCut, Cut, Stage, arch_of, build, cut
from prunesweep.models.builder import build_with
from prunesweep.pruners import Scores, unit_counts, upvit
from prunesweep.pruners.upvit.forward import Forward
from prunesweep.pruners.upvit.rules import Target, select

from .conftest import cases

FILES = [path.with_name(f"{path.name}.safetensors") for path in cases("upvit", ".safetensors")]
KINDS = {"neck": "embed", "ffn": "mlp", "attn": "attn", "sr": "sr"}
DTYPES = [torch.float64, torch.float32]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


MODELS = [path for path in FILES if not path.stem.endswith("_fisher")]
DEIT = [path for path in MODELS if metadata(path)["model"] == "deit"]
PVT = [path for path in MODELS if metadata(path)["model"] == "pvt_v2"]
FISHER = [path for path in FILES if path.stem.endswith("_fisher")]


def deit_arch(source: dict[str, Any]) -> Arch:
    width, side = source["embed_dim"] // source["num_heads"], source["img_size"] // source["patch_size"]
    shape = {"heads": source["num_heads"], "qk": width, "v": width, "scale": width**-0.5, "mlp": source["mlp_hidden"]}
    blocks = tuple(Block(src=i, **shape) for i in range(source["depth"]))
    return Arch(
        family="vit",
        source="golden",
        img_size=(source["img_size"],) * 2,
        patch_size=(source["patch_size"],) * 2,
        in_chans=3,
        num_classes=source["num_classes"],
        stages=(Stage(width=source["embed_dim"], grid=(side, side), blocks=blocks),),
    )


def pvt_arch(source: dict[str, Any]) -> Arch:
    side, index, stages = (source["img_size"] + 3) // 4, 0, []
    names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")
    for dim, heads, ratio, depth, sr in zip(*(source[name] for name in names), strict=True):
        width = dim // heads
        shape = {"heads": heads, "qk": width, "v": width, "scale": width**-0.5, "sr": dim if sr > 1 else 0}
        blocks = tuple(Block(src=index + j, mlp=dim * ratio, **shape) for j in range(depth))
        stages.append(Stage(width=dim, grid=(side, side), blocks=blocks, sr_ratio=sr))
        side, index = (side + 1) // 2, index + depth
    return Arch(
        family="pvt_v2",
        source="golden",
        img_size=(source["img_size"],) * 2,
        patch_size=(4, 4),
        in_chans=3,
        num_classes=source["num_classes"],
        stages=tuple(stages),
        class_token=False,
        pool="avg",
    )


def first(arch: Arch, stage: int) -> int:
    """Index of a stage's first block."""
    return sum(len(s.blocks) for s in arch.stages[:stage])


def vectors_of(arch: Arch, tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Rows of ``prefix`` tensors by our vectors' names; a pyramid's blocks are counted over all stages."""
    found = {}
    for name, tensor in tensors.items():
        kind, *place = name.removeprefix(prefix).split(".")
        if not name.startswith(prefix) or kind not in KINDS:
            continue
        if kind == "neck":
            found[f"stages.{place[0] if place else 0}.embed"] = tensor
        elif place:
            found[f"blocks.{first(arch, int(place[0])) + int(place[1])}.{KINDS[kind]}"] = tensor
        else:
            found |= {f"blocks.{i}.{KINDS[kind]}": row for i, row in enumerate(tensor)}
    return found


class Case:
    """One file and its model."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.tensors, facts = load_file(path), metadata(path)
        self.source, self.target = json.loads(facts["source"]), json.loads(facts["target"])
        self.arch = deit_arch(self.source) if facts["model"] == "deit" else pvt_arch(self.source)
        self.dtype, self.double = dtype, dtype == torch.float64
        self.model = build(self.arch).to(dtype).eval()
        self.model.load_state_dict({k: v.to(dtype) for k, v in self.group("state_dict/").items()}, strict=True)
        self.proxy, self.eval = (self.tensors[f"inputs/{name}"].to(dtype) for name in ("proxy", "eval"))
        self.batches = [(x, torch.zeros(len(x))) for x in self.proxy.split(-(-len(self.proxy) // 2))]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def check_logits(self, got: torch.Tensor, name: str) -> None:
        tolerance = 1e-9 if self.double else 2e-5
        torch.testing.assert_close(
            got.double(), self.tensors[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}\n{m}"
        )

    def check_scores(self, got: torch.Tensor, want: torch.Tensor, name: str) -> None:
        rtol, atol = (1e-8, 1e-13) if self.double else (1e-3, 1e-7)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{name}\n{m}")


@cache
def scored(path: Path, dtype: torch.dtype) -> tuple[Case, Scores, Scores]:
    """A case, and the scores of its units and of its blocks."""
    case = Case(path, dtype)
    scores = upvit.score(case.model, case.batches, importance="exact")
    return case, scores, upvit.score_blocks(case.model, case.batches)


def decision(case: Case, scores: Scores, blocks: Scores) -> Cut:
    goal = case.target
    if case.arch.family == "vit":
        shape = {"heads": goal["num_heads"], "head_width": goal["embed_dim"] // goal["num_heads"]}
        target = Target(embed=goal["embed_dim"], mlp=goal["mlp_hidden"], depth=goal["depth"], **shape)
    else:
        widths, ratios = goal["embed_dims"], goal["mlp_ratios"]
        target = Target(
            embed=widths,
            heads=goal["num_heads"],
            head_width=[width // heads for width, heads in zip(widths, goal["num_heads"], strict=True)],
            mlp=[width * ratio for width, ratio in zip(widths, ratios, strict=True)],
            depth=goal["depths"],
        )
    return select(case.arch, scores, target, blocks=blocks)


def test_there_are_cases() -> None:
    assert DEIT, "no golden case of upvit with a DeiT was found"
    assert PVT, "no golden case of upvit with a PVTv2 was found"
    assert FISHER, "no golden case of upvit with second-order scores was found"


by_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@by_model
@by_dtype
@torch.no_grad()
def test_logits(path: Path, dtype: torch.dtype) -> None:
    case, _, _ = scored(path, dtype)
    for images, name in ((case.proxy, "logits/teacher_proxy"), (case.eval, "logits/teacher_eval")):
        case.check_logits(case.model(images), name)
        case.check_logits(Forward(case.model)(images), name)


@by_model
@by_dtype
def test_exact_scores(path: Path, dtype: torch.dtype) -> None:
    case, scores, blocks = scored(path, dtype)
    want = vectors_of(case.arch, case.tensors, "importance/")
    assert set(scores.vectors) == set(want)
    for name, vector in want.items():
        case.check_scores(scores.vectors[name], vector, name)
    if case.arch.family == "vit":
        case.check_scores(blocks.vectors["skip"], case.tensors["importance/block"], "block")
    else:
        whole = torch.cat([case.tensors[f"importance/block.{s}"] for s in range(len(case.arch.stages))])
        case.check_scores(blocks.vectors["skip"][0::2], whole, "block")


@by_model
@by_dtype
def test_kept_units(path: Path, dtype: torch.dtype) -> None:
    case, scores, blocks = scored(path, dtype)
    found = decision(case, scores, blocks)
    kept = [i for i, choice in enumerate(found.blocks) if choice.keep]
    if case.arch.family == "vit":
        assert kept == case.tensors["keep/block"].tolist()
    else:
        stages = range(len(case.arch.stages))
        assert kept == [first(case.arch, s) + j for s in stages for j in case.tensors[f"keep/block.{s}"].tolist()]
    for name, want in vectors_of(case.arch, case.tensors, "keep/").items():
        _, place, kind = name.split(".")
        if kind == "embed":
            assert found.embed is not None
            assert list(found.embed[int(place)] or ()) == want.tolist(), name
        elif int(place) in kept:
            choice = found.blocks[int(place)]
            assert choice.qk == choice.v
            got = [c for head in choice.qk or () for c in head] if kind == "attn" else getattr(choice, kind)
            assert list(got) == want.tolist(), name


@pytest.mark.parametrize("path", DEIT, ids=lambda path: path.stem)
@by_dtype
def test_small_scores_are_not_misread(path: Path, dtype: torch.dtype) -> None:
    """The original ranks 9e-05 as 5.0 and keeps the least important units."""
    case, scores, _ = scored(path, dtype)
    target = Target(mlp=case.target["mlp_hidden"])
    units = torch.tensor([choice.mlp for choice in select(case.arch, scores, target).blocks])
    assert torch.equal(units, case.tensors["keep/ffn"])
    assert not torch.equal(units, case.tensors["trap/keep_ffn_regex"])


@by_model
@torch.no_grad()
def test_cut_model(path: Path) -> None:
    """Weights are bit-exact slices, but for the original's factor on the queries of narrower heads."""
    case, scores, blocks = scored(path, torch.float64)
    small = cut(case.model, decision(case, scores, blocks))
    weights, want = small.state_dict(), case.group("pruned_state_dict/")
    assert set(weights) == set(want)
    old, new = (arch_of(model).blocks for model in (case.model, small))
    index = {name: i for i, name in enumerate(n for n, _ in small.named_modules() if n.endswith(".attn"))}
    for name, tensor in want.items():
        module = name.rpartition(".q.")[0]
        if module:
            i = index[module]
            factor = (new[i].qk / old[new[i].src].qk) ** 0.5
            torch.testing.assert_close(weights[name] * factor, tensor, rtol=1e-15, atol=0)
        else:
            assert torch.equal(weights[name], tensor), name
    case.check_logits(small(case.proxy), "pruned/logits_proxy")
    case.check_logits(small(case.eval), "pruned/logits_eval")
    if "pruned/logits_eval_nofold" in case.tensors:
        record = arch_of(small)
        stages = tuple(
            dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, scale=b.qk**-0.5) for b in s.blocks))
            for s in record.stages
        )
        case.check_logits(
            build_with(dataclasses.replace(record, stages=stages), weights).eval()(case.eval),
            "pruned/logits_eval_nofold",
        )


@by_model
@torch.no_grad()
def test_cut_model_in_float32(path: Path) -> None:
    case, scores, blocks = scored(path, torch.float32)
    small = cut(case.model, decision(case, scores, blocks))
    case.check_logits(small(case.proxy), "pruned/logits_proxy")
    case.check_logits(small(case.eval), "pruned/logits_eval")


def one_unit_less(case: Case, name: str) -> tuple[str, torch.Tensor]:
    """The vector and the gate of a ``debug/logits_`` tensor: ``neck_c5``, ``ffn_l1_c5``, ``sr_1.0_c3``."""
    kind, *place, channel = name.removeprefix("debug/logits_").split("_")
    stage, _, block = (place[0].removeprefix("l") if place else "0").partition(".")
    if kind == "neck":
        vector = f"stages.{stage}.embed"
    else:
        index = first(case.arch, int(stage)) + int(block) if block else int(stage)
        vector = f"blocks.{index}.{KINDS[kind]}"
    gate = torch.ones(len(case.proxy), 1, unit_counts(case.arch)[vector], dtype=case.dtype)
    gate[..., int(channel.removeprefix("c"))] = 0
    return vector, gate


@by_model
@by_dtype
@torch.no_grad()
def test_single_deletions(path: Path, dtype: torch.dtype) -> None:
    case, _, _ = scored(path, dtype)
    forward = Forward(case.model)
    names = [name for name in case.tensors if name.startswith("debug/")]
    assert names
    for name in names:
        if "delete_ind" not in name:
            vector, gate = one_unit_less(case, name)
            case.check_logits(forward(case.proxy, {vector: gate}), name)


@pytest.mark.parametrize("path", DEIT, ids=lambda path: path.stem)
@by_dtype
@torch.no_grad()
def test_block_deletions(path: Path, dtype: torch.dtype) -> None:
    case, _, _ = scored(path, dtype)
    choices = (BlockCut(keep=False),) + (BlockCut(),) * (case.arch.depth - 1)
    case.check_logits(cut(case.model, Cut(blocks=choices))(case.proxy), "debug/logits_delete_ind_0")
    forward = Forward(case.model)
    x = forward.mixer(0, forward.begin(0, forward.stem(0, case.proxy)))
    logits = forward.run(2, forward.after(1, forward.block(1, x, mixer=False)))
    case.check_logits(logits, "debug/logits_delete_ind_1")


@pytest.mark.parametrize("path", FISHER, ids=lambda path: path.stem)
@by_dtype
def test_second_order_scores(path: Path, dtype: torch.dtype) -> None:
    case, _, _ = scored(path.with_name(path.name.replace("_fisher.", ".")), dtype)
    want = vectors_of(case.arch, load_file(path), "fisher/")
    assert want
    got = upvit.score(case.model, case.batches, importance="fisher", labels_per_image="all").vectors
    for name, vector in want.items():
        torch.testing.assert_close(got[name], vector, rtol=1e-7 if case.double else 1e-3, atol=0, msg=name)
