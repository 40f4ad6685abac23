from __future__ import annotations

from pathlib import Path

import pytest
import timm

from prunesweep.models import UserError, save
from prunesweep.training import Recipe
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.placement import Placement, worker_range

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(("given", "found"), [("1", (1, 1)), ("4", (4, 4)), ("2-4", (2, 4)), ("3-3", (3, 3))])
def test_ranges_of_workers(given: str, found: tuple[int, int]) -> None:
    assert worker_range(given) == found


@pytest.mark.parametrize("given", ["0", "4-2", "-2", "2-", "two", "1-2-3", ""])
def test_what_is_no_range(given: str) -> None:
    with pytest.raises(UserError, match=f"--workers {given}: must be a number from 1 on, or a range such as 2-4"):
        worker_range(given)


def test_batches_must_fit_every_number_of_workers(tmp_path: Path) -> None:
    """Said before anything is started: 128 images can be shared by 2 and by 4 workers, not by 3."""
    source = save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SHAPE), tmp_path / "source")
    job = Finetuning(model=source, data="digits", recipe=Recipe(batch_size=128), out=tmp_path / "out")
    with pytest.raises(UserError, match="batch_size = 128 cannot be shared by 3 workers .* must be a multiple of 3"):
        finetune(job, Placement(4, min_workers=2))
