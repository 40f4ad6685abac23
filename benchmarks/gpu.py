"""What compression is worth on a GPU: ``python -m benchmarks.gpu [--only speed,tokens,...]``, under eight minutes.

    speed     DeiT-S and DeiT-B, dense and at .5 and .3 of their MACs by each axis and by all: images per second, the
              share of a matrix product's rate, and the speed-up over the ratio of MACs; batches of 1, 64 and 256, eager
              and as a CUDA graph; the largest batch of DeiT-S compiled, too
    tokens    merged tokens in each form, and ToMe at equal MACs (``benchmarks.tokens``)
    training  ``fit`` against a bare loop, with images in memory and with a teacher (``benchmarks.training_speed``)
    loader    JPEGs through the loader, with DeiT's augmentation, beside what training takes
    compute   ``compress`` and ``instant`` of DeiT-B on 2,048 images: seconds of what is shared and of a model, memory,
              and the error of Gram matrices that are summed here
    heads     attention whose queries and values have unequal widths: as it is, and with zeros in memory; and a last
              block that computes the class token alone
    scores    NViT's and Taylor's scores against a forward and backward pass of the same images

Models have random weights, which costs and speeds do not depend on. Whatever is compared runs in turns. Results go to
``benchmarks/results/gpu/NAME.json``, each with the card, the dtype, the batch and the versions. ``--rehearse`` runs all
of it on the CPU with a tiny model, to see that the script is right; it writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import tokens, training_speed
from benchmarks.subspaces import uniform
from prunesweep.models import Arch, arch_of, build, cost, cut
from prunesweep.models.fuse import for_inference
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.models.latency.timing import DTYPES, Setting, device_name, measure_all, time_calls
from prunesweep.models.layers.mixers import with_heads_as_they_are
from prunesweep.pruners import WidthMethod, get_method, pmvit
from prunesweep.pruners.subspaces import SourceStatistics, compress, instant
from prunesweep.training import Distill, Recipe

FOLDER = Path(__file__).parent / "results" / "gpu"
SHARES = (0.5, 0.3)
MODES = ("eager", "graph", "compiled")
SLOW = ("tokens", "mixers", "depth")  # kinds that are not compiled


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the measurements are."""

    device: str
    dtype: str
    models: tuple[str, ...]
    large: str  # the model that is computed and scored
    batches: tuple[int, ...]
    images: int  # to compute models from
    seconds: float  # of every timing, at least
    matmul: int  # rows of the matrix product that rates are compared with


GPU = Scale(
    "cuda",
    "bfloat16",
    ("deit_small_patch16_224", "deit_base_patch16_224"),
    "deit_base_patch16_224",
    (1, 64, 256),
    2048,
    0.2,
    8192,
)
REHEARSAL = Scale("cpu", "float32", ("deit_tiny_patch16_224",), "deit_tiny_patch16_224", (1,), 8, 0.0, 256)


def narrowed(arch: Arch, share: float) -> Arch:
    """The widest record of regular widths (multiples of 8 in heads, of 64 elsewhere) within a share of the MACs."""
    [stage], whole = arch.stages, cost(arch).macs
    for percent in range(100, 4, -1):
        factor = percent / 100
        blocks = tuple(
            dataclasses.replace(
                b, qk=_multiple(b.qk * factor, 8), v=_multiple(b.v * factor, 8), mlp=_multiple(b.mlp * factor, 64)
            )
            for b in stage.blocks
        )
        found = arch.with_stages(
            (dataclasses.replace(stage, width=_multiple(stage.width * factor, 64), blocks=blocks),)
        )
        if cost(found).macs <= share * whole:
            return found
    raise ValueError(f"{arch.source} cannot be narrowed to {share}")


def _multiple(width: float, of: int) -> int:
    return max(of, int(width) // of * of)


def shallower(arch: Arch, share: float) -> Arch:
    """The deepest record without its last blocks within a share of the MACs."""
    [stage], whole = arch.stages, cost(arch).macs
    for depth in range(arch.depth, 0, -1):
        found = arch.with_stages((dataclasses.replace(stage, blocks=stage.blocks[:depth]),))
        if cost(found).macs <= share * whole:
            return found
    raise ValueError(f"{arch.source} cannot be made so shallow")


def merged(arch: Arch, share: float) -> nn.Module:
    """A model whose tokens are merged, as late as its MACs allow."""
    source, whole = build(arch), cost(arch).macs
    scores = pmvit.score(source, [], importance="random")
    for percent in range(90, 4, -5):
        found = cut(source, pmvit.plan(arch, scores, percent / 100))
        if cost(arch_of(found)).macs <= share * whole:
            return found
    return found


def convolved(arch: Arch) -> Arch:
    """The record with 1x1 convolutions in place of the attention in all blocks but the last three."""
    [stage] = arch.stages
    blocks = [
        dataclasses.replace(b, mixer="conv1x1", heads=0, qk=0, v=_multiple(stage.width / 2, 8), scale=0.0)
        for b in stage.blocks[:-3]
    ]
    return arch.with_stages((dataclasses.replace(stage, blocks=(*blocks, *stage.blocks[-3:])),))


def contestants(arch: Arch) -> dict[str, nn.Module]:
    """Models by the axis and the share that they were made for."""
    found = {"dense": build(arch), "mixers": build(convolved(arch))}
    for share in SHARES:
        found[f"widths, {share}"] = build(narrowed(arch, share))
        found[f"depth, {share}"] = build(shallower(arch, share))
        found[f"tokens, {share}"] = merged(arch, share)
        found[f"all, {share}"] = merged(shallower(narrowed(arch, share**0.4), share**0.3), share**0.3)
    return found


def call_of(model: nn.Module, images: torch.Tensor, mode: str) -> Callable[[], object]:
    """A function without arguments that runs a model once, in inference mode, on the images' device."""
    own: Any = copy.deepcopy(model).to(images.device, images.dtype).eval()
    if mode == "compiled":
        own = torch.compile(own, dynamic=False)
    if mode != "graph":
        return lambda: own(images)
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            own(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        own(images)
    return lambda: (graph.replay(), own)  # what is captured lives as long as the graph


def matmul_rate(scale: Scale) -> float:
    """FLOP per second of a large matrix product."""
    a, b = (torch.randn(scale.matmul, scale.matmul, device=scale.device, dtype=DTYPES[scale.dtype]) for _ in range(2))
    setting = Setting(batch=1, device=scale.device, dtype=scale.dtype)
    [timing] = time_calls([lambda: a @ b], setting, min_seconds=scale.seconds)
    return 2 * scale.matmul**3 / (timing.median_ms / 1e3)


def modes(scale: Scale, name: str, batch: int) -> Sequence[str]:
    """Ways to run a model. Compiling takes half a minute each: one model at one batch has to do."""
    if scale.device != "cuda":
        return MODES[:1]
    return MODES if (name, batch) == (scale.models[0], scale.batches[-1]) else MODES[:2]


def speed(scale: Scale) -> dict[str, Any]:
    """Images per second of all contestants, in every mode."""
    peak, rows = matmul_rate(scale), []
    for name in scale.models:
        arch = arch_of(timm.create_model(name))
        models = contestants(arch)
        macs = {key: cost(arch_of(model)).macs for key, model in models.items()}
        for batch in scale.batches:
            images = torch.randn(batch, arch.in_chans, *arch.img_size, device=scale.device, dtype=DTYPES[scale.dtype])
            for mode in modes(scale, name, batch):
                some = {key: model for key, model in models.items() if mode != "compiled" or not key.startswith(SLOW)}
                setting = Setting(batch=batch, device=scale.device, dtype=scale.dtype, compiled=mode == "compiled")
                calls = [call_of(model, images, mode) for model in some.values()]
                timings = dict(zip(some, time_calls(calls, setting, min_seconds=scale.seconds), strict=True))
                for key, timing in timings.items():
                    faster, fewer = timings["dense"].median_ms / timing.median_ms, macs["dense"] / macs[key]
                    rows.append(
                        {
                            "model": name,
                            "what": key,
                            "batch": batch,
                            "mode": mode,
                            "share": 1 / fewer,
                            "images_per_s": timing.throughput,
                            "of_matmul": 2 * macs[key] * timing.throughput / peak,
                            "speedup": faster,
                            "speedup_over_fewer_macs": faster / fewer,
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
                del calls
                torch._dynamo.reset()
    return {"matmul_flops": peak, "rows": rows, "aim": "speedup_over_fewer_macs >= .9 at batch 256"}


def merging(scale: Scale) -> dict[str, Any]:
    """``benchmarks.tokens`` in the dtype of this script."""
    given = argparse.Namespace(model=scale.models[0], keep_rate=0.6, prune_rate=0.1)
    models = tokens.contestants(given)
    arch = arch_of(models["source"][0])
    x = torch.randn(scale.batches[-1], arch.in_chans, *arch.img_size, device=scale.device, dtype=DTYPES[scale.dtype])
    runs = {name: model.to(x.device, x.dtype) for name, (model, _) in models.items()}
    seconds = tokens.measure(runs, x, rounds=7 if scale.device == "cuda" else 1)
    whole, rows = models["source"][1], {}
    for name, (_, macs) in models.items():
        faster = statistics.median(a / b for a, b in zip(seconds["source"], seconds[name], strict=True))
        rows[name] = {"share": macs / whole, "speedup": faster, "speedup_over_fewer_macs": faster * macs / whole}
    return {"model": given.model, "batch": len(x), "rows": rows}


def training(scale: Scale) -> dict[str, Any]:
    """The loop against a bare one, and what a teacher costs, with images in memory."""
    shape, classes = ((3, 224, 224), 1000) if training_speed.ON_GPU else ((1, 8, 8), 10)
    data = (
        training_speed.Random(256 * 40, shape, classes) if training_speed.ON_GPU else training_speed.open_data("digits")
    )
    recipe, rounds = training_speed.RECIPE, 3 if training_speed.ON_GPU else 1
    kept = recipe.model_copy(update={"distill": (Distill(cache_teacher=True),)})
    taught = recipe.model_copy(update={"distill": (Distill(),)})
    teacher = training_speed.make()
    with tempfile.TemporaryDirectory() as folder:
        options = {"teacher": teacher, "teacher_cache": Path(folder) / "logits"}
        found = training_speed.in_turns(
            {
                "bare PyTorch": lambda: training_speed.bare(data, recipe),
                "fit": lambda: training_speed.ours(data, recipe),
                "fit, teacher": lambda: training_speed.ours(data, taught, **options),
                "fit, cached logits": lambda: training_speed.ours(data, kept, **options),
            },
            rounds,
        )
    return {"batch": recipe.batch_size, "compiled": recipe.compile, "rows": found, "aim": "fit >= .97 of bare PyTorch"}


def loader(scale: Scale) -> dict[str, Any]:
    """JPEGs through the loader alone; training on them cannot be faster."""
    recipe = Recipe(batch_size=64, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    with tempfile.TemporaryDirectory() as folder:
        data = training_speed.photographs(Path(folder), images=1024 if scale.device == "cuda" else 64)
        return {"images_per_s": training_speed.loader_alone(data, recipe)}


def compute(scale: Scale) -> dict[str, Any]:
    """Seconds and memory of computed models, and whether sums on this device are right."""
    torch.manual_seed(0)
    source = timm.create_model(scale.large).to(scale.device).eval()
    arch = arch_of(source)
    batches = list(torch.randn(scale.images, arch.in_chans, *arch.img_size).split(64))
    clock = training_speed.now
    start = clock()[0]
    known = SourceStatistics.collect(source, batches)
    shared, rows = clock()[0] - start, []
    for share in (0.5, 0.26, 0.1):
        start = clock()[0]
        small = compress(source, uniform(source, share), batches, statistics=known)
        rows.append({"share": cost(arch_of(small)).macs / cost(arch).macs, "s": clock()[0] - start})
        print(json.dumps(rows[-1]), flush=True)
    start = clock()[0]
    points = instant(source, batches, budgets=(0.5, 0.26), align=8)
    found = {"instant_s": clock()[0] - start, "instant_points": len(points), "shared_s": shared, "rows": rows}
    if scale.device == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    features = torch.randn(4096, 768) * torch.logspace(-2, 2, 768)
    exact = features.double().T @ features.double()
    on_device = features.to(scale.device)
    parts = sum((part.T @ part).double() for part in on_device.split(512))
    found["gram_error"] = float((parts.cpu() - exact).abs().max() / exact.abs().max())
    found["gram_error_tf32_allowed"] = torch.backends.cuda.matmul.allow_tf32
    return {"images": scale.images, "model": scale.large, "aim": "shared 60 s, a model 10 s", **found}


def scores(scale: Scale) -> dict[str, Any]:
    """Scores of widths against a forward and backward pass of the same images, in turns."""
    model = timm.create_model(scale.large).to(scale.device)
    arch, batch = arch_of(model), 32 if scale.device == "cuda" else 2
    x = torch.randn(batch, arch.in_chans, *arch.img_size, device=scale.device)
    y = torch.arange(batch, device=scale.device) % arch.num_classes
    batches = [(x, y)] * (8 if scale.device == "cuda" else 1)

    def plain() -> None:
        for images, labels in batches:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()

    ways: Mapping[str, Callable[[], object]] = {
        "forward and backward": plain,
        **{name: lambda name=name: get_method(name, WidthMethod).score(model, batches) for name in ("nvit", "taylor")},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(6 if scale.device == "cuda" else 2):
        for name, way in ways.items():
            start = training_speed.now()[0]
            way()
            if turn:
                seconds[name].append(training_speed.now()[0] - start)
    base = seconds["forward and backward"]
    rows = {
        name: {"s": statistics.median(own), "ratio": statistics.median(a / b for a, b in zip(own, base, strict=True))}
        for name, own in seconds.items()
    }
    return {"model": scale.large, "batch": batch, "dtype": "float32", "rows": rows, "aim": "ratio <= 1.05"}


def heads(scale: Scale) -> dict[str, Any]:
    """A model with heads of unequal widths as ``attend`` runs it, as they are, and for inference; ms a batch."""
    whole, rows = Arch.from_timm(scale.models[0]), list[dict[str, Any]]()
    (stage,) = whole.stages
    for qk, v in ((32, 64), (40, 24), (20, 12)):
        blocks = tuple(dataclasses.replace(block, qk=qk, v=v) for block in stage.blocks)
        model = build(dataclasses.replace(whole, stages=(dataclasses.replace(stage, blocks=blocks),)))
        last: Any = for_inference(model)
        last.arch = arch_of(model)
        for batch in scale.batches:
            setting = Setting(batch=batch, device=scale.device, dtype=scale.dtype)
            models = [model, with_heads_as_they_are(model), last]
            timed = measure_all(models, setting, min_seconds=scale.seconds)
            ways = dict(zip(("ms", "ms as they are", "ms for inference"), (t.median_ms for t in timed), strict=True))
            rows.append({"qk": qk, "v": v, "batch": batch, **ways})
    return {"model": scale.models[0], "rows": rows}


PARTS: Mapping[str, Callable[[Scale], dict[str, Any]]] = {
    "speed": speed,
    "compute": compute,
    "scores": scores,
    "heads": heads,
    "tokens": merging,
    "training": training,
    "loader": loader,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, and nothing is written")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False; --rehearse runs a tiny version on the CPU")
    unknown = set(given.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only {given.only}: parts are {', '.join(PARTS)}")
    scale = REHEARSAL if given.rehearse else GPU
    facts = {"device": device_name(scale.device), "dtype": scale.dtype, "versions": versions()}
    for name in given.only.split(","):
        began = time.perf_counter()
        found = {**facts, **PARTS[name](scale), "seconds": round(time.perf_counter() - began, 1)}
        print(name, json.dumps(found), flush=True)
        if not given.rehearse:
            FOLDER.mkdir(parents=True, exist_ok=True)
            write_text(FOLDER / f"{name}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
