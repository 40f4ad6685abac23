"""Models whose weights are not float32: cast for work, saved again in the type that they had."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from prunesweep.models import cut, load, save, weights_digest
from prunesweep.models.precision import as_stored, dtype_in, in_float32, stored_dtype, to_float32
from tests.generate import FAMILIES, random_arch, random_cut, random_images, random_model

OTHER = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", OTHER)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_in_float32_is_saved_in_the_type_of_its_source(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    arch = random_arch(Random(2), family)
    model = random_model(arch, 2, torch.float32).to(dtype)
    save(model, tmp_path / "source")
    assert dtype_in(tmp_path / "source" / "model.safetensors") == dtype
    stored = load(tmp_path / "source")
    assert {p.dtype for p in stored.parameters()} == {dtype}
    work = in_float32(stored)
    assert {p.dtype for p in work.parameters()} == {torch.float32}
    assert {p.dtype for p in stored.parameters()} == {dtype}  # it is not changed
    small = cut(work, random_cut(Random(2), arch))
    as_stored(small)
    save(small, tmp_path / "small")
    again = load(tmp_path / "small")
    assert {p.dtype for p in again.parameters()} == {dtype}
    x = random_images(arch, 0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(to_float32(again)(x), small(x))


def test_the_digest_is_that_of_the_stored_weights() -> None:
    model = random_model(random_arch(Random(0)), 0, torch.float32).half()
    before = weights_digest(model)
    assert weights_digest(in_float32(model)) == before
    assert weights_digest(model.float()) != before


def test_float32_is_left_alone() -> None:
    model = random_model(random_arch(Random(0)), 0, torch.float32)
    assert in_float32(model) is model
    assert to_float32(model) is model
    assert stored_dtype(model) == torch.float32
    assert not as_stored(model)


def test_a_type_chosen_later_is_the_one_that_counts() -> None:
    model = to_float32(random_model(random_arch(Random(0)), 0, torch.float32).half())
    assert stored_dtype(model) == torch.float16
    assert stored_dtype(model.double()) == torch.float64
