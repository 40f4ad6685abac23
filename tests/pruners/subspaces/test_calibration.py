"""Calibration images: every form that they come in gives the same, and what cannot serve is refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import prunesweep
from prunesweep.models import UserError, arch_of, build
from prunesweep.models.families import family_of
from prunesweep.pruners.subspaces import NormalEquations, Widths, compress, recover
from prunesweep.pruners.subspaces.batches import Batches
from prunesweep.pruners.subspaces.calibration import BATCH, hold_out, images_of
from prunesweep.pruners.subspaces.refit import HEAD_SHRINKAGE
from tests.pruners.subspaces.test_compress import DTYPE, images, made, vit
from tests.pruners.subspaces.test_families import batches_of, source_of
from tests.pruners.subspaces.test_recovery import whole

X = torch.randn(150, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(150) % 7

FORMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "list of batches": lambda: list(X.split(40)),
    "list of images": lambda: list(X),
    "pairs": lambda: [(X[:100], LABELS[:100]), (X[100:], LABELS[100:])],
    "loader of pairs": lambda: DataLoader(TensorDataset(X, LABELS), 32),
    "loader of tensors": lambda: DataLoader(X, 32),  # type: ignore[arg-type]
    "data set": lambda: TensorDataset(X, LABELS),
    "generator": lambda: (batch for batch in X.split(7)),
    "dicts": lambda: [{"label": LABELS, "image": batch} for batch in X.split(64)],
    "loader of dicts": lambda: DataLoader([{"pixel_values": x, "labels": 0} for x in X], batch_size=40),
    "dicts of single images": lambda: [{"img": x} for x in X],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_images(form: Callable[[], Any]) -> None:
    found = images_of(form(), vit())
    assert torch.equal(torch.cat([*found]), X)
    assert max(map(len, found)) <= BATCH


def test_word_numbers_are_taken_for_a_language_model() -> None:
    from tests.generate import Random, random_arch

    arch = random_arch(Random(0), "lm")
    words = torch.randint(5, (9, 4))
    assert torch.equal(torch.cat([*images_of([words[:4], words[4:]], arch)]), words)


@pytest.mark.parametrize(("share", "held"), [(0.25, 38), (0.001, 1), (1.0, 149)])
def test_some_are_held_out_whatever_the_batches(share: float, held: int) -> None:
    for batches in ([X], list(X.split(64)), list(X.split(1))):
        fit, held_out = hold_out(Batches(batches), share)
        assert torch.equal(torch.cat([*fit, *held_out]), X)
        assert sum(map(len, held_out)) == sum(held_out.lengths) == held


def test_a_front_follows_from_one_tensor() -> None:
    torch.manual_seed(0)
    model = made(vit()).float()
    by_form = [prunesweep.instant(model, form, budgets=(0.5,))[0] for form in (X, list(X), [(X, LABELS)])]
    assert len({point.kl for point in by_form}) == 1
    assert by_form[0].images == 38


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "0 calibration images: give at least 2"),
        (X[:1], "1 calibration images: give at least 2"),
        (X[:1].expand(8, 3, 12, 12), "all 8 calibration images are the same"),
        (torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 12, 12), "each of the 8 calibration images is of one colour"),
        (X[:4].where(X[:4] < 2, torch.inf), "a calibration image has a value that is not finite"),
        (X[:, :1], r"of shape \(150, 1, 12, 12\); toy takes images of \(3, 12, 12\)"),
        (X[..., :8], r"of shape \(150, 3, 12, 8\); toy takes images of \(3, 12, 12\)"),
        ((X * 20 + 128).byte(), "of torch.uint8; give them as the model was trained on them"),
        ([LABELS, X], r"batch 0 is of shape \(150,\)"),
        (
            [{"picture": X, "mask": X}],
            "is of type a dict of picture, mask; give .* dicts that have one as image,",
        ),
        (3, "int is neither a tensor"),
    ],
)
@pytest.mark.parametrize("use", ["instant", "compress", "recover"])
def test_what_cannot_serve_is_refused(use: str, given: Any, said: str) -> None:
    model = build(vit()).eval()
    with pytest.raises(UserError, match=said):
        if use == "instant":
            prunesweep.instant(model, given)
        elif use == "compress":
            compress(model, Widths.uniform(arch_of(model), embed=12), given)
        else:
            recover(model, whole(), given)


def test_a_front_holds_one_image_out_of_three() -> None:
    model = made(vit()).float()
    with pytest.raises(UserError, match="2 calibration images: give at least 3"):
        prunesweep.instant(model, X[:2], budgets=(0.5,))
    with pytest.warns(UserWarning, match="2 calibration images give 20 token rows"):
        assert prunesweep.instant(model, X[:3], budgets=(0.5,))[0].images == 1


def test_activations_that_are_not_finite_are_refused() -> None:
    broken = made(vit())
    with torch.no_grad():
        broken.get_parameter("blocks.1.mlp.fc2.weight").fill_(1e308)
    with pytest.raises(UserError, match="an activation is not finite"):
        recover(broken, whole(), images())
    with pytest.raises(UserError, match="an activation is not finite"):
        prunesweep.instant(broken, images(), budgets=(0.5,))


def test_few_rows_raise_lambda_and_say_how_many_are_needed() -> None:
    """3 images of 10 tokens are 30 rows for 32 hidden units; four are enough not to be warned of."""
    source = made(vit())
    widths = Widths.uniform(arch_of(source), embed=12)
    with pytest.warns(UserWarning, match=r"3 calibration images give 30 token rows for layers of 32 .* give 64 images"):
        few = compress(source, widths, images(3, 3))
    asked = compress(source, widths, images(3, 3), shrinkage=1e-2)
    for a, b in zip(few.parameters(), asked.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.warns(UserWarning, match="lambda is raised"):
        recover(source, whole(), images(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(source, widths, images(4, 4))


@pytest.mark.parametrize("family", ["vit", "swin", "pvt_v2", "lm"])
def test_rows_and_features_are_those_of_the_fits(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """No layer but the head, which has a lambda of its own, has fewer rows for its features than is thought."""
    fits = list[tuple[int, int]]()

    def solve(self: NormalEquations, start: torch.Tensor, shrinkage: float, **given: Any) -> Any:
        if shrinkage != HEAD_SHRINKAGE:
            fits.append((self.features.rows, start.shape[1]))
        return solved(self, start, shrinkage, **given)

    solved = NormalEquations.solve
    monkeypatch.setattr(NormalEquations, "solve", solve)
    for seed in range(3):
        source = source_of(family, seed)
        arch, batches = arch_of(source), batches_of(source, 4)
        fits.clear()
        compress(source, Widths.uniform(arch), batches)
        inputs = sum(map(len, batches))
        listed = max(features / rows for rows, features in family_of(arch).rows_and_features(arch))
        assert listed == pytest.approx(max(features / rows for rows, features in fits) * inputs)


def test_a_source_that_is_not_trained_is_named() -> None:
    with pytest.warns(UserWarning, match="its answers hardly depend on the image .* It may be untrained"):
        prunesweep.instant(build(vit()).eval(), X, budgets=(0.6,))
    sure = made(vit())
    with torch.no_grad():
        sure.get_parameter("head.weight").mul_(20)
        sure.get_parameter("head.bias").sub_(sure(X.to(DTYPE)).mean(0))
    with warnings.catch_warnings():  # its answers differ from image to image
        warnings.simplefilter("error")
        prunesweep.instant(sure, X.to(DTYPE), budgets=(0.6,))
