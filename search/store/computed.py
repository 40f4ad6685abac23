"""The folder that ``prunesweep instant`` writes: ``front.json`` and a saved model for every point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunesweep.models import UserError

from .run import read_json

__all__ = ["FRONT", "ComputedFront"]

FRONT = "front.json"


class ComputedFront:
    """A front of computed models.

    Args:
        path: its folder.

    Attributes:
        facts: contents of ``front.json``: ``source``, ``data``, ``objective``, ``images``, ``seed``, and ``points``,
            of which the first is the source.

    Raises:
        UserError: the folder is none, or its file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.is_one(path):
            raise UserError(f"{path} is no front of computed models: 'prunesweep instant' makes one")
        file = self.path / FRONT
        self.facts: dict[str, Any] = read_json(file)
        points = self.facts.get("points")
        if not isinstance(points, list) or not points or not all(isinstance(p, dict) and "model" in p for p in points):
            raise UserError(f"{file} is damaged: it has no points")

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Whether a folder has a front that is not the one of a run."""
        folder = Path(path)
        return (folder / FRONT).is_file() and not any((folder / name).is_file() for name in ("search.toml", "run.json"))

    @property
    def points(self) -> list[dict[str, Any]]:
        """The computed models' rows, the largest first, without the source's."""
        return [point for point in self.facts["points"] if point["model"] is not None]

    @property
    def folders(self) -> list[Path]:
        """The saved models, the largest first."""
        return [self.path / point["model"] for point in self.points]
