"""The golden tests read every form of case: each variant is a copy of the development case with one thing changed.

Cases that are kept elsewhere (``PRUNESWEEP_GOLDEN``) may have a budget of its own in a run, no Gumbel noise, widths
that are not rounded, or no checkpoint of the original.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunesweep.models import cost, cut_arch

from . import test_isomorphic as isomorphic
from . import test_pmvit as pmvit
from . import test_uvc as uvc

DATA = Path(__file__).parent / "data"


def copy_case(method: str, name: str, folder: Path, suffixes: tuple[str, ...]) -> Path:
    """Copy these files of a case into ``folder``; the path of the copy without a suffix."""
    for suffix in suffixes:
        shutil.copyfile(DATA / method / f"{name}{suffix}", folder / f"{name}{suffix}")
    return folder / name


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Apply ``change`` to a case's JSON and tensors, in place."""
    facts, tensors = json.loads(Path(f"{path}.json").read_text()), load_file(f"{path}.safetensors")
    change(facts, tensors)
    Path(f"{path}.json").write_text(json.dumps(facts))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{path}.safetensors")


@pytest.fixture
def uvc_case(tmp_path: Path) -> Path:
    return copy_case("uvc", "dev", tmp_path, (".json", ".arch.json", ".safetensors"))


@pytest.mark.parametrize("in_the_run", [True, False])
def test_a_budget_of_the_run_s_own(uvc_case: Path, in_the_run: bool) -> None:
    def change(facts: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        if in_the_run:
            facts["budget"]["overrides"]["budget"] = facts["hyper"]["budget"]
        facts["hyper"]["budget"] = 0.9

    edit(uvc_case, change)
    if in_the_run:
        uvc.test_a_run_to_the_budget(uvc_case)
    else:  # the budget does decide how the run goes
        with pytest.raises(AssertionError):
            uvc.test_a_run_to_the_budget(uvc_case)


def test_no_gumbel_noise(uvc_case: Path) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        facts["hyper"]["use_gumbel"] = 0
        facts["hyper"]["eps_decay_every_n_steps_in_this_case"] = 5
        facts["pd"]["eps_after"] = facts["hyper"]["eps"] * facts["hyper"]["eps_decay"]  # once, before the sixth step
        for name in [n for n in tensors if "noise" in n or "gumbel" in n]:
            del tensors[name]

    edit(uvc_case, change)
    ran, skipped = [], []
    for mode in ("nogate", "gumbel_soft", "gumbel_hard", "softl0"):
        try:
            uvc.test_resource(uvc_case, mode)
            ran.append(mode)
        except pytest.skip.Exception:
            skipped.append(mode)
    assert (ran, skipped) == (["nogate", "softl0"], ["gumbel_soft", "gumbel_hard"])
    case = uvc.Case(uvc_case)
    assert not case.noise("joint", ("fwd", "R1", "R2"), 10).any()
    machine = case.machine()
    steps = uvc.primal_dual(case, machine, "pd", case["pd.g_task"], case.hyper["learning_rate"])
    eps = [machine.eps for _ in steps]
    assert eps == pytest.approx([0.1] * 5 + [0.1 * 0.92] * 5, rel=1e-12)
    assert machine.eps == pytest.approx(case.data["pd"]["eps_after"], rel=1e-12)


def test_a_case_of_gumbel_gates_without_its_noise_is_refused(uvc_case: Path) -> None:
    edit(uvc_case, lambda _, tensors: tensors.pop("pd.noise_R1"))
    with pytest.raises(KeyError, match=r"pd\.noise_R1"):
        uvc.test_ten_steps(uvc_case)


def test_widths_that_are_not_rounded(tmp_path: Path) -> None:
    path = copy_case("isomorphic", "dev", tmp_path, (".json", ".safetensors"))

    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        run = facts["runs"]["r1"]
        run["settings"]["round_to"] = None
        facts["runs"] = {"r1": run}
        scopes = run["scopes"]
        for name in [n for n in tensors if n.startswith("r1.keep.")]:  # what lies above the scope's threshold
            layer, kind = name.removeprefix("r1.keep.").rpartition(".")[::2]
            source = {"embed": "imp.embed", "mlp": f"imp.{layer}.mlp"}.get(kind, f"{kind}.{layer}")
            threshold = scopes[kind]["threshold"] * (1 + 1e-12)
            tensors[name] = (tensors[source] > threshold).nonzero()[:, 0]

    before = load_file(f"{path}.safetensors")
    edit(path, change)
    case = isomorphic.Case(path)
    assert any(t.shape != before[name].shape for name, t in case.tensors.items() if ".keep." in name)
    run = case.data["runs"]["r1"]
    decision = case.decide(run["settings"])
    small = cut_arch(case.arch, decision)
    run |= {"embed": small.stages[0].width, "heads": [b.heads for b in small.blocks]}
    run |= {"dims": [b.qk for b in small.blocks], "mlp": [b.mlp for b in small.blocks]}
    run |= {"macs": cost(small).macs, "params": cost(small).params}
    isomorphic.check_sets(case, "r1", decision)


def test_no_checkpoint_of_the_original(tmp_path: Path) -> None:
    case = pmvit.Case(copy_case("pmvit", "pmvit_dev", tmp_path, (".json", ".safetensors")))
    pmvit.test_dense_model(case, torch.float64)
    with pytest.raises(pytest.skip.Exception, match="no checkpoint"):
        pmvit.test_the_original_checkpoint(case, torch.float64)
    shutil.copyfile(DATA / "pmvit" / "pmvit_dev_refckpt.pth", tmp_path / "pmvit_dev_refckpt.pth")
    pmvit.test_the_original_checkpoint(case, torch.float64)
