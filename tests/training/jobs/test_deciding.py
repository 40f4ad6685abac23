"""Runs of methods that decide while they train, of which the decisions are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import Arch, Block, Cut, Stage, UserError, adopted, arch_of, build, cost, cut_arch
from prunesweep.pruners import METHODS
from prunesweep.pruners.hook import Hook
from prunesweep.pruners.method import TrainedMethod
from prunesweep.training import Data, Recipe, open_data
from prunesweep.training.jobs.deciding import Deciding
from prunesweep.training.jobs.proposal import Proposal

RECIPE = Recipe(epochs=2, batch_size=128, lr=1e-3)


def source() -> nn.Module:
    torch.manual_seed(0)
    block = Block(src=0, heads=2, qk=8, v=8, scale=0.35, mlp=64)
    blocks = tuple(Block(**{**vars_of(block), "src": i}) for i in range(3))
    stage = Stage(width=32, grid=(4, 4), blocks=blocks)
    arch = Arch(
        family="vit", source="test", img_size=(8, 8), patch_size=(2, 2), in_chans=1, num_classes=10, stages=(stage,)
    )
    return build(arch).eval()


def vars_of(block: Block) -> dict[str, Any]:
    return {name: getattr(block, name) for name in ("heads", "qk", "v", "scale", "mlp")}


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", source().pretrained_cfg, search_split=0.2)


def quiet(what: str, share: float, note: str) -> None:
    pass


@pytest.mark.parametrize(
    ("method", "budgets"), [("uvc", (0.8, 0.6)), ("nvit-iterative", (0.8, 0.6)), ("spvit", (0.6,))]
)
def test_decisions_meet_their_budgets_and_are_kept(
    method: str, budgets: tuple[float, ...], data: Data, tmp_path: Path
) -> None:
    """With the settings that follow from the length of the run; a second time nothing is trained."""
    model, told = source(), list[tuple[str, float]]()
    weights = [parameter.clone() for parameter in model.parameters()]
    run = Deciding(model, data, method, budgets, RECIPE)
    run.check()
    files = run.run(tmp_path, lambda what, share, _: told.append((what, share)))
    found = [Proposal.load(file) for file in files]
    assert [own.budget for own in found] == pytest.approx(budgets)
    assert {own.method for own in found} == {method}
    whole = cost(arch_of(model)).macs
    for own in found:
        assert 0.85 * own.budget < cost(cut_arch(arch_of(model), own.cut)).macs / whole <= own.budget
    assert told[-1] == (f"{method} decides", 1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))

    told.clear()
    assert Deciding(model, data, method, budgets, RECIPE).run(tmp_path, lambda *step: told.append(step[:2])) == files
    assert not told
    assert not list(tmp_path.glob("*state*"))


def test_what_is_damaged_or_in_part_is_made_again(data: Data, tmp_path: Path) -> None:
    run = Deciding(source(), data, "nvit-iterative", (0.8, 0.6), RECIPE)
    files = run.run(tmp_path, quiet)
    before = [file.read_text() for file in files]
    files[1].unlink()
    assert run.kept(tmp_path) == ()
    assert [file.read_text() for file in run.run(tmp_path, quiet)] == before
    files[0].write_text(before[0].replace('"of":2', '"of":1'))
    with pytest.raises(UserError, match="is no decision that can be read: it has changed since it was written"):
        Proposal.load(files[0])
    assert [file.read_text() for file in run.run(tmp_path, quiet)] == before


def test_a_run_that_was_interrupted_goes_on(data: Data, tmp_path: Path) -> None:
    whole = Deciding(source(), data, "uvc", (0.6,), RECIPE)
    (file,) = whole.run(tmp_path / "whole", quiet)
    epochs = list[float]()

    def stop(_: str, share: float, __: str) -> None:
        if share > 0.8:
            raise KeyboardInterrupt
        epochs.append(share)

    with pytest.raises(KeyboardInterrupt):
        whole.run(tmp_path / "parts", stop)
    assert list((tmp_path / "parts").glob("*.state.safetensors"))
    rest = list[float]()
    (again,) = whole.run(tmp_path / "parts", lambda _, share, __: rest.append(share))
    assert min(rest) > 0.5  # of the first epoch's updates none is done again
    assert again.read_text() == file.read_text()


def test_what_does_not_go_together_is_refused_before_training(data: Data) -> None:
    swin = timm.create_model(
        "swinv2_tiny_window8_256", num_classes=10, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    )
    with pytest.raises(UserError, match="method 'spvit' serves families vit, .* for which there are: .*uvc"):
        Deciding(adopted(swin), data, "spvit", (0.5,), RECIPE).check()
    with pytest.raises(UserError, match="serves one budget in a run"):
        Deciding(source(), data, "spvit", (0.5, 0.4), RECIPE).check()
    with pytest.raises(UserError, match="takes at least .* updates"):
        slow = {"interval": 100, "groups_per_step": 1}
        Deciding(source(), data, "nvit-iterative", (0.5,), RECIPE, slow).check()


class Never(Hook):
    """Reaches no budget."""

    def finish(self) -> list[Cut]:
        return []


def test_a_method_without_a_decision_is_an_error(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uvc = METHODS["uvc"]
    assert isinstance(uvc, TrainedMethod)
    never = TrainedMethod(
        name="never",
        description="",
        paper="",
        families=("vit",),
        settings=uvc.settings,
        recipe="quick",
        finetune="quick",
        hook=lambda *_: Never(),
        decided=lambda *_: [],
    )
    monkeypatch.setitem(METHODS, "never", never)
    with pytest.raises(UserError, match="no budget was reached in 2 epochs"):
        Deciding(source(), data, "never", (0.5,), RECIPE).run(tmp_path, quiet)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
