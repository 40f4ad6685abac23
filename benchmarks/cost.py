"""What it takes to know MACs and parameters of a 12-block record: the formula, a built model, a counted forward pass.

python benchmarks/cost.py            prints, and writes benchmarks/results/cost.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunesweep.models import Arch, build, cost, num_params
from prunesweep.models.io.files import write_text
from prunesweep.models.latency.timing import device_name

SOURCE = "deit_small_patch16_224"
RESULT = Path(__file__).parent / "results" / "cost.json"


def counted(model: torch.nn.Module, images: torch.Tensor) -> int:
    """MACs of one forward pass."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() // 2


def on_meta(arch: Arch) -> torch.nn.Module:
    with torch.device("meta"):
        return build(arch).eval()


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and quartile distance in microseconds, after one call that does not count."""
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {"median_us": float(median), "iqr_us": float(high - low), "calls": repeats}


def main() -> None:
    torch.set_num_threads(1)  # all but the forward pass is bookkeeping
    arch = Arch.from_timm(SOURCE)
    model, images = build(arch).eval(), torch.zeros(1, arch.in_chans, *arch.img_size)
    spent = cost(arch)
    if (spent.macs, spent.params) != (counted(model, images), num_params(model)):
        raise SystemExit("the formula and the counters disagree")
    methods: dict[str, tuple[Callable[[], Any], int]] = {
        "models.cost (MACs, params)": (lambda: cost(arch), 2000),
        "build on the meta device, numel (params)": (lambda: num_params(on_meta(arch)), 20),
        "build on the meta device, FlopCounterMode (MACs)": (lambda: counted(on_meta(arch), images.to("meta")), 10),
        "build, FlopCounterMode on a forward pass (MACs)": (lambda: counted(build(arch).eval(), images), 10),
        "FlopCounterMode on a forward pass of a built model (MACs)": (lambda: counted(model, images), 10),
    }
    results = {name: timed(call, repeats) for name, (call, repeats) in methods.items()}
    first = results["models.cost (MACs, params)"]["median_us"]
    table = Table(title=f"{SOURCE}: {spent.macs:,} MACs, {spent.params:,} params, by all methods")
    for column in ("method", "median (us)", "IQR (us)", "/ formula"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, timing in results.items():
        ratio = f"{timing['median_us'] / first:,.0f}"
        table.add_row(name, f"{timing['median_us']:,.1f}", f"{timing['iqr_us']:,.1f}", ratio)
    Console().print(table)
    facts = {
        "device": "cpu",
        "device_name": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "model": SOURCE,
        "macs": spent.macs,
        "params": spent.params,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
