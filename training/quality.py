"""What a model is worth by a measure that is not counted with the rest: one's own function, or labels of features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from prunesweep.models import UserError

from .data import Data
from .evaluation import EVAL_BATCH
from .labelled_features import QUALITIES, labelled_top1
from .metrics import quality_name
from .named_code import PREFIX, find_named
from .own_measure import MARK, measured_by

__all__ = ["BANK", "Quality", "try_quality"]

BANK = 20_000  # training images, at most, whose labels answer for others in a search
FEW = 32  # images that a function is tried on


class Quality(NamedTuple):
    """A measure of models: its name for people, its direction, and the function."""

    name: str
    higher_is_better: bool
    function: Callable[[nn.Module, Data, Iterable[Any]], float]

    @classmethod
    def find(cls, spec: str, key: str = "search.quality") -> Quality:
        """Find the measure of a name.

        Args:
            spec: ``knn``, ``probe`` or ``python:MODULE:FUNCTION``.
            key: of the configuration, for messages.

        Raises:
            UserError: there is none of that name, or nobody has allowed its module (``named_code.find_named``).
        """
        if spec in QUALITIES:

            def by_labels(model: nn.Module, data: Data, batches: Iterable[Any]) -> float:
                return labelled_top1(model, data, spec, batches, bank=BANK)[f"{spec}_top1"]

            return cls(quality_name(spec), True, by_labels)
        if not spec.startswith(PREFIX):
            raise UserError(f"{key} = {spec!r}: must be {', '.join(QUALITIES)} or python:MODULE:FUNCTION")
        function = find_named(spec, key, MARK, "prunesweep.training.own_quality")

        def by_function(model: nn.Module, _: Data, batches: Iterable[Any]) -> float:
            return measured_by(function, model, batches)

        return cls(quality_name(spec), bool(getattr(function, MARK)), by_function)

    @property
    def objective(self) -> str:
        """What the figure is called in results: ``quality``, where higher is better, or ``error``."""
        return "quality" if self.higher_is_better else "error"

    def figures(self, model: nn.Module, data: Data, batches: Iterable[Any]) -> dict[str, float]:
        """Measure a model.

        Args:
            model: on its device; its mode is left as it was.
            data: the data set.
            batches: (images, labels) per batch, to go through as often as one likes.

        Returns:
            The figure by ``objective``.

        Raises:
            UserError: the function failed, or gave no number.
        """
        return {self.objective: self.function(model, data, batches)}


def try_quality(spec: str, model: nn.Module, data: Data, key: str = "search.quality") -> None:
    """Call a function of one's own on a few images, before hours are spent on a model that it is to measure.

    What it gives counts for nothing, nor does a division by zero, which an untrained model's answers may cause. Where
    it fails on a few images it is called on the whole split, which may have classes that it needs.

    Args:
        spec: as for ``Quality.find``; ``knn`` and ``probe`` are not tried.
        model: of the kind that will be measured, trained or not.
        data: the data set.
        key: of the configuration, for messages.

    Raises:
        UserError: the function cannot be found, failed, or gave no number.
    """
    quality = Quality.find(spec, key)
    if spec in QUALITIES:
        return
    whole = data.val_loader(EVAL_BATCH)
    x, y = next(iter(whole))[:2]
    for batches in ([(x[:FEW], y[:FEW])], whole):
        try:
            quality.figures(model, data, batches)
            return
        except UserError as error:
            if isinstance(error.__cause__, ArithmeticError):
                return
            found = error
    raise UserError(f"{key} = {spec!r}: {found}") from found
