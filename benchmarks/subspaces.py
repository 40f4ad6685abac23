"""What computed models are worth: ``python -m benchmarks.subspaces [--seeds 3]``.

Sources are the digits example's ViT, trained with several seeds. On the validation split and without any training:

    rows    at every budget: channels and units chosen by Taylor importance, as cut; CORP's equations; equal shares of
            all widths by subspaces, only projected, with the writers refitted, and with readers, too; ``instant``
    spaces  one space alone narrowed, all others whole, refitted
    images  equal shares, refitted to few and to many images, with the seconds and the memory that this takes

KL is to the source, in nats; seconds are of the processor, memory is what a process takes beyond what it had before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.corp import corp
from benchmarks.record import by_seed
from prunesweep.models import Arch, arch_of, cost, cut
from prunesweep.pruners import kl_divergence, taylor, width_path
from prunesweep.pruners.subspaces import SourceStatistics, Widths, compress, compressed_arch, equal_shares, instant
from prunesweep.pruners.subspaces.compression import Compression, folded
from prunesweep.pruners.subspaces.streams import SourceStreams
from prunesweep.search.config import load_config
from prunesweep.search.execution.prepare import prepare_search
from prunesweep.search.report.display import Display
from prunesweep.training import open_data

RESULT = Path(__file__).parent / "results" / "subspaces.json"
CONFIG = Path(__file__).parents[1] / "examples" / "digits.toml"
BUDGETS = (0.9, 0.7, 0.5, 0.26, 0.15, 0.105, 0.07, 0.05, 0.036, 0.03)
IMAGES, BATCH = 684, 57  # of which a quarter is held out by ``instant``
SPACES: Mapping[str, tuple[str, ...]] = {
    "stream": ("embed",),
    "queries and keys": ("qk",),
    "values": ("v",),
    "MLP units": ("mlp",),
    "all": ("embed", "qk", "v", "mlp"),
}
KEPT = (0.75, 0.5, 0.375, 0.25, 0.125)  # of every width of a space
COUNTS, COUNT_BUDGETS = (32, 64, 128, 256, 512, 1024), (0.26, 0.07)


def source_of(seed: int, cache: Path, config: Path = CONFIG, *settings: str) -> nn.Module:
    """An example's source, trained once per seed."""
    from rich.console import Console

    from prunesweep.models import load

    with Display(Console()).progress() as report:
        return load(prepare_search(load_config(config, [f"seed={seed}", *settings]), cache, report).folder)


def narrowed(arch: Arch, share: float, spaces: Sequence[str] = SPACES["all"]) -> Widths:
    """Equal shares of the widths of some spaces, all others whole."""
    whole, equal = Widths.uniform(arch), equal_shares(arch, share)
    own = [space for space in spaces if space != "embed"]
    blocks = [
        dataclasses.replace(block, **{space: getattr(narrow, space) for space in own})
        for block, narrow in zip(whole.blocks, equal.blocks, strict=True)
    ]
    return Widths(embed=equal.embed if "embed" in spaces else None, blocks=tuple(blocks))


def within(arch: Arch, budget: float, spaces: Sequence[str] = (*SPACES["all"], "sr")) -> Widths | None:
    """Find the largest equal shares of some spaces within a budget; None where their smallest cost more."""
    for step in range(256, 0, -1):
        widths = narrowed(arch, step / 256, spaces)
        if cost(compressed_arch(arch, widths)).macs <= budget * cost(arch).macs:
            return widths
    return None


def uniform(model: nn.Module, budget: float) -> Widths:
    """Equal shares of stream, heads and units, the largest within a budget."""
    widths = within(arch_of(model), budget)
    if widths is None:
        raise ValueError(f"no widths cost as little as {budget}")
    return widths


class WritersOnly(Compression):
    """A compression whose readers stay what the projection makes of them; only writers are refitted."""

    def read(self, *_: Any, **__: Any) -> None:
        """Leave a reader as it is."""

    def attention(self, *given: Any) -> Any:
        """Project queries, keys and values, then fit the output projection."""
        self.refit = False
        return super().attention(*given)

    def write_attention(self, *given: Any) -> Any:
        """Fit the output projection."""
        self.refit = True
        return super().write_attention(*given)


@torch.no_grad()
def with_writers(
    model: nn.Module, widths: Widths, batches: Sequence[torch.Tensor], statistics: SourceStatistics
) -> nn.Module:
    """Project a source, and refit the writers."""
    source = folded(model)
    work = WritersOnly(source, widths, statistics, SourceStreams(source, batches))
    work.run(range(arch_of(model).depth))
    return work.small


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


def by_budget(source: Any, data: Any) -> Iterator[dict[str, Any]]:
    """Models of every way at every budget."""
    arch, batches = arch_of(source), calibration(data, IMAGES)
    whole = cost(arch).macs
    statistics = SourceStatistics.collect(source, batches)
    path = width_path(arch, taylor.score(source, data.calibration(512, 16, seed=0)))

    def row(how: str, budget: float, begun: float, small: nn.Module) -> dict[str, Any]:
        seconds = time.process_time() - begun
        return {"how": how, "budget": budget, "seconds": seconds, **measured(source, small, data)}

    for budget in BUDGETS:
        begun = time.process_time()
        if budget * whole >= path.costs[-1]:
            yield row("taylor, as cut", budget, begun, cut(source, path.cut(path.step_for(budget * whole))))
        begun = time.process_time()
        chosen = within(arch, budget, ("qk", "mlp"))
        if chosen is not None:
            small = compressed_arch(arch, chosen).blocks[0]
            yield row("CORP", budget, begun, corp(source, batches, qk=small.qk, mlp=small.mlp))
        widths = uniform(source, budget)
        for name, refit in (("uniform, projected", False), ("uniform, refitted", True)):
            begun = time.process_time()
            yield row(name, budget, begun, compress(source, widths, batches, statistics=statistics, refit=refit))
        begun = time.process_time()
        yield row("uniform, writers", budget, begun, with_writers(source, widths, batches, statistics))


def by_space(source: Any, data: Any) -> Iterator[dict[str, Any]]:
    """Models of which one space alone is narrow."""
    batches = calibration(data, IMAGES)
    statistics = SourceStatistics.collect(source, batches)
    for name, spaces in SPACES.items():
        for kept in KEPT:
            small = compress(source, narrowed(arch_of(source), kept, spaces), batches, statistics=statistics)
            yield {"space": name, "kept": kept, **measured(source, small, data)}


def by_images(source: Any, data: Any) -> Iterator[dict[str, Any]]:
    """Models fitted to few and to many images, with what that takes."""
    for count in COUNTS:
        batches = calibration(data, count)
        for budget in COUNT_BUDGETS:
            widths, begun = uniform(source, budget), time.process_time()
            with peak_memory() as peak:
                small = compress(source, widths, batches)
            used = {"seconds": time.process_time() - begun, "memory_mb": peak()}
            yield {"images": count, "budget": budget, **used, **measured(source, small, data)}


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Give a function that says how many MB more than before this process had at its peak, on Linux."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be used again and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    found = list[float]()
    yield lambda: found[0]
    found.append(_resident("VmHWM") - before)


def _resident(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def calibration(data: Any, count: int) -> list[torch.Tensor]:
    """Training images without their labels, the same for everybody."""
    return [images for images, _ in data.calibration(count, min(BATCH, count), seed=0)]


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """All models of one source, with the seconds that they took."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    batches = calibration(data, IMAGES)
    begun = time.process_time()
    SourceStatistics.collect(source, batches)
    shared = time.process_time() - begun
    begun = time.process_time()
    with peak_memory() as peak:
        points = instant(source, batches, BUDGETS)
    whole = time.process_time() - begun
    allocated = [{"how": "allocated", "budget": own.budget, **measured(source, own.model, data)} for own in points]
    return {
        "seed": seed,
        "source": measured(source, source, data),
        "statistics_s": shared,
        "instant_s": whole,
        "instant_mb": peak(),
        "rows": [*by_budget(source, data), *allocated],
        "spaces": list(by_space(source, data)),
        "images": list(by_images(source, data)),
    }


def medians(found: Sequence[Mapping[str, Any]], part: str, *keys: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """Medians over the seeds of all rows of a part, by some of their entries, in the order of the first seed's."""
    rows = [row for one in found for row in one[part]]
    groups = {tuple(row[key] for key in keys): list[dict[str, Any]]() for row in rows}
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return {
        own: {name: median(row[name] for row in same) for name, value in same[0].items() if isinstance(value, float)}
        for own, same in groups.items()
    }


def main() -> None:
    found = by_seed(__doc__, one_seed, RESULT, batch=BATCH, calibration_images=IMAGES)
    for part, keys in (("rows", ("how", "budget")), ("spaces", ("space", "kept")), ("images", ("images", "budget"))):
        for own, row in medians(found, part, *keys).items():
            seen = f"share {row['share']:.3f}  KL {row['kl']:8.4f}  top-1 {row['top1']:6.2f}"
            print(f"{own[0]!s:20} {own[1]:5.3f}  {seen}")
    print(f"seconds of `instant`, {len(BUDGETS)} budgets:", [round(f["instant_s"], 1) for f in found])


if __name__ == "__main__":
    main()
