"""Whether fewer tokens are as much faster as they are fewer MACs: ``python -m benchmarks.tokens``.

One DeiT-S with random weights, and the same with tokens merged: by Prune-and-Merge in the sparse form, that form fused
for inference, with full matrices, with full matrices and a third product for the tokens that pass by (as the released
code computes it), and by ToMe with as many MACs as the sparse form. Models are timed in turns; a speed-up is the median
over rounds of the source's time over the model's in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from prunesweep.models import arch_of, blocks_of, cost, cut, cut_arch
from prunesweep.models.fuse import fuse_tokens
from prunesweep.models.io.files import write_text
from prunesweep.models.tome import apply_tome, tome_macs
from prunesweep.pruners import pmvit

from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "tokens.json"


class ThreeProducts(nn.Module):
    """M x, R z and diag(1 - m) x, each a matrix product."""

    def __init__(self, plan: Any) -> None:
        super().__init__()
        M, R, takes_part = plan.matrices()
        self.M, self.R, self.past = nn.Buffer(M), nn.Buffer(R), nn.Buffer(torch.diag((~takes_part).to(M.dtype)))

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return self.M @ x

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.R @ z + self.past @ x


def contestants(args: argparse.Namespace) -> dict[str, tuple[nn.Module, int]]:
    """Models by name, with their MACs per image."""
    torch.manual_seed(0)
    source = timm.create_model(args.model).eval()
    arch = arch_of(source)
    scores = pmvit.score(source, [], importance="random")
    models = {"source": (source, cost(arch).macs)}
    for form in ("sparse", "dense"):
        decision = pmvit.plan(arch, scores, args.keep_rate, prune_rate=args.prune_rate, form=form)
        models[f"prune and merge, {form}"] = (cut(source, decision), cost(cut_arch(arch, decision)).macs)
    sparse, macs = models["prune and merge, sparse"]
    models["prune and merge, sparse, fused"] = (fuse_tokens(sparse), macs)
    three: Any = cut(source, decision)
    for block in blocks_of(three):
        block.token_merge = ThreeProducts(block.token_merge)
    extra = arch.depth * arch.tokens**2 * arch.stages[0].width
    models["prune and merge, three products"] = (three, models["prune and merge, dense"][1] + extra)
    r = min(range(arch.tokens // arch.depth), key=lambda r: abs(tome_macs(arch, r) - macs))
    models[f"tome, r = {r}"] = (apply_tome(source, r), tome_macs(arch, r))
    assert len({id(model) for model, _ in models.values()}) == len(models)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep-rate", type=float, default=0.6)
    parser.add_argument("--prune-rate", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    dtype, models = getattr(torch, args.dtype), contestants(args)
    image = arch_of(models["source"][0]).img_size
    x = torch.randn(args.batch, 3, *image, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
    runs = {name: model.to(args.device, dtype) for name, (model, _) in models.items()}
    seconds = measure(runs, x, args.rounds)
    source_macs = models["source"][1]
    rows = {}
    for name, (_, macs) in models.items():
        speedup = statistics.median(a / b for a, b in zip(seconds["source"], seconds[name], strict=True))
        rows[name] = {
            "macs": macs,
            "images_per_s": round(args.batch / statistics.median(seconds[name]), 2),
            "fewer_macs": round(source_macs / macs, 3),
            "speedup": round(speedup, 3),
            "speedup_over_fewer_macs": round(speedup * macs / source_macs, 3),
        }
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if args.device == "cuda" else "processor time of all threads",
        "load_average": round(os.getloadavg()[0], 2),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "timm": timm.__version__,
        **{k: getattr(args, k) for k in ("model", "keep_rate", "prune_rate", "batch", "rounds")},
        "models": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@torch.inference_mode()
def measure(models: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one forward pass, by model and round, after one round that does not count."""
    on_gpu = x.device.type == "cuda"
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = clock()
            model(x)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: own[1:] for name, own in seconds.items()}


if __name__ == "__main__":
    main()
