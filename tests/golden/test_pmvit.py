"""Prune-and-Merge against what the original code computes: scores, plans, forward passes, distillation, checkpoints."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from prunesweep.models import Arch, Block, Stage, arch_of, build, cut
from prunesweep.models.importers import import_checkpoint
from prunesweep.models.layers.token_merging import TokenPlan
from prunesweep.pruners import Scores, pmvit
from prunesweep.pruners.pmvit.scores import score
from prunesweep.training.recipe import Distill, Recipe
from prunesweep.training.task import make_task

from .conftest import cases


def config_of(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.json").read_text())["config"]


CASES = [
    path
    for path in cases("pmvit", ".safetensors")
    if "merge_list" in json.loads(Path(f"{path}.json").read_text())["config"]
]
FORWARD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SCORE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
EPS = {"c2c": 1e-8, "gap": 1e-10}  # the golden file has gap.score with 1e-8, and all that follows with 1e-10
VARIANTS = {
    "c2c": {"depth_decay": 0.025},
    "gap": {"mode": "gap", "scope": "layer", "empty_rows": True, "depth_decay": 0.015},
}


class Case:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_of(path)
        self.tensors = load_file(f"{path}.safetensors")
        self.merged: list[int] = self.config["merge_list"]

    @property
    def arch(self) -> Arch:
        config = self.config
        width, heads, side = config["dim"], config["heads"], config["img"] // config["patch"]
        E = width // heads
        shape = {"heads": heads, "qk": E, "v": E, "scale": E**-0.5, "mlp": int(width * config["mlp"])}
        blocks = tuple(Block(src=i, **shape) for i in range(config["depth"]))
        return Arch(
            family="vit",
            source="golden",
            img_size=(config["img"],) * 2,
            patch_size=(config["patch"],) * 2,
            in_chans=3,
            num_classes=len(self.tensors["sd.head.weight"]),
            stages=(Stage(width=width, grid=(side, side), blocks=blocks),),
        )

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        model = build(self.arch).to(dtype).eval()
        weights = {name.removeprefix("sd."): t for name, t in self.tensors.items() if name.startswith("sd.")}
        model.load_state_dict(weights, strict=True)
        return model

    def batches(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.tensors["calib.images"].to(dtype), self.tensors["calib.labels"], strict=True))

    @property
    def scores(self) -> Scores:
        return Scores({f"blocks.{i}.tokens": row for i, row in enumerate(self.tensors["score.raw"])})

    def plans(self, variant: str, scores: Scores | None = None, form: str = "dense") -> dict[int, TokenPlan]:
        decision = self.decision(variant, scores, form)
        return {i: decision.blocks[i].tokens for i in self.merged}

    def decision(self, variant: str, scores: Scores | None = None, form: str = "dense"):
        rates = {"keep_rate": self.config["keep"], "prune_rate": self.config["prune"], "merge_list": self.merged}
        return pmvit.plan(self.arch, scores or self.scores, form=form, **rates, **VARIANTS[variant])

    def planned(self, variant: str, dtype: torch.dtype, form: str = "dense") -> nn.Module:
        return cut(self.model(dtype), self.decision(variant, form=form))


@cache
def read(path: Path) -> Case:
    return Case(path)


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read(request.param)


def test_there_is_a_case() -> None:
    assert CASES, "no golden case of pmvit was found"


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@DTYPES
def test_dense_model(case: Case, dtype: torch.dtype) -> None:
    model, images = case.model(dtype), case.tensors["eval.images"].to(dtype)
    with torch.no_grad():
        close(model(images), case.tensors["dense.logits"], FORWARD_TOLERANCE[dtype])
        close(model.forward_features(images), case.tensors["dense.norm"], FORWARD_TOLERANCE[dtype])
        for (x, y), want in zip(case.batches(dtype), case.tensors["calib.loss"], strict=True):
            close(F.cross_entropy(model(x), y), want, FORWARD_TOLERANCE[dtype])


@DTYPES
def test_scores(case: Case, dtype: torch.dtype) -> None:
    model, batches, tolerance = case.model(dtype), case.batches(dtype), SCORE_TOLERANCE[dtype]
    names = [f"blocks.{i}.tokens" for i in range(case.config["depth"])]

    def rows(scores: Scores) -> torch.Tensor:
        assert list(scores.vectors) == names
        return torch.stack(list(scores.vectors.values()))

    for t, batch in enumerate(batches):
        close(rows(score(model, [batch])), case.tensors["score.per_batch"][:, t], tolerance)
    raw = rows(score(model, batches))
    close(raw, case.tensors["score.raw"], tolerance)
    close(pmvit.importance(raw, range(len(raw)), 0.0), case.tensors["score.norm"], tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@DTYPES
def test_selection(case: Case, variant: str, dtype: torch.dtype) -> None:
    """Thresholds are the lowest score that is not pruned and the lowest of a centre."""
    scores, settings = score(case.model(dtype), case.batches(dtype)), VARIANTS[variant]
    raw = torch.stack([scores.vectors[f"blocks.{i}.tokens"] for i in case.merged])
    rows = pmvit.importance(raw, case.merged, settings["depth_decay"])
    close(rows, case.tensors[f"{variant}.score"], SCORE_TOLERANCE[dtype])
    patches, K = rows.shape[1], len(rows)
    n_prune, n_keep = int(patches * case.config["prune"]), int(patches * case.config["keep"])
    assert (n_prune, n_keep) == (case.config["num_prune"], case.config["num_keep"])
    pruned, centres = pmvit.select(rows, n_prune, [n_keep] * K, settings.get("scope", "global"))
    with_own_eps = pmvit.importance(raw, case.merged, settings["depth_decay"], EPS[variant])
    close(with_own_eps * ~pruned, case.tensors[f"{variant}.masked_score"], SCORE_TOLERANCE[dtype])
    dims = () if variant == "c2c" else (1,)
    thresholds = [rows.where(which, torch.inf).amin(dims) for which in (~pruned, centres)]
    close(torch.stack(thresholds, -1), case.tensors[f"{variant}.thr"], SCORE_TOLERANCE[dtype])
    for k, i in enumerate(case.merged):
        assert torch.equal(torch.nonzero(pruned[k])[:, 0], case.tensors[f"{variant}.pruned.{i}"])
        assert torch.equal(torch.nonzero(centres[k])[:, 0], case.tensors[f"{variant}.centers.{i}"])


@pytest.mark.parametrize("variant", VARIANTS)
@DTYPES
def test_plans(case: Case, variant: str, dtype: torch.dtype) -> None:
    scores = score(case.model(dtype), case.batches(dtype))
    tolerance = FORWARD_TOLERANCE[dtype]
    channels = [case.arch.tokens] * case.config["depth"]
    for form in ("dense", "sparse"):
        plans = case.plans(variant, scores, form)
        for i, plan in plans.items():
            plan.check(case.arch.tokens, 1)
            assert list(plan.assign) == case.tensors[f"{variant}.assign.{i}"].tolist()
            channels[i], tensors = plan.kept, plan.tensors(torch.float64)
            M, R = case.tensors[f"{variant}.M.{i}"], case.tensors[f"{variant}.R.{i}"]
            if form == "dense":
                close(tensors["matrix"], M, tolerance)
                close(tensors["recover"], R, tolerance)
                assert torch.equal(tensors["takes_part"].double(), case.tensors[f"{variant}.mask.{i}"])
                if variant == "c2c":
                    close(tensors["matrix"].sum(1).sqrt().log(), case.tensors[f"c2c.bias.{i}"], tolerance)
            else:  # the one entry of every column of M, and of every row of R
                close(tensors["weight"], M.sum(0), tolerance)
                close(tensors["recover"], R.sum(1), tolerance)
        assert channels == case.tensors[f"{variant}.channels"].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@DTYPES
def test_forward(case: Case, variant: str, form: str, dtype: torch.dtype) -> None:
    model, tolerance = case.planned(variant, dtype, form), FORWARD_TOLERANCE[dtype]
    images, inputs, outputs = case.tensors["eval.images"].to(dtype), [], []

    def keep(_: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(y)

    for block in model.blocks:
        block.register_forward_hook(keep)
    with torch.no_grad():
        norm, logits = model.forward_features(images), model(images)
        close(inputs[0], case.tensors[f"{variant}.x_in.0"], tolerance)
        for i, block in enumerate(model.blocks):
            if i in case.merged:
                z = block.token_merge.merge(inputs[i])
                close(z, case.tensors[f"{variant}.merged.{i}"], tolerance)
                z = z + block.attn(block.norm1(z))
                z = z + block.mlp(block.norm2(z))
                close(z, case.tensors[f"{variant}.core.{i}"], tolerance)
            close(outputs[i], case.tensors[f"{variant}.out.{i}"], tolerance)
    close(norm, case.tensors[f"{variant}.norm"], tolerance)
    close(logits, case.tensors[f"{variant}.logits"], tolerance)
    close(F.cross_entropy(logits, case.tensors["eval.labels"]), case.tensors[f"{variant}.loss"], tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@DTYPES
def test_distillation_and_its_gradients(case: Case, variant: str, dtype: torch.dtype) -> None:
    """A recipe's term is a mean over images, the method's over images and classes."""
    model, tolerance = case.planned(variant, dtype), FORWARD_TOLERANCE[dtype]
    alpha, T, K = case.config["kd_alpha"], case.config["kd_tau"], case.arch.num_classes
    term = Distill(kind="soft", weight=alpha / K, temperature=T)
    task = make_task(model, Recipe(distill=(term,)), case.model(dtype)).eval()
    found = task(case.tensors["eval.images"].to(dtype), case.tensors["eval.labels"])
    want = {name.removeprefix(f"{variant}.kd."): t for name, t in case.tensors.items() if f"{variant}.kd." in name}
    close(found["task_loss"], want["base"], tolerance)
    close(found["kd_loss"] / alpha, want["distill"], tolerance)
    close(found["loss"], want["total"], tolerance)
    if dtype == torch.float32:  # there is no tolerance for its gradients
        return
    found["loss"].backward()
    for i in case.merged:
        close(model.blocks[i].token_merge.matrix.grad, want[f"grad.M.{i}"], tolerance)
        close(model.blocks[i].token_merge.recover.grad, want[f"grad.R.{i}"], tolerance)
    close(model.head.weight.grad, want["grad.head.weight"], tolerance)
    close(model.blocks[0].attn.qkv.weight.grad, want["grad.qkv.weight.0"], tolerance)


@DTYPES
def test_the_original_checkpoint(case: Case, dtype: torch.dtype) -> None:
    path = case.path.with_name(f"{case.path.name}_refckpt.pth")
    if not path.exists():
        pytest.skip("no checkpoint of the original is kept with this case")
    model = import_checkpoint(path, "pmvit", dtype=dtype, heads=case.config["heads"], img_size=case.config["img"])
    arch = arch_of(model)
    kept = [block.tokens or arch.tokens for block in arch.blocks]
    assert kept == case.tensors["c2c.channels"].tolist()
    assert [i for i, block in enumerate(arch.blocks) if block.merge == "dense"] == case.merged
    with torch.no_grad():
        logits = model(case.tensors["eval.images"].to(dtype))
    close(logits, case.tensors["c2c.logits"], FORWARD_TOLERANCE[dtype])
