"""How much faster exact UP-ViT scores are than one forward pass per unit: ``python -m benchmarks.upvit_exact``.

Every unit of a DeiT with random weights is scored by ``pruners.upvit``. The comparison is the time of one forward pass
of the same images and its divergence from the source's known logits, times the number of units; taking the unit out
costs it nothing. For a sample of units, drawn evenly, the scores are compared with those of the model without the unit.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import timm
import torch
from torch import nn

from prunesweep.models import Arch, BlockCut, Cut, arch_of, blocks_of, build, cut
from prunesweep.models.arch import Block, Stage
from prunesweep.models.io.files import write_text
from prunesweep.pruners import kl_divergence, upvit, vector_sizes

RESULT = Path(__file__).parent / "results" / "upvit_exact.json"


def deit(depth: int, width: int, img_size: int) -> nn.Module:
    """A DeiT with heads of 64 and weights large enough that every unit matters."""
    torch.manual_seed(0)
    shape = {"heads": width // 64, "qk": 64, "v": 64, "scale": 64**-0.5, "mlp": 4 * width}
    side = img_size // 16
    arch = Arch(
        family="vit",
        source="benchmark",
        img_size=(img_size, img_size),
        patch_size=(16, 16),
        in_chans=3,
        num_classes=1000,
        stages=(Stage(width=width, grid=(side, side), blocks=tuple(Block(src=i, **shape) for i in range(depth))),),
    )
    model = build(arch).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.05)
    return model


@torch.no_grad()
def removed(model: nn.Module, x: torch.Tensor, name: str, unit: int) -> torch.Tensor:
    """Logits of the whole model without one unit."""
    arch = arch_of(model)
    _, index, kind = name.split(".")
    if kind == "embed":
        kept = tuple(c for c in range(arch.stages[0].width) if c != unit)
        return cut(model, Cut(embed=(kept,), blocks=(BlockCut(),) * arch.depth))(x)
    block: Any = blocks_of(model)[int(index)]
    rows = [part * arch.blocks[int(index)].total_v + unit for part in range(3)]  # of query, key and value
    places: list[tuple[torch.Tensor, Any]] = [(block.attn.qkv.weight, rows), (block.attn.qkv.bias, rows)]
    if kind == "mlp":
        places = [(block.mlp.fc2.weight, (slice(None), unit))]
    saved = [tensor[where].clone() for tensor, where in places]
    for tensor, where in places:
        tensor[where] = 0
    logits = model(x)
    for (tensor, where), values in zip(places, saved, strict=True):
        tensor[where] = values
    return logits


def fewer_macs(depth: int, heads: int) -> float:
    """MACs of one forward pass per unit over those of the exact scheme, in the limit of wide models (in N*C^2)."""
    suffix = [12 * (depth - 2 - i) + 2 if i < depth - 1 else 0 for i in range(depth)]
    mlp = 4 * sum(suffix)
    attn = sum(8 + 1 / heads + s for s in suffix)
    embed = 12 * (depth - 1) + 2
    return (1 + 5 * depth) * 12 * depth / (mlp + attn + embed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--sample", type=int, default=120, help="passes that are timed, and units that are compared")
    parser.add_argument("--memory-mb", type=int, default=64, help="of stacked units")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if torch.cuda.is_available() else "processor time of all threads",
        "dtype": "float32",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "model": {"family": "vit", "patch_size": 16, **{k: getattr(args, k) for k in ("depth", "width", "img_size")}},
        **measure(args),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Times in seconds, and how far the two ways' scores are apart."""
    model = deit(args.depth, args.width, args.img_size).to(args.device)
    x = torch.randn(args.images, 3, args.img_size, args.img_size, generator=torch.Generator().manual_seed(1))
    batches, x = [(x, torch.zeros(len(x)))], x.to(args.device)
    units = [(name, unit) for name, size in vector_sizes(arch_of(model), upvit.KINDS).items() for unit in range(size)]
    with torch.no_grad():
        source = model(x)

        def passes() -> None:
            for _ in range(args.sample // 2):
                kl_divergence(source, model(x)).sum().item()

        before_s, _ = timed(passes)
        exact_s, exact = timed(
            lambda: upvit.score(model, batches, importance="exact", memory_mb=args.memory_mb).vectors
        )
        after_s, _ = timed(passes)
    fisher_s, _ = timed(lambda: upvit.score(model, batches, importance="fisher"))
    by_unit_s = (before_s + after_s) / (2 * (args.sample // 2)) * len(units)
    errors = [
        abs(exact[name][unit].item() / float(kl_divergence(source, removed(model, x, name, unit)).sum()) - 1)
        for name, unit in Random(0).sample(units, min(args.sample, len(units)))
    ]
    return {
        "images": args.images,
        "units": len(units),
        "memory_mb": args.memory_mb,
        "exact_s": round(exact_s, 2),
        "unit_by_unit_s": round(by_unit_s, 2),
        "unit_by_unit_passes_timed": args.sample,
        "speedup": round(by_unit_s / exact_s, 2),
        "fewer_macs": round(fewer_macs(args.depth, args.width // 64), 2),
        "largest_relative_difference": float(f"{max(errors):.2e}"),
        "fisher_4_labels_s": round(fisher_s, 3),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a run takes, and its result, which is on the CPU.

    Without a GPU, processor time of all threads, which other programs on the machine disturb least.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    result = run()
    return clock() - start, result


def processor() -> str:
    """This machine's CPU by name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
