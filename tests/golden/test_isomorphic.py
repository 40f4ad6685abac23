"""Isomorphic Pruning against what Torch-Pruning and the paper's own class compute: scores, decisions, cut models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from prunesweep.models import Arch, Block, Cut, Stage, arch_of, block_views, build, cost, cut, cut_arch, num_params
from prunesweep.pruners import kind_of
from prunesweep.pruners.isomorphic import Ratios, isomorphic_cut, normalised
from prunesweep.pruners.taylor import attention_pairs, score, summed_gradients, taylor_terms

from .conftest import cases

CASES = cases("isomorphic", ".json")


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_a_case() -> None:
    assert CASES, "no golden case of isomorphic was found"


class Case:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        self.tensors = load_file(path.with_name(path.name + ".safetensors"))
        self.data = json.loads(path.with_name(path.name + ".json").read_text())
        config, self.dtype = self.data["config"], dtype
        side = config["img_size"] // config["patch_size"]
        block = {"heads": config["num_heads"], "qk": config["head_dim"], "v": config["head_dim"]}
        scale = config["head_dim"] ** -0.5
        blocks = tuple(Block(src=i, **block, scale=scale, mlp=config["mlp_dim"]) for i in range(config["depth"]))
        self.arch = Arch(
            family="vit",
            source="golden",
            img_size=(config["img_size"],) * 2,
            patch_size=(config["patch_size"],) * 2,
            in_chans=3,
            num_classes=config["num_classes"],
            stages=(Stage(width=config["embed_dim"], grid=(side, side), blocks=blocks),),
            dist_token=config["distilled"],
            norm_eps=config["norm_eps"],
        )
        self.model = build(self.arch).to(dtype).eval()
        self.model.load_state_dict({name: t.to(dtype) for name, t in self.group("model.").items()}, strict=True)
        self.batches = [(x.to(dtype), y) for x, y in zip(self.tensors["inputs"], self.tensors["labels"], strict=True)]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def vectors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors of ``prefix`` under our names."""
        return {"stages.0.embed" if name == "embed" else name: t for name, t in self.group(prefix).items()}

    def decide(self, settings: dict[str, Any], **options: Any) -> Cut:
        channel, dim = settings["pruning_ratio"], settings["head_dim_pruning_ratio"]
        ratios = Ratios(channel, channel, settings["head_pruning_ratio"], channel if dim is None else dim)
        return isomorphic_cut(
            self.arch,
            score(self.model, self.batches),
            ratios,
            round_to=settings["round_to"] or 1,  # null: widths are not rounded
            isomorphic=settings["isomorphic"],
            **options,
        )


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e} of the vector's maximum"


def test_dense_model(path: Path) -> None:
    case = Case(path)
    assert cost(case.arch).macs == case.data["macs"]
    assert cost(case.arch).params == case.data["params"] == num_params(case.model)
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.batches[0][0]), case.tensors["logits"], rtol=0, atol=1e-10)
        losses = torch.stack([F.cross_entropy(case.model(x), y) for x, y in case.batches])
    torch.testing.assert_close(losses, case.tensors["losses"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-4)])
def test_scores(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(path, dtype)
    scores = score(case.model, case.batches)
    raw = case.vectors("raw.")
    assert set(scores.vectors) == set(raw)
    for name, want in raw.items():
        assert_close(scores.vectors[name], want, tolerance, f"raw.{name}")
        imp = scores.vectors[name] / scores.vectors[name].mean()
        assert_close(imp, case.vectors("imp.")[name], tolerance, f"imp.{name}")
        assert_close(imp, case.vectors("imp_tp32.")[name], max(tolerance, 5e-7), f"imp_tp32.{name}")
    ours = normalised(case.arch, scores)
    for kind, own in (("head", "heads"), ("dim", "dim")):
        for name, want in case.vectors(f"{kind}.").items():
            assert_close(ours[f"{name}.{own}"], want, tolerance, f"{kind}.{name}")


def kept_of(case: Case, run: str) -> dict[str, torch.Tensor]:
    """A run's kept indices; those of the paper's class are stored for the dims only."""
    return case.vectors(f"{run.removesuffix('_paper')}.keep.") | case.vectors(f"{run}.keep.")


def check_sets(case: Case, run: str, decision: Cut) -> None:
    kept, width = kept_of(case, run), case.data["config"]["head_dim"]
    assert decision.embed is not None
    assert list(decision.embed[0] or ()) == kept["stages.0.embed"].tolist()
    for i, choice in enumerate(decision.blocks):
        assert list(choice.mlp or ()) == kept[f"blocks.{i}.mlp"].tolist()
        heads, dims = kept[f"blocks.{i}.head"].tolist(), kept[f"blocks.{i}.dim"]
        rows = dims if dims.dim() == 2 else dims.expand(len(heads), -1)
        want = tuple(tuple(h * width + j for j in row.tolist()) for h, row in zip(heads, rows, strict=True))
        assert choice.qk == choice.v == want
    summary, small = case.data["runs"][run], cut_arch(case.arch, decision)
    assert small.stages[0].width == summary["embed"]
    assert [b.heads for b in small.blocks] == summary["heads"]
    assert [b.qk for b in small.blocks] == summary["dims"]
    assert [b.mlp for b in small.blocks] == summary["mlp"]
    assert (cost(small).macs, cost(small).params) == (summary["macs"], summary["params"])


def runs(case: Case, *, paper: bool) -> list[str]:
    return [run for run in case.data["runs"] if run.endswith("_paper") == paper]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_units(path: Path, dtype: torch.dtype) -> None:
    case = Case(path, dtype)
    assert runs(case, paper=False)
    for run in runs(case, paper=False):
        check_sets(case, run, case.decide(case.data["runs"][run]["settings"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_units_of_the_papers_class(path: Path, dtype: torch.dtype) -> None:
    case = Case(path, dtype)
    terms = taylor_terms(case.model, summed_gradients(case.model, case.batches))
    pairs = [attention_pairs(terms, block) for block in block_views(case.model)]
    assert runs(case, paper=True)
    for run in runs(case, paper=True):
        check_sets(case, run, case.decide(case.data["runs"][run]["settings"], pairs=pairs))


def test_thresholds(path: Path) -> None:
    """All units at or below a scope's threshold are cut, before rounding."""
    case = Case(path)
    vectors = normalised(case.arch, score(case.model, case.batches))
    for run in runs(case, paper=False):
        for scope, facts in case.data["runs"][run]["scopes"].items():
            names = ["stages.0.embed"] if scope == "embed" else []
            wanted = {"head": ["heads"], "global": ["embed", "mlp", "dim"]}.get(scope, [scope])
            names = names or [name for name in vectors if kind_of(name) in wanted]
            units = torch.cat([vectors[name] for name in names])
            assert len(units) == facts["units"]
            assert units.kthvalue(facts["cut"]).values.item() == pytest.approx(facts["threshold"], rel=1e-9)
            for layer, count in facts.get("cut_before_rounding", {}).items():
                own = vectors["stages.0.embed" if layer == "embed" else layer]
                assert int((own <= facts["threshold"] * (1 + 1e-12)).sum()) == count


def test_cut_models(path: Path) -> None:
    case = Case(path)
    x = case.batches[0][0]
    for run in runs(case, paper=False):
        small = cut(case.model, case.decide(case.data["runs"][run]["settings"]))
        want = case.group(f"{run}.model.")
        assert set(small.state_dict()) == set(want)
        assert all(torch.equal(small.state_dict()[name], t) for name, t in want.items())
        with torch.no_grad():
            torch.testing.assert_close(small(x), case.tensors[f"{run}.logits_keep_scale"], rtol=0, atol=1e-10)
        (stage,) = arch_of(small).stages
        blocks = tuple(dataclasses.replace(block, scale=block.qk**-0.5) for block in stage.blocks)
        rescaled = build(dataclasses.replace(arch_of(small), stages=(dataclasses.replace(stage, blocks=blocks),)))
        rescaled = rescaled.double().eval()
        rescaled.load_state_dict(want, strict=True)
        with torch.no_grad():
            torch.testing.assert_close(rescaled(x), case.tensors[f"{run}.logits"], rtol=0, atol=1e-10)
