"""Recovery of a cut model: readers, writers and head refitted in closed form, without labels and without training.

A method has chosen which channels, heads, units, blocks, mixers and tokens stay. Block after block, every layer that
reads or writes the stream is refitted by ridge regression, shrunk towards what the cut left: features are the small
model's own, targets the source's. Notation as in ``pruners.subspaces.compression``, with T the choice of the channels
that stay; M merges the tokens of a planned block.

    qkv   N(M z)                  q, k, v of the source at M x_i, for the channels that stay
    proj  attention output        M m_i T - M z      (a convolution: its second layer, patches only)
    fc1   N(z')                   the kept units' inputs at M m_i
    fc2   hidden units            M x T - z', x the stream in front of the next kept block
    head  pooled N(z)             the source's logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from prunesweep.models import BlockCut, Cut, arch_of, cut

from .compression import HEAD_SHRINKAGE, SHRINKAGE
from .normal_equations import NormalEquations
from .source import SourceBlock, images_of, open_source, stem

__all__ = ["recover"]

Streams = list[torch.Tensor]


@torch.no_grad()
def recover(
    model: nn.Module,
    decision: Cut,
    batches: Iterable[Any],
    *,
    shrinkage: float = SHRINKAGE,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Cut a model and refit what is left. The record and the cost are those of ``cut(model, decision)``.

    Args:
        model: the source, a ViT that ``Arch.from_timm`` accepts; it is not changed.
        decision: what stays.
        batches: calibration images (B, C, rows, columns), or pairs of images and labels, without augmentation.
        shrinkage: lambda of the fits, in units of the features' mean variance.
        progress: told of kept blocks done and of all.

    Returns:
        The recovered model, in evaluation mode.

    Raises:
        UserError: the decision does not fit, the source is not a plain ViT, or there are no images.
    """
    arch, blocks = open_source(model)
    images = images_of(batches)
    small = cut(model, decision).eval()
    source_mode = model.training
    model.eval()
    try:
        work = _Recovery(model, blocks, small, decision, images, shrinkage)
        kept = [i for i, choice in enumerate(decision.blocks) if choice.keep]
        for j, i in enumerate(kept):
            work.block(j, i, kept[j + 1] if j + 1 < len(kept) else arch.depth)
            if progress:
                progress(j + 1, len(kept))
        work.heads()
    finally:
        model.train(source_mode)
    return small


class _Recovery:
    """The streams of source and small model, up to the block that is refitted next."""

    def __init__(
        self, model: Any, blocks: list[SourceBlock], small: Any, decision: Cut, images: Streams, shrinkage: float
    ) -> None:
        self.model, self.blocks, self.small, self.decision, self.shrinkage = model, blocks, small, decision, shrinkage
        parameter = next(model.parameters())
        width = arch_of(model).stages[0].width
        embed = None if decision.embed is None else decision.embed[0]
        self.kept = torch.tensor(range(width) if embed is None else embed, device=parameter.device)
        self.x = [stem(model, batch.to(parameter)) for batch in images]
        self.z = [stem(small, batch.to(parameter)) for batch in images]

    def block(self, j: int, i: int, after: int) -> None:
        """Refit block ``j`` of the small model, block ``i`` of the source; ``after`` is the next kept one."""
        own = SourceBlock(self.small.blocks[j], arch_of(self.small).blocks[j])
        source, choice, plan = self.blocks[i], self.decision.blocks[i], own.module.token_merge
        middle = [source.after_attention(x) for x in self.x]
        following = []
        for m in middle:
            x = source.after_mlp(m)
            for between in self.blocks[i + 1 : after]:
                x = between.after_mlp(between.after_attention(x))
            following.append(x)
        merged: Callable[[Streams], Streams] = (
            (lambda streams: streams) if plan is None else (lambda streams: [plan.merge(s) for s in streams])
        )
        z = merged(self.z)
        if own.record.mixer == "attn":
            z = self._attention(own, source, choice, merged(self.x), z, merged(middle if own.record.mlp else following))
        elif own.record.conv_kernel:
            z = self._convolution(own, z, middle if own.record.mlp else following)
        elif own.record.norm_residual:
            z = [one + own.module.norm1(one) for one in z]
        if own.record.mlp:
            z = self._mlp(own, source, choice, merged(middle), z, merged(following))
        self.z = z if plan is None else [plan.spread(new, old) for new, old in zip(z, self.z, strict=True)]
        self.x = following

    def _attention(
        self, own: SourceBlock, source: SourceBlock, choice: BlockCut, x: Streams, z: Streams, target: Streams
    ) -> Streams:
        rows = _rows(source, choice, self.kept.device)
        norm, attn = own.module.norm1, own.module.attn
        self._fit(attn.qkv, [norm(s) for s in z], [source.qkv(s)[..., rows] for s in x])
        features = [own.attend(attn.qkv(norm(s))) for s in z]
        _fold(own.module.ls1, attn.proj)
        return self._write(attn.proj, features, z, target)

    def _convolution(self, own: SourceBlock, z: Streams, target: Streams) -> Streams:
        """Refit the 1x1 layer behind the convolution; prefix tokens have no place on the grid."""
        attn, prefix = own.module.attn, own.module.attn.prefix_tokens
        rows, columns = attn.grid
        layer = attn.bconv[3]
        _fold(own.module.ls1, layer)
        inside: Streams = []
        for stream in z:
            patches = own.module.norm1(stream)[:, prefix:]
            inside.append(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        norm = attn.bconv[1]
        maps = torch.cat([attn.bconv[0](one) for one in inside])
        norm.running_mean.copy_(maps.mean((0, 2, 3)))
        norm.running_var.copy_(maps.var((0, 2, 3)))
        features = [attn.bconv[:3](one).flatten(2).transpose(1, 2) for one in inside]
        wanted = [(t[..., self.kept] - s)[:, prefix:] for t, s in zip(target, z, strict=True)]
        self._fit(layer, features, wanted)
        return [s + own.module.ls1(attn(own.module.norm1(s))) for s in z]

    def _mlp(
        self, own: SourceBlock, source: SourceBlock, choice: BlockCut, m: Streams, z: Streams, target: Streams
    ) -> Streams:
        units = slice(None) if choice.mlp is None else list(choice.mlp)
        mlp = own.module.mlp
        self._fit(mlp.fc1, [own.module.norm2(s) for s in z], [source.preactivation(s)[..., units] for s in m])
        features = [mlp.act(own.preactivation(s)) for s in z]
        _fold(own.module.ls2, mlp.fc2)
        return self._write(mlp.fc2, features, z, target)

    def _write(self, layer: Any, features: Streams, z: Streams, target: Streams) -> Streams:
        self._fit(layer, features, [t[..., self.kept] - s for t, s in zip(target, z, strict=True)])
        return [s + layer(f) for s, f in zip(z, features, strict=True)]

    def _fit(self, layer: Any, features: Streams, targets: Streams, shrinkage: float | None = None) -> None:
        """Put the fitted weight and bias into a linear layer or a 1x1 convolution."""
        weight = layer.weight.flatten(1)
        sums = NormalEquations(weight.shape[1], weight.shape[0], weight.device)
        for feature, target in zip(features, targets, strict=True):
            sums.add(feature, target)
        if layer.bias is None:  # nothing takes up the means, so the fit is of the plain moments
            found = sums.solve(weight, self.shrinkage if shrinkage is None else shrinkage, centred=False)[0]
        else:
            found, bias = sums.solve(weight, self.shrinkage if shrinkage is None else shrinkage)
            layer.bias.copy_(bias)
        layer.weight.copy_(found.view_as(layer.weight))

    def heads(self) -> None:
        """Refit the classifiers to the source's logits."""
        names = ("head", "head_dist") if hasattr(self.small, "head_dist") else ("head",)
        for n, name in enumerate(names):
            token = n if len(names) > 1 else None
            features = [_pooled(self.small, s, token) for s in self.z]
            wanted = [getattr(self.model, name)(_pooled(self.model, s, token)) for s in self.x]
            self._fit(getattr(self.small, name), features, wanted, HEAD_SHRINKAGE)


def _pooled(model: Any, stream: torch.Tensor, token: int | None) -> torch.Tensor:
    """Compute the classifier's input, (B, width)."""
    normed = model.norm(stream)
    return model.fc_norm(model.pool(normed)) if token is None else normed[:, token]


def _fold(scale: Any, layer: Any) -> None:
    """Move LayerScale's factors into the layer in front of it."""
    if not hasattr(scale, "gamma"):
        return
    factors = scale.gamma
    layer.weight.mul_(factors.view(-1, *(1,) * (layer.weight.ndim - 1)))
    layer.bias.mul_(factors)
    factors.fill_(1)


def _rows(source: SourceBlock, choice: BlockCut, device: torch.device) -> torch.Tensor:
    """List the outputs of the source's qkv layer that stay, in the small model's order."""
    block = source.record
    width = block.heads * block.qk
    if choice.qk is None or choice.v is None:
        return torch.arange(2 * width + block.total_v, device=device)
    qk, v = list(chain.from_iterable(choice.qk)), list(chain.from_iterable(choice.v))
    rows = [*qk, *(width + c for c in qk), *(2 * width + c for c in v)]
    return torch.tensor(rows, device=device)
