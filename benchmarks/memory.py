"""Memory of computed models over the number of calibration images: ``python -m benchmarks.memory``.

For every number of images, a process of its own takes images from a loader that draws them at random, and computes a
front of one budget for a small ViT of random weights. Its peak of memory stands beside what it had before, when the
libraries had taken theirs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.record import write_result
from prunesweep.models import arch_of
from prunesweep.pruners.subspaces import instant
from prunesweep.pruners.subspaces.batches import Batches

RESULT = Path(__file__).parent / "results" / "memory.json"
IMAGES, BATCH = (256, 1024, 4096), 64
SHAPE = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
LIMIT = 2**20  # bytes of a stream in memory: as small beside the usual one as this model beside a usual one
BUDGET = 0.3


class Drawn:
    """Batches of random images, made when they are asked for."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[torch.Tensor]:
        for seed in range(self.images // BATCH):
            yield torch.randn(BATCH, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def one_process(images: int) -> dict[str, Any]:
    """Compute the front in this process; return peaks of memory in MiB, and CPU seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()
    instant(model, Drawn(BATCH), (BUDGET,))  # libraries have taken their workspaces
    before, begun = _peak(), time.process_time()
    instant(model, Drawn(images), (BUDGET,))
    stream = images * arch_of(model).tokens * arch_of(model).stages[0].width * 4 / 2**20
    return {"images": images, "before": before, "peak": _peak(), "stream": stream, "s": time.process_time() - begun}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="images of one process, whose figures are printed")
    given = parser.parse_args()
    if given.one:
        warnings.simplefilter("ignore")  # a source of random weights
        Batches.IN_MEMORY = LIMIT
        print(json.dumps(one_process(given.one)))
        return
    rows = []
    for images in IMAGES:
        call = [sys.executable, "-m", "benchmarks.memory", "--one", str(images)]
        out = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print("{images:5} images  before {before:5.0f}  peak {peak:6.0f} MiB  {s:5.1f} s".format(**rows[-1]))
    write_result(RESULT, limit_mib=LIMIT / 2**20, budget=BUDGET, shape=SHAPE, rows=rows)


if __name__ == "__main__":
    main()
