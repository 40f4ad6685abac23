"""What scoring costs beside a plain forward and backward pass, and a whole cut beside Torch-Pruning's.

    pip install torch-pruning && python -m benchmarks.scoring [--images 16] [--turns 5]

DeiT-S with random weights, one batch of random images, seconds of the processor on one thread, in turns:

    plain           forward, cross-entropy and backward
    nvit, taylor    our scores, which take the same passes
    ours            taylor's scores, the choice of half the MACs, and the cut
    torch-pruning   GroupTaylorImportance over the same passes, its pruner with a ratio that gives about as many MACs

Writes benchmarks/results/scoring.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.record import begun, write_result
from prunesweep.models import arch_of, cost, cut
from prunesweep.pruners import WidthMethod, get_method

MODEL = "deit_small_patch16_224"
RESULT = Path(__file__).parent / "results" / "scoring.json"
SHARE = 0.5  # of the MACs


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Do what every scoring by gradients must."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def ours(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Score, choose and cut."""
    method, arch = get_method("taylor", WidthMethod), arch_of(model)
    scores = method.score(model, [(x, y)])
    return cut(model, method.decide(arch, scores, SHARE * cost(arch).macs, groups=method.groups).cut)


def torch_pruning(model: Any, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Do the same with Torch-Pruning, as its example for timm's ViTs does: channels of all layers; heads stay."""
    import torch_pruning as tp

    for block in model.blocks:
        block.attn.fused_attn = False  # its graph follows plain products
    pruner = tp.pruner.BasePruner(
        model,
        x[:1],
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=False,
        pruning_ratio=1 - SHARE**0.5,  # of every width, and products of two of them are MACs
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        ignored_layers=[model.head],
    )
    backward(model, x, y)
    pruner.step()
    for block in model.blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.attn_dim = block.attn.qkv.out_features // 3
        block.attn.head_dim = block.attn.attn_dim // block.attn.num_heads
    return model  # type: ignore[no-any-return]


def main() -> None:
    given = begun(__doc__, images=16, turns=5)
    torch.manual_seed(0)
    x, y = torch.randn(given.images, 3, 224, 224), torch.arange(given.images)
    model = timm.create_model(MODEL).eval()
    ways: dict[str, Callable[[nn.Module], object]] = {
        "plain": lambda own: backward(own, x, y),
        "nvit": lambda own: get_method("nvit", WidthMethod).score(own, [(x, y)]),
        "taylor": lambda own: get_method("taylor", WidthMethod).score(own, [(x, y)]),
        "ours": lambda own: ours(own, x, y),
        "torch-pruning": lambda own: torch_pruning(own, x, y),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    facts: dict[str, Any] = {}
    for turn in range(given.turns + 1):  # the first one warms up
        for name, way in ways.items():
            own = timm.create_model(MODEL).eval()
            own.load_state_dict(model.state_dict())
            begin = time.process_time()
            found = way(own)
            if turn:
                seconds[name].append(time.process_time() - begin)
            elif isinstance(found, nn.Module):
                facts[f"{name}, share of parameters"] = _parameters(found) / _parameters(model)
                with torch.no_grad():
                    assert found(x[:2]).shape == (2, 1000)
    plain = seconds["plain"]
    rows = {
        name: {
            "s": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
        }
        for name, own in seconds.items()
    }
    write_result(
        RESULT,
        model=MODEL,
        images=given.images,
        clock="seconds of the processor",
        torch_pruning=version("torch-pruning"),
        rows=rows,
        **facts,
    )
    for name, row in rows.items():
        print(f"{name:14} {row['s']:.3f} s, {row['ratio']:.3f} of plain")
    print(facts)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
