"""The folder that ``prunesweep instant`` writes: ``front.json`` and a saved model for every point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunesweep.models import UserError
from prunesweep.models.io.provenance import digest
from prunesweep.models.io.store import check_saved

from .run import read_json

__all__ = ["FRONT", "ComputedFront"]

FRONT, WEIGHTS = "front.json", "weights_sha256"


class ComputedFront:
    """A front of computed models.

    Args:
        path: its folder.

    Attributes:
        facts: contents of ``front.json``: ``source``, ``data``, ``objective``, ``images``, ``seed``, and ``points``,
            of which the first is the source.
        sealed: whether it says what its own content and the models' weights are, which earlier versions did not.

    Raises:
        UserError: the folder is none, or its file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.is_one(path):
            raise UserError(f"{path} is no front of computed models: 'prunesweep instant' makes one")
        file = self.path / FRONT
        self.facts: dict[str, Any] = read_json(file)
        seal = self.facts.pop("digest", None)
        points = self.facts.get("points")
        if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
            raise UserError(f"{file} is damaged: it has no points")
        for i, point in enumerate(points):
            if not isinstance(point.get("model", 0), str if i else type(None)):
                wrong = "is no folder" if i else "is not that of the source"
                raise UserError(f"{file} is damaged: points[{i}].model {wrong}")
            for name in ("budget", "macs", "params", "macs_share", "images"):
                if not isinstance(point.get(name), int | float):
                    raise UserError(f"{file} is damaged: points[{i}].{name} is no number")
        self.sealed = seal is not None or any(WEIGHTS in point for point in points)
        if self.sealed and seal != digest(self.facts):
            raise UserError(f"{file} is damaged: it has changed since it was written")  # earlier versions had no digest

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Whether a folder has a front that is not the one of a run."""
        folder = Path(path)
        return (folder / FRONT).is_file() and not any((folder / name).is_file() for name in ("search.toml", "run.json"))

    @property
    def points(self) -> list[dict[str, Any]]:
        """The computed models' rows, the largest first, without the source's."""
        return list(self.facts["points"][1:])

    def check_model(self, number: int) -> None:
        """Check that a saved model holds what was written, and is the one that its point is about.

        Args:
            number: of its point, the largest being 0.

        Raises:
            UserError: it is gone or damaged, or is another one.
        """
        check_saved(self.folders[number], weights=self.points[number].get(WEIGHTS))

    @property
    def folders(self) -> list[Path]:
        """The saved models, the largest first."""
        return [self.path / point["model"] for point in self.points]
