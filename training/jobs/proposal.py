"""A decision of a method that decided while it trained, as a file that a search starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesweep.models import UserError
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import digest
from prunesweep.models.io.reading import read_json

if TYPE_CHECKING:
    from prunesweep.models import Cut

__all__ = ["Proposal", "is_proposal"]


@dataclass(frozen=True)
class Proposal:
    """What stays of a source, by the decision of a method.

    Args:
        cut: the decision.
        budget: what was asked for, as a share of the source's MACs.
        run: what the decision depends on, JSON-ready, ``method`` among it.
        of: number of decisions of that run.
    """

    cut: Cut
    budget: float
    run: Mapping[str, Any]
    of: int = 1

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.run["method"])

    def save(self, path: Path) -> None:
        """Write it as JSON, with its own digest."""
        facts = {"cut": self.cut.to_dict(), "budget": self.budget, "run": dict(self.run), "of": self.of}
        write_text(path, json.dumps({**facts, "digest": digest(facts)}, separators=(",", ":")))

    @classmethod
    def load(cls, path: Path) -> Proposal:
        """Read what ``save`` wrote. Raises UserError where the file is missing or damaged."""
        from prunesweep.models import Cut

        try:
            facts = read_json(path)
            if facts.pop("digest") != digest(facts):
                raise ValueError("it has changed since it was written")
            return cls(Cut.from_dict(facts["cut"]), float(facts["budget"]), facts["run"], int(facts["of"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no decision that can be read: {error}") from error


def is_proposal(path: Path) -> bool:
    """Whether a path is that of a decision's file, and not of a saved model's folder."""
    return path.suffix == ".json" and not path.is_dir()
