"""NViT against what the original code computes: saliency, and the dense model that its masks stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models import Arch, Block, BlockCut, Cut, Stage, arch_of, build, cost, cut, num_params
from pruners import kind_of, nvit
from tests.oracle import masked

from .conftest import cases

CASES = cases("nvit", "_latency.json")
KINDS = {"emb": "stages.0.embed", "head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}


def read_arch(record: dict[str, Any]) -> Arch:
    """Our record of a golden ``vit-hetero/1`` one."""
    side, patch = record["img_size"], record["patch_size"]
    blocks = tuple(
        Block(src=i, heads=b["num_heads"], qk=b["qk_dim"], v=b["v_dim"], scale=record["attn_scale"], mlp=b["mlp_dim"])
        for i, b in enumerate(record["blocks"])
    )
    return Arch(
        family="vit",
        source="golden",
        img_size=(side, side),
        patch_size=(patch, patch),
        in_chans=record["in_chans"],
        num_classes=record["num_classes"],
        stages=(Stage(width=record["embed_dim"], grid=(side // patch, side // patch), blocks=blocks),),
        dist_token=record["distilled"],
        qkv_bias=record["qkv_bias"],
        norm_eps=record["norm_eps"],
        act=record["act"],
    )


class Case:
    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.tensors = load_file(path.with_name(path.name + ".safetensors"))
        self.data = json.loads(path.with_name(path.name + ".json").read_text())
        self.config, self.dtype = self.data["config"], dtype
        self.model = build(read_arch(self.data["arch_initial"])).to(dtype).eval()
        weights = {k.removeprefix("model."): v.to(dtype) for k, v in self.tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(weights, strict=True)

    def vectors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors ``prefix.<vector>`` under our names."""
        found = {}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix + "."):
                *place, kind = name.removeprefix(prefix + ".").split(".")
                found[".".join([*place, KINDS[kind]])] = tensor
        return found

    def loss(self, index: int) -> torch.Tensor:
        """The case's training loss of one batch, from the two heads' own logits."""
        per_batch = ("inputs", "labels", "soft", "teacher", "cnn")
        part = {name: tensor[index] for name, tensor in self.tensors.items() if name.startswith(per_batch)}
        x = part["inputs"].to(self.dtype)
        features = self.model.forward_features(x)
        z = z_mean = self.model.head(features[:, 0])
        if hasattr(self.model, "head_dist"):
            z = self.model.head_dist(features[:, 1])
            z_mean = (self.model.head(features[:, 0]) + z) / 2
        if self.config["loss"] == "ce":
            return F.cross_entropy(z_mean, part["labels"])
        soft = -(part["soft_targets"].to(self.dtype) * z_mean.log_softmax(-1)).sum(-1).mean()
        if self.config["loss"] == "soft_ce":
            return soft
        temperature = self.config["kl_temperature"]
        teacher = part["teacher_logits"]
        if "teacher_logits_dist" in part:
            teacher = (teacher + part["teacher_logits_dist"]) / 2
        kd = F.kl_div(
            (z_mean / temperature).log_softmax(-1), (teacher.to(self.dtype) / temperature).softmax(-1), reduction="mean"
        )
        alpha = self.config["distill_alpha"]
        hard = F.cross_entropy(z, part["cnn_teacher_logits"].argmax(-1))
        return self.config["kl_coef"] * kd + self.config["original_loss_coef"] * ((1 - alpha) * soft + alpha * hard)


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_a_case() -> None:
    assert CASES, "no golden case of nvit was found"


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e} of the vector's maximum"


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "score_tolerance"), [(torch.float64, 1e-10, 1e-9), (torch.float32, 1e-4, 1e-3)]
)
def test_saliency(path: Path, dtype: torch.dtype, loss_tolerance: float, score_tolerance: float) -> None:
    case = Case(path, dtype)
    arch = arch_of(case.model)
    divisors = nvit.divisors(arch)
    assert divisors == {kind_of(KINDS[k]): d for k, d in case.config["score_divisor"].items()}
    want_raw, sums = case.vectors("raw"), {}
    assert set(want_raw) == set(case.vectors("score0"))
    for index, want_loss in enumerate(case.tensors["loss"]):
        case.model.zero_grad()
        loss = case.loss(index)
        assert loss.item() == pytest.approx(want_loss.item(), abs=loss_tolerance)
        loss.backward()
        raw = nvit.raw_saliency(case.model, arch)
        assert set(raw) == set(want_raw)
        for name, want in want_raw.items():
            assert_close(raw[name], want[index], score_tolerance, f"raw.{name}[{index}]")
            squared = (raw[name].double() / divisors[kind_of(name)]) ** 2
            sums[name] = sums.get(name, 0) + squared
            if index == 0:
                assert_close(squared, case.vectors("score_batch0")[name], score_tolerance, f"score_batch0.{name}")
    for name, want in case.vectors("score0").items():
        assert_close(sums[name] / len(case.tensors["loss"]), want, score_tolerance, f"score0.{name}")


def test_score_is_the_mean_of_squared_batch_saliency(path: Path) -> None:
    case = Case(path, torch.float64)
    if case.config["loss"] != "ce":
        pytest.skip("score() takes a loss of logits and labels")
    batches = list(zip(case.tensors["inputs"].double(), case.tensors["labels"], strict=True))
    scores = nvit.score(case.model, batches)
    for name, want in case.vectors("score0").items():
        assert_close(scores.vectors[name], want, 1e-9, name)


def decision_of(case: Case) -> Cut:
    keep = {name: tuple(torch.nonzero(mask)[:, 0].tolist()) for name, mask in case.vectors("keep").items()}
    blocks = arch_of(case.model).stages[0].blocks
    return Cut(
        embed=(keep["stages.0.embed"],),
        blocks=tuple(
            BlockCut.aligned(block, **{kind: keep[f"blocks.{i}.{kind}"] for kind in ("heads", "qk", "v", "mlp")})
            for i, block in enumerate(blocks)
        ),
    )


def test_dense_model_of_the_masks(path: Path) -> None:
    case = Case(path, torch.float64)
    decision = decision_of(case)
    small = cut(case.model, decision)
    weights = small.state_dict()
    want = {k.removeprefix("dense."): v for k, v in case.tensors.items() if k.startswith("dense.")}
    fused = {}
    for name, tensor in want.items():  # the golden files keep q, k and v apart
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(("attn.q", "attn.k", "attn.v")):
            fused.setdefault(f"{stem[:-2]}.qkv.{leaf}", {})[stem[-1]] = tensor
        else:
            fused[name] = tensor
    for name, tensor in fused.items():
        if isinstance(tensor, dict):
            tensor = torch.cat([tensor["q"], tensor["k"], tensor["v"]])
        assert torch.equal(weights.pop(name), tensor), name
    assert not weights, f"tensors that the original does not have: {list(weights)}"
    x = case.tensors["inputs"][0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), case.tensors["logits_dense"], rtol=0, atol=1e-10)
        with masked(case.model, decision) as model:
            torch.testing.assert_close(model(x), case.tensors["logits_masked_masked_ln"], rtol=0, atol=1e-10)


def test_costs_and_logits(path: Path) -> None:
    case = Case(path, torch.float64)
    with torch.no_grad():
        logits = case.model(case.tensors["inputs"][0])
    torch.testing.assert_close(logits, case.tensors["logits_initial"], rtol=0, atol=1e-10)
    for stage in ("initial", "final"):
        arch = read_arch(case.data[f"arch_{stage}"])
        assert cost(arch).macs == case.data[f"macs_{stage}"]
        assert cost(arch).params == case.data[f"params_{stage}"] == num_params(build(arch))
