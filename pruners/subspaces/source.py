"""Reading a source ViT block by block, and the statistics of its spaces from one pass of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, blocks_of
from prunesweep.models.arch import Block
from prunesweep.models.layers.mixers import attend

from .support import can_recover

__all__ = ["SourceBlock", "SourceStatistics", "images_of", "open_source", "stem"]


@dataclass(frozen=True)
class SourceBlock:
    """The pieces of one block. Shapes: x and m (B, N, D), qkv (B, N, 2 H E + sum of V), hidden (B, N, M)."""

    module: Any
    record: Block

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Compute queries, keys and values, head after head, before any q/k norm."""
        return self.module.attn.qkv(self.module.norm1(x))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Compute the input of the output projection."""
        block, norms = self.record, (self.module.attn.q_norm, self.module.attn.k_norm)
        return attend_with(qkv, block.heads, block.qk, block.v_widths, block.scale, norms)

    def after_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the stream m between attention and MLP."""
        if self.record.mixer != "attn":
            return x
        return x + self.module.ls1(self.module.attn.proj(self.attend(self.qkv(x))))

    def preactivation(self, m: torch.Tensor) -> torch.Tensor:
        """Compute the hidden units before their activation."""
        return self.module.mlp.fc1(self.module.norm2(m))

    def after_mlp(self, m: torch.Tensor) -> torch.Tensor:
        """Compute the next block's stream."""
        if not self.record.mlp:
            return m
        return m + self.module.ls2(self.module.mlp(self.module.norm2(m)))

    def gain(self, half: str) -> torch.Tensor:
        """Return LayerScale's factors ``ls1`` or ``ls2`` on a half's output, (D,); ones without it."""
        scale = getattr(self.module, half)
        weight = self.module.attn.proj.weight if half == "ls1" else self.module.mlp.fc2.weight
        return scale.gamma if hasattr(scale, "gamma") else torch.ones_like(weight[:, 0])


def attend_with(
    qkv: torch.Tensor,
    heads: int,
    qk: int,
    v: Sequence[int],
    scale: float,
    norms: tuple[nn.Module, nn.Module],
) -> torch.Tensor:
    """Run softmax attention on joined queries, keys and values.

    Args:
        qkv: (B, N, 2 H E + sum of V).
        heads, qk, v: H, E, and V of every head.
        scale: factor on the logits.
        norms: of queries and keys.
    """
    q, k, values = torch.split(qkv, [heads * qk, heads * qk, sum(v)], dim=-1)
    q, k = (rearrange(t, "b n (h e) -> b h n e", h=heads) for t in (q, k))
    return attend(norms[0](q), norms[1](k), values, v, scale)


def open_source(model: nn.Module) -> tuple[Arch, list[SourceBlock]]:
    """Return the record and blocks of a ViT whose parts can all be refitted.

    Raises:
        UserError: another family, or a block with a convolution, a token plan or token factors.
    """
    arch = arch_of(model)
    if reason := can_recover(arch):
        raise UserError(reason)
    pairs = zip(blocks_of(model), arch.blocks, strict=True)
    return arch, [SourceBlock(module, record) for module, record in pairs]


def stem(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Compute the first block's input.

    Args:
        model: a timm ViT.
        images: (B, C, rows, columns).

    Returns:
        (B, N, D).
    """
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def images_of(batches: Iterable[Any]) -> list[torch.Tensor]:
    """Return the calibration images of a list of batches; labels that come with them are not used.

    Raises:
        UserError: there is no image, only one, or a value that is not finite.
    """
    found = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    count = sum(len(images) for images in found)
    if count < 2:
        raise UserError(f"{count} calibration images: give at least 2, better 256 or more")
    if not all(bool(torch.isfinite(images).all()) for images in found):
        raise UserError("a calibration image has a value that is not finite")
    return found


@dataclass
class SourceStatistics:
    """Sums of one pass over the source, in float64; they serve every width and add up over workers.

    ``stream`` is the sum over the inputs of all norms of E[u u'], u = Ms / |Ms| (section 2 of the method: LayerNorm
    forgets a token's mean and length). Per block with attention there are S_q and S_k (H, E, E), per block with an MLP
    the mean and mean square of every hidden unit.
    """

    images: int = 0
    rows: int = 0
    stream: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # (2, M)

    @classmethod
    @torch.no_grad()
    def collect(
        cls, model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int, int], None] | None = None
    ) -> SourceStatistics:
        """Run the source once over calibration images.

        Args:
            model: a ViT; put into evaluation mode for the time of the pass.
            batches: images (B, C, rows, columns), or pairs of images and labels.
            progress: told of batches done and of all.

        Raises:
            UserError: the source cannot be read block by block, there are no images, or activations are not finite.
        """
        arch, blocks = open_source(model)
        images, device, found = images_of(batches), next(model.parameters()).device, cls()
        dtype = next(model.parameters()).dtype
        mode = model.training
        model.eval()
        for number, batch in enumerate(images):
            found._add(blocks, stem(model, batch.to(device, dtype)), arch.source)
            if progress:
                progress(number + 1, len(images))
        model.train(mode)
        return found

    def merge(self, other: SourceStatistics) -> None:
        """Add the sums of another worker."""
        self.images += other.images
        self.rows += other.rows
        self.stream = self.stream + other.stream if self.stream.numel() else other.stream
        for name in ("queries", "keys", "hidden"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for i, value in theirs.items():
                mine[i] = mine[i] + value if i in mine else value

    @property
    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute spectrum (D,) and eigenvectors (D, D) of the stream, in ascending order; the spectrum's sum is 1."""
        values, vectors = torch.linalg.eigh(self.stream)
        values = values.clamp_min(0)
        return values / values.sum(), vectors

    def unit_variance(self, block: int) -> torch.Tensor:
        """Compute the variance of every hidden unit of a block after its activation, (M,)."""
        mean, square = self.hidden[block] / self.rows
        return (square - mean**2).clamp_min(0)

    def _add(self, blocks: Sequence[SourceBlock], x: torch.Tensor, source: str) -> None:
        own = SourceStatistics(images=len(x), rows=x.shape[0] * x.shape[1])
        own.stream = _directions(x)
        for i, block in enumerate(blocks):
            if block.record.mixer == "attn":
                qkv = block.qkv(x)
                own.queries[i], own.keys[i] = _moments(qkv, block.record.heads, block.record.qk)
                x = x + block.module.ls1(block.module.attn.proj(block.attend(qkv)))
                own.stream = own.stream + _directions(x)
            if block.record.mlp:
                hidden = block.module.mlp.act(block.preactivation(x))
                wide = hidden.flatten(0, -2).double()
                own.hidden[i] = torch.stack([wide.sum(0), (wide**2).sum(0)])
                x = x + block.module.ls2(block.module.mlp.fc2(hidden))
                own.stream = own.stream + _directions(x)
        if not bool(torch.isfinite(own.stream).all()):
            raise UserError(f"{source}: an activation is not finite on these images; nothing can be computed from it")
        self.merge(own)


def _directions(x: torch.Tensor) -> torch.Tensor:
    """Sum u u' over tokens (D, D), u the centred token of length 1; constant tokens add nothing."""
    wide = x.flatten(0, -2).double()
    centred = wide - wide.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return unit.T @ unit


def _moments(qkv: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum q q', and k k' with keys centred per image, over tokens, (H, E, E) each."""
    q, k, _ = torch.split(qkv, [heads * width, heads * width, qkv.shape[-1] - 2 * heads * width], dim=-1)
    q, k = (rearrange(t.double(), "b n (h e) -> b n h e", h=heads) for t in (q, k))
    k = k - k.mean(1, keepdim=True)
    return torch.einsum("bnhe,bnhf->hef", q, q), torch.einsum("bnhe,bnhf->hef", k, k)
