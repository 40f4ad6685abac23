"""What computed models are worth: ``python -m benchmarks.subspaces [--seeds 3]``.

Sources are the digits example's ViT, trained with several seeds. At every budget, on the validation split and without
any training: channels and units chosen by Taylor importance, as cut; uniform widths by subspaces, only projected; the
same refitted; and the shares of ``prunesweep.instant``. KL is to the source, in nats.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.upvit_exact import processor
from prunesweep.models import arch_of, cost, cut
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.pruners import kl_divergence, taylor, width_path
from prunesweep.pruners.subspaces import SourceStatistics, Widths, compress, compressed_arch, equal_shares, instant
from prunesweep.search.config import load_config
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.report.display import Display
from prunesweep.training import open_data

RESULT = Path(__file__).parent / "results" / "subspaces.json"
CONFIG = Path(__file__).parents[1] / "examples" / "digits.toml"
BUDGETS = (0.9, 0.7, 0.5, 0.26, 0.15, 0.105, 0.07, 0.05, 0.036)
IMAGES, BATCH = 684, 57  # of which a quarter is held out by ``instant``


def source_of(seed: int, cache: Path) -> nn.Module:
    """The example's source, trained once per seed."""
    from rich.console import Console

    from prunesweep.models import load

    with Display(Console()).progress() as report:
        return load(prepare_search(load_config(CONFIG, [f"seed={seed}"]), cache, report).folder)


def uniform(model: nn.Module, budget: float) -> Widths:
    """Equal shares of stream, heads and units, the largest within a budget."""
    arch = arch_of(model)
    for step in range(256, 0, -1):
        widths = equal_shares(arch, step / 256)
        if cost(compressed_arch(arch, widths)).macs <= budget * cost(arch).macs:
            return widths
    raise ValueError(f"no widths cost as little as {budget}")


@torch.no_grad()
def measured(source: nn.Module, small: nn.Module, data: Any) -> dict[str, float]:
    """KL, agreement and top-1 on the validation split."""
    wanted, got, labels = [], [], []
    for images, own in data.val_loader(256):
        wanted.append(source(images))
        got.append(small(images))
        labels.append(own)
    a, b, c = torch.cat(wanted), torch.cat(got), torch.cat(labels)
    return {
        "share": cost(arch_of(small)).macs / cost(arch_of(source)).macs,
        "kl": kl_divergence(a, b).mean().item(),
        "agreement": 100 * (a.argmax(1) == b.argmax(1)).double().mean().item(),
        "top1": 100 * (b.argmax(1) == c).double().mean().item(),
    }


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """All models of one source, with the seconds that they took."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    batches = data.calibration(IMAGES, BATCH, seed=0)
    rows: list[dict[str, Any]] = []

    def add(name: str, budget: float, small: nn.Module, seconds: float) -> None:
        rows.append({"how": name, "budget": budget, "seconds": seconds, **measured(source, small, data)})

    begun = time.process_time()
    statistics = SourceStatistics.collect(source, batches)
    shared = time.process_time() - begun
    path = width_path(arch_of(source), taylor.score(source, data.calibration(512, 16, seed=0)))
    for budget in BUDGETS:
        begun = time.process_time()
        limit = budget * cost(arch_of(source)).macs
        if limit >= path.costs[-1]:
            chosen = path.cut(path.step_for(limit))
            add("taylor, as cut", budget, cut(source, chosen), time.process_time() - begun)
        widths = uniform(source, budget)
        for name, refit in (("uniform, projected", False), ("uniform, refitted", True)):
            begun = time.process_time()
            small = compress(source, widths, batches, statistics=statistics, refit=refit)
            add(name, budget, small, time.process_time() - begun)
    begun = time.process_time()
    for point in instant(source, batches, BUDGETS):
        add("allocated", point.budget, point.model, float("nan"))
    whole = time.process_time() - begun
    return {
        "seed": seed,
        "source": measured(source, source, data),
        "statistics_s": shared,
        "instant_s": whole,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [one_seed(seed, given.cache) for seed in range(given.seeds)]
    facts = {"device": processor(), "threads": 1, "dtype": "float32", "batch": BATCH, "images": IMAGES}
    write_text(RESULT, json.dumps({**facts, "versions": versions(), "seeds": found}, indent=1))
    for row in found[0]["rows"]:
        same = [r for f in found for r in f["rows"] if (r["how"], r["budget"]) == (row["how"], row["budget"])]
        kl, top1 = (sorted(r[name] for r in same)[len(same) // 2] for name in ("kl", "top1"))
        print(f"{row['how']:20} {row['budget']:5.3f}  KL {kl:8.4f}  top-1 {top1:6.2f}")
    print("seconds of `instant`, 9 budgets:", [round(f["instant_s"], 1) for f in found])


if __name__ == "__main__":
    main()
