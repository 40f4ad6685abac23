"""Is searching along all axes at once worth it? The joint space against each axis alone, at equal processor seconds.

    python -m benchmarks.joint [--seeds 3] [--candidates 48] [--trained 0] [--config FILE]

Searches run in this process, one unit after the other, so that processor seconds are theirs alone. Of each seed the
joint search goes first, with so many candidates; every other space gets the seconds that it took, or ends before where
it has no more candidates. With ``--trained 1`` candidates go on to the second rung of the configuration, and fronts are
those of trained models. Fronts are chosen by KL on the images that the search holds out, and measured on the validation
split.

On the digits the split is turned round: 593 images to train on, 1,204 to measure by.

Writes benchmarks/results/joint.json and docs/joint.svg, or joint_trained.*, or joint_NAME.* of another configuration.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from benchmarks.pictures import DOCS, plot
from benchmarks.record import begun, write_result
from prunesweep.models import load
from prunesweep.models.io.files import write_text
from prunesweep.models.precision import to_float32
from prunesweep.pruners import kl_divergence
from prunesweep.search.config import SearchConfig, load_config
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.cutting import Cutter
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.reopen import open_study
from prunesweep.search.execution.source import LoadedSource, prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.space.axes import AXES
from prunesweep.search.space.warm_start import met_points, start_points
from prunesweep.search.store import pareto
from prunesweep.search.store.front import Ranking
from prunesweep.search.store.run import Result, Run
from prunesweep.training import EVAL_BATCH
from prunesweep.training.data.digits import Digits
from prunesweep.training.data.registry import register
from prunesweep.training.metrics import Z95, wilson_interval

FOLDER = Path(__file__).parent
DIGITS, RESULT = FOLDER.parent / "examples" / "digits.toml", FOLDER / "results" / "joint.json"
# axes by what they change; an axis that a configuration's table leaves fixed stays fixed
PARTS: Mapping[str, tuple[str, ...]] = {
    "widths": ("budget", "mlp_weight", "embed_weight", "qk_weight", "depth_slope"),
    "blocks": ("skip",),
    "tokens": ("keep_rate", "merge_start"),
    "mixers": ("conv", "conv3"),
}
SPACES: Mapping[str, tuple[str, ...]] = {
    "joint": tuple(PARTS),
    **{part: (part,) for part in PARTS},
    **{f"without {part}": tuple(other for other in PARTS if other != part) for part in PARTS if part != "widths"},
}
WIDE = (  # the digits example with all that its axes can do, and a third of the candidates to start from
    "data.name=turned-digits",
    "source.train.epochs=28",  # as many updates as the example's
    "space.budget=[0.03, 1.0]",
    "space.budget_scale=log",
    "search.start_neutral=16",
    "search.recover_images=192",
    "space.skip=[0, 5]",
    "space.conv=[0, 6]",
    "space.conv3=[0, 6]",
    "space.keep_rate=[0.1, 1.0]",
    "space.embed_weight=[0.5, 2.0]",
    "space.qk_weight=[0.5, 2.0]",
    "space.depth_slope=[-1.0, 1.0]",
)
BUDGETS = (0.9, 0.7, 0.5, 0.35, 0.26, 0.18, 0.12, 0.08, 0.055, 0.036)
LEAST, WORST, BEST = 0.03, math.log(10), 1e-4  # share of MACs, and nats: the corners of the hypervolumes
Floats = NDArray[np.float64]


@register
class TurnedDigits(Digits):
    """The digits, two thirds of which are held out as ``val``."""

    kind = "turned-digits"
    HELD_OUT = 0.67


@dataclass(frozen=True)
class Member:
    """A member of a front: its share of the source's MACs, and every image's figures on the validation split."""

    macs: float
    kl: Floats  # (images,) in nats
    loss: Floats
    right: Floats
    arch: str
    point: Mapping[str, Any]

    def figures(self) -> dict[str, Any]:
        """What is kept of it: means, and the intervals of the KL and of the top-1."""
        images, top1 = len(self.kl), float(self.right.mean())
        low, high = wilson_interval(top1, images)
        return {
            "macs": self.macs,
            "kl": float(self.kl.mean()),
            "kl_error": float(self.kl.std() / math.sqrt(images)),
            "loss": float(self.loss.mean()),
            "top1": 100 * top1,
            "top1_low": 100 * low,
            "top1_high": 100 * high,
            "point": dict(self.point),
        }


def settings(config: SearchConfig, space: str, candidates: int, *, trained: bool) -> SearchConfig:
    """The configuration of a search along some axes, with all others at the values that leave the source as it is."""
    free = {axis for part in SPACES[space] for axis in PARTS[part]}
    fixed = {
        axis: (AXES[axis].neutral, AXES[axis].neutral)
        for axes in PARTS.values()
        for axis in axes
        if axis in AXES and axis not in free
    }
    fixed = {k: tuple(map(int, v)) if AXES[k].whole else v for k, v in fixed.items()}  # type: ignore[arg-type]
    search: dict[str, Any] = {"trials": candidates}
    if not trained:  # one would go on, once all are done
        search["reduction_factor"] = float(candidates)
    return config.model_copy(
        update={
            "name": space.replace(" ", "-"),
            "space": config.space.model_copy(update=fixed),
            "search": config.search.model_copy(update=search),
        }
    )


def searched(
    config: SearchConfig, kept: LoadedSource, run: Run, seconds: float | None, *, trained: bool
) -> tuple[Coordinator, float]:
    """Search in this process until all candidates are done, or the processor seconds are spent.

    Returns:
        The coordinator, and the processor seconds of proposals and units.
    """
    points = met_points(kept.space, start_points(config, kept.space))
    search = config.search.model_copy(update={"start": tuple(dict(point) for point in points)})
    config = create_run(run, config.model_copy(update={"search": search}), kept)
    begun = time.process_time()
    study = open_study(run, config, kept.space, run / "study.journal")
    coordinator = Coordinator(run, study, kept.space, search, max_concurrent=1, seed=config.seed)
    while seconds is None or time.process_time() - begun < seconds:
        unit = coordinator.next()
        if unit is None or (unit.rung and not trained):
            break
        found = run_task(run.path, unit)
        if found["state"] not in ("finished", "failed"):
            raise RuntimeError(f"{unit.id}: {found}")
        coordinator.complete(unit.id)
    return coordinator, time.process_time() - begun


def chosen(coordinator: Coordinator, *, trained: bool) -> list[Result]:
    """The front, by what candidates were compared by."""
    ranking: Ranking = coordinator.search.ranking
    return ranking.front(r for r in coordinator.current if r.rung == int(trained))


class Judge:
    """Measures members of fronts on the validation split, image by image."""

    def __init__(self, config: SearchConfig, kept: LoadedSource, cache: Path) -> None:
        self.cutter = Cutter(kept.model, kept.data, config, kept=cache / "scores")
        batches = list(kept.data.report.val_loader(EVAL_BATCH))
        self.images, self.labels = [x for x, _ in batches], torch.cat([y for _, y in batches])
        self.macs = kept.space.source_cost.macs
        self.source = self.logits(kept.model)

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> torch.Tensor:
        """Answers of a model, (images, K)."""
        return torch.cat([model(x) for x in self.images])

    def member(self, run: Run, result: Result) -> Member:
        """Measure the model of a result; one that was screened is computed again."""
        folder = run.model(result)
        decision = run.read_cut(result.trial)
        assert decision is not None
        model = to_float32(load(folder)) if folder.is_dir() else self.cutter.model(decision)
        return self.measured(model, result.macs / self.macs, result)

    def measured(self, model: nn.Module, macs: float, result: Result | None = None) -> Member:
        """Measure any model."""
        answers = self.logits(model)
        return Member(
            macs=macs,
            kl=kl_divergence(self.source, answers).double().numpy(),
            loss=F.cross_entropy(answers, self.labels, reduction="none").double().numpy(),
            right=(answers.argmax(1) == self.labels).double().numpy(),
            arch="" if result is None else result.arch_hash,
            point={} if result is None else result.point,
        )


def volumes(front: Sequence[Member]) -> dict[str, float]:
    """Hypervolumes of a front: shares of the square of log MACs and quality that it covers.

    MACs run from ``LEAST`` of the source's to all of them on a logarithmic scale, KL and loss from ``WORST``, that of
    answers at chance, to ``BEST`` on a logarithmic scale, top-1 from 10 to 100 %.
    """
    macs = np.array([math.log(m.macs / LEAST) / -math.log(LEAST) for m in front])
    nats = {name: np.array([float(getattr(m, name).mean()) for m in front]) for name in ("kl", "loss")}
    losses = {name: np.log(np.maximum(own, BEST) / BEST) / math.log(WORST / BEST) for name, own in nats.items()}
    losses["top1"] = (1 - np.array([float(m.right.mean()) for m in front])) / 0.9
    return {
        name: pareto.hypervolume(np.column_stack([np.maximum(macs, 0), own]), (1.0, 1.0))
        for name, own in losses.items()
    }


def outside(member: Member, front: Sequence[Member]) -> dict[str, bool]:
    """Whether a member is better than all of a front that cost no more, beyond the interval of the difference.

    Of KL and loss this is the 95 % interval of the mean difference by image; of top-1 the better one's Wilson interval.
    """
    rivals = [other for other in front if other.macs <= member.macs * 1.005]  # a budget is met within 0.5 %
    found = {}
    for name in ("kl", "loss"):
        gains = [getattr(other, name) - getattr(member, name) for other in rivals]
        found[name] = all(gain.mean() > Z95 * gain.std() / math.sqrt(len(gain)) for gain in gains)
    images = len(member.right)
    highest = max((wilson_interval(float(other.right.mean()), images)[1] for other in rivals), default=0.0)
    found["top1"] = bool(member.right.mean() > highest)
    return {name: bool(own) for name, own in found.items()}


def within(front: Sequence[Member], budget: float) -> float | None:
    """The KL of the best-chosen member within a budget: the one of most MACs."""
    own = [m for m in front if m.macs <= budget]
    return float(max(own, key=lambda m: m.macs).kl.mean()) if own else None


def of_seed(
    config: SearchConfig, cache: Path, candidates: int, *, trained: bool, spaces: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield fronts, hypervolumes and processor seconds of the searches on one source, with a space more each time."""
    found: dict[str, Any] = {}
    joint: list[Member] = []
    seconds: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for space in spaces:
            most = candidates if len(SPACES[space]) > 1 else 4 * candidates  # one axis may be done with them sooner
            own = settings(config, space, most, trained=trained)
            kept = prepare(own, cache, lambda *_: None)
            judge, run = Judge(own, kept, cache), Run(Path(folder) / own.name)
            coordinator, spent = searched(own, kept, run, seconds, trained=trained)
            front = [judge.member(run, result) for result in chosen(coordinator, trained=trained)]
            if seconds is None:
                seconds, joint = spent, front
            found[space] = {
                "seconds": spent,
                "candidates": len(coordinator.current),
                "hypervolume": volumes(front),
                "within": {str(budget): within(front, budget) for budget in BUDGETS},
                "front": [{**member.figures(), "outside": outside(member, joint)} for member in front],
            }
            print(
                config.seed, space, round(spent, 1), len(coordinator.current), found[space]["hypervolume"], flush=True
            )
            source = judge.measured(kept.model, 1.0).figures()
            yield {"seed": config.seed, "images": len(judge.labels), "source": source, "spaces": found}


def picture(seeds: Sequence[Mapping[str, Any]], *, trained: bool = False) -> str:
    """Draw the KL within every budget, the median over the sources, for the joint search and each axis alone."""
    series = dict[str, list[tuple[float, float]]]()
    for space in ("joint", *PARTS):
        for budget in BUDGETS:
            found = [seed["spaces"][space]["within"][str(budget)] for seed in seeds if space in seed["spaces"]]
            if found and None not in found:
                series.setdefault(space, []).append((budget, max(median(found), BEST)))
    how = "trained" if trained else "untrained"
    title = f"KL to the source, {how}, {seeds[0]['images']:,} images: all axes and each alone"
    return plot(title, "MACs / source", series, (0.03, 0.05, 0.1, 0.2, 0.5, 1))


def main() -> None:
    given = begun(
        __doc__,
        seeds=3,
        first=0,
        candidates=48,
        trained=0,
        config=str(DIGITS),
        cache=Path("runs/cache"),
        spaces=",".join(SPACES),
        out="",
    )
    digits = Path(given.config).resolve() == DIGITS.resolve()
    name = given.out or "joint" + ("" if digits else f"_{Path(given.config).stem}") + (
        "_trained" if given.trained else ""
    )
    changes = WIDE if digits else ()
    path = RESULT.with_name(f"{name}.json")
    for seed in range(given.first, given.first + given.seeds):
        config = load_config(given.config, [*changes, f"seed={seed}"])
        spaces = given.spaces.split(",")
        for row in of_seed(config, given.cache, given.candidates, trained=bool(given.trained), spaces=spaces):
            kept = json.loads(path.read_text())["seeds"] if path.is_file() else []
            rows = [row, *(other for other in kept if other["seed"] != seed)]
            rows.sort(key=lambda own: own["seed"])
            write_result(path, candidates=given.candidates, seeds=rows)
            write_text(DOCS / f"{name}.svg", picture(rows, trained=bool(given.trained)))


if __name__ == "__main__":
    main()
