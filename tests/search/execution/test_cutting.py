"""The models that candidates start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunesweep.models import BlockCut, Cut, UserError, arch_of, cut, cut_arch, load
from prunesweep.models.recalibrate import recalibrate
from prunesweep.search.config import SearchConfig
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.training import EVAL_BATCH, Data, evaluate, open_data
from tests.search.execution.test_task import begin, nothing


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", search_split=0.2)


@pytest.fixture
def source(tiny: Callable[..., SearchConfig], runs: Path) -> nn.Module:
    return load(prepare_search(tiny(), runs / "cache", nothing).folder)


def decision(source: nn.Module) -> Cut:
    """A quarter of the residual channels goes, the last attention becomes a convolution."""
    arch = arch_of(source)
    blocks = [*(BlockCut(),) * (arch.depth - 1), BlockCut(mixer="conv3x3")]
    return Cut(embed=(tuple(range(0, arch.stages[0].width - 4)),), blocks=tuple(blocks))


def same(a: nn.Module, b: nn.Module) -> bool:
    weights = b.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in a.state_dict().items())


def test_what_a_cut_leaves_is_recovered(tiny: Callable[..., SearchConfig], source: Any, data: Data) -> None:
    chosen = decision(source)
    recovered = Cutter(source, data, tiny(search={"recover_images": 400})).model(chosen)
    as_cut = Cutter(source, data, tiny(search={"recover": False})).model(chosen)
    assert arch_of(recovered) == arch_of(as_cut) == cut_arch(arch_of(source), chosen)
    plain = cut(source, chosen)
    recalibrate(plain, data.calibration(1024, EVAL_BATCH, 0))
    assert same(as_cut, plain)
    found = [evaluate(m, data.val_loader(EVAL_BATCH), source=source)["kl"] for m in (recovered, as_cut)]
    assert found[0] < 0.5 * found[1]


@pytest.mark.parametrize("method", ["magnitude", "subspaces"])
def test_a_projected_candidate_is_what_the_space_decoded(
    method: str, tiny: Callable[..., SearchConfig], runs: Path
) -> None:
    """Record and cost, whatever the other axes say; and it is nearer to the source than channels that were chosen."""
    scores = {"method": method, "images": 256, "batch_size": 64}
    space = {
        "budget": [0.2, 0.9],
        "skip": [0, 1],
        "conv": [0, 1],
        "keep_rate": [0.5, 1.0],
        "lr": [1e-3, 2e-3],
        "halves": [0, 3],
    }
    config = tiny(scores=scores, space=space, search={"recover_images": 400})
    prepared = prepare(config, runs / "cache", nothing)
    cutter = Cutter(prepared.model, prepared.data, config)
    assert cutter.recovery is not None
    assert cutter.recovery.project
    for point in (
        {"budget": 0.5},
        {"budget": 0.4, "skip": 1},
        {"budget": 0.4, "conv": 1},
        {"budget": 0.4, "keep_rate": 0.6},
        {"budget": 0.3, "halves": 1},
        {"budget": 0.2, "halves": 2, "keep_rate": 0.7},
    ):
        full = {"skip": 0, "conv": 0, "keep_rate": 1.0, "lr": 1e-3, "halves": 0, **point}
        candidate = prepared.space.decode({n: v for n, v in full.items() if n in prepared.space.distributions})
        model = cutter.model(candidate.decision)
        assert arch_of(model) == candidate.arch
        heads = {block.heads for block in candidate.arch.blocks if block.mixer == "attn"}
        assert heads <= {prepared.arch.blocks[0].heads}
    if method == "magnitude":
        plain = config.model_copy(update={"search": config.search.model_copy(update={"project": False})})
        chosen = prepared.space.decode({**prepared.space.neutral, "budget": 0.4}).decision
        found = [c.measured(c.model(chosen)).kl for c in (cutter, Cutter(prepared.model, prepared.data, plain))]
        assert found[0] < 0.7 * found[1]


def test_a_method_that_needs_projection_is_refused_without(tiny: Callable[..., SearchConfig], runs: Path) -> None:
    config = tiny(scores={"method": "subspaces"}, search={"project": False})
    with pytest.raises(
        UserError, match="method 'subspaces' says how many units stay, not which.*search.project is off"
    ):
        prepare(config, runs / "cache", nothing)


def test_the_same_candidate_is_the_same_model_in_every_process(
    tiny: Callable[..., SearchConfig], source: Any, data: Data
) -> None:
    chosen, config = decision(source), tiny()
    first, again = (Cutter(source, open_data("digits", search_split=0.2), config).model(chosen) for _ in range(2))
    assert same(first, again)
    other = Cutter(source, data, config.model_copy(update={"seed": 7})).model(chosen)
    assert not same(first, other)


def test_a_source_that_cannot_be_recovered_is_cut(tiny: Callable[..., SearchConfig], source: Any, data: Data) -> None:
    arch = arch_of(source)
    mixed = cut(source, Cut(blocks=(BlockCut(mixer="conv1x1"), *(BlockCut(),) * (arch.depth - 1))))
    chosen = Cut(embed=(tuple(range(12)),), blocks=(BlockCut(),) * arch.depth)
    models = [Cutter(mixed, data, tiny(search={"recover": on})).model(chosen) for on in (True, False)]
    assert same(*models)


def test_a_trial_starts_from_the_recovered_model(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, data: Data
) -> None:
    config = tiny(search={"rungs": [0, 1], "screen_images": 200, "recover_images": 300})
    run, coordinator = begin(config, runs / "cache", tmp_path / "run")
    unit = coordinator.next()
    assert unit is not None
    cutter = Cutter(load(run / "source"), data, config)
    kept = run.read_cut(unit.number)
    assert kept is not None
    assert run_task(run.path, unit)["result"]["top1"] == cutter.screened(kept).top1
    assert len(torch.cat([labels for _, labels in cutter.screen])) == 200
    assert sum(cutter.streams.inputs.lengths) == 300
    # what candidates are compared by is none of what they are fitted to
    fitted = {image.numpy().tobytes() for images, _ in data.calibration(2000, 256, 0) for image in images}
    assert not fitted & {image.numpy().tobytes() for images, _ in cutter.screen for image in images}
