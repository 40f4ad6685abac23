from __future__ import annotations

import dataclasses
import json
from random import Random

import pytest
import torch
from torch import nn

from prunesweep.models import Arch, Block, Stage, UserError, build
from prunesweep.models.layers.token_merging import DenseMerge, SparseMerge, TokenPlan, default_groups


def arch_with(**block: object) -> Arch:
    own = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=8)
    return Arch(
        family="vit",
        source="test",
        img_size=(6, 8),
        patch_size=(2, 2),
        in_chans=1,
        num_classes=3,
        stages=(Stage(width=8, grid=(3, 4), blocks=(dataclasses.replace(own, **block),)),),
    )


def as_dense(sparse: SparseMerge) -> DenseMerge:
    tokens = len(sparse.assign)
    dense = DenseMerge(tokens, sparse.kept, 0).double()
    member = (sparse.assign[None] == torch.arange(sparse.kept)[:, None]).double()
    with torch.no_grad():
        dense.matrix.copy_(member * sparse.weight)
        dense.recover.copy_(member.T * sparse.recover[:, None])
    dense.takes_part.copy_(sparse.assign >= 0)
    return dense


def test_sparse_equals_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = SparseMerge(13, 4, 1).double()
    sparse.assign.copy_(torch.tensor([0, 1, -1, 1, 2, -1, 2, 2, 3, 3, 3, -1, 3]))
    with torch.no_grad():
        for p in sparse.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    dense = as_dense(sparse)
    x = torch.randn(2, 13, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sparse.merge(x), dense.merge(x))
    torch.testing.assert_close(sparse.spread(z, x), dense.spread(z, x))
    assert torch.equal(sparse.spread(z, x)[:, [2, 5, 11]], x[:, [2, 5, 11]])  # pruned tokens pass unharmed


@pytest.mark.parametrize("form", [SparseMerge, DenseMerge])
def test_a_new_plan_sums_and_averages_runs(form: type) -> None:
    merge = form(7, 4, 1)
    x = torch.arange(7.0).reshape(1, 7, 1)
    z = merge.merge(x)
    assert z.flatten().tolist() == [0, 1 + 2, 3 + 4, 5 + 6]
    assert merge.spread(z, x).flatten().tolist() == [0, 1.5, 1.5, 3.5, 3.5, 5.5, 5.5]


def test_groups_are_nearly_equal_and_prefix_tokens_alone() -> None:
    groups = default_groups(199, 60, 3)
    assert groups[:3].tolist() == [0, 1, 2]
    sizes = groups[3:].bincount()[3:]
    assert len(sizes) == 57
    assert int(sizes.max() - sizes.min()) <= 1
    assert groups.diff().min() >= 0


@pytest.mark.parametrize("merge", ["sparse", "dense"])
def test_a_plan_that_keeps_all_tokens_changes_nothing(merge: str) -> None:
    plain = build(arch_with()).double().eval()
    planned = build(arch_with(tokens=13, merge=merge)).double().eval()
    weights = planned.state_dict() | plain.state_dict()
    planned.load_state_dict(weights)
    x = torch.randn(2, 1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(planned(x), plain(x), rtol=0, atol=1e-12)


def test_the_block_works_on_merged_tokens() -> None:
    block = build(arch_with(tokens=5)).double().eval().blocks[0]
    x = torch.randn(2, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = block.token_merge.merge(x)
    assert z.shape == (2, 5, 8)
    z = z + block.attn(block.norm1(z))
    z = z + block.mlp(block.norm2(z))
    torch.testing.assert_close(block(x), block.token_merge.spread(z, x))


PLAN = TokenPlan(4, (0, 1, 1, -1, 2, 2, 3), (1.0, 0.3, 1.0, 0.0, 1.0, 0.25, 1.0))


def random_plan(random: Random, tokens: int, prefix: int, form: str = "sparse") -> TokenPlan:
    """Any groups, scattered; merged tokens may be empty."""
    kept = random.randint(prefix + 1, tokens)
    assign = [*range(prefix), *(random.choice([-1, random.randrange(prefix, kept)]) for _ in range(tokens - prefix))]
    return TokenPlan(kept, tuple(assign), tuple(random.uniform(0.1, 2) if row >= 0 else 0.0 for row in assign), form)


def loaded(plan: TokenPlan) -> SparseMerge | DenseMerge:
    form = SparseMerge if plan.form == "sparse" else DenseMerge
    merge = form(len(plan.assign), plan.kept, 1).double()
    merge.load_state_dict(plan.tensors(torch.float64), strict=True)
    return merge


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_recovers_by_the_pseudo_inverse(seed: int) -> None:
    random = Random(seed)
    plan = random_plan(random, random.randint(3, 20), 1)
    dense = dataclasses.replace(plan, form="dense").tensors(torch.float64)
    torch.testing.assert_close(dense["recover"], torch.linalg.pinv(dense["matrix"]), rtol=0, atol=1e-12)
    for own, whole in zip(
        loaded(plan).matrices(), (dense["matrix"], dense["recover"], dense["takes_part"]), strict=True
    ):
        assert torch.equal(own, whole)


class There(nn.Module):
    """To the merged tokens and back, with something done to them."""

    def __init__(self, merge: SparseMerge | DenseMerge) -> None:
        super().__init__()
        self.merge = merge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.merge.merge(x)
        return self.merge.spread(z * z, x)


@pytest.mark.parametrize("seed", range(5))
def test_all_ways_to_compute_a_plan_are_one_function_with_one_gradient(seed: int) -> None:
    """By the definition; dense; sparse, as on a CPU; and sparse as traced, which is how other devices run it."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    plan = random_plan(random, 13, 1)
    dense = loaded(dataclasses.replace(plan, form="dense"))
    x = torch.randn(3, 13, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    M, R, m = dense.matrices()
    y = torch.einsum("nc,bcd->bnd", R, torch.einsum("cn,bnd->bcd", M, x) ** 2) + (~m)[:, None] * x
    seen = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    by_x, by_M, by_R = torch.autograd.grad((y * seen).sum(), (x, M, R))
    row, takes_part = torch.tensor(plan.assign), torch.tensor(plan.assign) >= 0
    by_weight = torch.where(takes_part, by_M[row.clamp(min=0), torch.arange(13)], 0)
    by_recover = torch.where(takes_part, by_R[torch.arange(13), row.clamp(min=0)], 0)

    torch.testing.assert_close(There(dense)(x), y)
    plain, traced = There(loaded(plan)), torch.export.export(There(loaded(plan)), (x,)).module()
    assert "index_add" in traced.code
    for way in (plain, traced):
        got = way(x)
        torch.testing.assert_close(got, y)
        assert torch.equal(got[:, ~takes_part], x[:, ~takes_part])  # what passes is not touched
        gradients = torch.autograd.grad((got * seen).sum(), (x, way.merge.weight, way.merge.recover))
        for found, want in zip(gradients, (by_x, by_weight, by_recover), strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    merge, x = loaded(PLAN).to(dtype), torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    z = merge.merge(x)
    assert z.dtype == merge.spread(z, x).dtype == dtype
    want = loaded(PLAN).merge(x.double())
    torch.testing.assert_close(z.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loaded(PLAN).float().merge(x.float()).double(), want, rtol=0, atol=0.1)


def test_a_plan_goes_through_json() -> None:
    assert TokenPlan.from_dict(json.loads(json.dumps(dataclasses.asdict(PLAN)))) == PLAN
    with pytest.raises(UserError, match="unknown key 'weights'.*did you mean 'weight'"):
        TokenPlan.from_dict(dataclasses.asdict(PLAN) | {"weights": []})
    with pytest.raises(UserError, match="lacks 'assign'"):
        TokenPlan.from_dict({"kept": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "csr"}, "form = 'csr': must be one of sparse, dense"),
        ({"assign": (0, 1, 1, -1, 2)}, "assign has 5 entries, the block has 7 tokens .*one grid of patches"),
        ({"weight": (1.0,) * 8}, "weight has 8 entries, the block has 7 tokens"),
        ({"kept": 1}, "kept = 1: must lie in 2..7"),
        ({"kept": 8}, "kept = 8"),
        ({"kept": 4.0}, "kept = 4.0"),
        ({"assign": (0, 1, 1, -1, 2, 2, 4)}, r"assign\[6\] = 4: must lie in -1..3"),
        ({"assign": (0, 0, 1, -1, 2, 2, 3)}, r"assign\[1\] = 0: the first 1 must be alone"),
        ({"assign": (1, 1, 1, -1, 2, 2, 3)}, r"assign\[0\] = 1: the first 1 must be alone"),
        ({"weight": (1.0, 0.3, 1.0, 0.5, 1.0, 0.25, 1.0)}, r"weight\[3\] = 0.5: must be 0 where a token passes"),
        ({"weight": (1.0, 0.3, 0.0, 0.0, 1.0, 0.25, 1.0)}, r"weight\[2\] = 0.0: must be finite and above 0"),
        ({"weight": (1.0, 0.3, 1.0, 0.0, float("nan"), 0.25, 1.0)}, r"weight\[4\] = nan"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, object], message: str) -> None:
    PLAN.check(7, 1)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAN, **changes).check(7, 1)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_takes_any_number_of_images(form: str) -> None:
    model = build(arch_with(tokens=5, merge=form)).eval()
    images = torch.randn(4, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        traced = torch.jit.trace(model, images[:1])  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(images), model(images))
