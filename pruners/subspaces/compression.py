"""Compression in closed form: project every linear space onto its best subspace, then refit readers and writers.

The small model begins as the projection of the source (T the map of a stage's stream, g and beta the source's norm,
LayerScale folded into the writers) and is refitted by ``pruners.subspaces.refit``, block after block:

    reader behind a norm    W diag(g) T sqrt(D/k)
    writer                  T' W
    q, k, v                 fitted at full width, then mapped to their ranks
    output projection       its best rank-r columns

LayerNorm stays as it is: its gain becomes 1, and its bias goes into the readers. Of a stream that cannot be projected,
channels are chosen: those of the most energy that is read.

Source: the closed forms of ``pruners.subspaces.maps`` and ``normal_equations``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import Arch, BlockView, arch_of, block_views
from prunesweep.models.arch import Block, Stage
from prunesweep.models.builder import build_with, preprocessing_of
from prunesweep.models.cutting import gather, replaced
from prunesweep.models.families import family_of
from prunesweep.models.families.base import tensor_shapes
from prunesweep.models.families.views import AttentionView, MlpView, Reader
from prunesweep.models.feature_head import with_feature_head
from prunesweep.models.precision import narrowed, widened
from prunesweep.models.reduction import Choose, Project, Reduction, reduce_tensor

from .calibration import shrinkage_for
from .maps import best_pairs, query_key_maps, residual_map, value_map
from .normal_equations import Moments
from .refit import SHRINKAGE, Refit, Streams, alone, fold_scale, has_bias, rows_of, run_together, solve_shift
from .source import SourceStatistics, open_source
from .streams import LayerOutputs, SourceStreams
from .widths import Widths, can_project, compressed_arch, narrow_block

__all__ = ["Compression", "compress", "compress_all", "folded"]


@torch.no_grad()
def compress(
    model: nn.Module,
    widths: Widths,
    batches: Iterable[Any] | SourceStreams,
    *,
    statistics: SourceStatistics | None = None,
    units: Mapping[int, torch.Tensor] | None = None,
    refit: bool = True,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Compute a smaller model from a source and unlabelled images. Nothing is trained, no label is used.

    Args:
        model: the source, for which ``can_recover`` has no reason; it is not changed. Its dtype is that of features and
            result; features of a model in half precision are in float32.
        widths: of the small model.
        batches: calibration images or texts in any form that ``images_of`` takes, from the training split and without
            augmentation, or the source's streams on them; at least about 20 tokens per feature, 512 images of 17 tokens
            for a width of 96.
        statistics: of the same source, where they are there already; collected from ``batches`` otherwise.
        units: order of the hidden units by block, the most important first, as ``rank_units`` gives it; by energy
            (variance times squared weights that read them) where there is none.
        refit: fit readers and writers; without it the model is what the projections alone give.
        shrinkage: lambda of the fits, in units of the features' mean variance; raised, with a warning, where images
            are too few.
        progress: told of kept blocks done and of all.

    Returns:
        An ordinary model of the same family, in evaluation mode, of the record ``compressed_arch(arch, widths)``.

    Raises:
        UserError: the widths do not fit, the source cannot be projected, an image is not one of its, or an activation
            is not finite.
    """
    (small,) = compress_all(
        model,
        [widths],
        batches,
        statistics=statistics,
        units=units,
        refit=refit,
        shrinkage=shrinkage,
        progress=progress,
    )
    return small


@torch.no_grad()
def compress_all(
    model: nn.Module,
    widths: Sequence[Widths],
    batches: Iterable[Any] | SourceStreams,
    *,
    statistics: SourceStatistics | None = None,
    units: Mapping[int, torch.Tensor] | None = None,
    refit: bool = True,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> list[nn.Module]:
    """Compute several smaller models of one source side by side: what they need of it is computed once for all.

    Args:
        model: as for ``compress``.
        widths: of every small model.
        batches, statistics, units, refit, shrinkage: as for ``compress``.
        progress: told of kept blocks done and of all, those of all models.

    Returns:
        For each of the widths what ``compress`` returns.

    Raises:
        UserError: as ``compress``.
    """
    arch = open_source(model)
    small = [compressed_arch(arch, own) for own in widths]
    if not small:
        return []
    given, model = model, widened(model)
    sources = {
        mapped: folded(with_feature_head(model) if mapped else model) for mapped in {own.feature_head for own in small}
    }
    streams = SourceStreams.of(batches, sources[small[0].feature_head])
    found = SourceStatistics.collect(model, streams.inputs) if statistics is None else statistics
    outputs = LayerOutputs() if len(widths) > 1 else None
    works = [
        Compression(
            sources[record.feature_head],
            own,
            found,
            streams,
            units=units,
            refit=refit,
            shrinkage=shrinkage_for(record, streams.inputs, shrinkage) if refit else shrinkage,
            outputs=outputs,
        )
        for own, record in zip(widths, small, strict=True)
    ]
    run_together(works, [[i for i, block in enumerate(own.blocks) if block.keep] for own in widths], progress)
    return [narrowed(work.small, given) for work in works]


class Compression(Refit):
    """A refit of a model that begins as the projection of its source.

    Args:
        model: the source as ``folded`` returns it, in evaluation mode.
        widths: of the small model.
        statistics: of the source.
        units: as for ``compress``.
        streams, refit, shrinkage, fitted, outputs: as for ``Refit``.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Widths,
        statistics: SourceStatistics,
        streams: SourceStreams,
        *,
        units: Mapping[int, torch.Tensor] | None = None,
        refit: bool = True,
        shrinkage: float = SHRINKAGE,
        fitted: int | None = None,
        outputs: LayerOutputs | None = None,
    ) -> None:
        arch, self.statistics, self.units = arch_of(model), statistics, units or {}
        self.source_arch = arch
        narrow = compressed_arch(arch, widths)
        device = next(model.parameters()).device
        self.embed: dict[str, Reduction] = {}
        self.gains: dict[int, float] = {}  # of projected streams
        for s, (stage, own) in enumerate(zip(arch.stages, narrow.stages, strict=True)):
            space = f"stages.{s}.embed"
            if own.width < stage.width and can_project(arch, space):
                self.embed[space] = Project(residual_map(statistics.directions(s)[1].to(device), own.width))
                self.gains[s] = (stage.width / own.width) ** 0.5
            elif own.width < stage.width:
                energy = statistics.streams[s].diagonal().to(device) * _read_energy(model, arch, space)
                self.embed[space] = _best(energy, own.width)
        records = {i: narrow_block(arch, i, own) for i, own in enumerate(widths.blocks) if own.keep}
        weights = {name: t.double() if t.is_floating_point() else t for name, t in model.state_dict().items()}
        reductions = self._reductions(model, records)
        kept = gather(arch, [own.keep for own in widths.blocks], reductions, weights)
        changes = [(records[i], own.mixer, own.tokens) if own.keep else None for i, own in enumerate(widths.blocks)]
        small = self._built(narrow, replaced(arch, changes, kept), model)
        super().__init__(
            model, small, reductions, streams, refit=refit, shrinkage=shrinkage, fitted=fitted, outputs=outputs
        )
        self._project_readers(list(records))

    def _reductions(self, model: nn.Module, records: Mapping[int, Block]) -> dict[str, Reduction]:
        """Reduce spaces to their widths: streams by projection, MLP units by energy, ranks by the first channels."""
        arch, reductions = arch_of(model), dict(self.embed)
        views = block_views(model, arch)
        for i, record in records.items():
            source, mlp = arch.blocks[i], views[i].mlp
            if record.mixer == "attn" and (record.qk, record.v) != (source.qk, source.v):  # weights are fitted later
                heads = range(source.heads)
                qk = Choose(
                    self._kept_pairs(i, record.qk) or [h * source.qk + j for h in heads for j in range(record.qk)]
                )
                begins = accumulate((0, *source.v_widths[:-1]))
                v = Choose([b + j for b, width in zip(begins, record.v_widths, strict=True) for j in range(width)])
                reductions |= {f"blocks.{i}.q": qk, f"blocks.{i}.k": qk, f"blocks.{i}.v": v}
            if mlp is not None and 0 < record.mlp < source.mlp:
                reductions[f"blocks.{i}.mlp"] = self._kept_units(i, mlp, views[i].stage, record.mlp)
            if 0 < record.sr < source.sr:
                reductions[f"blocks.{i}.sr"] = _best(_read_energy(model, arch, f"blocks.{i}.sr"), record.sr)
        return reductions

    def _kept_pairs(self, i: int, count: int) -> list[int]:
        """Choose the pairs of channels that stay of every head, where a unit is one."""
        full = self.source_arch.blocks[i]
        if self.source_arch.qk_rows == 1 or count == full.qk:
            return []
        queries, keys = self.statistics.heads[i]
        turned = self.source_arch.rope is not None
        best = (best_pairs(queries[h], keys[h], count, turned=turned).tolist() for h in range(full.heads))
        return [h * full.qk + pair for h, own in enumerate(best) for pair in own]

    def _kept_units(self, i: int, mlp: MlpView, s: int, count: int) -> Choose:
        if i in self.units:
            return Choose(self.units[i][:count].sort().values.tolist())
        out = self._written(mlp.out.weight.double(), s)
        return _best(self.statistics.unit_variance(i).to(out.device) * out.square().sum(0), count)

    def _written(self, weight: torch.Tensor, s: int) -> torch.Tensor:
        """Project what a layer (D, F) of stage ``s`` writes, to (k, F)."""
        reduction = self.embed.get(f"stages.{s}.embed")
        return weight if reduction is None else reduction.apply(weight, 0)

    def _built(self, narrow: Arch, kept: Mapping[str, torch.Tensor], model: nn.Module) -> nn.Module:
        """Build the small model, with gains of 1 and biases of 0 in the norms of projected streams."""
        family, dtype = family_of(narrow), next(model.parameters()).dtype
        scalers = {name for s in self.gains for name in family.scalers(narrow, f"stages.{s}.embed")}
        weights = {}
        for name, shape in tensor_shapes(family, narrow).items():
            tensor = kept[name]
            if name in scalers:
                tensor = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=tensor.device)
            weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return build_with(narrow, weights, pretrained_cfg=preprocessing_of(model)).eval()

    def _project_readers(self, kept: Sequence[int]) -> None:
        """Finish the readers of projected streams: the factor sqrt(D/k), and the norms' biases that are left."""
        for own, view in zip(self.small_views, (self.views[i] for i in kept), strict=True):
            grid = self.arch.stages[view.stage].grid
            halves = []
            if own.attention is not None and view.attention is not None:
                halves.append((own.attention.readers(grid), view.attention.readers(grid)))
            if own.mlp is not None and view.mlp is not None:
                halves.append((own.mlp.readers(), view.mlp.readers()))
            for readers, wanted in halves:
                self._project(readers, wanted, view.stage, f"{view.name}.")
        for s in range(1, len(self.arch.stages)):
            own_reader = self.family.entrance(self.small, self.arch, s).reader
            self._project((own_reader,), (self.family.entrance(self.model, self.arch, s).reader,), s - 1, "")
        heads = self.family.heads(self.small, self.arch), self.family.heads(self.model, self.arch)
        self._project(*heads, len(self.arch.stages) - 1, "")

    def _project(self, own: Sequence[Reader], source: Sequence[Reader], s: int, prefix: str) -> None:
        if s not in self.gains:
            return
        shifts: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # by the norm, which several may read
        for reader, wanted in zip(own, source, strict=True):
            if reader.norm is None or wanted.norm is None:
                continue
            reader.weight.mul_(self.gains[s])
            beta = wanted.norm.get_parameter("bias").double()
            if bool(beta.any()):
                start = self._start(f"{prefix}{wanted.name}", wanted, s)
                shifts.setdefault(reader.norm, []).append((start, wanted.weight.double() @ beta))
        for norm, found in shifts.items():
            starts, outputs = (torch.cat(parts) for parts in zip(*found, strict=True))
            norm.get_parameter("bias").copy_(solve_shift(starts, outputs))

    def _start(self, name: str, source: Reader, s: int) -> torch.Tensor:
        """Project what a layer reads, with all of its outputs, (G, F) in float64."""
        weight = source.layer.get_parameter("weight").double()
        axes = self.family.axes(self.arch, f"{name}.weight")
        parts = [(), *(self.family.parts(axis) for axis in axes[1:])]
        found = reduce_tensor(weight, parts, self.sizes, self.reductions).flatten(1)
        return found if source.norm is None else found * self.gains.get(s, 1.0)

    def attention(
        self, stage: Stage, own: AttentionView, source: BlockView, x: Streams, z: Streams, target: Streams
    ) -> Streams:
        """Fit queries, keys and values at full width, map them to their ranks, then fit the output projection."""
        wanted, record = source.attention, own.record
        assert wanted is not None
        if (record.qk, record.v_widths) == (wanted.record.qk, wanted.record.v_widths):
            return super().attention(stage, own, source, x, z, target)
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        projections = {wanted.q.name, wanted.k.name, wanted.v.name}
        for reader, full in zip(own.readers(stage.grid), wanted.readers(stage.grid), strict=True):
            if full.name not in projections:
                self.read(reader, self.wanted(source, full, x), z, f"{source.name}.{full.name}", single=False)
                continue
            start = self._start(f"{source.name}.{full.name}", full, source.stage)
            bias = start.new_zeros(len(start)) if full.bias is None else full.bias.double()
            if self.refit:
                centred = full.bias is not None or _takes_shift(own, reader, stage)
                start, bias = self.solve(
                    start, rows_of(reader, z), self.wanted(source, full, x), len(z), centred=centred
                )
            found[full.name] = start, bias
        self._take_ranks(stage, own, source, z, found)
        return self.write_attention(stage, own, source, x, z, target)

    def _take_ranks(
        self,
        stage: Stage,
        own: AttentionView,
        source: BlockView,
        z: Streams,
        found: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Map q, k and v, fitted at full width, to their ranks; put them and the projection's columns in place."""
        wanted, record = source.attention, own.record
        assert wanted is not None
        full, columns = wanted.record, self._written(wanted.out.weight.double(), source.stage)
        eye = torch.eye(full.qk * self.arch.qk_rows, dtype=torch.float64, device=columns.device)
        pairs = [(eye, eye)] * full.heads
        if record.qk < full.qk and self.arch.qk_rows == 1:
            queries, keys = (self.statistics.heads[source.index][n].to(columns.device) for n in range(2))
            pairs = [query_key_maps(queries[h], keys[h], record.qk) for h in range(full.heads)]
        down, kept, begin = [], [], 0
        covariance = self._covariance(stage, own, wanted, z, found)
        for h, (rank, width) in enumerate(zip(record.v_widths, full.v_widths, strict=True)):
            piece = columns[:, begin : begin + width]
            values = torch.eye(width, dtype=torch.float64, device=columns.device)
            if rank < width:
                values, piece = value_map(covariance[h], piece, rank)
            down.append(values)
            kept.append(piece)
            begin += width
        own.out.weight.copy_(torch.cat(kept, 1))
        maps = {"q": [q for q, _ in pairs], "k": [k for _, k in pairs], "v": down}
        shifts: dict[str, list[torch.Tensor]] = {}
        for part, matrices in maps.items():
            to, of = getattr(own, part), getattr(wanted, part)
            weight, bias = (t[of.rows] for t in found[of.name])
            matrix = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
            if part != "v" and self.arch.qk_rows == 2:  # pairs were chosen
                matrix = self.narrowed(f"{source.name}.{of.name}", matrix).T
            to.weight.copy_(matrix @ weight)
            if to.bias is not None:
                to.bias.copy_(matrix @ bias)
            shifts.setdefault(of.name, []).append(matrix @ bias)
        for reader in own.readers(stage.grid):
            if reader.name in shifts and reader.bias is None and _takes_shift(own, reader, stage):
                assert reader.norm is not None
                reader.norm.get_parameter("bias").add_(
                    solve_shift(reader.weight, torch.cat(shifts[reader.name])).to(reader.weight)
                )

    def _covariance(
        self,
        stage: Stage,
        own: AttentionView,
        wanted: AttentionView,
        z: Streams,
        found: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Compute C_h of every head: covariance of the small model's attention output before ranks are taken."""
        widths = wanted.record.v_widths
        if own.record.v_widths == widths:
            return []
        readers = {reader.name: reader for reader in own.readers(stage.grid)}
        # the source's attention turns all of its pairs, by the places that the small model's tokens have
        turning = own if own.rotary is None else dataclasses.replace(wanted, coordinates=own.coordinates)
        sums = Moments(sum(widths), own.out.weight.device)
        for one in z[: self.fitted]:
            outputs = {
                name: F.linear(readers[name].rows(one), weight.to(one), bias.to(one))
                for name, (weight, bias) in found.items()
            }
            q, k, v = (outputs[part.name][..., part.rows] for part in (wanted.q, wanted.k, wanted.v))
            # in float64: the map divides by the root of the covariance, down to a cut-off that float32 does not reach
            sums.add(turning.attended(q, k, v, one, widths).double())
        # without a bias, the mean of what goes cannot be made up for
        covariance = sums.covariance if own.out.bias is not None else sums.products / sums.rows
        ends = list(accumulate(widths))
        return [covariance[end - width : end, end - width : end] for end, width in zip(ends, widths, strict=True)]


def _best(energy: torch.Tensor, count: int) -> Choose:
    """Choose the channels of the largest energy."""
    return Choose(energy.topk(count).indices.sort().values.tolist())


def _read_energy(model: nn.Module, arch: Arch, space: str) -> torch.Tensor:
    """Sum the squares of the weights that read every channel of a space."""
    family, state = family_of(arch), model.state_dict()
    total = torch.zeros(family.spaces(arch)[space], dtype=torch.float64, device=next(model.parameters()).device)
    for name in family.readers(arch, space):
        for axis, use in enumerate(family.uses(arch, name)):
            parts = family.parts(use.axis)
            if space in parts and use.role != "writes":
                own = state[name].double().movedim(axis, 0).flatten(1).square().sum(1)
                for part, piece in zip(parts, own.split([family.spaces(arch)[p] for p in parts]), strict=True):
                    total += piece if part == space else 0
    return total


def _takes_shift(own: AttentionView, reader: Reader, stage: Stage) -> bool:
    """Whether the norm in front of a layer can take up a bias: no other layer reads it, and all rows come of it."""
    return not reader.padded and has_bias(reader.norm) and alone(reader, own.readers(stage.grid))


def folded(model: nn.Module) -> nn.Module:
    """Copy a source, in evaluation mode, with gains and biases of norms and LayerScale in the layers around them.

    It computes the same. Norms are those of streams that can be projected. A norm keeps a bias where a layer behind it
    has none, or reads zeros beside the norm's output.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    arch = arch_of(model)
    family = family_of(arch)
    projected = [can_project(arch, f"stages.{s}.embed") for s in range(len(arch.stages))]
    for view in block_views(model, arch):
        for half in (view.attention, view.mlp):
            if half is not None:
                fold_scale(half.scale, half.out.layer)
        if projected[view.stage]:
            if view.attention is not None:
                _fold(view.attention.readers(arch.stages[view.stage].grid))
            if view.mlp is not None:
                _fold(view.mlp.readers())
    for s in range(1, len(arch.stages)):
        if projected[s - 1]:
            _fold((family.entrance(model, arch, s).reader,))
    if projected[-1]:
        by_norm: dict[Any, list[Reader]] = {}  # class attention has several
        for reader in family.heads(model, arch):
            by_norm.setdefault(reader.norm, []).append(reader)
        for readers in by_norm.values():
            _fold(readers)
    return model


def _fold(readers: Sequence[Reader]) -> None:
    """Fold the norm that some layers read into them."""
    norm = readers[0].norm
    if norm is None:
        return
    gain, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    outputs = [reader.weight.double() @ bias.double() for reader in readers]
    for reader in readers:
        reader.weight.mul_(gain)
    gain.fill_(1)
    biases = [reader.bias for reader in readers]
    if any(own is None for own in biases) or any(reader.padded for reader in readers):
        bias.copy_(solve_shift(torch.cat([reader.weight for reader in readers]), torch.cat(outputs)))
        return
    for own, output in zip(biases, outputs, strict=True):
        assert own is not None
        own.add_(output.to(own))
    bias.zero_()
