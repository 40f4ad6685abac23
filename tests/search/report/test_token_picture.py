from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from prunesweep.models import UserError, build, cut
from prunesweep.pruners import Scores, pmvit
from prunesweep.search.report.token_picture import draw_tokens, patch_groups
from tests.models.test_fuse import planned
from tests.pruners.pmvit.test_plans import scores_of


def model(form: str = "sparse") -> torch.nn.Module:
    """3 rows of 4 patches: patch 11 passes block 1 by, 0 and 1 are alone, the others merge."""
    arch = planned(None, None, None)
    scores: Scores = scores_of([1.0] * 12, [9, 8, 7, 2, 2, 2, 7, 2, 2, 2, 2, 1], [1.0] * 12)
    return cut(build(arch), pmvit.plan(arch, scores, 0.34, prune_rate=0.09, merge_list=[1], form=form))


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_groups(form: str) -> None:
    groups = patch_groups(model(form))
    assert {i: own.tolist() for i, own in groups.items()} == {1: [[1, 2, 3, 3], [4, 4, 4, 4], [4, 4, 4, -1]]}


def test_the_picture(tmp_path: Path) -> None:
    grey = Image.new("L", (50, 31), 200)
    draw_tokens(model(), grey, tmp_path / "tokens.png")
    picture = Image.open(tmp_path / "tokens.png").convert("RGB")
    side = 224 // 4
    left, top = 6, 6 + 14
    assert picture.size == (4 * side + 12, 3 * side + 14 + 12)

    def colour(row: int, column: int) -> tuple[int, int, int]:
        return picture.getpixel((left + column * side + side // 2, top + row * side + side // 2))

    assert colour(0, 0) == colour(0, 1) == (200, 200, 200)
    assert colour(2, 3) == (50, 50, 50)
    assert colour(0, 2) == colour(0, 3) != colour(1, 0)
    assert len({colour(1, c) for c in range(4)} | {colour(2, c) for c in range(3)}) == 1
    assert len(set(colour(1, 0))) > 1
    outline = (255, 255, 255)
    assert picture.getpixel((left + side, top + side // 2)) == outline  # between patches 0 and 1
    assert picture.getpixel((left + 3 * side, top + side // 2)) != outline  # within one group


def test_a_model_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test has no token plan: there is nothing to draw"):
        draw_tokens(build(planned(None)), Image.new("RGB", (8, 8)), tmp_path / "tokens.png")
