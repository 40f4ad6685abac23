"""Compression in closed form: project every linear space onto its best subspace, then refit readers and writers.

Blocks are computed in order. Features are the small model's own, targets the source's: x_i is the source's stream in
front of block i, m_i between its halves, z and z' those of the small model, T the map of the residual stream, N
LayerNorm without gain and bias. W_0 of every fit is what the projection alone gives.

    reader   features            target                        shrunk towards
    qkv      N(z)                q, k, v of the source         W diag(g) T sqrt(D/k)
    fc1      N(z')               the kept units' inputs        W diag(g) T sqrt(D/k)
    head     pooled N(z)         the source's logits           W diag(g) T sqrt(D/k)
    writer
    proj     attention output    m_i T - z                     its best rank-r columns
    fc2      hidden units        x of the next kept block T - z'   T' W

so the MLP also carries what dropped blocks behind it did. LayerScale is folded into the writers, gain and bias of norms
into the readers. Source: the closed forms of ``pruners.subspaces.maps`` and ``normal_equations``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import Arch
from prunesweep.models.arch import Block
from prunesweep.models.builder import build_with

from .maps import query_key_maps, residual_map, value_map
from .normal_equations import NormalEquations
from .source import SourceBlock, SourceStatistics, attend_with, images_of, open_source, stem
from .widths import BlockWidths, Widths, compressed_arch

__all__ = ["Work", "compress"]

SHRINKAGE = 1e-3  # 1e-3 to 1e-5 are equal within noise, 1e-2 is 10 to 25 % worse
HEAD_SHRINKAGE = 1e-2  # one row an image, not one a token


@torch.no_grad()
def compress(
    model: nn.Module,
    widths: Widths,
    batches: Iterable[Any],
    *,
    statistics: SourceStatistics | None = None,
    refit: bool = True,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Compute a smaller model from a source and unlabelled images. Nothing is trained, no label is used.

    Args:
        model: a ViT that ``Arch.from_timm`` accepts; it is not changed. Its dtype is that of features and result.
        widths: of the small model.
        batches: calibration images (B, C, rows, columns), or pairs of images and labels, from the training split and
            without augmentation; at least about 20 tokens per feature, 512 images of 17 tokens for a width of 96.
        statistics: of the same source, where they are there already; collected from ``batches`` otherwise.
        refit: fit readers and writers; without it the model is what the projections alone give.
        shrinkage: lambda of the fits, in units of the features' mean variance.
        progress: told of kept blocks done and of all.

    Returns:
        An ordinary model of the same family, in evaluation mode, of the record ``compressed_arch(arch, widths)``.

    Raises:
        UserError: the widths do not fit, the source cannot be projected, or there are no images.
    """
    arch, blocks = open_source(model)
    small = compressed_arch(arch, widths)
    images = images_of(batches)
    found = SourceStatistics.collect(model, images) if statistics is None else statistics
    mode = model.training
    model.eval()
    try:
        work = Work(model, arch, blocks, small, found, refit=refit, shrinkage=shrinkage)
        work.start(images)
        kept = [i for i, own in enumerate(widths.blocks) if own.keep]
        for j, i in enumerate(kept):
            after = kept[j + 1] if j + 1 < len(kept) else len(blocks)
            work.block(j, i, after, widths.blocks[i])
            if progress:
                progress(j + 1, len(kept))
        work.finish()
    finally:
        model.train(mode)
    dtype = next(model.parameters()).dtype
    weights = {name: t.to(dtype).contiguous() for name, t in work.weights.items()}
    result = build_with(small, weights, pretrained_cfg=getattr(model, "pretrained_cfg", None))
    return result.eval()


class Work:
    """The state of a compression: the small model's weights computed so far, and both streams of every batch.

    Args:
        model, arch, blocks: the source.
        small: the record that is aimed at.
        statistics: of the source.
        refit, shrinkage: as for ``compress``.
        fitted: fits read the first so many batches; both streams of all others are carried along. All by default.
    """

    def __init__(
        self,
        model: Any,
        arch: Arch,
        blocks: list[SourceBlock],
        small: Arch,
        statistics: SourceStatistics,
        *,
        refit: bool = True,
        shrinkage: float = SHRINKAGE,
        fitted: int | None = None,
    ) -> None:
        self.model, self.arch, self.blocks, self.small = model, arch, blocks, small
        self.statistics, self.refit, self.shrinkage, self.fitted = statistics, refit, shrinkage, fitted
        self.parameter = next(model.parameters())
        width, full = small.stages[0].width, arch.stages[0].width
        basis = statistics.directions[1].to(self.parameter.device)
        self.T = residual_map(basis, width)  # (D, k), float64
        self.gain = (full / width) ** 0.5
        self.weights: dict[str, torch.Tensor] = {}
        self.x: list[torch.Tensor] = []  # the source's stream in front of the present block, by batch
        self.m: list[torch.Tensor] = []  # between its halves
        self.after: list[torch.Tensor] = []  # in front of the next kept block
        self.z: list[torch.Tensor] = []  # the small model's own

    def start(self, images: list[torch.Tensor]) -> None:
        """Project the writers of the first stream: patch embedding, prefix tokens, positions."""
        state = self.model.state_dict()
        for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
            if name in state:
                self.weights[name] = state[name].double() @ self.T
        weight = state["patch_embed.proj.weight"].double()
        self.weights["patch_embed.proj.weight"] = torch.einsum("dcpq,dk->kcpq", weight, self.T)
        if "patch_embed.proj.bias" in state:
            self.weights["patch_embed.proj.bias"] = state["patch_embed.proj.bias"].double() @ self.T
        self.weights |= {name: state[name] for name in state if name.startswith("norm_pre.")}
        for batch in images:
            self.x.append(stem(self.model, batch.to(self.parameter)))
            self.z.append(self._map(self.x[-1]))

    def block(self, j: int, i: int, after: int, own: BlockWidths) -> None:
        """Compute one block of the small model.

        Args:
            j: its number in the small model.
            i: its number in the source.
            after: number in the source of the next kept block; the source's depth behind the last one.
            own: ranks and units of the block.
        """
        source, record = self.blocks[i], self.small.blocks[j]
        self.m = [source.after_attention(x) for x in self.x]
        self.after = []
        for m in self.m:
            x = source.after_mlp(m)
            for between in self.blocks[i + 1 : after]:
                x = between.after_mlp(between.after_attention(x))
            self.after.append(x)
        if record.mixer == "attn":
            target = self.m if record.mlp else self.after
            self.attention(f"blocks.{j}.", source, record, i, target)
        if record.mlp:
            self.mlp(f"blocks.{j}.", source, record, i)
        self.x = self.after

    def attention(self, name: str, source: SourceBlock, record: Block, i: int, target: list[torch.Tensor]) -> None:
        """Compute the attention of a block, and add its output to the small model's stream.

        Args:
            name: prefix of the block's tensors in the small model, such as ``blocks.0.``.
            source: the source's block.
            record: the small model's block.
            i: number of the block in the source.
            target: for every batch, the source's stream that the sum should come close to, (B, N, D).
        """
        attn, old = source.module.attn, source.record
        weight, bias = self._reader(attn.qkv, source.module.norm1)
        if self.refit:
            weight, bias = self._fit_reader(weight, lambda n: source.qkv(self.x[n]))
        norms = (attn.q_norm, attn.k_norm)
        columns = self.T.T @ (source.gain("ls1").double()[:, None] * attn.proj.weight.double())
        if record.v_widths != old.v_widths or record.qk != old.qk:
            full, columns = self._rank_maps(i, record, old, norms, weight, bias, columns)
            weight, bias = full @ weight, full @ bias
        shift = None
        if not self.arch.qkv_bias:  # what the layer cannot add, its norm does: W shift = b in the least squares
            shift = torch.linalg.lstsq(weight, bias[:, None]).solution[:, 0]
            bias = weight @ shift
        qkv = _linear(weight, bias, self.parameter)

        def attended(n: int) -> torch.Tensor:
            joined = qkv(self._normed(self.z[n]))
            return attend_with(joined, record.heads, record.qk, record.v_widths, record.scale, norms)

        out_bias = self.T.T @ (source.gain("ls1").double() * attn.proj.bias.double())
        columns, out_bias = self._write(attended, target, columns, out_bias)
        self._store(f"{name}attn.qkv", weight, bias if self.arch.qkv_bias else None)
        self._store(f"{name}attn.proj", columns, out_bias)
        self._norm(f"{name}norm1", f"{name}ls1", shift)
        for part in ("q_norm", "k_norm"):
            self.weights |= {f"{name}attn.{part}.{k}": v for k, v in getattr(attn, part).state_dict().items()}

    def _rank_maps(
        self,
        i: int,
        record: Block,
        old: Block,
        norms: tuple[nn.Module, nn.Module],
        weight: torch.Tensor,
        bias: torch.Tensor,
        columns: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the block-diagonal map of q, k, v to their ranks, and the output projection's columns for them."""
        found, device = self.statistics, self.T.device
        queries, keys = found.queries[i].to(device) / found.rows, found.keys[i].to(device) / found.rows
        eye = torch.eye(old.qk, dtype=torch.float64, device=device)
        pairs = [
            query_key_maps(queries[h], keys[h], record.qk) if record.qk < old.qk else (eye, eye)
            for h in range(old.heads)
        ]
        covariance = self._output_covariance(record, old, norms, weight, bias)
        values, kept, begin = [], [], 0
        for h, (rank, full) in enumerate(zip(record.v_widths, old.v_widths, strict=True)):
            own = columns[:, begin : begin + full]
            if rank < full:
                down, own = value_map(covariance[h], own, rank)
            else:
                down = torch.eye(full, dtype=torch.float64, device=device)
            values.append(down)
            kept.append(own)
            begin += full
        maps = [*(q for q, _ in pairs), *(k for _, k in pairs), *values]
        return torch.block_diag(*maps), torch.cat(kept, 1)  # type: ignore[no-untyped-call]

    def _output_covariance(
        self, record: Block, old: Block, norms: tuple[nn.Module, nn.Module], weight: torch.Tensor, bias: torch.Tensor
    ) -> list[torch.Tensor]:
        """Compute C_h of every head: covariance of the small model's attention output before ranks are taken."""
        if record.v_widths == old.v_widths:
            return []
        qkv = _linear(weight, bias, self.parameter)
        sums = NormalEquations(old.total_v, 1, self.T.device)
        for z in self.z[: self.fitted]:
            out = attend_with(qkv(self._normed(z)), old.heads, old.qk, old.v_widths, old.scale, norms)
            sums.add(out, out[..., :1])
        ends = torch.tensor(old.v_widths).cumsum(0).tolist()
        return [
            sums.covariance[end - width : end, end - width : end] for end, width in zip(ends, old.v_widths, strict=True)
        ]

    def mlp(self, name: str, source: SourceBlock, record: Block, i: int) -> None:
        """Compute the MLP of a block, and add its output to the small model's stream.

        Args:
            name: prefix of the block's tensors in the small model, such as ``blocks.0.``.
            source: the source's block.
            record: the small model's block.
            i: number of the block in the source.
        """
        mlp = source.module.mlp
        out = self.T.T @ (source.gain("ls2").double()[:, None] * mlp.fc2.weight.double())
        units = torch.arange(len(mlp.fc1.weight), device=self.T.device)
        if record.mlp < len(units):
            energy = self.statistics.unit_variance(i).to(self.T.device) * out.square().sum(0)
            units = energy.topk(record.mlp).indices.sort().values
        weight, bias = self._reader(mlp.fc1, source.module.norm2)
        weight, bias = weight[units], bias[units]
        if self.refit:
            weight, bias = self._fit_reader(weight, lambda n: source.preactivation(self.m[n])[..., units])
        fc1 = _linear(weight, bias, self.parameter)
        out_bias = self.T.T @ (source.gain("ls2").double() * mlp.fc2.bias.double())
        out, out_bias = self._write(
            lambda n: mlp.act(fc1(self._normed(self.z[n]))), self.after, out[:, units], out_bias
        )
        self._store(f"{name}mlp.fc1", weight, bias)
        self._store(f"{name}mlp.fc2", out, out_bias)
        self._norm(f"{name}norm2", f"{name}ls2")

    def finish(self) -> None:
        """Compute the last norm and the classifiers."""
        arch, model = self.arch, self.model
        heads = {"head": 0, "head_dist": 1} if arch.dist_token else {"head": None}
        norm = {"tokens": "norm", "pooled": "fc_norm", "none": None}[arch.head_norm]
        for name, token in heads.items():
            head = getattr(model, name)
            if norm is None:
                weight, bias = head.weight.double() @ self.T, head.bias.double()
            else:
                weight, bias = self._reader(head, getattr(model, norm))
            if self.refit:
                sums = NormalEquations(weight.shape[1], weight.shape[0], self.T.device)
                for x, z in zip(self.x[: self.fitted], self.z[: self.fitted], strict=True):
                    wanted = self._pooled(x, token, getattr(model, norm) if norm else nn.Identity())
                    sums.add(self._pooled(z, token, self._normed if norm else nn.Identity()), head(wanted))
                weight, bias = sums.solve(weight, HEAD_SHRINKAGE)
            self._store(name, weight, bias)
        if norm is not None:
            self._norm(norm, None)

    def _pooled(self, stream: torch.Tensor, token: int | None, norm: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Compute the classifier's input, (B, width of the stream)."""
        if token is not None:
            return norm(stream)[:, token]
        stream = norm(stream) if self.arch.head_norm == "tokens" else stream
        pooled = stream[:, 0] if self.arch.pool == "token" else stream[:, self.arch.prefix_tokens :].mean(1)
        return norm(pooled) if self.arch.head_norm == "pooled" else pooled

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.T.to(x.dtype)

    def _normed(self, z: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=self.arch.norm_eps)

    def _reader(self, layer: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Project a layer behind a norm: W diag(g) T sqrt(D/k), b + W beta."""
        weight = layer.weight.double()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
        return (weight * norm.weight.double()) @ self.T * self.gain, bias + weight @ norm.bias.double()

    def _fit_reader(
        self, weight: torch.Tensor, target: Callable[[int], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = NormalEquations(weight.shape[1], weight.shape[0], self.T.device)
        for n, z in enumerate(self.z[: self.fitted]):
            sums.add(self._normed(z), target(n))
        return sums.solve(weight, self.shrinkage)

    def _write(
        self,
        features: Callable[[int], torch.Tensor],
        target: list[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit a writer to the difference between the source's stream and the small model's, and add its output."""
        if self.refit:
            sums = NormalEquations(weight.shape[1], weight.shape[0], self.T.device)
            for n, z in enumerate(self.z[: self.fitted]):
                sums.add(features(n), self._map(target[n]) - z)
            weight, bias = sums.solve(weight, self.shrinkage)
        layer = _linear(weight, bias, self.parameter)
        self.z = [z + layer(features(n)) for n, z in enumerate(self.z)]
        return weight, bias

    def _store(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weights[f"{name}.weight"] = weight
        if bias is not None:
            self.weights[f"{name}.bias"] = bias

    def _norm(self, name: str, scale: str | None, shift: torch.Tensor | None = None) -> None:
        """Reset a norm's gain and bias and a LayerScale to 1, 0 and 1: both are in the layers around them."""
        width = self.small.stages[0].width
        self.weights[f"{name}.weight"] = torch.ones(width)
        self.weights[f"{name}.bias"] = torch.zeros(width) if shift is None else shift
        if scale is not None and self.arch.layer_scale:
            self.weights[f"{scale}.gamma"] = torch.ones(width)


def _linear(weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = weight.to(like), bias.to(like)
    return lambda x: F.linear(x, weight, bias)
