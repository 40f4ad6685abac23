"""The evaluation forward pass of a ViT or PVTv2 in pieces: with a gate on every unit, and from any block on.

``pruners.upvit.windows`` has that of a Swin, ``pruners.upvit.lm`` that of a language model.

The pieces are the model's own sub-modules, so stock timm blocks and those of ``models.families.vit`` and
``models.families.pvt_v2`` run alike; without gates the result is ``model(x)``. Gates are named like the vectors of
``Scores`` and have shape (B, 1, units), one row per image; 1 leaves a unit, 0 removes it (``models.cut``'s meaning of
removal):

    stages.S.embed  everything that reads the residual stream: LayerNorms have mean and variance over the channels
                    that are left, and 0 in the others
    blocks.I.attn   query and value channel; with q/k norm, the norm of the channel's head counts the others only
    blocks.I.mlp    hidden unit behind the activation (before it, PVTv2's depthwise bias would remain)
    blocks.I.sr     channel of the reduced map, in its LayerNorm

Nothing is gated twice, so that the logits' derivatives at 1 mean something: the residual channel where it is read but
not where it is written, the query but not the key. Shapes: B batch, N tokens, D width, H heads, E head width, M hidden
units, R channels and P places of the reduced map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from einops import rearrange
from timm.layers import RmsNorm
from torch import nn

from prunesweep.models import Arch, arch_of, block_views
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView
from prunesweep.models.layers.mixers import attend

__all__ = ["UNGATED", "Forward", "Gates", "normed", "normed_over"]

Gates = Mapping[str, torch.Tensor]
UNGATED: Gates = {}
NORMS = (nn.LayerNorm, RmsNorm)


def _standardised(x: torch.Tensor, gate: torch.Tensor, eps: float, *, centre: bool = True) -> torch.Tensor:
    """Compute (x - mean) / sqrt(var + eps) over the last axis, weighted by ``gate``; mean 0 if no channel is left.

    Without ``centre`` nothing is taken away, as RMSNorm has it.
    """
    count = gate.sum(-1, keepdim=True).clamp(min=1)
    centred = x - (x * gate).sum(-1, keepdim=True) / count if centre else x
    return centred * ((centred.square() * gate).sum(-1, keepdim=True) / count + eps).rsqrt()


def normed_over(norm: Any, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Apply a LayerNorm or RMSNorm with mean and variance over the channels that a gate leaves.

    Args:
        norm: the norm; a missing one (an identity) passes ``x`` on.
        x: (..., D).
        gate: 1 for channels that are left, 0 for others, shape (B, 1, D); ``None`` leaves all.

    Returns:
        (..., D), also for channels that are gone.
    """
    if gate is None or not isinstance(norm, NORMS):
        return norm(x)
    if isinstance(norm, RmsNorm):
        return norm.weight * _standardised(x, gate, norm.eps, centre=False)
    return norm.weight * _standardised(x, gate, norm.eps) + norm.bias


def normed(norm: Any, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Apply ``normed_over`` and multiply by the gate.

    Args:
        norm: the norm; a missing one (an identity) passes ``x`` on, for the next reader to gate.
        x: (..., D).
        gate: as for ``normed_over``.

    Returns:
        (..., D).
    """
    y = normed_over(norm, x, gate)
    return y if gate is None or not isinstance(norm, NORMS) else gate * y


class Forward:
    """``model`` in pieces. A block's input and output are its stage's residual stream, (B, N, D).

    Where the classifier reads one token (or two, with a distillation token) of the last block, only these leave that
    block's attention: ``rows`` is their number, ``None`` where all tokens are needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.arch: Arch = arch_of(model)
        views = block_views(model, self.arch)
        self.blocks: list[Any] = [block.module for block in views]
        self.attention, self.mlps = [block.attention for block in views], [block.mlp for block in views]
        self.stage_of = [block.stage for block in views]
        last = self.arch.blocks[-1]
        whole = self.arch.pool != "token" or bool(last.conv_kernel) or last.tokens is not None
        self.rows = None if whole else 1 + int(self.arch.dist_token)
        self.causal = self.arch.text is not None
        self._pyramid = not family_of(self.arch).single_stage  # every stage embeds patches, and ends with a norm

    def __call__(self, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute logits (B, K) of images B·C·H·W."""
        return self.run(0, self.begin(0, self.stem(0, x, gates), gates), gates)

    def run(self, i: int, x: torch.Tensor, gates: Gates = UNGATED, skipped: Collection[int] = ()) -> torch.Tensor:
        """Compute logits (B, K) from the input of a block on.

        Args:
            i: number of the block; the depth stands for the end, where ``x`` are the logits (see ``after``).
            x: the block's input, (B, N, D).
            gates: by vector; left out: all units are there.
            skipped: blocks that are left out.
        """
        for j in range(i, self.arch.depth):
            x = self.after(j, x if j in skipped else self.block(j, x, gates), gates)
        return x

    def after(self, i: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the next block's input, or the logits, from block ``i``'s output."""
        if i + 1 == self.arch.depth:
            return self.logits(x, gates)
        s = self.stage_of[i + 1]
        return x if s == self.stage_of[i] else self.begin(s, self.stem(s, x, gates), gates)

    def stem(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the start of stage ``s``, before any norm: (B, N, D), of images or of the last stage's tokens."""
        model = self.model
        if not self._pyramid:
            return model.patch_drop(model._pos_embed(model.patch_embed(x)))
        if s:
            x = normed(model.stages[s - 1].norm, x, gates.get(f"stages.{s - 1}.embed"))
            x = rearrange(x, "b (h w) d -> b d h w", h=self.arch.stages[s - 1].grid[0])
        return rearrange(self._embedding(s).proj(x), "b d h w -> b (h w) d")

    def begin(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the first block's input in stage ``s`` from the output of ``stem``."""
        gate = gates.get(f"stages.{s}.embed")
        return normed_over(self._embedding(s).norm if self._pyramid else self.model.norm_pre, x, gate)

    def _embedding(self, s: int) -> Any:
        return self.model.stages[s].downsample if s else self.model.patch_embed

    def logits(self, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute logits (B, K) from the last block's output; a distilled model's are the mean of its heads."""
        model, gate = self.model, gates.get(f"stages.{len(self.arch.stages) - 1}.embed")
        if self._pyramid:
            return model.head(normed(model.stages[-1].norm, x, gate).mean(1))
        x = normed(model.norm, x, gate)
        if self.arch.head_norm == "none" and self.arch.attn_pool is not None and gate is not None:
            x = x * gate  # what reads the stream is in front of the pool
        if self.arch.head_norm == "tokens" or self.arch.attn_pool is not None:
            return model.forward_head(x)
        pooled = model.pool(x)[:, None]
        if self.arch.head_norm in ("pooled", "both"):
            pooled = normed(model.fc_norm, pooled, gate)
        elif gate is not None:
            pooled = pooled * gate
        return model.head(pooled[:, 0])

    def block(self, i: int, x: torch.Tensor, gates: Gates = UNGATED, *, mixer: bool = True) -> torch.Tensor:
        """Run a block, (B, N, D) to the same.

        Args:
            i: number of the block.
            x: its input, (B, N, D).
            gates: by vector; left out: all units are there.
            mixer: False leaves the token mixer out.
        """
        z = self.enter(i, x)
        z = self.mixer(i, z, gates) if mixer else z[:, : self._rows(i)]
        return self.leave(i, self.mlp(i, z, gates), x)

    def enter(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Compute the tokens inside block ``i``: merged where it has a token plan."""
        return x if self.arch.blocks[i].tokens is None else self.blocks[i].token_merge.merge(x)

    def leave(self, i: int, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute the output of block ``i`` from the tokens inside it at the end and from its input."""
        return z if self.arch.blocks[i].tokens is None else self.blocks[i].token_merge.spread(z, x)

    def _rows(self, i: int) -> int | None:
        """Return how many tokens, from the first on, leave the mixer of block ``i``."""
        return self.rows if i + 1 == self.arch.depth else None

    def mixer(self, i: int, z: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Add the token mixer's output to ``z``."""
        block, module, rows = self.arch.blocks[i], self.blocks[i], self._rows(i)
        if block.mixer == "none" and not block.norm_residual:
            return z[:, :rows]
        y = self.norm1(i, z, gates)
        if self.attention[i]:
            y = self.attended(i, y, gates)
        elif block.conv_kernel:
            y = module.attn(y)
        else:
            y = y[:, :rows]
        return z[:, :rows] + self.behind(i, "1", y, gates)

    def attended(self, i: int, y: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the attention of block ``i`` of its norm's output, (B, N, D), for the tokens that are needed."""
        attention, block = self.attention_of(i), self.arch.blocks[i]
        q, k, v = self.qkv(i, y, gates)
        q, k = self.scaled_heads(i, q, k, gates.get(f"blocks.{i}.attn"))
        bias = None if attention.bias is None else attention.bias()[:, :, : q.shape[2]].to(q.dtype)
        mixed = attend(q, k, v, block.v_widths, block.scale, is_causal=self.causal, attn_mask=bias)
        return attention.out.layer(normed(attention.out_norm, mixed, self._value_gate(i, gates)))

    def norm1(self, i: int, z: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the token mixer's input."""
        return self._read(i, self.blocks[i].norm1, z, gates)

    def _read(self, i: int, norm: nn.Module, z: torch.Tensor, gates: Gates) -> torch.Tensor:
        """Compute what a half of a block reads: a norm's output or, where norms stand behind, the stream itself."""
        gate = gates.get(f"stages.{self.stage_of[i]}.embed")
        if not self.arch.post_norm:
            return normed(norm, z, gate)
        return z if gate is None else z * gate

    def behind(self, i: int, half: str, y: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Apply what stands behind half ``1`` or ``2`` of a block: a norm, or layer scale where there is one."""
        if not self.arch.post_norm:
            return self.layer_scaled(i, f"ls{half}", y)
        norm = getattr(self.blocks[i], f"norm{half}")
        return normed(norm, y, gates.get(f"stages.{self.stage_of[i]}.embed"))

    def layer_scaled(self, i: int, name: str, y: torch.Tensor) -> torch.Tensor:
        """Multiply ``y`` by the layer scale ``ls1`` or ``ls2``, where there is one."""
        return getattr(self.blocks[i], name)(y) if self.arch.layer_scale else y

    def qkv(self, i: int, y: torch.Tensor, gates: Gates = UNGATED) -> tuple[torch.Tensor, ...]:
        """Compute queries (B, N, H·E) of needed rows, keys (B, P, H·E) and values (B, P, H·V), of norm1's output.

        Before any q/k norm, and queries without their gate.
        """
        attention = self.attention_of(i)
        q = attention.queries(y[:, : self._rows(i)])
        if reduction := attention.reduction:  # to (B, P, R)
            rows = self.arch.stages[self.stage_of[i]].grid[0]
            y = reduction.act(normed(reduction.norm, reduction.convolve(y, rows), gates.get(f"blocks.{i}.sr")))
        k, v = attention.keys_values(y)
        gate = self._value_gate(i, gates)
        return q, k, v if gate is None else v * gate

    def _value_gate(self, i: int, gates: Gates) -> torch.Tensor | None:
        """Return the gate on value channels (B, 1, V): a unit of ``attn`` may have several, side by side."""
        gate, block = gates.get(f"blocks.{i}.attn"), self.arch.blocks[i]
        return None if gate is None else gate.repeat_interleave(block.total_v // gate.shape[-1], -1)

    def attention_of(self, i: int) -> AttentionView:
        """Return the view of block ``i``'s attention, which it has."""
        attention = self.attention[i]
        assert attention is not None, "the caller has looked at the block's mixer"
        return attention

    def scaled_heads(self, i: int, q: torch.Tensor, k: torch.Tensor, gate: torch.Tensor | None) -> tuple[Any, Any]:
        """Split queries and keys into heads, with q/k norms where the model has them, and gate the queries.

        Args:
            i: number of the block.
            q: queries (B, N, H·E).
            k: keys (B, P, H·E).
            gate: (B, 1, H·E) on channels, or None.

        Returns:
            ((B, H, N, E), (B, H, P, E)).
        """
        attention = self.attention_of(i)
        q, k = attention.by_head(q), attention.by_head(k)
        # the channels of a pair are one unit
        by_head = None if gate is None else attention.by_head(torch.cat([gate] * self.arch.qk_rows, -1))
        if self.arch.qk_norm and by_head is not None:
            q, k = normed(attention.q_norm, q, by_head), normed_over(attention.k_norm, k, by_head)
            return attention.turned(q), attention.turned(k)
        q, k = attention.turned(attention.q_norm(q)), attention.turned(attention.k_norm(k))
        return q if by_head is None else q * by_head, k

    def hidden(self, i: int, z: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the MLP's hidden units behind the activation, (B, N, M)."""
        s, mlp = self.stage_of[i], self.mlps[i]
        assert mlp is not None, "the caller has looked whether the block has an MLP"
        gate = gates.get(f"blocks.{i}.mlp")
        bare = dataclasses.replace(mlp, inner_norm=nn.Identity(), entry_norm=nn.Identity())
        read = normed(mlp.entry_norm, self._read(i, mlp.norm, z, gates), gates.get(f"stages.{s}.embed"))
        y = bare.hidden(read, self.arch.stages[s].grid[0])
        if gate is not None:
            y = y * gate
        return normed(mlp.inner_norm, y, gate)

    def mlp(self, i: int, z: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Add the MLP's output to ``z``."""
        mlp = self.mlps[i]
        return z if mlp is None else z + self.behind(i, "2", mlp.out.layer(self.hidden(i, z, gates)), gates)
