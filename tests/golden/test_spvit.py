"""SPViT against what the original code computes: gates, cost, supernet, finetuned and frozen forms, distillation."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models import arch_of, blocks_of, cost, cut, num_params
from prunesweep.pruners.spvit.choices import spvit_cut
from prunesweep.pruners.spvit.cost import COUNTS, complexity_loss, gate_costs
from prunesweep.pruners.spvit.gates import choice_of, cumulate, expect, sample
from prunesweep.pruners.spvit.mixed import SPViTMixed, SPViTMixedSettings
from prunesweep.pruners.spvit.supernet import Supernet
from prunesweep.training import Distill, Recipe
from prunesweep.training.task import make_task

from .conftest import cases

GATES = cases("spvit", ".safetensors")
CASES = [path for path in GATES if not path.name.startswith("gates")]
GATES = [path for path in GATES if path.name.startswith("gates")]
DTYPES = [torch.float64, torch.float32]
OUTPUT = {torch.float64: 1e-9, torch.float32: 2e-5}
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-4}
CHOICES = ("skip", "conv1x1", "conv3x3", "msa")
UNITS_OF_MACS = 1e9


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(f"{path}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    error = (got.detach().double() - want).abs().max() / (1 + want.abs().max())
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e}"


class Case:
    """A dense model, and what the file says about it; ``used`` are the names that a test has looked at."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        self.config, self.tensors = read(path)
        self.dtype = dtype
        config = self.config
        shape = {"img_size": config["img"], "patch_size": config["patch"], "num_classes": config["ncls"]}
        shape |= {"embed_dim": config["dim"], "num_heads": config["heads"], "mlp_ratio": config.get("mlp_ratio", 4)}
        shape["drop_path_rate"] = 0.0  # as in the file; timm's Swin has 0.1
        self.swin = config["kind"] == "swin"
        if self.swin:
            self.dense: nn.Module = SwinTransformer(**shape, window_size=config["window"], depths=config["depths"])
            self.tags = [f"{s}.{j}" for s, depth in enumerate(config["depths"]) for j in range(depth)]
            self.prefixes = [f"layers.{t.replace('.', '.blocks.')}." for t in self.tags]
        else:
            self.dense = VisionTransformer(**shape, depth=config["depth"])
            self.tags = [str(i) for i in range(config["depth"])]
            self.prefixes = [f"blocks.{t}." for t in self.tags]
        self.dense.load_state_dict(self.group("timm."), strict=True)
        self.dense.to(dtype).eval()
        self.arch = arch_of(self.dense)
        self.keep = [tuple(self.tensors[f"ffn_keep.{t}"].nonzero()[:, 0].tolist()) for t in self.tags]
        self.x, self.labels = self.tensors["x"].to(dtype), self.tensors["labels"]
        self.output, self.gradient = OUTPUT[dtype], GRADIENT[dtype]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def extra(self, i: int, name: str) -> torch.Tensor:
        return self.tensors[f"extra.{self.prefixes[i]}{name}"].to(self.dtype)

    def load_extra(self, i: int, module: nn.Module, *norms: tuple[str, str]) -> None:
        """Head probabilities and the BatchNorms (name in the file, name in ``module``) of block ``i``."""
        with torch.no_grad():
            module.get_parameter("head_probs").copy_(self.extra(i, "attn.head_probs"))
        for theirs, ours in norms:
            state = self.group(f"extra.{self.prefixes[i]}attn.{theirs}.")
            module.get_submodule(ours).load_state_dict(state, strict=True)

    def supernet(self) -> Supernet:
        net = Supernet(self.dense, self.arch, theta=1.5, alpha=self.config["alpha"], conv_scope="window")
        kernel = "attn.kernel_thresholds" + "_full" * self.swin
        for i, (mixer, units) in enumerate(zip(net.mixers, net.units, strict=True)):
            self.load_extra(i, mixer, ("bn_1x1", "bn_1x1"), ("bn_3x3", "bn_3x3"))
            with torch.no_grad():
                mixer.theta.copy_(self.extra(i, kernel))
                units.theta.copy_(self.extra(i, "mlp.ffn_thresholds"))
        return net

    def mixed(self, choices: list[str]) -> tuple[nn.Module, SPViTMixed]:
        """The finetuned form with these mixers."""
        decision = spvit_cut(self.arch, choices, self.keep, skip_form="ln_residual")
        model = cut(self.dense, decision)
        hook = SPViTMixed(self.dense, decision, SPViTMixedSettings(alpha=self.config["alpha"]))
        hook.wrap(model)
        for i, (block, choice) in enumerate(zip(blocks_of(model), choices, strict=True)):
            if choice.startswith("conv"):
                self.load_extra(i, block.attn, (f"bn_{choice[4:]}", "bn"))
        return model, hook

    def gradients(self, prefix: str, model: nn.Module, own: dict[str, torch.Tensor]) -> None:
        """Compare every gradient under ``prefix``; those of ``own`` have the file's names, others the model's."""
        wanted = self.group(prefix)
        assert wanted
        for name, want in wanted.items():
            got = own[name] if name in own else model.get_parameter(name).grad
            assert_close(got, want, self.gradient, prefix + name)


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def case(request: pytest.FixtureRequest, path: Path) -> Case:
    return Case(path, request.param)


def test_there_are_cases() -> None:
    assert CASES, "no golden case of spvit was found"
    assert GATES, "no golden gates of spvit were found"


def test_dense(case: Case) -> None:
    assert_close(case.dense(case.x), case.tensors["dense.logits"], case.output, "dense.logits")


@pytest.mark.parametrize("which", ["A", "B"])
def test_finetuned_and_frozen_forms(case: Case, which: str) -> None:
    choices = case.config[f"mix{which}"]
    model, hook = case.mixed(choices)
    assert num_params(model) == case.config["models"][which]["params_ft"]
    outputs: dict[str, torch.Tensor] = {}
    for tag, block in zip(case.tags, blocks_of(model), strict=True):
        block.register_forward_hook(lambda _m, _a, y, tag=tag: outputs.update({tag: y.flatten(1, -2)}))
    assert_close(model(case.x), case.tensors[f"ft.{which}.logits"], case.output, "ft logits")
    for tag, want in case.group(f"ft.{which}.block_out.").items():
        assert_close(outputs[tag], want, case.output, f"output of block {tag}")
    frozen_state = {name: t.clone() for name, t in model.state_dict().items()}

    model.train()
    logits = model(case.x)
    assert_close(logits, case.tensors[f"ft.{which}.train.logits"], case.output, "train logits")
    loss = F.cross_entropy(logits, case.labels)
    assert_close(loss, case.tensors[f"ft.{which}.train.ce"], case.output, "cross-entropy")
    loss.backward()
    own = {}
    for prefix, block, choice in zip(case.prefixes, blocks_of(model), choices, strict=True):
        if choice.startswith("conv"):
            norm = {f"{prefix}attn.bn_{choice[4:]}.{n}": p.grad for n, p in block.attn.bn.named_parameters()}
            own |= norm
    case.gradients(f"ft.{which}.train.grad.", model, own)

    model.load_state_dict(frozen_state, strict=True)  # BatchNorm's statistics have moved
    assert hook.finish() == sum(choice.startswith("conv") for choice in choices)
    model.eval()
    assert_close(model(case.x), case.tensors[f"frozen.{which}.logits"], case.output, "frozen logits")
    state, wanted = model.state_dict(), case.group(f"frozen.{which}.sd.")
    assert wanted
    for name, want in wanted.items():
        assert_close(state[name], want, case.output, name)
    assert {name for name in state if "bconv" in name and "num_batches" not in name} == set(wanted)
    assert num_params(model) == cost(arch_of(model)).params == case.config["models"][which]["params_frozen"]


def test_gates_and_complexity(case: Case) -> None:
    net = case.supernet()
    mixers, units = net.expected()
    for tag, gates, kernel, hidden in zip(
        case.tags, zip(net.mixers, net.units, strict=True), mixers, units, strict=True
    ):
        for own, name in zip(gates, ("kernel", "ffn"), strict=True):
            assert_close(own.theta.sigmoid(), case.tensors[f"search.{name}_probs.{tag}"], case.output, name)
        assert torch.equal(kernel.double(), case.tensors[f"search.kernel_indicators.{tag}"])
        assert torch.equal(hidden.double(), case.tensors[f"search.ffn_indicators.{tag}"])
    costs = gate_costs(case.arch, COUNTS["reference"])
    found = [costs.estimate(mixers, units), *costs.parts(mixers, units)]
    assert [t.item() for t in found] == case.tensors["search.eval.flops_total_att_ffn"].tolist()
    kept = [int(gates.sum()) for gates in units]
    assert costs.total(net.choices, kept) == found[0]
    target, weight = case.config["target_flops_g"], case.config["loss_lambda"]
    loss = complexity_loss(found[0] / UNITS_OF_MACS, target, weight, "two_sided")
    assert_close(loss, case.tensors["search.eval.bops_loss"], case.output, "complexity loss")
    loss.backward()
    case.gradients("search.eval.bops_grad.", case.dense, search_gradients(case, net))


def search_gradients(case: Case, net: Supernet) -> dict[str, torch.Tensor]:
    """Gradients under the file's names."""
    found = {}
    for prefix, block, mixer, units in zip(case.prefixes, blocks_of(case.dense), net.mixers, net.units, strict=True):
        attn, mlp = (block.block.attn, block.block.mlp) if case.swin else (block.attn.attn, block.mlp)
        found[f"{prefix}attn.kernel_thresholds{'_full' * case.swin}"] = mixer.theta.grad
        found[f"{prefix}mlp.ffn_thresholds"] = units.theta.grad
        if attn.qkv.weight.grad is None:
            continue
        found[f"{prefix}attn.head_probs"] = mixer.head_probs.grad
        for norm in ("bn_1x1", "bn_3x3"):
            found |= {f"{prefix}attn.{norm}.{n}": p.grad for n, p in getattr(mixer, norm).named_parameters()}
        for leaf in ("weight", "bias"):
            found[f"{prefix}attn.v.{leaf}"] = getattr(attn.qkv, leaf).grad.chunk(3)[2]
            found[f"{prefix}attn.proj.{leaf}"] = getattr(attn.proj, leaf).grad
        found[f"{prefix}mlp.fc1.bias"] = mlp.fc1.bias.grad
    return found


def test_supernet(case: Case) -> None:
    net = case.supernet()
    assert_close(case.dense(case.x), case.tensors["search.eval.logits"], case.output, "search.eval.logits")

    draws = [case.tensors[f"search.train.u_{name}.{tag}"] for tag in case.tags for name in ("kernel", "ffn")]
    net.set_uniforms(draws)
    case.dense.train()
    logits = case.dense(case.x)
    assert_close(logits, case.tensors["search.train.logits"], case.output, "search.train.logits")
    estimate = gate_costs(case.arch, COUNTS["reference"]).estimate(*net.expected())
    task = F.cross_entropy(logits, case.labels)
    target, weight = case.config["target_flops_g"], case.config["loss_lambda"]
    complexity = complexity_loss(estimate / UNITS_OF_MACS, target, weight, "two_sided")
    parts = torch.stack([task.double(), complexity, task.double() + complexity])
    assert_close(parts, case.tensors["search.train.ce_bops_total"], case.output, "losses")
    (task + complexity).backward()
    case.gradients("search.train.grad.", case.dense, search_gradients(case, net))
    buffers = case.group("search.train.buf.")
    for prefix, mixer in zip(case.prefixes, net.mixers, strict=True):
        for name, buffer in mixer.named_buffers():
            if "running" in name:
                assert_close(buffer, buffers.pop(f"{prefix}attn.{name}"), case.output, prefix + name)
    assert not buffers


def branch(block: nn.Module, norm2: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mixer adds to ``x``, and the block's output."""
    seen: list[torch.Tensor] = []
    handle = norm2.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    y = block(x)
    handle.remove()
    return seen[0].reshape(x.shape) - x, y


def alternatives(case: Case) -> dict[int, str]:
    """The blocks that the file looks at alone, and the prefix of their names there."""
    return {0: "alt.0.", 1: "alt.1."} if case.swin else {case.config["alt_block"]: "alt."}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_in_one_block_finetuned(case: Case, choice: str) -> None:
    x, places = case.tensors["alt.x"].to(case.dtype), alternatives(case)
    model, _ = case.mixed([choice if i in places else "msa" for i in range(len(case.tags))])
    for i, prefix in places.items():
        block = blocks_of(model)[i]
        if case.swin:
            added, y = branch(block, block.norm2, x.unflatten(1, case.arch.stages[0].grid))
            want = case.tensors[f"{prefix}branch_ft.{choice}"]
            assert_close(added.flatten(1, 2), want, case.output, f"{prefix} branch {choice}")
            y = y.flatten(1, 2)
        else:
            want = case.tensors[f"{prefix}attn_ft.{choice}"]
            assert_close(block.attn(x), want, case.output, f"{prefix} attn {choice}")
            y = block(x)
        assert_close(y, case.tensors[f"{prefix}block_ft.{choice}"], case.output, f"{prefix} block {choice}")


def test_every_choice_in_one_block_of_the_supernet(case: Case) -> None:
    x, net = case.tensors["alt.x"].to(case.dtype), case.supernet()
    for (i, prefix), choice in product(alternatives(case).items(), CHOICES):
        with torch.no_grad():
            net.mixers[i].theta.copy_(torch.where(torch.arange(3) < CHOICES.index(choice), 1.0, -1.0))
        block = blocks_of(case.dense)[i]
        if case.swin:
            found, _ = branch(block, block.block.norm2, x.unflatten(1, case.arch.stages[0].grid))
            found, name = found.flatten(1, 2), "branch_search"
        else:
            found, name = block.attn(x), "attn_search"
        assert_close(found, case.tensors[f"{prefix}{name}.{choice}"], case.output, f"{prefix}{name} {choice}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", GATES, ids=lambda path: path.name)
def test_sampled_and_expected_gates(path: Path, dtype: torch.dtype) -> None:
    config, data = read(path)
    assert config["temperature"] == 1
    theta, u = data["theta"].to(dtype).requires_grad_(), data["u"].to(dtype)
    drawn = sample(theta, u)
    assert torch.equal(drawn.double(), data["sample"])
    assert_close(theta.sigmoid(), data["p"], OUTPUT[dtype], "p")
    (slope,) = torch.autograd.grad((data["w"].to(dtype) * drawn).sum(), theta)
    assert_close(slope, data["sample_grad_theta"], GRADIENT[dtype], "sample")
    expected = expect(theta)
    assert torch.equal(expected.double(), data["expect"])
    (slope,) = torch.autograd.grad((data["w"].to(dtype) * expected).sum(), theta)
    assert_close(slope, data["expect_grad_theta"], GRADIENT[dtype], "expect")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", GATES, ids=lambda path: path.name)
def test_cumulated_gates_and_what_is_detached(path: Path, dtype: torch.dtype) -> None:
    _, data = read(path)
    theta = data["k.theta"].to(dtype).requires_grad_()
    drawn = sample(theta, data["k.u"].to(dtype))
    assert torch.equal(drawn.double(), data["k.pattern"].double())
    gates = cumulate(drawn)
    assert torch.equal(gates.double(), data["k.cumgates"])
    (slope,) = torch.autograd.grad((data["k.w"].to(dtype) * gates).sum(), theta)
    assert_close(slope, data["k.grad_theta"], GRADIENT[dtype], "cumulated")
    for row, want in zip(data["k.pattern"], data["k.cumgates"], strict=True):
        assert choice_of(row - 0.5) == CHOICES[int(want.sum())]


class Logits(nn.Module):
    """A model that gives these logits for any images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
        self.logits, self.num_classes = nn.Parameter(logits.clone()), logits.shape[1]

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", GATES, ids=lambda path: path.name)
def test_distillation(path: Path, dtype: torch.dtype) -> None:
    config, data = read(path)
    alpha, classes = config["kd_alpha"], data["kd.student"].shape[1]
    losses = {name: t for name, t in data.items() if name.startswith("kd.loss.")}
    assert losses
    for name, want in losses.items():
        _, _, kind, tau = name.split(".")
        temperature = float(tau.removeprefix("tau"))
        # the original's soft term is divided by images and classes
        weights = {"none": (), "hard": (alpha,), "soft": (alpha / classes,)}[kind]
        terms = tuple(Distill(kind=kind, weight=weight, temperature=temperature) for weight in weights)
        recipe = Recipe(mixup=0.8, loss_weight=1 - alpha if terms else 1.0, distill=terms)
        student, teacher = Logits(data["kd.student"].to(dtype)), Logits(data["kd.teacher"].to(dtype))
        images = torch.zeros(len(data["kd.student"]), 1, 1, 1, dtype=dtype)
        loss = make_task(student, recipe, teacher).to(dtype)(images, data["kd.target"].to(dtype))["loss"]
        assert_close(loss, want, OUTPUT[dtype], name)
        loss.backward()
        assert_close(student.logits.grad, data[name.replace("loss", "grad")], GRADIENT[dtype], name)
