"""The last look of a search: its front, on the validation split and on test data, by which nothing was chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prunesweep.models import UserError, load
from prunesweep.models.precision import to_float32
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.run import Run
from prunesweep.training import EVAL_BATCH, Compared, Data, open_fitting
from prunesweep.training.jobs.scoring import Progress

from .cutting import measure_of
from .reopen import check_data

__all__ = ["open_test", "validate_front"]

WHAT = "validating the front"


def open_test(config: SearchConfig, source: nn.Module, data: Data) -> Data | None:
    """Open the data that ``data.test`` names; None where it names none.

    Args:
        config: the search's configuration.
        source: its source.
        data: its data, as they are opened for a search.

    Raises:
        UserError: they are not there, are the search's own, or have other classes.
    """
    name = config.data.test
    if name is None:
        return None
    opened = open_fitting(name, source, **{**config.data.options, "search_split": 0.0})
    if opened.info.fingerprint == data.report.info.fingerprint:
        raise UserError(f"data.test = {name!r}: holds what data.name does; name other data, or drop it")
    own, classes = data.info.classes, opened.info.classes
    if own and classes and own != classes:
        other = next((b for a, b in zip(own, classes, strict=False) if a != b), classes[-1])
        raise UserError(f"data.test = {name!r}: has other classes than data.name = {config.data.name!r}: {other!r}")
    return opened


def validate_front(path: Path, config: SearchConfig, progress: Progress) -> None:
    """Measure the members of a run's front on validation and test data, and keep the figures beside their models.

    Members that were measured before are left as they are. Nothing is measured on the validation split where candidates
    were compared on it, because ``data.search_split`` is 0.

    Args:
        path: the run's folder.
        config: its configuration.
        progress: called with what is being done and the share of it done.

    Raises:
        UserError: the data are not those that the run was made on, or a model is damaged.
    """
    run, members = Run(path), Run(path).members()
    unseen = [result for result in members if config.data.search_split and run.validation(result) is None]
    untested = [result for result in members if config.data.test is not None and run.test(result) is None]
    if not unseen and not untested:
        return
    device = "cuda" if config.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"
    source = to_float32(load(run / "source")).to(device)
    data = check_data(run, config, source)
    looks = [(data.report, unseen, run.write_validation)]
    if untested and (test := open_test(config, source, data)) is not None:
        looks.append((test, untested, run.write_test))
    done, due = 0, len(unseen) + len(untested)
    for images, left, keep in looks:
        compared = Compared(images.val_loader(EVAL_BATCH), source, measure_of(config, data))
        for result in left:
            progress(WHAT, done / due, f"{done}/{due}")
            model = to_float32(load(run.trial(result.id) / "model")).to(device)
            keep(result, compared.measure(model))
            done += 1
    progress(WHAT, 1.0, f"{due}/{due}")
