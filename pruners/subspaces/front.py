"""A front of computed models: for every budget, the residual width and the shares of all blocks that change least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunesweep.models import UserError, arch_of
from prunesweep.models.precision import narrowed, widened
from prunesweep.pruners.divergence import feature_quality, kl_divergence
from prunesweep.pruners.measures import MACS, PARAMS, Measure
from prunesweep.pruners.protection import Protection
from prunesweep.pruners.reached import suggestion

from .allocation import allocate
from .batches import Batches
from .block_losses import measure_losses
from .calibration import check_features, check_source, hold_out, images_of, shrinkage_for
from .compression import compress_all
from .refit import SHRINKAGE
from .sensitivity import output_error
from .source import SourceStatistics, to_model
from .streams import SourceStreams, scouted
from .widths import Widths, compressed_arch, equal_shares

__all__ = ["OBJECTIVES", "Point", "instant"]

OBJECTIVES: Mapping[str, Measure] = {measure.name: measure for measure in (MACS, PARAMS)}
BUDGETS = (0.9, 0.7, 0.5, 0.3, 0.15)
STREAM = (1.0, 0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.333, 0.25, 0.1875, 0.125)  # residual widths that are tried
HELD_OUT = 0.25  # of the images: chosen by, not fitted to
TRIES = 4  # models that are usually compared for a budget: three residual widths and equal shares


@dataclass(frozen=True, eq=False)
class Point:
    """One computed model.

    Args:
        budget: share of the source's cost that was asked for.
        share: share of it that the model has.
        images: how many were held out, on which these were measured, before the last fit, which reads them too:
        kl, agreement: to the source, mean KL divergence, and per cent of equal answers.
        cosine, relative_error: of a backbone without a head, ``pruners.FeatureQuality`` of its features, in place of
            these.
    """

    budget: float
    share: float
    model: nn.Module
    widths: Widths
    images: int
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    relative_error: float | None = None


def instant(
    model: nn.Module,
    batches: Iterable[Any],
    budgets: Sequence[float] = BUDGETS,
    *,
    objective: str | Measure = "macs",
    align: int = 1,
    protect: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Point]:
    """Compute a front of smaller models from unlabelled images, without training.

    A quarter of the images is held out: shares of blocks and the residual width are chosen by the squared error of the
    logits, or features, on them. The model that is chosen is then fitted to all images.

    Args:
        model: the source, from timm or of ours.
        batches: images (B, C, rows, columns) or texts (B, T): one tensor, or a list or loader of tensors or of pairs of
            these and labels, which are not read, or of dicts (``calibration.KEYS``); 256 images or more, without
            augmentation.
        budgets: shares of the source's cost, each above 0 and at most 1.
        objective: ``macs``, ``params``, or a measure such as ``pruners.latency(table, arch_of(model))``, predicted
            milliseconds per batch.
        align: widths are multiples of it; 8 suits GPUs.
        protect: what keeps its widths: ``blocks=0,11``, ``mlp=0,1``, ``qk``, ``v`` or ``embed`` (the residual streams).
        progress: told what goes on, how much of it is done, and of how much.

    Returns:
        One point per budget that can be met, the largest first.

    Raises:
        UserError: a budget or the objective is none, the source cannot be projected, an image is not one of its, or an
            activation is not finite.
    """
    measure = objective if isinstance(objective, Measure) else OBJECTIVES.get(objective)
    if measure is None:
        raise UserError(f"objective {objective!r}: must be one of {', '.join(OBJECTIVES)}, or a measure of latency")
    for budget in budgets:
        if not 0 < budget <= 1:
            meant = suggestion(budget)
            hint = f"; {meant} Divide it by the {measure.name} of the source" if meant else ""
            raise UserError(f"budget {budget:g}: must be a share of the source's {measure.name}, in (0, 1]{hint}")
    protected = Protection.parse(protect)
    protected.check(arch_of(model))
    fit, held_out = hold_out(images_of(batches, arch_of(model)), HELD_OUT)
    if sum(fit.lengths) < 2:
        raise UserError("2 calibration images: give at least 3, of which one is held out; better 256 or more")
    mode = model.training
    model.eval()
    try:
        front = _Front(widened(model), fit, held_out, measure, align, protected, progress or (lambda *_: None))
        points = front.points(budgets)
        for point in points:
            narrowed(point.model, model)
        return points
    finally:
        model.train(mode)


@dataclass(frozen=True, eq=False)
class _Scout:
    """Widths, and how a model of them, fitted to some of the images, does on those held out."""

    widths: Widths
    error: float
    figures: Mapping[str, float]  # as in ``Point``


class _Front:
    """The state that all budgets share."""

    def __init__(
        self,
        model: nn.Module,
        fit: Batches,
        held_out: Batches,
        objective: Measure,
        align: int,
        protected: Protection,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.protected = protected
        self.model, self.fit, self.held_out, self.align, self.progress = model, fit, held_out, align, progress
        self.arch, self.objective = arch_of(model), objective
        self.whole = self.objective(self.arch)
        self.statistics = SourceStatistics.collect(
            model, fit, progress=lambda done, total: progress("reading the source", done, total)
        )
        self.wanted = self._outputs(model)
        if self.arch.text is None:
            (check_features if self.arch.headless else check_source)(self.wanted, self.arch.source)
        self.shrinkage = shrinkage_for(self.arch, fit, SHRINKAGE)
        self.losses = measure_losses(
            model,
            fit,
            held_out,
            self.statistics,
            align=align,
            shrinkage=self.shrinkage,
            progress=lambda done, total: progress("narrowing block by block", done, total),
        )
        kept = {c: own for c, own in self.losses.losses.items() if not protected.keeps(f"blocks.{c[0]}.{c[1]}")}
        self.losses = dataclasses.replace(self.losses, losses=kept)
        self.scouted = scouted(model, fit, self.statistics)
        full = tuple(stage.width for stage in self.arch.stages)
        rounded = [tuple(min(width, round(width * share / align) * align) for width in full) for share in STREAM]
        rounded = rounded[:0] if "embed" in protected.spaces else rounded
        narrower = {widths for widths in rounded if min(widths) >= 2}
        self.streams = sorted({full, *narrower}, reverse=True)  # residual widths of all stages

    def points(self, budgets: Sequence[float]) -> list[Point]:
        chosen: list[tuple[float, _Scout]] = []
        begin, met = 0, 1.0  # the residual width that was chosen last, and for what budget
        self.planned = (TRIES + 1) * len(budgets)
        for number, budget in enumerate(sorted(budgets, reverse=True)):
            self.done, self.due = TRIES * number, TRIES * (number + 1)
            at, scouts = self._downhill(budget * self.whole, self._smaller(begin, budget / met))
            if scouts:
                begin, met = at, budget
                chosen.append((budget, min(scouts, key=lambda one: one.error)))
            self._report(self.due)
        models = self._compressed([scout.widths for _, scout in chosen], self.fit + self.held_out, self._report_last)
        self._report(self.planned)
        return [self._point(*own, small) for own, small in zip(chosen, models, strict=True)]

    def _smaller(self, stream: int, ratio: float) -> int:
        """Find the residual width that suits a model of a smaller cost: most of it is products of two widths."""
        sizes = [sum(widths) for widths in self.streams]
        wanted = sizes[stream] * math.sqrt(ratio)
        return min(range(len(sizes)), key=lambda n: abs(sizes[n] - wanted))

    def _downhill(self, limit: float, at: int) -> tuple[int, list[_Scout]]:
        """Find the residual width of the least error, going on from one; return it with the models that were tried."""
        tried: dict[int, _Scout | None] = {}
        # sums of one-block losses rank well but are no measurement: equal shares are the baseline to beat
        even, equal = self._even(limit), list[_Scout]()
        while True:
            near = [n for n in (at, at - 1, at + 1) if 0 <= n < len(self.streams) and n not in tried]
            found = {
                n: allocate(self.arch, self.streams[n], self.losses, limit, objective=self.objective, align=self.align)
                for n in near
            }
            tried |= dict.fromkeys(near)
            alive = {n: widths for n, widths in found.items() if widths is not None}
            scouts = self._scouts([*alive.values(), *even])
            tried |= dict(zip(alive, scouts, strict=False))
            equal, even = equal + scouts[len(alive) :], []
            best = min((n for n in tried if tried[n]), key=lambda n: tried[n].error, default=None)  # type: ignore[union-attr]
            if best is not None and best != at:
                at = best
            elif best is None and at + 1 < len(self.streams):  # too wide for this budget
                at += 1
            else:
                return at, [*(one for one in tried.values() if one is not None), *equal]

    def _even(self, limit: float) -> list[Widths]:
        """Find the largest equal shares of all widths within a limit; none where there are none."""
        for step in range(256, 0, -1):
            widths = self._protected(equal_shares(self.arch, step / 256, self.align))
            if self.objective(compressed_arch(self.arch, widths)) <= limit:
                return [widths]
        return []

    def _protected(self, widths: Widths) -> Widths:
        """Set whole again what is protected."""
        blocks = []
        for i, own in enumerate(widths.blocks):
            whole: dict[str, Any] = {
                s: None for s in ("qk", "v", "mlp", "sr") if self.protected.keeps(f"blocks.{i}.{s}")
            }
            blocks.append(dataclasses.replace(own, **whole))
        embed = self.streams[0] if "embed" in self.protected.spaces else widths.embed
        return dataclasses.replace(widths, embed=embed, blocks=tuple(blocks))

    def _scouts(self, widths: Sequence[Widths]) -> list[_Scout]:
        models = self._compressed(widths, self.scouted)
        self._report(min(self.done + len(models), self.due - 1))  # some budgets need more than others
        return [self._scout(*own) for own in zip(widths, models, strict=True)]

    def _scout(self, widths: Widths, small: nn.Module) -> _Scout:
        got = self._outputs(small)
        error = output_error(self.arch, self.wanted, got)
        if self.arch.headless:
            figures: Mapping[str, float] = feature_quality(self.wanted, got)._asdict()
            return _Scout(widths, error, figures)
        same = self.wanted.argmax(-1) == got.argmax(-1)
        divergence = kl_divergence(self.wanted, got).mean().item()
        figures = {"kl": divergence, "agreement": 100 * same.double().mean().item()}
        return _Scout(widths, error, figures)

    def _point(self, budget: float, chosen: _Scout, small: nn.Module) -> Point:
        return Point(
            budget=budget,
            share=self.objective(arch_of(small)) / self.whole,
            model=small,
            widths=chosen.widths,
            images=len(self.wanted),
            **chosen.figures,
        )

    def _compressed(
        self,
        widths: Sequence[Widths],
        batches: Batches | SourceStreams,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[nn.Module]:
        return compress_all(
            self.model,
            widths,
            batches,
            statistics=self.statistics,
            units=self.losses.units,
            shrinkage=self.shrinkage,
            progress=progress,
        )

    def _report(self, done: int) -> None:
        self.done = done
        self.progress("computing models", done, self.planned)

    def _report_last(self, done: int, due: int) -> None:
        """Tell of the models that are fitted to all images."""
        left = self.planned - self.due
        self._report(self.due + min(left * done // due, left - 1))

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(to_model(model, images)) for images in self.held_out])
