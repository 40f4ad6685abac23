"""The importer of fairseq's language models against what fairseq computes with the same checkpoints."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prunesweep.models import UserError, arch_of, cost, load, num_params, save
from prunesweep.models.counting import block_cost, outside_cost
from prunesweep.models.importers import import_checkpoint
from prunesweep.models.published.counts import tables_twice

from .conftest import cases

PADDING = 1  # fairseq's word number; what is predicted behind it is undefined


class Case:
    def __init__(self, path: Path) -> None:
        self.path, self.data = Path(f"{path}.pth"), json.loads(Path(f"{path}.json").read_text())
        self.facts, self.expected, self.tolerance = self.data["arch"], self.data["expected"], self.data["tolerance"]
        self.refused_global: str | None = self.data.get("refused_global")

    def read(self, dtype: torch.dtype = torch.float32, *, heads: bool = True, trust: bool | None = None) -> nn.Module:
        """With the number of heads given, unless a trusted file tells it."""
        trust = self.refused_global is not None if trust is None else trust
        number = self.data["needs"]["num_heads"] if heads else None
        return import_checkpoint(self.path, "fairseq", heads=number, trust=trust, dtype=dtype)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    @property
    def words(self) -> torch.Tensor:
        return self.tensors["inputs"]


def found() -> list[Case]:
    layouts = {
        path: json.loads(Path(f"{path}.json").read_text()).get("layout", "") for path in cases("import", ".json")
    }
    return [Case(path) for path, layout in layouts.items() if layout.startswith("fairseq")]


CASES = found()


def each(which: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", which, ids=lambda case: case.path.stem)


def test_there_are_cases() -> None:
    assert {case.data["layout"] for case in CASES} >= {"fairseq_lm", "fairseq_lm_oldattn", "fairseq_lm_full"}


def check(got: torch.Tensor, want: torch.Tensor, words: torch.Tensor, tolerance: float) -> None:
    defined = words != PADDING
    torch.testing.assert_close(got.double()[defined], want[defined], rtol=0, atol=tolerance)


@each(CASES)
@torch.no_grad()
def test_log_probabilities(case: Case) -> None:
    double = case.read(torch.float64)(case.words)
    check(double, case.tensors["logits"], case.words, case.tolerance["float64_vs_logits"])
    exact = case.tensors["logits_f64_table"]
    check(double, exact, case.words, case.tolerance["float64_vs_logits_f64_table"])
    check(case.read()(case.words), case.tensors["logits"], case.words, case.tolerance["float32"])


@each(CASES)
@torch.no_grad()
def test_log_probabilities_of_the_targets(case: Case) -> None:
    """Without those of all other words."""
    got = case.read(torch.float64)(case.words, case.tensors["targets"])
    check(got, case.tensors["target_logprob"], case.words, case.tolerance["float64_vs_logits"])


@each(CASES)
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same(case: Case, tmp_path: Path) -> None:
    model = case.read()
    again = load(save(model, tmp_path / "model"))
    assert arch_of(again) == arch_of(model)
    assert torch.equal(again(case.words), model(case.words))


@each(CASES)
def test_costs(case: Case) -> None:
    model, length = case.read(), case.words.shape[1]
    arch = arch_of(model)
    (stage,) = arch.stages
    stage = dataclasses.replace(stage, grid=(1, length))  # attention over the words of the case
    assert length * sum(block_cost(arch, stage, b).macs for b in stage.blocks) == case.expected["macs"]
    projections = stage.width * sum(arch.text.tails)
    counted = outside_cost(arch).macs - projections - stage.width**2  # without those of the input
    assert length * counted == case.expected["macs_softmax_full"]
    assert cost(arch).params == num_params(model) == case.expected["params"]
    # state dicts have the tails' projections twice too, and five counters and placeholders of one entry each
    assert tables_twice(arch) + projections + 5 == case.expected["params_state_dict_entries"]


@each(CASES)
def test_record(case: Case) -> None:
    arch, facts = arch_of(case.read()), case.facts
    text = arch.text
    assert (arch.num_classes, list(text.cutoffs)) == (facts["vocab"], facts["cutoffs"])
    assert [arch.stages[0].width, *text.tails] == facts["band_dims"]
    assert (arch.depth, arch.norm_eps, arch.act) == (facts["layers"], facts["ln_eps"], facts["act"])
    assert all((b.heads, b.mlp) == (facts["num_heads"], facts["ffn"]) for b in arch.blocks)
    assert text.embed_scale == pytest.approx(facts["embed_scale"], rel=1e-12)
    assert text.tied == {(True, True): "all", (True, False): "tables"}[facts["tie_tables"], facts["tie_proj"]]
    assert text.first_position == facts["pad_idx"] + 1


@each([case for case in CASES if case.refused_global])
def test_more_than_weights_is_refused_and_then_tells_the_heads(case: Case) -> None:
    with pytest.raises(UserError, match="If you trust") as refusal:
        case.read(trust=False)
    assert str(case.refused_global) in str(refusal.value)
    assert arch_of(case.read(heads=False)) == arch_of(case.read())


@each([case for case in CASES if not case.refused_global])
def test_heads_must_be_given(case: Case) -> None:
    with pytest.raises(UserError, match="give heads"):
        case.read(heads=False)
