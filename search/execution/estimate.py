"""What a search would train, and about how long that takes here: for a dry run, which trains nothing."""

from __future__ import annotations

from prunesweep.models import Arch, build, cost
from prunesweep.models.latency.timing import measure
from prunesweep.search.config import SearchConfig
from prunesweep.search.report.words import clock, counted
from prunesweep.search.space.space import Summary
from prunesweep.search.store.progress import planned

__all__ = ["estimate"]

BATCH = 8  # images of the pass that is timed
TIMED = 2e10  # MACs of a source, up to which a pass of it takes seconds on any CPU
BACKWARD = 3  # passes forward that one forward and backward is worth


def estimate(config: SearchConfig, arch: Arch, summary: Summary, images: int, units: int | None) -> str:
    """Say what training of a search costs, and how long it takes on this machine's CPUs where those do it.

    Candidates count with the median of their MACs, each image with a pass of the source for distillation. The time is
    that of one timed forward pass of the source, so it is rough: small models are slower than their MACs say.

    Args:
        config: of the search.
        arch: the source's record.
        summary: of its space.
        images: training images.
        units: tasks that run side by side, if that is known.
    """
    search, source = config.search, cost(arch).macs
    rungs = search.rungs or (config.finetune.epochs,)
    counts = planned(search.trials, len(rungs), search.reduction_factor)
    seen = images * sum(count * epochs for count, epochs in zip(counts, rungs, strict=True))
    if not seen:
        return "estimate: nothing is trained; every candidate is computed and measured"
    each = BACKWARD * summary.macs.median + (source if config.finetune.distill else 0)
    line = f"estimate: training sees {seen:,} images, about {seen * each / 1e9:,.0f} G MACs"
    resources = config.resources
    if units and not resources.gpus_per_trial and arch.text is None and source <= TIMED:
        timing = measure(
            build(arch), batch=BATCH, threads=resources.cpus_per_trial, warmup=1, repeats=2, min_seconds=0.0
        )
        rate = BATCH * source / (timing.median_ms / 1000) * resources.workers_per_trial
        line += (
            f", roughly {clock(seen * each / rate / units)} with {counted(units, 'candidate')} side by side on "
            f"{counted(resources.cpus_per_trial, 'CPU')} each, by the time of one pass of the source here"
        )
    elif resources.gpus_per_trial:
        line += "; the time is not estimated, for nothing is run on a GPU before the search"
    return f"{line}; computing and measuring the candidates comes on top"
