"""Measured latency: milliseconds per batch of images, on one device, under stated conditions.

Models that are compared are timed in turns, a few calls each, round after round, so that a machine that slows down or
is busy for a while affects all of them alike. Times are medians over calls; on CUDA they are taken by events on the
device, on the CPU by the wall clock.
"""

from __future__ import annotations

import contextlib
import copy
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunesweep.models.builder import arch_of, example_input
from prunesweep.models.errors import UserError, nearest
from prunesweep.models.memory import out_of_memory

__all__ = ["Call", "Setting", "Timing", "device_name", "measure", "measure_all", "time_calls"]

Call = Callable[[], Any]
Progress = Callable[[int, int], None]  # steps done, steps in all

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS = 5  # turns that every model gets


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The conditions of a measurement; latencies are comparable under equal ones only.

    Raises:
        UserError: a value is impossible, or the device is not there.
    """

    batch: int
    device: str = "cpu"  # cpu | cuda | cuda:N
    dtype: str = "float32"  # of weights and images
    compiled: bool = False  # torch.compile
    threads: int | None = None  # of the CPU; None: as torch is set

    def __post_init__(self) -> None:
        if type(self.batch) is not int or self.batch < 1:
            raise UserError(f"batch = {self.batch!r}: must be a whole number of at least 1")
        if self.dtype not in DTYPES:
            raise UserError(
                f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}. {nearest(self.dtype, DTYPES)}"
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise UserError(f"threads = {self.threads!r}: must be a whole number of at least 1")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device = {self.device!r}: must be cpu, cuda or cuda:N")

    def require_device(self) -> None:
        """Raise UserError where this machine does not have the device.

        A setting itself may name a device of another machine, as that of a loaded table does.
        """
        if self.device != "cpu" and (torch.device(self.device).index or 0) >= torch.cuda.device_count():
            raise UserError(f"device = {self.device!r}: this machine has {torch.cuda.device_count()} CUDA devices")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one batch: the median over ``calls`` calls and the distance between their quartiles."""

    batch: int
    median_ms: float
    iqr_ms: float
    calls: int

    @property
    def throughput(self) -> float:
        """Images per second."""
        return 1e3 * self.batch / self.median_ms


def measure(
    model: nn.Module,
    *,
    batch: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    threads: int | None = None,
    warmup: int = 3,
    repeats: int = 10,
    min_seconds: float = 1.0,
) -> Timing:
    """Time the forward pass of ``model`` in eval and inference mode on random images of its record's size.

    Args:
        model: a timm model that ``Arch.from_timm`` accepts, or one of ours. A copy is timed; ``model`` stays as it is.
        batch: images per batch.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of weights and images; float32, bfloat16 or float16.
        compiled: time ``torch.compile(model)``; compiling is part of the warm-up.
        threads: CPU threads, for the time of the measurement; ``None`` leaves torch as it is set.
        warmup: calls that do not count.
        repeats: calls that count, at least.
        min_seconds: calls go on until so much time is measured.

    Raises:
        UserError: an argument is impossible, the device is not there, or the batch does not fit into its memory.
    """
    name = str(dtype).removeprefix("torch.")
    setting = Setting(batch=batch, device=device, dtype=name, compiled=compiled, threads=threads)
    return measure_all([model], setting, warmup=warmup, repeats=repeats, min_seconds=min_seconds)[0]


def measure_all(models: Sequence[nn.Module], setting: Setting, **options: Any) -> list[Timing]:
    """Time several models in turns, as ``measure`` times one; all of them are in memory at once.

    Args:
        models: timm models that ``Arch.from_timm`` accepts, or ours; copies are timed.
        setting: the conditions, the same for all.
        options: those of ``time_calls``: ``warmup``, ``repeats``, ``min_seconds``, ``progress``.

    Returns:
        One timing per model, in order.

    Raises:
        UserError: the device is not there, or the batch does not fit into its memory.
    """
    setting.require_device()
    with _memory(setting):
        return time_calls([_call(model, setting) for model in models], setting, **options)


def _call(model: nn.Module, setting: Setting) -> Call:
    arch = arch_of(model)
    dtype = DTYPES[setting.dtype]
    own: Any = copy.deepcopy(model).to(setting.device, dtype).eval()
    if setting.compiled:
        own = torch.compile(own, dynamic=False)
    images = example_input(arch, setting.batch, seed=0).to(setting.device)
    if images.is_floating_point():
        images = images.to(dtype)
    return lambda: own(images)


def time_calls(
    calls: Sequence[Call],
    setting: Setting,
    *,
    warmup: int = 3,
    repeats: int = 10,
    min_seconds: float = 1.0,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time functions without arguments, in turns; return one timing per function, of ``setting.batch`` images each.

    Args:
        calls: each runs a module once, on the device and in the dtype of ``setting``.
        setting: says what device to wait for and how many threads to use.
        warmup: calls of each that do not count.
        repeats: calls of each that count, at least.
        min_seconds: measured time of each, at least.
        progress: called with (turns done, turns in all); the first turn is the warm-up.
    """
    samples: list[list[float]] = [[] for _ in calls]
    sample = _on_cuda if setting.device != "cpu" else _on_cpu
    steps, total = 0, (ROUNDS + 1) * len(calls)
    with _memory(setting), _conditions(setting, len(calls)):
        turns = []
        for turn in range(ROUNDS + 1):
            for i, call in enumerate(calls):
                if turn == 0:
                    sample(call, max(warmup, 1))
                    seconds = sample(call, 1)[0] / 1e3
                    needed = max(repeats, math.ceil(min_seconds / max(seconds, 1e-6)))
                    turns.append(math.ceil(needed / ROUNDS))
                else:
                    samples[i] += sample(call, turns[i])
                steps += 1
                if progress:
                    progress(steps, total)
    return [_timing(setting.batch, own) for own in samples]


def _timing(batch: int, samples: Sequence[float]) -> Timing:
    low, median, high = np.percentile(samples, [25, 50, 75])
    return Timing(batch, float(median), float(high - low), len(samples))


def _on_cpu(call: Call, count: int) -> list[float]:
    """Measure milliseconds of each of ``count`` calls."""
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        marks.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in pairwise(marks)]


def _on_cuda(call: Call, count: int) -> list[float]:
    """Measure milliseconds of each of ``count`` calls by events, without waiting between calls.

    The result is how long the device is busy, or how fast it is fed where that is slower.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


@contextlib.contextmanager
def _conditions(setting: Setting, modules: int) -> Iterator[None]:
    """Set inference mode, the number of threads and the device that events are recorded on; restore all afterwards."""
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(torch.inference_mode())
        if setting.threads is not None:
            torch.set_num_threads(setting.threads)
        if setting.device != "cpu":
            stack.enter_context(torch.cuda.device(setting.device))
        if setting.compiled:
            # modules of one class share a cache of compiled code, and beyond its limit torch silently stops compiling
            limits: dict[str, Any] = {"recompile_limit": 8 + modules, "accumulated_recompile_limit": 256 + modules}
            stack.enter_context(torch._dynamo.config.patch(limits))
        yield


@contextlib.contextmanager
def _memory(setting: Setting) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"batch = {setting.batch}: does not fit into the memory of {setting.device}: {error}"
        ) from error


def device_name(device: str) -> str:
    """Return the name that the hardware reports."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
