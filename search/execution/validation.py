"""The last look of a search: its front, on the validation split, by which nothing was chosen."""

from __future__ import annotations

from pathlib import Path

import torch

from prunesweep.models import load
from prunesweep.models.precision import to_float32
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, Compared
from prunesweep.training.jobs.scoring import Progress

from .reopen import check_data

__all__ = ["validate_front"]

WHAT = "validating the front"


def validate_front(path: Path, config: SearchConfig, progress: Progress) -> None:
    """Measure the members of a run's front on the validation split, and keep the figures beside their models.

    Members that were measured before are left as they are. Nothing is done where candidates were compared on the
    validation split, because ``data.search_split`` is 0.

    Args:
        path: the run's folder.
        config: its configuration.
        progress: called with what is being done and the share of it done.

    Raises:
        UserError: the data are not those that the run was made on, or a model is damaged.
    """
    run = Run(path)
    left = [result for result in run.members() if run.validation(result) is None]
    if not config.data.search_split or not left:
        return
    device = "cuda" if config.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"
    source = to_float32(load(run / "source")).to(device)
    data = check_data(run, config, source).report
    compared = Compared(data.val_loader(EVAL_BATCH), source)
    for number, result in enumerate(left):
        progress(WHAT, number / len(left), f"{number}/{len(left)}")
        model = to_float32(load(run.trial(result.id) / "model")).to(device)
        run.write_validation(result, compared.measure(model))
    progress(WHAT, 1.0, f"{len(left)}/{len(left)}")
