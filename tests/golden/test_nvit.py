"""NViT against what the original code computes: losses, saliency, latencies, whole pruning runs, the dense model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from prunesweep.models import Arch, Block, BlockCut, Cut, Stage, arch_of, build, cost, cut, cut_arch, num_params
from prunesweep.models.latency.nvit_format import from_nvit
from prunesweep.models.latency.table import LatencyTable
from prunesweep.models.latency.timing import Setting
from prunesweep.pruners import kind_of, nvit, vector_sizes
from prunesweep.pruners.masking import Masking
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.nvit.schedule import Grouping, adjust, dims_of, form_groups, narrow, reference_index, unit_gains
from prunesweep.training.losses import cnn_distillation, full_model_kl
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
        z = z_dist = self.model.head(features[:, 0])
        if hasattr(self.model, "head_dist"):
            z_dist = self.model.head_dist(features[:, 1])
        z_mean = (z + z_dist) / 2
        if self.config["loss"] == "ce":
            return F.cross_entropy(z_mean, part["labels"])
        soft = part["soft_targets"].to(self.dtype)
        if self.config["loss"] == "soft_ce":
            return F.cross_entropy(z_mean, soft)
        teacher = part["teacher_logits"]
        if "teacher_logits_dist" in part:
            teacher = (teacher + part["teacher_logits_dist"]) / 2
        alpha, cnn = self.config["distill_alpha"], part["cnn_teacher_logits"]
        kl = full_model_kl(z_mean, teacher.to(self.dtype), self.config["kl_temperature"])
        hard = self.config["original_loss_coef"] * cnn_distillation(z, z_dist, soft, cnn, alpha=alpha)
        return self.config["kl_coef"] / z.shape[-1] * kl + hard  # its mean is over the classes, too

    @property
    def batches(self) -> int:
        return len(self.tensors["loss"])

    @property
    def grouping(self) -> Grouping:
        return Grouping({kind_of(KINDS[kind]): size for kind, size in self.config["group_size"].items()})

    @property
    def eta(self) -> float:
        """Per millisecond; the golden files count in seconds."""
        return self.config["eta"] / 1e3


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


def table_of(path: Path) -> LatencyTable:
    data = json.loads(path.with_name(path.name + "_latency.json").read_text())
    arch = read_arch(json.loads(path.with_name(path.name + ".json").read_text())["arch_initial"])
    return from_nvit(data, source=arch, setting=Setting(batch=1), device_name="golden")


def vector_of(kind: str, block: int) -> str:
    return KINDS[kind] if block < 0 else f"blocks.{block}.{KINDS[kind]}"


def test_latencies_of_a_block(path: Path) -> None:
    case, grid = Case(path, torch.float64), table_of(path).stages[0]["attn"]
    axes = ("embed", "heads", "qk", "v", "mlp")
    queries = case.tensors["lat_query"].tolist()
    for query, want, gains in zip(queries, case.tensors["lat_value"], case.tensors["lat_unit_gain"], strict=True):
        at = dict(zip(axes, query, strict=True))
        assert grid("block", at) / 1e3 == pytest.approx(want.item(), abs=1e-10)
        for axis, gain in zip(axes, gains.tolist(), strict=True):
            less = at | {axis: at[axis] - 1}
            assert grid.covers(less) == (gain == gain), f"{less}: {gain}"
            if grid.covers(less):
                assert (grid("block", at) - grid("block", less)) / 1e3 == pytest.approx(gain, abs=1e-10)


TRACES = {
    "trace_full_ln": ("reference", "full"),
    "trace_masked_ln": ("reference", "kept"),
    "trace_live_masked_ln": ("live", "kept"),
}


def run(case: Case, path: Path, trace: str) -> tuple[NViTPruning, Iterator[dict[str, Any]]]:
    """Prune the case as ``trace`` was: at its target latency and at the trace's last one; yields its steps."""
    schedule, layer_norm = TRACES[trace]
    steps, config = case.data[trace], case.config
    budgets = {config["latency_target_ratio"] * config["latency_full"], min(s["latency_true"] for s in steps)}
    hook = NViTPruning(
        [budget * 1e3 * (1 + 1e-12) for budget in budgets],
        measure=table_of(path),
        eta=case.eta,
        eta_unit="absolute",
        interval=case.batches,
        groups_per_step=config["units_per_iteration"] // config["schedule_group_size"],
        schedule=schedule,
        groups=case.grouping.sizes,
        momentum=config["momentum"],
        divide={kind_of(KINDS[kind]): d for kind, d in config["score_divisor"].items()},
        layer_norm=layer_norm,
        exact=False,
    )
    hook.wrap(case.model)

    def steps_done() -> Iterator[dict[str, Any]]:
        for step in steps:
            for index in range(case.batches):
                case.model.zero_grad()
                case.loss(index).backward()
                hook.after_backward()
                hook.after_step()  # weights are frozen in the golden runs
            yield step
            if hook.done:
                return

    return hook, steps_done()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trace", TRACES)
def test_traces(path: Path, trace: str, dtype: torch.dtype) -> None:
    case = Case(path, dtype)
    arch, total = arch_of(case.model), len(case.data["ranking_iteration0"])
    hook, steps = run(case, path, trace)
    for step in steps:
        where = f"{trace}[{step['iteration']}]"
        want = {(vector_of(g["kind"], g["block"]), tuple(sorted(g["units"]))): g["score"] for g in step["pruned"]}
        assert {(g.vector, g.units) for g in hook.last_step.removed} == set(want), where
        small = narrow(arch, dims_of(hook.keep))
        assert small.stages == read_arch(case.data["arch_initial"] | step["dims"]).stages, where
        assert hook.measure.predict(small) / 1e3 == pytest.approx(step["latency_true"], abs=1e-10), where
        if "macs" in step:
            assert (cost(small).macs, cost(small).params) == (step["macs"], step["params"]), where
        if "threshold" in step:
            assert reference_index(step["iteration"], hook.groups_per_step, total) == step["threshold_index"], where
        if "threshold" in step and dtype == torch.float64:
            assert hook.last_step.threshold == pytest.approx(step["threshold"], rel=1e-9), where
        if dtype == torch.float64:
            for group in hook.last_step.removed:
                assert group.score == pytest.approx(want[group.vector, group.units], rel=1e-9, abs=1e-12), where
    assert hook.done
    variant = trace.removeprefix("trace_") + "/true"
    if variant in case.data["stops"]:
        stop = case.data["stops"][variant]
        first = hook.snapshots[0]
        assert first.step == (stop["iteration"] + 1) * case.batches
        assert first.cost / 1e3 / case.config["latency_full"] == pytest.approx(stop["latency_true_ratio"], abs=1e-10)
        assert cut_arch(arch, first.cut).stages == read_arch(case.data["arch_initial"] | stop["dims"]).stages
        assert cost(arch_of(first.model)).macs == stop["macs"]
        assert num_params(first.model) == stop["params"]
    if trace == "trace_full_ln":
        assert hook.snapshots[0].cut == decision_of(case)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("trace", "prefix"), [("trace_full_ln", ""), ("trace_masked_ln", "masked_ln.")])
def test_averages_and_latency_aware_scores(
    path: Path, trace: str, prefix: str, dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(path, dtype)
    hook, steps = run(case, path, trace)
    full = vector_sizes(hook.arch, nvit.KINDS)
    for index in (0, 1):
        keep = {name: mask.clone() for name, mask in hook.keep.items()}
        next(steps)
        gains = unit_gains(hook.measure, narrow(hook.arch, dims_of(keep)), full, case.grouping)
        adjusted = adjust(hook.scores, keep, gains, case.eta)
        want = {"ema": case.vectors(f"{prefix}ema{index}"), "adjusted": case.vectors(f"{prefix}adjusted{index}")}
        for what, got in (("ema", hook.scores), ("adjusted", adjusted)):
            for name, vector in want[what].items():
                assert_close(got[name], vector, tolerance, f"{prefix}{what}{index}.{name}")
    assert want["ema"], "the case has no ema1"


def test_first_ranking(path: Path) -> None:
    case = Case(path, torch.float64)
    hook, steps = run(case, path, "trace_full_ln")
    keep = {name: mask.clone() for name, mask in hook.keep.items()}
    gains = unit_gains(hook.measure, hook.arch, vector_sizes(hook.arch, nvit.KINDS), case.grouping)
    next(steps)
    adjusted = adjust(hook.scores, keep, gains, case.eta)
    groups = [
        group
        for name, vector in adjusted.items()
        for group in form_groups(name, vector, torch.arange(len(vector)), case.grouping.size(name))
    ]
    ranked = {(g.vector, g.units): g.score for g in sorted(groups, key=lambda g: g.score)}
    want = case.data["ranking_iteration0"]
    names = [(vector_of(g["kind"], g["block"]), tuple(sorted(g["units"]))) for g in want]
    assert list(ranked) == names
    for name, group in zip(names, want, strict=True):
        assert ranked[name] == pytest.approx(group["score"], rel=1e-9, abs=1e-15)
        assert gains[name[0]] / 1e3 == pytest.approx(group["latency_gain_per_unit"], abs=1e-10)
        saliency = float(hook.scores[name[0]][list(name[1])].sum())
        assert saliency == pytest.approx(group["saliency"], rel=1e-9)


def test_masked_models(path: Path) -> None:
    """LayerNorms over all channels are the original's, over kept ones the dense model's."""
    for kept_norms, want in ((False, "logits_masked_full_ln"), (True, "logits_masked_masked_ln")):
        case = Case(path, torch.float64)
        masking = Masking(case.model, arch_of(case.model), kept_norms=kept_norms)
        masking.set({name: mask.bool() for name, mask in case.vectors("keep").items()})
        with torch.no_grad():
            logits = case.model(case.tensors["inputs"][0])
        torch.testing.assert_close(logits, case.tensors[want], rtol=0, atol=1e-10)
