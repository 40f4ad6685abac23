"""Computed models of DeiT-T, Swin-T and PVTv2-B0 at random weights: ``python -m benchmarks.random_weights``.

Shows that stock shapes go through and what that takes. Answers of an untrained model hardly depend on the image, so its
KL says little about trained ones; beside it stands the squared error of the logits, as a share of what they vary over
images. Images are digits, enlarged and coloured; others than those that are fitted to are measured.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.families import digits
from benchmarks.record import begun, write_result
from benchmarks.subspaces import peak_memory, uniform
from prunesweep.models import arch_of, cost
from prunesweep.pruners import kl_divergence
from prunesweep.pruners.subspaces import SourceStatistics, compress

RESULT = Path(__file__).parent / "results" / "random_weights.json"
SIZE, IMAGES, BATCH = 128, 64, 16
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {},
    "swin_tiny_patch4_window7_224": {"window_size": 4},
    "pvt_v2_b0": {},
}
BUDGETS = (0.5, 0.26, 0.1)


def source_of(name: str, options: dict[str, Any]) -> nn.Module:
    """A model of timm's at random weights, for images of ``SIZE``."""
    torch.manual_seed(0)
    sizes = {} if name.startswith("pvt") else {"img_size": SIZE}
    return timm.create_model(name, **sizes, **options).eval()


def one_model(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All computed models of one source."""
    source = source_of(name, options)
    arch = arch_of(source)
    train, _, val, _ = digits(arch.img_size)
    tint = torch.randn(len(train), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    fitted = list((train[:IMAGES] * tint[:IMAGES]).split(BATCH))
    others = val[:IMAGES] * tint[-IMAGES:]
    begun = time.process_time()
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        statistics = SourceStatistics.collect(source, fitted)
    found: dict[str, Any] = {"model": name, "image": arch.img_size, "macs": cost(arch).macs}
    found |= {"statistics_s": time.process_time() - begun, "rows": []}
    with torch.no_grad():
        wanted = source(others)
    spread = (wanted - wanted.mean(0)).square().sum().item()
    for budget in BUDGETS:
        widths, begun = uniform(source, budget), time.process_time()
        with peak_memory() as peak:
            small = compress(source, widths, fitted, statistics=statistics)
        used = {"seconds": time.process_time() - begun, "memory_mb": peak()}
        with torch.no_grad():
            got = small(others)
        found["rows"].append(
            {
                "budget": budget,
                "share": cost(arch_of(small)).macs / cost(arch).macs,
                "kl": kl_divergence(wanted, got).mean().item(),
                "logit_error": (got - wanted).square().sum().item() / spread,
                **used,
            }
        )
        print(name, found["rows"][-1], flush=True)
    return found


def main() -> None:
    begun(__doc__)
    found = [one_model(name, options) for name, options in MODELS.items()]
    write_result(RESULT, images=IMAGES, models=found)


if __name__ == "__main__":
    main()
