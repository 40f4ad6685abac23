"""Dynamic int8 quantisation of computed models, in several bases: ``python -m benchmarks.int8 [--seeds 3]``.

A residual stream may be rotated by any orthogonal map that fixes the ones direction: the function stays, but what is
rounded differs (QuaRot, arXiv 2404.00456). Sources are the digits example's ViT; linear layers are quantised by torch's
``quantize_dynamic``, weights with one scale or with one per output, activations with one per batch. Bases:

    as it is    of a source and of chosen channels that of training; computed models are rotated at random already
    rotated     at random
    principal   channels are close to the principal directions of the stream, so energy sits in few of them

KL is in nats, on the validation split: to the source, and to the same model in float32 (``rounding_kl``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import by_seed
from benchmarks.subspaces import calibration, measured, medians, source_of, uniform
from prunesweep.models import arch_of, cost
from prunesweep.models.builder import build_with
from prunesweep.models.cutting import gather
from prunesweep.models.reduction import Project
from prunesweep.pruners import taylor, width_path
from prunesweep.pruners.subspaces import SourceStatistics, compress, recover
from prunesweep.pruners.subspaces.compression import folded
from prunesweep.training import open_data

RESULT = Path(__file__).parent / "results" / "int8.json"
BUDGETS = (0.5, 0.26, 0.105, 0.05)
IMAGES = 684


def in_basis(model: nn.Module, rotation: torch.Tensor) -> nn.Module:
    """Express a ViT in another basis of its residual stream.

    Args:
        model: it is not changed.
        rotation: (D, D), orthogonal, takes the ones to the ones.
    """
    model, arch = folded(model), arch_of(model)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    turned = gather(arch, [True] * arch.depth, {"stages.0.embed": Project(rotation)}, weights)
    return build_with(arch, {name: tensor.float() for name, tensor in turned.items()}).eval()


def beside_ones(directions: torch.Tensor) -> torch.Tensor:
    """Make directions (D, D - 1) orthonormal, and orthogonal to the ones, by QR."""
    ones = torch.ones(len(directions), 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones, directions], 1))[0][:, 1:]


def at_random(width: int) -> torch.Tensor:
    """A rotation (D, D) that fixes the ones."""
    start = torch.randn(width, width - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return beside_ones(torch.eye(width, dtype=torch.float64)[:, 1:]) @ beside_ones(start).T + 1 / width


def principal(model: nn.Module, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rotation (D, D) after which channels are close to the principal directions of a model's stream."""
    vectors = SourceStatistics.collect(model, batches).directions(0)[1].flip(1)[:, :-1]
    width = len(vectors)
    return beside_ones(vectors) @ beside_ones(torch.eye(width, dtype=torch.float64)[:, 1:]).T + 1 / width


def quantised(model: nn.Module, *, per_output: bool) -> nn.Module:
    """Quantise the linear layers of a copy of a model."""
    from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    own = per_channel_dynamic_qconfig if per_output else default_dynamic_qconfig
    with warnings.catch_warnings(action="ignore"):
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear: own})


def models_of(source: Any, data: Any, batches: Sequence[torch.Tensor]) -> Iterator[tuple[str, float, nn.Module]]:
    """The source, half of it chosen by Taylor importance and recovered, and computed models."""
    arch = arch_of(source)
    yield "source", 1.0, source
    path = width_path(arch, taylor.score(source, data.calibration(512, 16, seed=0)))
    half = path.cut(path.step_for(0.5 * cost(arch).macs))
    yield "taylor, recovered", 0.5, recover(source, half, batches)
    statistics = SourceStatistics.collect(source, batches)
    for budget in BUDGETS:
        yield "computed", budget, compress(source, uniform(source, budget), batches, statistics=statistics)


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """All models of one source in all bases."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    batches, rows = calibration(data, IMAGES), list[dict[str, Any]]()
    for name, budget, model in models_of(source, data, batches):
        width = arch_of(model).stages[0].width
        bases = {"as it is": None, "rotated": at_random(width), "principal": principal(model, batches)}
        for basis, rotation in bases.items():
            own = model if rotation is None else in_basis(model, rotation)
            kinds = {
                "float32": own,
                "one scale": quantised(own, per_output=False),
                "per output": quantised(own, per_output=True),
            }
            for kind, small in kinds.items():
                found = measured(source, small, data)
                found["rounding_kl"] = measured(own, small, data)["kl"]
                rows.append({"model": name, "budget": budget, "basis": basis, "weights": kind, **found})
    return {"seed": seed, "rows": rows}


def main() -> None:
    found = by_seed(__doc__, one_seed, RESULT, engine=torch.backends.quantized.engine, images=IMAGES)
    for own, row in medians(found, "rows", "model", "budget", "basis", "weights").items():
        print(*own, f"KL {row['kl']:.4f}, of rounding {row['rounding_kl']:.5f}  top-1 {row['top1']:.2f}")


if __name__ == "__main__":
    main()
