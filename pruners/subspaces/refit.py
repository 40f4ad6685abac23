"""Refits of a small model: block after block, every layer that reads or writes a residual stream, by ridge regression.

Features are the small model's own, targets the source's. Every fit is shrunk towards what the layer's weights are
already, by choice or by projection. Notation: x is the source's stream in front of a block and m between its halves,
z and z' those of the small model, T what maps the source's stream to the small one's (channels that stay, or a
projection), M merges the tokens of a planned block.

    layer                   features                            target
    readers of attention    N(M z), or what is made of it       the source's outputs at M x, for channels that stay
    output projection       attention output                    M m T - M z
    first layer of an MLP   N(z')                               the kept units' inputs at M m
    second layer            hidden units                        M x T - z', x in front of the next kept block
    entrance of a stage     what it reads of z                  the source's outputs, T of the new stage
    heads                   what they read of z                 the source's outputs

so an MLP also carries what dropped blocks behind it did. A layer without a bias gets one through the norm in front of
it, if nothing else reads that norm: W shift = b in the least squares.

Where a norm stands behind the output projection or the second layer, these are fitted to what they give in the source,
for channels that stay; the norm's gain and bias are fitted channel by channel to the targets above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from timm.layers import RmsNorm
from torch import nn

from prunesweep.models import Arch, BlockView, arch_of, block_views
from prunesweep.models.arch import Stage
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView, MlpView, Reader
from prunesweep.models.reduction import Reduction

from .batches import Batches
from .normal_equations import NormalEquations
from .source import to_model
from .streams import LayerOutputs, SourceStreams

__all__ = [
    "HEAD_SHRINKAGE",
    "SHRINKAGE",
    "Refit",
    "alone",
    "fold_scale",
    "has_bias",
    "has_norm",
    "outputs_of",
    "rows_of",
    "run_together",
    "solve_shift",
    "tail",
]

SHRINKAGE = 1e-3  # 1e-3 to 1e-5 are equal within noise, 1e-2 is 10 to 25 % worse
HEAD_SHRINKAGE = 1e-2  # one row an image, not one a token

Streams = Sequence[torch.Tensor]
Merge = Callable[[Streams], Streams]
ByBatch = Callable[[int], torch.Tensor]


class Refit:
    """A source, a small model that is refitted in place, and the streams of both up to the block that is next.

    Args:
        model: the source, in evaluation mode.
        small: the small model, in evaluation mode; its weights are what every fit is shrunk towards.
        reductions: of the source's spaces, by which the small model was made.
        streams: of the source.
        refit: fit at all; without it streams are computed only.
        shrinkage: lambda of the fits, in units of the features' mean variance.
        fitted: fits read the first so many batches; the streams of all others are carried along. All by default.
        outputs: of the source's layers, where other models of the source are fitted to them, too.
    """

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        reductions: Mapping[str, Reduction],
        streams: SourceStreams,
        *,
        refit: bool = True,
        shrinkage: float = SHRINKAGE,
        fitted: int | None = None,
        outputs: LayerOutputs | None = None,
    ) -> None:
        self.model, self.small, self.reductions, self.source = model, small, reductions, streams
        self.refit, self.shrinkage, self.fitted = refit, shrinkage, fitted
        self.arch, self.family = arch_of(model), family_of(arch_of(model))
        self.views, self.small_views = block_views(model, self.arch), block_views(small)
        self.sizes = self.family.spaces(self.arch)
        self.z: Streams = Batches()
        self.outputs, self._shared = outputs, outputs  # those of all tokens, and of the present block if it has them

    def run(self, kept: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Refit everything.

        Args:
            kept: numbers in the source of the small model's blocks.
            progress: told of kept blocks done and of all.
        """
        run_together([self], [kept], progress)

    def walk(self, kept: Sequence[int]) -> Iterator[int]:
        """Refit everything, step by step; in front of every block yield its number in the source.

        Args:
            kept: as for ``run``.
        """
        self._stem()
        own = iter(self.small_views)
        for s, stage in enumerate(self.arch.stages):
            if s:
                self._enter(s)
            alive = [i for i in kept if self.views[i].stage == s]
            for i, after in zip(alive, [*alive[1:], None], strict=True):
                yield i
                self.source.forget(i)
                self.block(stage, next(own), self.views[i], after)
        self._heads()

    # --- parts of the model ---

    def block(self, stage: Stage, own: BlockView, source: BlockView, after: int | None) -> None:
        """Refit a block, and go on to the stream in front of the next kept one.

        Args:
            stage: of the source.
            own: the small model's block.
            source: the source's.
            after: number in the source of the next kept block of the stage; None behind its last one.
        """
        module: Any = own.module
        plan = getattr(module, "token_merge", None)
        self._shared = self.outputs if plan is None else None
        merged: Merge = (lambda s: s) if plan is None else (lambda s: Batches(map(plan.merge, s)))
        x, middle = self.source.front(source.index), self.source.middle(source.index)
        following = self.source.last(source.stage) if after is None else self.source.front(after)
        target = merged(middle if own.mlp else following)
        z = merged(self.z)
        if own.attention is not None and source.attention is not None:
            z = self.attention(stage, own.attention, source, merged(x), z, target)
        elif own.record.conv_kernel:
            z = self._convolution(own, source.stage, z, target)
        elif own.record.norm_residual:
            z = Batches(one + module.norm1(one) for one in z)
        if own.mlp is not None and source.mlp is not None:
            z = self.mlp(stage, own.mlp, source, merged(middle), z, merged(following))
        self.z = z if plan is None else Batches(plan.spread(new, old) for new, old in zip(z, self.z, strict=True))

    def attention(
        self, stage: Stage, own: AttentionView, source: BlockView, x: Streams, z: Streams, target: Streams
    ) -> Streams:
        """Refit a block's attention.

        Args:
            stage: of the source.
            own: the small model's attention.
            source: the source's block.
            x: the source's streams in front of the block.
            z: the small model's.
            target: the source's streams that the sums of z and the attention's output should come close to.

        Returns:
            The small model's streams behind the attention.
        """
        assert source.attention is not None
        pairs = zip(own.readers(stage.grid), source.attention.readers(stage.grid), strict=True)
        for reader, wanted in pairs:
            single = alone(reader, own.readers(stage.grid))
            self.read(reader, self.wanted(source, wanted, x), z, f"{source.name}.{wanted.name}", single=single)
        return self.write_attention(stage, own, source, x, z, target)

    def write_attention(
        self, stage: Stage, own: AttentionView, source: BlockView, x: Streams, z: Streams, target: Streams
    ) -> Streams:
        """Fit the output projection of an attention whose readers are done; arguments and result as for it."""
        wanted = source.attention
        assert wanted is not None
        fold_scale(own.scale, own.out.layer)
        features = Batches(own.mixed(one, stage.grid) for one in z)
        if not has_norm(own.scale):
            return self._write(own.out.layer, features, z, target, source.stage)

        def given(n: int) -> torch.Tensor:
            return wanted.out(wanted.mixed(x[n], stage.grid))

        return self._write_normed(own.out.layer, own.scale, features, given, z, target, source.stage)

    def mlp(self, stage: Stage, own: MlpView, source: BlockView, m: Streams, z: Streams, target: Streams) -> Streams:
        """Refit a block's MLP; arguments and result as for ``attention``, ``m`` the source's streams in front of it."""
        assert source.mlp is not None
        rows = stage.grid[0]
        for reader, wanted in zip(own.readers(), source.mlp.readers(), strict=True):
            self.read(reader, self.wanted(source, wanted, m), z, f"{source.name}.{wanted.name}", single=True)
        fold_scale(own.scale, own.out.layer)
        hidden = Batches(own.hidden(own.norm(one), rows) for one in z)
        if not has_norm(own.scale):
            return self._write(own.out.layer, hidden, z, target, source.stage)
        whole = source.mlp

        def given(n: int) -> torch.Tensor:
            return whole.out(whole.hidden(whole.norm(m[n]), rows))

        return self._write_normed(own.out.layer, own.scale, hidden, given, z, target, source.stage)

    def _convolution(self, own: BlockView, s: int, z: Streams, target: Streams) -> Streams:
        """Refit the 1x1 layer behind the convolution; prefix tokens have no place on the grid."""
        module: Any = own.module
        attn, prefix = module.attn, module.attn.prefix_tokens
        rows, columns = attn.grid
        layer, scale = attn.bconv[3], getattr(module, "ls1", nn.Identity())
        fold_scale(scale, layer)
        tokens = Batches(module.norm1(one).flatten(1, -2) for one in z)

        def inside(n: int) -> torch.Tensor:
            return rearrange(tokens[n][:, prefix:], "b (h w) d -> b d h w", h=rows, w=columns)

        self._set_batch_norm(attn.bconv[1], (attn.bconv[0](inside(n)) for n in range(len(z))[: self.fitted]))
        if self.refit:
            self._fit(
                layer,
                lambda n: attn.bconv[:3](inside(n)).flatten(2).mT,
                lambda n: (self.reduced(s, target[n]) - z[n]).flatten(1, -2)[:, prefix:],
                len(z),
            )
        return Batches(one + scale(attn(normed)).view_as(one) for one, normed in zip(z, tokens, strict=True))

    def _set_batch_norm(self, norm: nn.Module, maps: Iterable[torch.Tensor]) -> None:
        """Set the statistics of a BatchNorm to those of all maps (B, C, rows, columns)."""
        running = norm.get_buffer("running_mean")
        count, total = 0, torch.zeros_like(running, dtype=torch.float64)
        square = total.clone()
        for one in maps:
            wide = one.double().transpose(0, 1).flatten(1)
            count, total, square = count + wide.shape[1], total + wide.sum(1), square + wide.square().sum(1)
        mean = total / count
        running.copy_(mean)
        norm.get_buffer("running_var").copy_((square - count * mean**2) / (count - 1))

    def _stem(self) -> None:
        def streams() -> Batches:
            return Batches(self.family.stem(self.small, to_model(self.model, batch)) for batch in self.source.inputs)

        self.z, norm = streams(), self.family.stem_norm(self.small)
        if norm is not None:
            self._rescale(norm, self.z, 0)
            self.z = streams()

    def _enter(self, s: int) -> None:
        """Refit the entrance of a stage other than the first."""
        wanted = self.family.entrance(self.model, self.arch, s)
        own = self.family.entrance(self.small, self.arch, s)
        x = self.source.last(s - 1)
        self.read(own.reader, outputs_of(wanted.reader, x), self.z, wanted.reader.name, single=True)
        if own.norm is not None:
            self._rescale(own.norm, Batches(map(own.run, self.z)), s)
        self.z = Batches(map(own.run, self.z))

    def _heads(self) -> None:
        wanted, x = self.family.heads(self.model, self.arch), self.source.last(len(self.arch.stages) - 1)
        for reader, target in zip(self.family.heads(self.small, self.arch), wanted, strict=True):
            self.read(
                reader,
                outputs_of(target, x),
                self.z,
                target.name,
                single=False,
                shrinkage=HEAD_SHRINKAGE,
            )

    # --- fits ---

    def wanted(self, source: BlockView, reader: Reader, x: Streams) -> ByBatch:
        """Give what a layer of the source's block makes of the source's streams, by batch."""
        return outputs_of(reader, x) if self._shared is None else self._shared.of(source.index, reader, x)

    def reduced(self, s: int, x: torch.Tensor) -> torch.Tensor:
        """Map a source's stream of stage ``s`` to the small model's."""
        reduction = self.reductions.get(f"stages.{s}.embed")
        return x if reduction is None else reduction.apply(x, -1)

    def narrowed(self, name: str, outputs: torch.Tensor) -> torch.Tensor:
        """Reduce the outputs of the source's layer ``name`` (..., G) to those that the small model's layer has."""
        axes = self.family.axes(self.arch, f"{name}.weight")
        parts = self.family.parts(axes[0]) if axes else ()
        if not any(part in self.reductions for part in parts):
            return outputs
        pieces = torch.split(outputs, [self.sizes[part] for part in parts], dim=-1)
        own = [
            self.reductions[p].apply(t, -1) if p in self.reductions else t for p, t in zip(parts, pieces, strict=True)
        ]
        return torch.cat(own, -1)

    def read(
        self,
        reader: Reader,
        target: ByBatch,
        z: Streams,
        name: str,
        *,
        single: bool,
        shrinkage: float | None = None,
    ) -> None:
        """Fit a layer that reads the stream.

        Args:
            reader: the small model's layer.
            target: gives the source's outputs, by batch.
            z: the small model's streams.
            name: of the layer in the source.
            single: nothing else reads the norm in front of it.
            shrinkage: lambda, where it is not that of all fits.
        """
        if self.refit:
            norm = reader.norm if single and not reader.padded else None
            self._fit(
                reader.layer,
                rows_of(reader, z),
                lambda n: self.narrowed(name, target(n)),
                len(z),
                norm=norm,
                shrinkage=shrinkage,
            )

    def _write(self, layer: nn.Module, features: Streams, z: Streams, target: Streams, s: int) -> Streams:
        """Fit a writer to the difference between the streams of source and small model, and add its output."""
        if self.refit:
            self._fit(layer, features.__getitem__, lambda n: self.reduced(s, target[n]) - z[n], len(z))
        return Batches(one + layer(own) for one, own in zip(z, features, strict=True))

    def _write_normed(
        self, layer: nn.Module, norm: nn.Module, features: Streams, given: ByBatch, z: Streams, target: Streams, s: int
    ) -> Streams:
        """Fit a writer with a norm behind it to what it gives in the source, then the norm to the streams."""
        if self.refit:
            self._fit(layer, features.__getitem__, lambda n: self.reduced(s, given(n)), len(z))
            added = Batches(norm(layer(own)) for own in features)
            self._fit_norm(norm, added, lambda n: self.reduced(s, target[n]) - z[n])
        return Batches(one + norm(layer(own)) for one, own in zip(z, features, strict=True))

    def _fit(
        self,
        layer: nn.Module,
        features: ByBatch,
        target: ByBatch,
        count: int,
        *,
        norm: nn.Module | None = None,
        shrinkage: float | None = None,
    ) -> None:
        """Put the fitted weight and bias into a linear layer or a convolution that is one on its rows."""
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        found, shift = self.solve(
            weight.flatten(1),
            features,
            target,
            count,
            centred=bias is not None or has_bias(norm),
            shrinkage=shrinkage,
        )
        weight.copy_(found.view_as(weight))
        if bias is not None:
            bias.copy_(shift)
        elif norm is not None and has_bias(norm):
            norm.get_parameter("bias").add_(solve_shift(found, shift).to(weight))

    def solve(
        self,
        start: torch.Tensor,
        features: ByBatch,
        target: ByBatch,
        count: int,
        *,
        centred: bool = True,
        shrinkage: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit a matrix to the batches that fits read.

        Args:
            start: what it is shrunk towards, (G, F).
            features: gives (..., F), by batch.
            target: gives (..., G), by batch.
            count: number of batches.
            centred: with a bias.
            shrinkage: lambda, where it is not that of all fits.

        Returns:
            The matrix (G, F) and the bias (G,), in float64.
        """
        sums = NormalEquations(start.shape[1], start.shape[0], start.device)
        for n in range(count)[: self.fitted]:
            sums.add(features(n), target(n))
        return sums.solve(start, self.shrinkage if shrinkage is None else shrinkage, centred=centred)

    def _rescale(self, norm: nn.Module, z: Streams, s: int) -> None:
        """Refit gain and bias of a norm that writes the stream of stage ``s``, channel by channel."""
        if not self.refit or f"stages.{s}.embed" not in self.reductions:
            return
        x = self.source.entry(s)
        self._fit_norm(norm, z, lambda n: self.reduced(s, x[n]))

    def _fit_norm(self, norm: nn.Module, given: Streams, target: ByBatch) -> None:
        """Fit gain and bias of a norm, which gives ``given``, channel by channel to targets of the same shape."""

        def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for n in range(len(given))[: self.fitted]:
                yield given[n].flatten(0, -2).double(), target(n).flatten(0, -2).double()

        weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
        rows, zero = 0, torch.zeros_like(weight, dtype=torch.float64)
        own, wanted, spread, shared = zero, zero, zero, zero
        for a, b in pairs():
            rows, own, wanted = rows + len(a), own + a.sum(0), wanted + b.sum(0)
        own, wanted = (own / rows, wanted / rows) if bias is not None else (zero, zero)
        for a, b in pairs():
            spread, shared = spread + (a - own).square().sum(0), shared + ((a - own) * (b - a)).sum(0)
        factor = 1 + shared / rows / (spread / rows * (1 + self.shrinkage)).clamp_min(1e-12)
        weight.mul_(factor.to(weight))
        if bias is not None:
            bias.copy_((bias.double() * factor + wanted - factor * own).to(bias))


def run_together(
    works: Sequence[Refit], kept: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> None:
    """Run refits of the same source block after block, so that what they need of it is computed once.

    Args:
        works: the refits, on the same streams.
        kept: of each, numbers in the source of its blocks.
        progress: told of kept blocks done and of all.
    """
    walks, done, due = [work.walk(own) for work, own in zip(works, kept, strict=True)], 0, sum(map(len, kept))
    at = {n: block for n, walk in enumerate(walks) if (block := next(walk, None)) is not None}
    while at:
        last = min(at, key=at.__getitem__)
        following = next(walks[last], None)
        if following is None:
            del at[last]
        else:
            at[last] = following
        done += 1
        if progress:
            progress(done, due)


def outputs_of(reader: Reader, streams: Streams) -> ByBatch:
    """Compute the outputs of a source's layer when they are asked for, by batch."""
    return lambda n: reader(streams[n])


def rows_of(reader: Reader, streams: Streams) -> ByBatch:
    """Compute the rows that a layer reads when they are asked for, by batch."""
    return lambda n: reader.rows(streams[n])


def has_norm(scale: nn.Module) -> bool:
    """Whether what stands behind a half of a block is a norm, and not LayerScale or nothing."""
    return isinstance(scale, (nn.LayerNorm, RmsNorm))


def has_bias(norm: nn.Module | None) -> bool:
    """Whether there is a norm, and it has a bias."""
    return getattr(norm, "bias", None) is not None


def alone(reader: Reader, readers: Sequence[Reader]) -> bool:
    """Whether no other layer of a block reads the norm that a layer reads."""
    return sum(other.norm is reader.norm for other in readers) == 1


def solve_shift(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute in float64 the shortest input (F,) of ``weight`` (G, F) that gives ``bias`` (G,) in the least squares."""
    return torch.linalg.pinv(weight.double(), rtol=1e-9) @ bias.double()


def fold_scale(scale: nn.Module, layer: nn.Module) -> None:
    """Move LayerScale's factors into the layer in front of it."""
    factors = getattr(scale, "gamma", None)
    if factors is None:
        return
    weight = layer.get_parameter("weight")
    weight.mul_(factors.view(-1, *(1,) * (weight.ndim - 1)))
    if (bias := getattr(layer, "bias", None)) is not None:
        bias.mul_(factors)
    factors.fill_(1)


def tail(model: nn.Module, arch: Arch, views: Sequence[BlockView], done: int, x: torch.Tensor) -> torch.Tensor:
    """Compute a model's output from the stream behind its first ``done`` blocks."""
    family, stage = family_of(arch), views[max(done - 1, 0)].stage
    for view in views[done:]:
        for s in range(stage + 1, view.stage + 1):
            x = family.entrance(model, arch, s).run(x)
        stage = view.stage
        x = family.run_block(arch, arch.stages[view.stage], view.module, x)
    return family.finish(model, arch, x)
