"""Let a method decide while it trains, for others to build on: its decisions are kept, its trained weights are not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from prunesweep.models import UserError, arch_of, weights_digest
from prunesweep.models.io.files import make_folder, publish_folder
from prunesweep.models.io.provenance import digest
from prunesweep.models.precision import in_float32
from prunesweep.pruners import TrainedMethod, get_method

from ..data import Data
from ..recipe import Recipe
from ..trainer import batches_of
from ..world import World
from .proposal import Proposal
from .prune_loop import check_decides, decide_while_training
from .scoring import Progress

__all__ = ["Deciding"]

FORMAT = "prunesweep/decision/1"  # to be counted up when methods decide otherwise, so that no older run is believed


@dataclass(frozen=True)
class Deciding:
    """One run of a method that decides while it trains, of which only the decisions are kept.

    Args:
        model: the source, on its device; also the teacher. It is not changed.
        data: data set of the run.
        method: name of a ``TrainedMethod``.
        budgets: shares of the source's MACs; one, where the method serves one in a run.
        recipe: of the run.
        options: settings of the method; those that pace it, where they are left out, follow from the run's length.
        seed: of the run.
        weights: ``weights_digest(model)``, if it is known already.
    """

    model: nn.Module
    data: Data
    method: str
    budgets: Sequence[float]
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    weights: str | None = None

    def check(self) -> None:
        """Raise UserError where the method, its settings, the source, the data and the recipe do not go together."""
        check_decides(self.model, self.data, self.recipe, self.method, self.settings)

    @cached_property
    def settings(self) -> Any:
        """The method's settings. Raises UserError for one that is not allowed, or a family that it does not serve."""
        method, arch = get_method(self.method, TrainedMethod), arch_of(self.model)
        method.check(arch)
        updates = self.recipe.epochs * batches_of(self.data, self.recipe, World()).updates
        return method.for_budgets(self.budgets, {**method.paced(arch, updates), **self.options})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the decisions depend on, JSON-ready."""
        return {
            "method": self.method,
            "settings": self.settings.model_dump(mode="json"),
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "weights": self.weights or weights_digest(self.model),
            "arch": arch_of(self.model).hash,
            "data": self.data.info.fingerprint,
            "format": FORMAT,
        }

    def kept(self, cache: Path) -> tuple[Path, ...]:
        """Return the files of the decisions, the largest budget first; none where the cache does not have them all.

        Args:
            cache: folder of decisions.
        """
        folder = self._folder(cache)
        try:
            found = {path: Proposal.load(path) for path in folder.glob("*.json")}
        except UserError:
            return ()
        facts = json.loads(json.dumps(self.facts))
        if any(own.run != facts or own.of != len(found) for own in found.values()):
            return ()
        return tuple(sorted(found, key=lambda path: -found[path].budget))

    def run(self, cache: Path, progress: Progress) -> tuple[Path, ...]:
        """Return the files of the decisions, the largest budget first; train if the cache does not have them.

        An interrupted run is resumed.

        Args:
            cache: folder of decisions; a run's folder in it is named by the hash of everything that they depend on,
                which every file also carries inside; they are made again if that differs, or if one is damaged.
            progress: called with (what is being done, share done, note).

        Raises:
            UserError: as ``check``, no budget was reached, or the search collapsed or diverged.
        """
        if found := self.kept(cache):
            return found
        folder = self._folder(cache)
        make_folder(folder.parent)
        state = folder.with_name(f"{folder.name}.state.safetensors")

        def on_step(done: int, total: int, loss: float) -> None:
            progress(f"{self.method} decides", done / total, f"loss {loss:.3f}")

        source = in_float32(self.model)
        run: dict[str, Any] = {"seed": self.seed, "state": state, "on_step": on_step}
        decided = decide_while_training(source, self.data, self.recipe, self.method, self.settings, **run)
        assert decided is not None  # nothing asks it to stop
        progress(f"{self.method} decides", 1.0, ", ".join(f"{one.budget:.3g}" for one in decided) + " of the MACs")
        with publish_folder(folder) as scratch:
            for one in decided:
                own = Proposal(one.cut, one.budget, self.facts, of=len(decided))
                own.save(scratch / f"{one.budget:.4g}.json")
        state.unlink(missing_ok=True)
        return self.kept(cache)

    def _folder(self, cache: Path) -> Path:
        return cache / f"{self.method}-{digest(self.facts)}"
