from __future__ import annotations

import pytest

from prunesweep.models import Arch, UserError
from prunesweep.pruners import METHODS, WidthMethod, get_method
from tests.contract_pruner import PrunerContract

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


def test_budgets_are_met_and_nested(contract: PrunerContract) -> None:
    contract.check_budgets_are_met_and_nested()


def test_a_cut_model_can_be_scored_and_cut_again(contract: PrunerContract) -> None:
    contract.check_a_cut_model_can_be_scored_and_cut_again()


def test_unknown_methods_and_families_are_named() -> None:
    with pytest.raises(UserError, match="unknown method 'nvti'; known: nvit, .* did you mean 'nvit'"):
        get_method("nvti", WidthMethod)
    with pytest.raises(UserError, match="method 'nvit' serves families vit, swin; pvt_v2_b0 is a 'pvt_v2', for which"):
        get_method("nvit", WidthMethod).check(Arch.from_timm("pvt_v2_b0"))
