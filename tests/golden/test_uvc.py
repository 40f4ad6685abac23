"""UVC against what the original code computes: static values, primal-dual runs, joint training, the dense model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from prunesweep.models import Arch, Block, BlockCut, Cut, Stage, arch_of, build, cost, cut, cut_arch
from prunesweep.pruners.uvc.primal_dual import Norms, PrimalDual, keep_weight, least_sum, next_least, weakest
from prunesweep.pruners.uvc.resource import Resource, paper_macs
from prunesweep.pruners.uvc.settings import UVCSettings
from tests.oracle import masked

from .conftest import cases

CASES = cases("uvc", ".arch.json")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
RUN = {"rtol": 1e-7, "atol": 1e-7}


def read_arch(record: dict[str, Any]) -> Arch:
    """Our record of a golden one, whole."""
    side = record["img_size"] // record["patch_size"]
    heads, width = record["num_heads"], record["head_dim"]
    block = Block(src=0, heads=heads, qk=width, v=width, scale=width**-0.5, mlp=record["mlp_hidden"])
    blocks = tuple(dataclasses.replace(block, src=i) for i in range(record["depth"]))
    return Arch(
        family="vit",
        source="golden",
        img_size=(record["img_size"],) * 2,
        patch_size=(record["patch_size"],) * 2,
        in_chans=3,
        num_classes=record["num_classes"],
        stages=(Stage(width=record["embed_dim"], grid=(side, side), blocks=blocks),),
        norm_eps=record["layer_norm_eps"],
    )


class Case:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        self.tensors = load_file(path.with_name(path.name + ".safetensors"))
        self.data = json.loads(path.with_name(path.name + ".json").read_text())
        self.dense = json.loads(path.with_name(path.name + ".arch.json").read_text())
        self.arch, self.hyper = read_arch(self.data["arch"]), self.data["hyper"]
        self.model = build(self.arch).to(dtype).eval()
        weights = {k.removeprefix("init.model."): v for k, v in self.tensors.items() if k.startswith("init.model.")}
        self.model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def noise(self, part: str, names: tuple[str, ...], steps: int) -> torch.Tensor:
        """Recorded Gumbel noise (steps, names, L, 2); zeros where a case has none, because its gates are soft-L0."""
        none = torch.zeros(steps, self.arch.depth, 2, dtype=torch.float64)
        if self.hyper["use_gumbel"]:
            return torch.stack([self[f"{part}.noise_{name}"] for name in names], 1)
        return torch.stack([self.tensors.get(f"{part}.noise_{name}", none) for name in names], 1)

    def machine(self, **changes: Any) -> PrimalDual:
        """The original's settings; starts from the case's initial values."""
        hyper = self.hyper | changes
        settings = UVCSettings(
            budgets=(hyper["budget"],),
            steps="reference",
            resource="paper",
            gates="gumbel" if hyper["use_gumbel"] else "soft_l0",
            warmup_epochs=0,
            gate_weighting="rising",
            sticky_upper_bound=True,
            resource_band=hyper["z_grad_clip"],
            zlr=(hyper["zlr_schedule_list"][0],),
            z_max=float("inf"),
            **{k: hyper[k] for k in ("slr", "rlr", "ylr", "plr", "glr", "gating_weight", "gating_interval")},
            **{k: hyper[k] for k in ("eps", "eps_decay", "sl2wd")},
        )
        machine = PrimalDual(Resource.of(self.arch, "paper"), settings)
        for name in ("s", "r", "y", "p", "z", "gates"):
            setattr(machine, name, self[f"init.{name}"].reshape(getattr(machine, name).shape).clone())
        return machine


def norms_of(model: nn.Module, heads: int) -> Norms:
    columns = torch.stack([block.attn.proj.weight.detach().double().square().sum(0) for block in model.blocks])
    mlp = torch.stack([block.mlp.fc2.weight.detach().double().square().sum(0) for block in model.blocks])
    return Norms(columns.unflatten(1, (heads, -1)), mlp)


@torch.no_grad()
def shrink(model: nn.Module, machine: PrimalDual, eta: float) -> Norms:
    """The prox on the weights; the norms after it."""
    heads = machine.resource.num_heads
    columns, units = machine.shrink(norms_of(model, heads), eta)
    for block, by_column, by_unit in zip(model.blocks, columns.flatten(1), units, strict=True):
        block.attn.proj.weight *= by_column
        block.mlp.fc2.weight *= by_unit
    return norms_of(model, heads)


def kept_masks(machine: PrimalDual, norms: Norms) -> dict[str, torch.Tensor]:
    channels = weakest(norms.columns, machine.r) | weakest(norms.heads, machine.s[:, 0])[..., None]
    units = ~weakest(norms.mlp, machine.s[:, 1])
    return {"proj_cols": ~channels.flatten(1), "fc2_cols": units, "fc1_rows": units}


def assert_masks(case: Case, prefix: str, machine: PrimalDual, norms: Norms) -> None:
    for name, mask in kept_masks(machine, norms).items():
        assert torch.equal(mask.double(), case[f"{prefix}.{name}"]), f"{prefix}.{name}"


def stacked(model: nn.Module, layer: str) -> torch.Tensor:
    return torch.stack([block.get_submodule(layer).weight.detach() for block in model.blocks])


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, {"rtol": 1e-5, "atol": 1e-5})]
)
def test_norms_and_their_sums(path: Path, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    case = Case(path, dtype)
    machine = case.machine()
    norms = norms_of(case.model, machine.resource.num_heads)
    s, r, y, p = machine.s, machine.r, machine.y, machine.p
    least = torch.stack([least_sum(norms.heads, s[:, 0]), least_sum(norms.mlp, s[:, 1])], 1)
    following = torch.stack([next_least(norms.heads, s[:, 0]), next_least(norms.mlp, s[:, 1])], 1)
    found = {
        "col_sqnorm": norms.columns,
        "head_sqnorm": norms.heads,
        "mlp_sqnorm": norms.mlp,
        "col_sqnorm_sorted": norms.columns.sort(-1).values,
        "head_sqnorm_sorted": norms.heads.sort(-1).values,
        "mlp_sqnorm_sorted": norms.mlp.sort(-1).values,
        "least_s_norm": least,
        "least_r_norm": least_sum(norms.columns, r),
        "sloss1_grad_s": y * following,
        "rloss1_grad_r": p * next_least(norms.columns, r),
        **dict.fromkeys(("sloss1", "yloss"), (y * least).sum()[None]),
        **dict.fromkeys(("rloss1", "ploss"), (p * least_sum(norms.columns, r)).sum()[None]),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, case[f"static.{name}"], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert_masks(case, "static.mask", machine, norms)


@pytest.mark.parametrize("mode", ["nogate", "gumbel_soft", "gumbel_hard", "softl0"])
def test_resource(path: Path, mode: str) -> None:
    case = Case(path)
    if f"static.R.{mode}" not in case.tensors:
        assert mode.startswith("gumbel"), f"the case lacks static.R.{mode}"
        assert not case.hyper["use_gumbel"], f"the case lacks static.R.{mode}"
        pytest.skip("a case of soft-L0 gates has no values of Gumbel's")
    machine = case.machine()
    gone = weakest(norms_of(case.model, machine.resource.num_heads).heads, machine.s[:, 0])
    pi, slopes = torch.ones(case.arch.depth, dtype=torch.float64), torch.zeros_like(machine.gates)
    if mode == "softl0":
        pi, slopes = keep_weight(machine.gates, torch.zeros_like(machine.gates), "soft_l0", case.hyper["eps"])
    elif mode != "nogate":
        noise = case[f"static.R.{mode}.noise"]
        pi, slopes = keep_weight(machine.gates, noise, "gumbel", 0.0, hard=mode.endswith("hard"))
    usage = machine.resource(machine.s, machine.r, pi, gone)
    prefix = f"static.R.{mode}"
    assert usage.value == pytest.approx(case[prefix].item(), rel=1e-9)
    torch.testing.assert_close(usage.s, case[f"{prefix}.grad_s"], **EXACT)
    torch.testing.assert_close(usage.r, case[f"{prefix}.grad_r"], **EXACT)
    if mode != "nogate":
        torch.testing.assert_close(usage.pi[:, None] * slopes, case[f"{prefix}.grad_gates"], **EXACT)


def test_macs_and_the_older_form_of_the_resource(path: Path) -> None:
    """Until December 2021 the projection's share was rho squared."""
    case = Case(path)
    embed, macs = paper_macs(case.arch)
    counts = case.data["flops_list"]
    assert embed == counts["embed_macs"]
    assert macs.tolist() == counts["block_macs[l][qkv,qk,av,proj,fc1,fc2]"]
    total = embed + macs.sum()
    assert 2 * total == counts["full_flops"]
    machine = case.machine()
    gone = weakest(norms_of(case.model, machine.resource.num_heads).heads, machine.s[:, 0])
    rho = machine.resource.kept(machine.s, machine.r, gone)[1]
    usage = machine.resource(machine.s, machine.r, torch.ones(case.arch.depth, dtype=torch.float64), gone)
    older = usage.value + float((macs[:, 3] * (rho**2 - rho)).sum() / total)
    assert older == pytest.approx(case["static.R.nogate_dec2021_r2"].item(), rel=1e-9)


def test_shrinking_and_projecting(path: Path) -> None:
    case = Case(path)
    machine = case.machine()
    masks = kept_masks(machine, norms_of(case.model, machine.resource.num_heads))
    for name, layer, mask in (
        ("proj", "attn.proj", masks["proj_cols"][:, None, :]),
        ("fc2", "mlp.fc2", masks["fc2_cols"][:, None, :]),
        ("fc1", "mlp.fc1", masks["fc1_rows"][:, :, None]),
    ):
        torch.testing.assert_close(stacked(case.model, layer) * mask, case[f"static.hardproj.{name}_weight"], **EXACT)
    shrink(case.model, machine, case.hyper["learning_rate"])
    torch.testing.assert_close(stacked(case.model, "attn.proj"), case["static.prox.proj_weight"], **EXACT)
    torch.testing.assert_close(stacked(case.model, "mlp.fc2"), case["static.prox.fc2_weight"], **EXACT)


def decay(case: Case, machine: PrimalDual) -> None:
    """Soft-L0's eps falls before steps 6, 11, 16, ... where a case has it fall at all."""
    every = case.hyper["eps_decay_every_n_steps_in_this_case"]
    if every and machine.step and machine.step % every == 0:
        machine.eps *= machine.settings.eps_decay


def primal_dual(case: Case, machine: PrimalDual, part: str, task: torch.Tensor, eta: float) -> Iterator[Norms]:
    """Steps in which the weights are changed by the prox alone."""
    for noise in case.noise(part, ("R1", "R1", "R2"), len(case[f"{part}.traj.resource"])):
        decay(case, machine)
        machine.step += 1
        norms = shrink(case.model, machine, eta)
        machine.update(norms, task, noise)
        yield norms


def test_ten_steps(path: Path) -> None:
    case = Case(path)
    machine = case.machine()
    steps = primal_dual(case, machine, "pd", case["pd.g_task"], case.hyper["learning_rate"])
    for t, norms in enumerate(steps):  # noqa: B007 (the last ones are used below)
        for name in ("s", "r", "y", "p", "z", "gates"):
            want = case[f"pd.traj.{name}"][t]
            torch.testing.assert_close(getattr(machine, name), want, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        assert machine.resource_used == pytest.approx(case["pd.traj.resource"][t].item(), rel=1e-9)
        if f"pd.step{t + 1}.proj_weight" in case.tensors:
            for name, layer in (("proj", "attn.proj"), ("fc2", "mlp.fc2")):
                torch.testing.assert_close(stacked(case.model, layer), case[f"pd.step{t + 1}.{name}_weight"], **EXACT)
    assert machine.eps == pytest.approx(case.data["pd"]["eps_after"], rel=1e-12)
    assert_masks(case, "pd.step10.mask", machine, norms)
    exact = cost(cut_arch(case.arch, decision_of(machine, norms))).macs
    classifier = case.arch.stages[0].width * case.arch.num_classes
    assert exact - classifier == case.data["calculator_extras"]["pd_step10_all_blocks"]["exact_dense_macs"]


def decision_of(machine: PrimalDual, norms: Norms, runs: list[bool] | None = None) -> Cut:
    columns = kept_masks(machine, norms)["proj_cols"].unflatten(1, (machine.resource.num_heads, -1))
    units = kept_masks(machine, norms)["fc2_cols"]
    blocks = []
    for i, (heads, mlp) in enumerate(zip(columns, units, strict=True)):
        kept = [h for h, head in enumerate(heads) if head.any()]
        E = machine.resource.head_dim
        qk = tuple(tuple(range(h * E, (h + 1) * E)) for h in kept)
        v = tuple(tuple(h * E + c for c in heads[h].nonzero()[:, 0].tolist()) for h in kept)
        keep = runs is None or runs[i]
        blocks.append(BlockCut(keep=keep, qk=qk, v=v, mlp=tuple(mlp.nonzero()[:, 0].tolist())))
    return Cut(blocks=tuple(blocks))


def test_a_run_to_the_budget(path: Path) -> None:
    case = Case(path)
    given = case.data["budget"]
    machine = case.machine(**given["overrides"])
    machine.s.zero_()
    machine.r.zero_()
    machine.y[:] = torch.tensor(given["y_init"])
    machine.p.fill_(given["p_init"])
    machine.z.fill_(given["z_init"])
    machine.gates[:] = torch.tensor([-1.0, 1.0])
    eta = given["overrides"].get("learning_rate", case.hyper["learning_rate"])
    resource, z = [], []
    for norms in primal_dual(case, machine, "budget", case["pd.g_task"] * given["g_task_scale"], eta):  # noqa: B007
        resource.append(machine.resource_used)
        z.append(machine.z.item())
    torch.testing.assert_close(torch.tensor(resource, dtype=torch.float64), case["budget.traj.resource"], **RUN)
    torch.testing.assert_close(torch.tensor(z, dtype=torch.float64), case["budget.traj.z"], **RUN)
    for name in ("s", "r", "y", "p", "z", "gates"):
        torch.testing.assert_close(
            getattr(machine, name), case[f"budget.final.{name}"].view_as(getattr(machine, name)), **RUN
        )
    assert machine.eps == pytest.approx(given["eps_after"], rel=1e-12)
    assert_masks(case, "budget.mask", machine, norms)
    runs = machine.gates[:, 1] > machine.gates[:, 0]
    assert torch.equal(runs.double(), case["budget.block_keep"])
    usage = machine.resource(machine.s, machine.r, runs.double(), weakest(norms.heads, machine.s[:, 0]))
    assert usage.value == pytest.approx(given["R_decided"], rel=1e-7)
    exact = cost(cut_arch(case.arch, decision_of(machine, norms, runs.tolist()))).macs
    classifier = case.arch.stages[0].width * case.arch.num_classes
    assert exact - classifier == case.data["calculator_extras"]["budget"]["exact_dense_macs"]


class Gated(nn.Module):
    """The original's training model: gates beside a ViT, and patch gates where the case has them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.vit, self.kind = case.model, "gumbel" if case.hyper["use_gumbel"] else "soft_l0"
        self.gates = nn.Parameter(case["init.gates"].clone())
        patches = case.arch.tokens - case.arch.prefix_tokens
        first = case.tensors.get("init.patch_gating", torch.full((1, patches, 1), 3.0, dtype=torch.float64))
        self.patch_gating = nn.Parameter(first.clone()) if case.hyper["enable_patch_gating"] else None

    def forward(self, x: torch.Tensor, noise: torch.Tensor, eps: float) -> torch.Tensor:
        z = self.vit.patch_embed(x)
        if self.patch_gating is not None:
            z = z * self.patch_gating.sigmoid()
        z = self.vit._pos_embed(z)
        keep = self.gates[:, 1]
        weights = ((self.gates + noise) / 0.5).softmax(1)[:, 1] if self.kind == "gumbel" else keep**2 / (keep**2 + eps)
        for block, w in zip(self.vit.blocks, weights, strict=True):
            z = w * block(z) + (1 - w) * z
        return self.vit.forward_head(self.vit.norm(z))


def joint_loss(case: Case, logits: torch.Tensor) -> torch.Tensor:
    alpha, tau = case.hyper["distillation_alpha"], case.hyper["distillation_tau"]
    log_p, log_q = ((z / tau).log_softmax(1) for z in (case["joint.teacher_logits"], logits))
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * tau**2 / logits.numel()
    return (1 - alpha) * F.cross_entropy(logits, case["joint.y"]) + alpha * kl


def assert_joint(case: Case, model: Gated, machine: PrimalDual, t: int) -> None:
    prefix = f"joint.step{t}."
    found = {f"model.{k}": v for k, v in model.vit.state_dict().items()}
    found |= {name: getattr(machine, name) for name in ("s", "r", "y", "p", "z", "gates")}
    if model.patch_gating is not None:
        found["patch_gating"] = model.patch_gating.detach()
    for name in (k.removeprefix(prefix) for k in case.tensors if k.startswith(prefix)):
        if name not in ("logits", "grad_gates_preclip"):
            want = case[prefix + name].view_as(found[name])
            torch.testing.assert_close(found[name], want, **RUN, msg=lambda m, n=name: f"{n}: {m}")


def test_joint_training(path: Path) -> None:
    """Forward, clip, AdamW over everything, prox, primal-dual step; then the masked model and the dense one."""
    case = Case(path)
    with torch.no_grad():
        torch.testing.assert_close(case.model(case["joint.x"]), case["joint.teacher_logits"], **RUN)
    model, machine = Gated(case), case.machine()
    lr = case.hyper["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=case.hyper["weight_decay"])
    for t, noise in enumerate(case.noise("joint", ("fwd", "R1", "R2"), len(case["joint.traj.loss"])), 1):
        decay(case, machine)
        optimizer.zero_grad()
        logits = model(case["joint.x"], noise[0], machine.eps)
        loss = joint_loss(case, logits)
        loss.backward()
        assert loss.item() == pytest.approx(case["joint.traj.loss"][t - 1].item(), rel=1e-7)
        if t == 1:
            torch.testing.assert_close(logits.detach(), case["joint.step1.logits"], **RUN)
            torch.testing.assert_close(model.gates.grad, case["joint.step1.grad_gates_preclip"], **RUN)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.item() == pytest.approx(case["joint.traj.grad_norm"][t - 1].item(), rel=1e-7)
        optimizer.step()
        machine.step += 1
        machine.gates = model.gates.detach().clone()
        norms = shrink(model.vit, machine, lr)
        machine.update(norms, model.gates.grad, noise)
        model.gates.data.copy_(machine.gates)
        assert machine.resource_used == pytest.approx(case["joint.traj.resource"][t - 1].item(), rel=1e-7)
        if t in (1, 10):
            assert_joint(case, model, machine, t)
    assert_masks(case, "joint.final.mask", machine, norms)
    assert_same_function(case, model, decision_of(machine, norms, _runs(case["joint.final.decided_gates"])))


def _runs(gates: torch.Tensor) -> list[bool]:
    return (gates[:, 1] > gates[:, 0]).tolist()


def assert_same_function(case: Case, model: Gated, decision: Cut) -> None:
    """The masked model and the dense one give the original's masked logits; the dense one is the golden record's."""
    dense = case.dense["joint_final"]
    assert "".join("01"[choice.keep] for choice in decision.blocks) == dense["skip_config"]
    small = cut(case.model, decision)
    for choice, block in zip(decision.blocks, dense["blocks"], strict=True):
        assert choice.keep == block["keep"]
        E = case.data["arch"]["head_dim"]
        assert [h[0] // E for h in choice.qk] == block["heads"]
        assert [[c % E for c in head] for head in choice.v] == block["v_dims"]
        assert list(choice.mlp) == block["mlp_units"]
    classifier = case.arch.stages[0].width * case.arch.num_classes
    exact = case.data["calculator_extras"]["joint_final"]["exact_dense_macs"]
    assert cost(arch_of(small)).macs - classifier == exact
    x, want = case["joint.x"], case["joint.final.masked_logits"]
    with torch.no_grad(), masked(case.model, decision):
        torch.testing.assert_close(logits_of(case.model, model, x), want, **RUN)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(small, model, x), want, **RUN)


def logits_of(vit: nn.Module, trained: Gated, x: torch.Tensor) -> torch.Tensor:
    """The decided model; patches stay scaled by their gates where there are any."""
    z = vit.patch_embed(x)
    if trained.patch_gating is not None:
        z = z * trained.patch_gating.detach().sigmoid()
    return vit.forward_head(vit.norm(vit.blocks(vit._pos_embed(z))))
