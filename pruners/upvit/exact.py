"""Exact scores: every unit is removed on its own, and only the layers behind it are run again.

A unit's score is KL(source || without the unit), or half the squared error of features, summed over the images. The
source runs once per batch and keeps the residual stream around every sublayer. Removing an MLP unit is a rank-1 change
of the MLP's output, removing a channel of query, key and value changes one head, so both resume behind their sublayer;
residual channels resume where their stage begins, with LayerNorms over the channels that are left. Many units are
stacked on the batch axis, unit by unit.

In multiply-adds of N·C² for L blocks of width C, an MLP unit of block l costs 12 (L - 2 - l) + 2, because the last
block needs queries, projection and MLP of the class token only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from prunesweep.models import Arch
from prunesweep.pruners.divergence import feature_error, kl_divergence
from prunesweep.pruners.scores import kind_of

from .forward import UNGATED, Forward, normed, normed_over

__all__ = ["Exact", "rows_in"]


def rows_in(memory_mb: int, arch: Arch, element_size: int) -> int:
    """Estimate how many images (of all units stacked) can run at a time; at least one.

    Args:
        memory_mb: memory to use, in MiB.
        arch: the model's record.
        element_size: bytes of an activation.
    """
    largest = 0
    for stage in arch.stages:
        places = stage.grid[0] * stage.grid[1] + arch.prefix_tokens
        for block in stage.blocks:
            spans = stage.window is None or block.whole_map
            reduced = arch.pooled_map**2 or places // stage.sr_ratio**2
            keys = reduced if spans else math.prod(stage.window or ())
            channels = 6 * stage.width + 2 * block.mlp + 2 * block.heads * block.qk + block.total_v
            largest = max(largest, places * (channels + (block.heads + 2) * keys))
    return max(1, memory_mb * 2**20 // (largest * element_size))


class _Trace(NamedTuple):
    """The source's residual stream around a block's halves."""

    x: torch.Tensor  # the block's input
    entered: torch.Tensor  # the same inside the block: merged, where it has a token plan
    mixed: torch.Tensor  # behind the mixer
    done: torch.Tensor  # behind the MLP


class Exact:
    """Exact scores of one batch of images: the source runs once, then any vectors can be scored."""

    def __init__(self, forward: Forward, images: torch.Tensor, memory_mb: int) -> None:
        self.forward = forward
        self.batch = len(images)
        self.stems: list[torch.Tensor] = []
        self.trace: list[_Trace] = []
        arch, x = forward.arch, images
        for i in range(arch.depth):
            s = forward.stage_of[i]
            if s == len(self.stems):
                self.stems.append(forward.stem(s, x))
                x = forward.begin(s, self.stems[s])
            entered = forward.enter(i, x)
            mixed = forward.mixer(i, entered)
            done = forward.mlp(i, mixed)
            self.trace.append(_Trace(x, entered, mixed, done))
            x = forward.leave(i, done, x)
        self.logits = forward.logits(x)
        self.units_at_once = max(1, rows_in(memory_mb, arch, x.element_size()) // self.batch)

    def score(self, name: str) -> torch.Tensor:
        """Compute the scores of a vector's units, summed over the images, float64 on the CPU."""
        index = int(name.split(".")[1])
        parts = _LOGITS[kind_of(name)](self, index)
        return torch.cat([self._divergence(logits) for logits in parts])

    def score_skips(self) -> torch.Tensor:
        """Score (2L,) without block i, and without block i's MLP and the next block's mixer (see ``score_blocks``)."""
        forward, depth = self.forward, self.forward.arch.depth
        entries = []
        for i, trace in enumerate(self.trace):
            entries.append(forward.run(i + 1, forward.after(i, trace.x)))
            j, x = i + 1, forward.after(i, forward.leave(i, trace.mixed, trace.x))
            if j < depth and forward.stage_of[j] == forward.stage_of[i]:
                j, x = j + 1, forward.after(j, forward.block(j, x, mixer=False))
            entries.append(forward.run(j, x))
        return torch.cat([self._divergence(logits) for logits in entries])

    def without(self, skipped: frozenset[int]) -> float:
        """Compute the divergence, summed over the images, of the source without these blocks."""
        start = min(skipped)
        return float(self._divergence(self.forward.run(start, self.trace[start].x, skipped=skipped)))

    def _divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Compute the divergence (units,) of stacked logits (units·B, K)."""
        changed = logits.view(-1, *self.logits.shape)
        measure = feature_error if self.forward.arch.headless else kl_divergence
        return measure(self.logits, changed).sum(1).cpu()

    def _chunks(self, units: int) -> Iterator[torch.Tensor]:
        return iter(torch.split(torch.arange(units, device=self.logits.device), self.units_at_once))

    def _stack(self, x: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Repeat ``x`` (B, N, D) once for every unit, (units·B, N, D)."""
        return x.repeat(len(units), 1, 1)

    def _gate(self, units: torch.Tensor, size: int) -> torch.Tensor:
        """Make gates (units·B, 1, size), each unit's rows without that unit."""
        return self._one_less(units, size).repeat_interleave(self.batch, 0)[:, None]

    def _one_less(self, units: torch.Tensor, size: int) -> torch.Tensor:
        return 1 - torch.eye(size, dtype=self.logits.dtype, device=units.device)[units]

    def _resume(self, i: int, z: torch.Tensor) -> torch.Tensor:
        """Compute logits from behind block ``i``'s MLP, (units·B, N, D) to (units·B, K)."""
        forward, x = self.forward, self.trace[i].x
        if forward.arch.blocks[i].tokens is not None:  # the block's input is read again only in this case
            x = x.repeat(len(z) // self.batch, 1, 1)
        return forward.run(i + 1, forward.after(i, forward.leave(i, z, x)))

    def _embed(self, s: int) -> Iterator[torch.Tensor]:
        forward, size = self.forward, self.forward.arch.stages[s].width
        for units in self._chunks(size):
            gates = {f"stages.{s}.embed": self._gate(units, size)}
            x = forward.begin(s, self._stack(self.stems[s], units), gates)
            yield forward.run(forward.stage_of.index(s), x, gates)

    def _mlp(self, i: int) -> Iterator[torch.Tensor]:
        forward, trace = self.forward, self.trace[i]
        if self.forward.arch.mlp_norm or self.forward.arch.post_norm:  # a norm over units or outputs follows
            yield from self._gated_mlp(i)
            return
        hidden = forward.hidden(i, trace.mixed).movedim(-1, 0)[..., None]  # (M, B, N, 1)
        mlp = forward.mlps[i]
        assert mlp is not None, "only blocks with an MLP have such a vector"
        columns = forward.layer_scaled(i, "ls2", mlp.out.weight.T)[:, None, None]  # (M, 1, 1, D)
        for units in self._chunks(len(hidden)):
            z = torch.addcmul(trace.done, hidden[units], columns[units], value=-1)
            yield self._resume(i, z.flatten(0, 1))

    def _gated_mlp(self, i: int) -> Iterator[torch.Tensor]:
        size = self.forward.arch.blocks[i].mlp
        for units in self._chunks(size):
            gates = {f"blocks.{i}.mlp": self._gate(units, size)}
            yield self._resume(i, self.forward.mlp(i, self._stack(self.trace[i].mixed, units), gates))

    def _gated_attn(self, i: int) -> Iterator[torch.Tensor]:
        forward, block = self.forward, self.forward.arch.blocks[i]
        size = block.heads * block.qk
        for units in self._chunks(size):
            gates = {f"blocks.{i}.attn": self._gate(units, size)}
            z = forward.mixer(i, self._stack(self.trace[i].entered, units), gates)
            yield self._resume(i, forward.mlp(i, z))

    def _sr(self, i: int) -> Iterator[torch.Tensor]:
        forward, size = self.forward, self.forward.arch.blocks[i].sr
        for units in self._chunks(size):
            gates = {f"blocks.{i}.sr": self._gate(units, size)}
            z = forward.mixer(i, self._stack(self.trace[i].entered, units), gates)
            yield self._resume(i, forward.mlp(i, z))

    def _attn(self, i: int) -> Iterator[torch.Tensor]:
        forward, trace, block = self.forward, self.trace[i], self.forward.arch.blocks[i]
        attention = forward.attention_of(i)
        placed = attention.rotary is not None or attention.bias is not None or attention.windows is not None
        if placed or forward.arch.post_norm:  # pairs are turned, logits have biases, or a norm follows
            yield from self._gated_attn(i)
            return
        weight = self.forward.attention_of(i).out.weight
        q, k, v = forward.qkv(i, forward.norm1(i, trace.entered), UNGATED)
        for head in torch.arange(block.total_v, device=q.device).view(block.heads, -1):
            columns = weight[:, head].T  # (E, D)
            own = q[..., head], k[..., head], v[..., head]
            whole = self._head_logits(i, *own[:2]).softmax(-1) @ own[2]
            for units in self._chunks(block.qk):
                gate = self._one_less(units, block.qk)[:, None, None]  # (units, 1, 1, E)
                shares = self._head_logits_without(i, *own[:2], units, gate).softmax(-1)
                change = (shares @ own[2] * gate - whole) @ columns
                z = trace.mixed + forward.layer_scaled(i, "ls1", change)
                yield self._resume(i, forward.mlp(i, z.flatten(0, 1)))

    def _head_logits(self, i: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Compute attention logits (B, N, P) of one head's queries and keys."""
        attention = self.forward.attention_of(i)
        if self.forward.arch.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        logits = attention.record.scale * q @ k.mT
        if not self.forward.causal:
            return logits
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(ahead, -torch.inf)

    def _head_logits_without(
        self, i: int, q: torch.Tensor, k: torch.Tensor, units: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """Compute the logits without one channel's product, (units, B, N, P).

        With q/k norm the head's logits change as a whole.
        """
        attention = self.forward.attention_of(i)
        scale = attention.record.scale
        if not self.forward.arch.qk_norm:
            q_u, k_u = (t[..., units].movedim(-1, 0) for t in (q, k))
            return torch.addcmul(self._head_logits(i, q, k), q_u[..., None], k_u[..., None, :], value=-scale)
        return scale * normed(attention.q_norm, q, gate) @ normed_over(attention.k_norm, k, gate).mT


_LOGITS: Mapping[str, Callable[[Exact, int], Iterator[torch.Tensor]]] = {
    "embed": Exact._embed,
    "attn": Exact._attn,
    "mlp": Exact._mlp,
    "sr": Exact._sr,
}
