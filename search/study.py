"""Optuna's study on disk: it proposes points and remembers what they gave. One driver writes; units never open it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

__all__ = ["Study"]

NAME = "r0"  # one study per rung


class Study:
    """Two objectives, top-1 (percent) up and MACs down. Open it only while holding the run's lease."""

    def __init__(self, journal: Path, distributions: Mapping[str, BaseDistribution], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _repair(journal)
        self._distributions = dict(distributions)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            study_name=NAME, storage=storage, directions=["maximize", "minimize"], load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["top1", "macs"])  # for optuna-dashboard
        # a sampler keeps its random state in memory: after a resume it must not draw the same points again
        state = np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False))])
        study.sampler = optuna.samplers.TPESampler(
            seed=int(state.generate_state(1)[0]), n_startup_trials=3 * len(self._distributions)
        )
        self._study = study

    def ask(self) -> tuple[int, dict[str, float]]:
        """Number and point of a new trial."""
        trial = self._study.ask(self._distributions)
        return trial.number, dict(trial.params)

    def tell(self, number: int, top1: float, macs: int) -> None:
        """Finish a trial; does nothing where it is finished already."""
        self._study.tell(number, [top1, macs], skip_if_finished=True)

    def fail(self, number: int) -> None:
        """Finish a trial without values."""
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """Take back a proposal that is no candidate."""
        self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def running(self) -> dict[int, dict[str, float] | None]:
        """Trials that were asked for and not told, with their points; None where the driver died while asking."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        complete = set(self._distributions)
        return {t.number: dict(t.params) if set(t.params) == complete else None for t in trials}


def _repair(journal: Path) -> None:
    """Cut a torn last line, which would make every later read fail, and break the dead driver's lock."""
    if not journal.exists():
        return
    data = journal.read_bytes()
    if data and not data.endswith(b"\n"):
        warnings.warn(f"{journal}: the last line was torn by a kill; it is cut off", stacklevel=2)
        os.truncate(journal, data.rfind(b"\n") + 1)
    Path(f"{journal}.lock").unlink(missing_ok=True)
