"""What training adds to computed models: ``python -m benchmarks.gentle [--seeds 3]``.

Sources are the digits example's ViT, trained with several seeds. At every budget: what ``prunesweep.instant`` computes,
and the same after 1, 3 and 10 epochs by recipe ``gentle``, each a training of its own; channels and units chosen by
Taylor importance, as cut, and after as many epochs by recipe ``quick``. KL to the source, in nats, agreement and top-1
on the validation split.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.record import by_seed
from benchmarks.subspaces import measured, medians, source_of
from prunesweep.models import arch_of, cost, cut
from prunesweep.pruners import taylor, width_path
from prunesweep.pruners.subspaces import instant
from prunesweep.training import Kept, fit, load_recipe, open_data

RESULT = Path(__file__).parent / "results" / "gentle.json"
BUDGETS = (0.5, 0.25, 0.1, 0.07, 0.05)
EPOCHS = (1, 3, 10)
IMAGES, BATCH = 512, 64


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """All models of one source, with the seconds that training took."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    arch = arch_of(source)
    path = width_path(arch, taylor.score(source, data.calibration(IMAGES, 16, seed=0)))
    rows = list[dict[str, Any]]()
    for point in instant(source, data.calibration(IMAGES, BATCH, seed=0), BUDGETS):
        rows += trained("computed", "gentle", point.budget, point.model, source, data)
        limit = point.budget * cost(arch).macs
        if limit >= path.costs[-1]:
            rows += trained("cut", "quick", point.budget, cut(source, path.cut(path.step_for(limit))), source, data)
    return {"seed": seed, "source": measured(source, source, data), "rows": rows}


def trained(
    how: str, recipe: str, budget: float, small: nn.Module, source: nn.Module, data: Any
) -> Iterator[dict[str, Any]]:
    """Figures of a model as it is, and after trainings of several lengths."""
    own = {"how": how, "budget": budget}
    yield {**own, "epochs": 0, **measured(source, small, data)}
    for epochs in EPOCHS:
        model, kept, begun = copy.deepcopy(small), list[Kept](), time.process_time()
        fit(model, data, load_recipe(recipe, {"epochs": epochs}), teacher=source, on_kept=kept.append)
        row = {**own, "epochs": epochs, "seconds": time.process_time() - begun, **measured(source, model, data)}
        yield {**row, "kept": [one.as_dict() for one in kept]}


def main() -> None:
    found = by_seed(__doc__, one_seed, RESULT, images=IMAGES, batch=BATCH)
    for (how, budget, epochs), row in medians(found, "rows", "how", "budget", "epochs").items():
        print(f"{how:10} {budget:5.3f} {epochs:3} epochs  KL {row['kl']:7.4f}  top-1 {row['top1']:6.2f}")


if __name__ == "__main__":
    main()
