from __future__ import annotations

import dataclasses

import pytest

from prunesweep.models import Arch, UserError
from prunesweep.pruners import METHODS, Measure, Reached, Scores, TokenMethod, WidthMethod, get_method
from tests.contract_pruner import GROUPS, PrunerContract

PAIRS = [(n, family) for n, m in METHODS.items() if isinstance(m, WidthMethod) for family in m.families]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def contract(request: pytest.FixtureRequest) -> PrunerContract:
    name, family = request.param
    return PrunerContract(get_method(name, WidthMethod), family)


def test_every_unit_is_scored(contract: PrunerContract) -> None:
    contract.check_every_unit_is_scored()


def test_scoring_is_a_pure_function(contract: PrunerContract) -> None:
    contract.check_scoring_is_a_pure_function()


def test_progress_counts_to_the_end(contract: PrunerContract) -> None:
    contract.check_progress_counts_to_the_end()


def test_budgets_are_met_or_the_hindrance_is_named(contract: PrunerContract) -> None:
    contract.check_budgets_are_met_or_the_hindrance_is_named()


def test_budgets_choose_alike(contract: PrunerContract) -> None:
    contract.check_budgets_choose_alike()


def test_a_cut_model_can_be_scored_and_cut_again(contract: PrunerContract) -> None:
    contract.check_a_cut_model_can_be_scored_and_cut_again()


@pytest.mark.parametrize("name", [name for name, family in PAIRS if family == "eva"])
def test_normed_queries_and_mlps_with_two_norms(name: str) -> None:
    normed = {"qk_norm": True, "layer_scale": True, "mlp_scale": False, "glu": True, "mlp_entry_norm": True}
    contract = PrunerContract(get_method(name, WidthMethod), "eva", post_norm=False, **normed)
    contract.check_every_unit_is_scored()
    contract.check_budgets_are_met_or_the_hindrance_is_named()


def test_the_contract_sees_budgets_that_choose_otherwise() -> None:
    """Each budget is met, and by another half of the residual channels."""
    calls: list[float] = []
    usual = get_method("magnitude", WidthMethod)

    def decide(arch: Arch, scores: Scores, budget: float, *, measure: Measure) -> Reached:
        calls.append(budget)
        found = usual.decide(arch, scores, budget, measure=measure, groups=GROUPS)
        width = arch.stages[0].width
        assert found.cut.embed is not None
        kept = len(found.cut.embed[0] or range(width))
        units = tuple(range(kept) if len(calls) % 2 else range(width - kept, width))
        return dataclasses.replace(found, cut=dataclasses.replace(found.cut, embed=(units,)))

    contract = PrunerContract(dataclasses.replace(usual, decide=decide), "vit")
    with pytest.raises(AssertionError, match=r"stages.0.embed: one budget keeps \[.*, another"):
        contract.check_budgets_choose_alike()


def test_the_contract_sees_budgets_that_are_missed() -> None:
    usual = get_method("magnitude", WidthMethod)

    def decide(arch: Arch, scores: Scores, budget: float, *, measure: Measure) -> Reached:
        found = usual.decide(arch, scores, 0.8 * budget, measure=measure, groups=GROUPS)
        return dataclasses.replace(found, budget=budget, hindrance="")

    contract = PrunerContract(dataclasses.replace(usual, decide=decide), "vit")
    with pytest.raises(AssertionError, match="of the MACs for 0.95, without a word"):
        contract.check_budgets_are_met_or_the_hindrance_is_named()


def test_unknown_methods_and_families_are_named() -> None:
    with pytest.raises(UserError, match="unknown method 'nvti'; known: nvit, .* did you mean 'nvit'"):
        get_method("nvti", WidthMethod)
    with pytest.raises(
        UserError,
        match=r"method 'upvit' serves families vit, .*, lm; cait_\w+ is a 'cait', for which there are: "
        r"nvit, .* \(of 'cait', it has 'mixed_maps': its own passes",
    ):
        get_method("upvit", WidthMethod).check(Arch.from_timm("cait_xxs24_224"))
    with pytest.raises(UserError, match=r"of 'pvt_v2', it lacks 'tokens': convolutions of its MLPs"):
        get_method("pmvit", TokenMethod).check(Arch.from_timm("pvt_v2_b0"))
