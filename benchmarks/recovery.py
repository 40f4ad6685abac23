"""What recovery is worth to models that methods choose: ``python -m benchmarks.recovery [--seeds 3]``.

Sources are the digits example's ViT, trained with several seeds. What ``prunesweep prune`` makes of each without any
training: as cut, recovered by refits, and projected to the widths that the method decided; KL to the source, in nats,
agreement and top-1 on the validation split.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import by_seed
from benchmarks.subspaces import measured, medians, source_of
from prunesweep.models import arch_of, cost, cut
from prunesweep.pruners import Scores, WidthMethod, get_method
from prunesweep.training import open_data
from prunesweep.training.jobs.recovery import Recovery
from prunesweep.training.jobs.scoring import Calibration, cached_scores

RESULT = Path(__file__).parent / "results" / "recovery.json"
METHODS = ("nvit", "taylor", "magnitude", "random")
BUDGETS = (0.5, 0.3)
WAYS = {"refits": Recovery(), "projection": Recovery(project=True)}


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """All models of one source, with the seconds that they took."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    rows = [row for method in METHODS for row in _rows(source, data, method, cache)]
    return {"seed": seed, "source": measured(source, source, data), "rows": rows}


def _rows(source: Any, data: Any, method: str, cache: Path) -> Iterator[dict[str, Any]]:
    arch, entry = arch_of(source), get_method(method, WidthMethod)
    scores = Scores.load(cached_scores(source, method, data, Calibration(), cache / "scores", lambda *_: None))
    for budget in BUDGETS:
        decision = entry.decide(arch, scores, budget * cost(arch).macs).cut
        yield {"method": method, "budget": budget, "how": "as cut", **measured(source, cut(source, decision), data)}
        for how, recovery in WAYS.items():
            begun = time.process_time()
            small = recovery.model(source, decision, recovery.calibration(data))
            seconds = time.process_time() - begun
            yield {
                "method": method,
                "budget": budget,
                "how": how,
                "seconds": seconds,
                **measured(source, small, data),
            }


def main() -> None:
    found = by_seed(__doc__, one_seed, RESULT, images=Recovery().images)
    for (method, budget, how), row in medians(found, "rows", "method", "budget", "how").items():
        seen = f"{row['share']:.3f} {how:10} KL {row['kl']:7.4f}  top-1 {row['top1']:6.2f}"
        print(f"{method:10} {budget:4} {seen}")


if __name__ == "__main__":
    main()
