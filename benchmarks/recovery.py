"""What recovery is worth to models that methods choose: ``python -m benchmarks.recovery [--seeds 3]``.

Sources are the digits example's ViT, trained with several seeds. What ``prunesweep prune`` makes of each without any
training: as cut, recovered by refits, and projected to the widths that the method decided; KL to the source, in nats,
agreement and top-1 on the validation split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.subspaces import measured, source_of
from benchmarks.upvit_exact import processor
from prunesweep.models import arch_of, cost, cut
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [one_seed(seed, given.cache) for seed in range(given.seeds)]
    facts = {"device": processor(), "threads": 1, "dtype": "float32", "images": Recovery().images}
    write_text(RESULT, json.dumps({**facts, "versions": versions(), "seeds": found}, indent=1))
    for at, row in enumerate(found[0]["rows"]):
        kl, top1, share = (median(one["rows"][at][name] for one in found) for name in ("kl", "top1", "share"))
        print(f"{row['method']:10} {row['budget']:4} {share:.3f} {row['how']:10} KL {kl:7.4f}  top-1 {top1:6.2f}")


if __name__ == "__main__":
    main()
