"""What narrowing one space of one block costs, for all spaces, blocks and levels, from one pass of images.

Every space is narrowed alone, all other widths whole, and the layer behind it refitted. What that changes of the
residual stream is weighed by the gradients of ``pruners.subspaces.sensitivity``, so nothing is run behind the block.
With C the covariance of what the layer reads, W its weight, and P what takes C's space to r of its dimensions:

    values      P = ranks of ``value_map``, the fit follows from P C P' and P C alone
    units       P chooses the first r of ``unit_order``, likewise
    queries     attention is run again at rank r, and its covariance with the whole one taken
    reduced map the attention is computed as ``compress`` does it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from prunesweep.models import Arch, BlockView
from prunesweep.models.arch import Stage
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView, MlpView

from .batches import Batches
from .compression import Compression, folded
from .maps import best_pairs, query_key_maps, value_map
from .refit import SHRINKAGE, Streams, has_norm
from .sensitivity import Sensitivity
from .source import SourceStatistics, open_source, to_model
from .streams import SourceStreams, steps
from .units import moments, unit_order
from .widths import BlockWidths, Widths, can_narrow

__all__ = ["SPACES", "BlockLosses", "Choice", "measure_losses"]

SHARES = (0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625)  # tried, below the whole
SPACES = ("qk", "v", "sr", "mlp")
ROWS = 20  # token rows per feature that a fit reads, at most
Choice = tuple[int, str]  # block and space


@dataclass(frozen=True, eq=False)
class BlockLosses:
    """What narrowing costs.

    Args:
        losses: estimated squared change of an image's logits by block and space, then by width; 0 at the full width.
        units: order of the hidden units by block, the most important first.
    """

    losses: Mapping[Choice, Mapping[int, float]]
    units: Mapping[int, torch.Tensor] = field(default_factory=dict)


def levels(full: int, align: int) -> list[int]:
    """List widths to try for a space, the full one first, all others multiples of ``align``."""
    rounded = {max(align, round(full * share / align) * align) for share in SHARES}
    return [full, *sorted((width for width in rounded if width < full), reverse=True)]


@torch.no_grad()
def measure_losses(
    model: nn.Module,
    fit: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    statistics: SourceStatistics,
    *,
    align: int = 1,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> BlockLosses:
    """Estimate what narrowing one space of one block costs, for all of them.

    Args:
        model: the source, in evaluation mode.
        fit: batches of images (B, C, rows, columns) or texts (B, T) for the fits.
        held_out: batches that the losses are estimated on, as many as memory allows.
        statistics: of the source.
        align: widths are multiples of it.
        shrinkage: lambda of the fits.
        progress: told of halves of blocks done and of all.
    """
    return _Losses(folded(model), open_source(model), fit, held_out, statistics, align, shrinkage).run(progress)


class _Losses:
    """The streams of a folded source in front of the present block, of fitted batches and of held-out ones."""

    def __init__(
        self,
        model: nn.Module,
        arch: Arch,
        fit: Sequence[torch.Tensor],
        held_out: Sequence[torch.Tensor],
        statistics: SourceStatistics,
        align: int,
        shrinkage: float,
    ) -> None:
        self.model, self.arch, self.statistics = model, arch, statistics
        self.align, self.shrinkage = align, shrinkage
        self.family, self.fitted = family_of(arch), len(fit)
        self.sensitivity = Sensitivity(model, held_out)
        batches = chain(fit, self.sensitivity.batches)
        self.x = Batches(self.family.stem(model, to_model(model, batch)) for batch in batches)
        self.losses: dict[Choice, dict[int, float]] = {}
        self.units: dict[int, torch.Tensor] = {}

    def run(self, progress: Callable[[int, int], None] | None) -> BlockLosses:
        walk = list(steps(self.model, self.arch))
        for done, step in enumerate(walk):
            stage = self.arch.stages[step.stage]
            if step.view is not None and step.attention is not None:
                self._attention(step.view, step.attention, stage)
            if step.view is not None and step.mlp is not None:
                self._mlp(step.view.index, step.mlp, stage.grid[0])
            self.x = Batches(map(step.run, self.x))
            if progress:
                progress(done + 1, len(walk))
        return BlockLosses(self.losses, self.units)

    def _attention(self, view: BlockView, attention: AttentionView, stage: Stage) -> None:
        i, record = view.index, view.record
        weight = attention.out.weight.double()
        whole = Batches(attention.mixed(x, stage.grid) for x in self._held())
        if isinstance(record.v, int) and can_narrow(self.arch, f"blocks.{i}.v"):
            # in float64: the map divides by the root of the covariance, down to a cut-off that float32 does not reach
            covariance, mean = moments(
                (attention.mixed(x, stage.grid).double() for x in self._rows(record.total_v)),
                centred=attention.out.bias is not None,
            )
            reached = covariance @ weight.T  # (V, D)
            own = self._choice(i, "v", record.v)
            for rank in levels(record.v, self.align)[1:]:
                down, columns = self._values(record.heads, record.v, covariance, weight, rank)
                fitted = self._refitted(columns, down @ covariance @ down.T, (down @ reached).T)
                change = fitted @ down - weight
                own[rank] = self._loss(i, attention, whole, (_apply(change, one, mean) for one in whole))
        if can_narrow(self.arch, f"blocks.{i}.q"):
            self._queries(view, attention, stage, whole)
        if record.sr:
            own = self._choice(i, "sr", record.sr)
            middle = Batches(x + attention.out(one) for x, one in zip(self._held(), whole, strict=True))
            for width in levels(record.sr, self.align)[1:]:
                own[width] = self._loss(i, attention, whole, self._reduced(view, stage, width, middle))

    def _queries(self, view: BlockView, attention: AttentionView, stage: Stage, whole: Streams) -> None:
        i, record, weight = view.index, view.record, attention.out.weight.double()
        queries, keys = self.statistics.heads[i].to(weight.device)
        fit = sum(1 for _ in self._rows(record.total_v))  # batches
        x = self.x[:fit] + self._held()
        q, k, v = Batches(), Batches(), Batches()
        for one in x:
            for kept, part in zip((q, k, v), attention.projected(one, stage.grid), strict=True):
                kept.append(part)
        full = Batches(attention.attended(q[n], k[n], v[n], x[n]) for n in range(fit))
        own = self._choice(i, "qk", record.qk)
        for rank in levels(record.qk, self.align)[1:]:
            q_map, k_map = self._query_maps(queries, keys, rank)

            def narrow(n: int, q_map: torch.Tensor = q_map, k_map: torch.Tensor = k_map) -> torch.Tensor:
                return attention.attended(q[n] @ q_map.to(q[n]), k[n] @ k_map.to(k[n]), v[n], x[n])

            both = (torch.cat([narrow(n), full[n]], -1) for n in range(fit))
            joint, mean = moments(both, centred=attention.out.bias is not None)
            V = record.total_v
            fitted = self._refitted(weight, joint[:V, :V], weight @ joint[V:, :V])
            change = torch.cat([fitted, -weight], 1)
            held = (torch.cat([narrow(fit + n), one], -1) for n, one in enumerate(whole))
            own[rank] = self._loss(i, attention, whole, (_apply(change, one, mean) for one in held))

    def _query_maps(self, queries: torch.Tensor, keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the matrices that rows of all heads' queries and keys are multiplied by.

        Where units are pairs, they are all there, and those that go are zero.
        """
        heads = range(len(queries))
        if self.arch.qk_rows == 1:
            maps = [query_key_maps(queries[h], keys[h], rank) for h in heads]
            q_map, k_map = (torch.block_diag(*own_maps) for own_maps in zip(*maps, strict=True))  # type: ignore[no-untyped-call]
            return q_map.T, k_map.T
        kept = queries.new_zeros(len(queries), queries.shape[1] // 2)
        for h in heads:
            kept[h, best_pairs(queries[h], keys[h], rank, turned=self.arch.rope is not None)] = 1
        mask = torch.diag(kept.flatten().repeat(2))
        return mask, mask

    def _mlp(self, i: int, mlp: MlpView, rows: int) -> None:
        weight = mlp.out.weight.double()
        units = weight.shape[1]
        rows_of_units = (mlp.hidden(mlp.norm(x), rows) for x in self._rows(units))
        covariance, mean = moments(rows_of_units, centred=mlp.out.bias is not None)
        self.units[i] = order = unit_order(covariance, weight)
        hidden = Batches(mlp.hidden(mlp.norm(x), rows) for x in self._held())
        own = self._choice(i, "mlp", units)
        for width in levels(units, self.align)[1:]:
            kept = order[:width]
            fitted = self._refitted(weight[:, kept], covariance[kept][:, kept], weight @ covariance[:, kept])
            change = -weight
            change[:, kept] += fitted
            own[width] = self._loss(i, mlp, hidden, (_apply(change, one, mean) for one in hidden))

    def _reduced(self, view: BlockView, stage: Stage, width: int, middle: Streams) -> Iterator[torch.Tensor]:
        """Compute what a narrower reduced map changes of the held-out streams."""
        blocks = [BlockWidths(sr=width) if n == view.index else BlockWidths() for n in range(self.arch.depth)]
        widths = Widths(blocks=tuple(blocks))
        streams = SourceStreams(self.model, Batches())  # none is asked for
        work = Compression(self.model, widths, self.statistics, streams, shrinkage=self.shrinkage, fitted=self.fitted)
        small, whole = work.small_views[view.index].attention, view.attention
        assert small is not None
        assert whole is not None
        target = Batches(whole.after(x, stage.grid) for x in self.x)
        found = work.attention(stage, small, view, self.x, self.x, target)[self.fitted :]
        return (z - one for z, one in zip(found, middle, strict=True))

    def _values(
        self, heads: int, full: int, covariance: torch.Tensor, weight: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the map of all heads' values to their ranks, and the output projection's columns for them."""
        own = [slice(h * full, (h + 1) * full) for h in range(heads)]
        maps = [value_map(covariance[part, part], weight[:, part], rank) for part in own]
        down = torch.block_diag(*(one for one, _ in maps))  # type: ignore[no-untyped-call]
        return down, torch.cat([columns for _, columns in maps], 1)

    def _refitted(self, start: torch.Tensor, covariance: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        """Fit a layer by ridge, shrunk towards what it is.

        Args:
            start: its weight (D, F).
            covariance: of what it reads, (F, F).
            reached: covariance of the target with what it reads, (D, F).
        """
        lam = (self.shrinkage * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        ridge = covariance.clone()
        ridge.diagonal().add_(lam)
        residual = reached - start @ covariance
        factor, failed = torch.linalg.cholesky_ex(ridge)
        if not failed:
            return start + torch.cholesky_solve(residual.T, factor).T
        values, vectors = torch.linalg.eigh(covariance)  # rounding of products in float32 left it indefinite
        return start + residual @ vectors / (values.clamp_min(0) + lam) @ vectors.T

    def _choice(self, i: int, space: str, full: int) -> dict[int, float]:
        return self.losses.setdefault((i, space), {full: 0.0})

    def _loss(self, i: int, half: AttentionView | MlpView, features: Streams, changes: Iterable[torch.Tensor]) -> float:
        """Measure changes of what a half's last layer gives on held-out ``features``; a norm may stand behind it."""
        if has_norm(half.scale):
            changes = self._behind(half, features, changes)
        return self.sensitivity.loss(i, "mlp" if isinstance(half, MlpView) else "attention", changes)

    def _behind(
        self, half: AttentionView | MlpView, features: Streams, changes: Iterable[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        for one, change in zip(features, changes, strict=True):
            given = half.out(one)
            yield half.scale(given + change) - half.scale(given)

    def _held(self) -> Batches:
        return self.x[self.fitted :]

    def _rows(self, features: int) -> Iterator[torch.Tensor]:
        """Give the first batches of the fit, as many as a fit of so many features needs."""
        rows = 0
        for x in self.x[: self.fitted]:
            if rows >= ROWS * features:
                return
            yield x
            rows += x[..., 0].numel()


def _apply(change: torch.Tensor, features: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute what a change (D, F) of a layer's weight does to its output on features (..., F), the bias refitted."""
    return (features - mean.to(features)) @ change.T.to(features)
