"""UP-ViT's importance for language models: the forward pass and scores that ``pruners.upvit`` uses for family ``lm``.

Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers" (arXiv 2111.15127), UP-Transformer. Every word
that is predicted is an image, so a score is KL(source || without the unit) in nats, summed over all places of all
texts. The softmax of bands decomposes it exactly,

    KL = KL(head) + sum over bands b of p(b) · KL(tail b)

so no distribution over the whole vocabulary is ever made. Units and what goes with them:

    stages.0.embed  a residual channel: in every LayerNorm, in the table and projection of band 0 (the softmax reads
                    the same table), in all projections and clusters, and its column of the sinusoids
    bands.B.tail    a channel of the words of band B, in the input and in the softmax
    blocks.I.attn, blocks.I.mlp, and whole blocks as everywhere

A text has one row of gates for all its places. Fisher scores draw one label per place, independently: the squared
gradient of the sum of their log-probabilities has the places' sum of squares as its mean, as cross terms have mean 0.
So one backward pass serves a whole text, and the noise falls with texts times labels.

Memory of the real model (transformer_lm_wiki103, 267,744 words, texts of 512, float32), per text of a batch: Fisher
keeps 16 blocks' activations, 16 x 512 x (8 x 1024 + 2 x 4096) x 4 B = 0.5 GB, the head's logits and log-probabilities,
512 x 20,002 x (4 + 8 + 8) B = 0.2 GB, and those of tails for drawn words only, 4 MB for a word of the last band; 1.1 GB
were measured, beside 1 GB of weights. Exact scores take what ``memory_mb`` allows, at least one changed text; but
83,264 units that each need a softmax over all words are out of reach of one machine: take ``fisher`` or ``hybrid``.

Shapes: B texts, T places, D width, R what the softmax reads (D and the tails' widths), U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from prunesweep.pruners.divergence import kl_divergence
from prunesweep.pruners.scores import kind_of

from .exact import Exact
from .forward import UNGATED, Forward, Gates

__all__ = ["TextExact", "TextForward", "text_fisher_sums", "text_kl"]

LOGIT_BYTES = 8 * 8  # of one logit, compared in float64 with some temporaries


class TextForward(Forward):
    """A language model in pieces; the pass ends with the softmax's input, (B, T, R), not with logits."""

    def stem(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute word vectors with their positions, (B, T, D), of word numbers (B, T)."""
        words, vectors = self.model.words, None
        for b, (band, table, projection) in enumerate(zip(words.bands, words.tables, words.projections, strict=True)):
            own, gate = table((x - band.start).clamp(0, len(band) - 1)), gates.get(_channels(b))
            part = projection(own if gate is None else own * gate)
            vectors = part if vectors is None else torch.where((x >= band.start)[..., None], part, vectors)
        return self.model.embed(vectors)

    def begin(self, s: int, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        return x

    def logits(self, x: torch.Tensor, gates: Gates = UNGATED) -> torch.Tensor:
        """Compute the softmax's input: the hidden state and its projection for every tail, side by side."""
        embed = gates.get(_channels(0))
        hidden = x if embed is None else x * embed
        parts = [hidden]
        for b in range(1, len(self.arch.bands)):
            part, gate = self.model.project(hidden, b), gates.get(_channels(b))
            parts.append(part if gate is None else part * gate)
        return torch.cat(parts, dim=-1)

    def groups(self, read: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield logits (..., n) of the head, then of every tail, from the softmax's input (..., R)."""
        hidden, *projected = self.split(read)
        yield self.model.head(hidden)
        yield from (self.model.tail(part, b) for b, part in enumerate(projected, start=1))

    def split(self, read: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split the softmax's input into the hidden state and its projection for every tail."""
        assert self.arch.text is not None
        return torch.split(read, [self.arch.stages[0].width, *self.arch.text.tails], dim=-1)


def _channels(band: int) -> str:
    """Name the vector of a band's channels; the first band's are the residual ones."""
    return f"bands.{band}.tail" if band else "stages.0.embed"


def text_kl(forward: TextForward, source: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Compute the KL of next-word distributions, from inputs of the softmax.

        KL = KL(head) + sum over bands b of p(b) * KL(tail b)

    Args:
        forward: the model.
        source: the source's (N, R), N places.
        changed: the changed models' (U, N, R), U units.

    Returns:
        Nats, float64 (U, N).
    """
    groups = zip(forward.groups(source), forward.groups(changed), strict=True)
    head, changed_head = next(groups)
    total = kl_divergence(head, changed_head)
    clusters = head.double().softmax(-1)[:, len(forward.arch.bands[0]) :]
    for share, (tail, changed_tail) in zip(clusters.unbind(1), groups, strict=True):
        total = total + share * kl_divergence(tail, changed_tail)
    return total


class TextExact(Exact):
    """Exact scores of one batch of texts (B, T)."""

    forward: TextForward

    def __init__(self, forward: TextForward, words: torch.Tensor, memory_mb: int) -> None:
        super().__init__(forward, words, memory_mb)
        self.words = words
        widest = max(len(band) for band in forward.arch.bands)
        self.places_at_once = max(1, memory_mb * 2**20 // (LOGIT_BYTES * widest))  # of all units

    def score(self, name: str) -> torch.Tensor:
        if kind_of(name) in ("embed", "tail"):
            return torch.cat([self._divergence(read) for read in self._gated(name)])
        return super().score(name)

    def _gated(self, name: str) -> Iterator[torch.Tensor]:
        """Compute the softmax's input without every unit of a vector that the word vectors have too."""
        text = self.forward.arch.text
        assert text is not None
        band = int(name.split(".")[1])
        size = text.tails[band - 1] if band else self.forward.arch.stages[0].width
        for units in self._chunks(size):
            yield self.forward(self.words.repeat(len(units), 1), {name: self._gate(units, size)})

    def _divergence(self, logits: torch.Tensor) -> torch.Tensor:
        source = self.logits.flatten(0, 1)
        changed = logits.reshape(-1, *source.shape)
        step = max(1, self.places_at_once // len(changed))
        total = torch.zeros(len(changed), dtype=torch.float64, device=logits.device)
        for places in torch.split(torch.arange(len(source), device=logits.device), step):
            total += text_kl(self.forward, source[places], changed[:, places]).sum(1)
        return total.cpu()


def text_fisher_sums(
    forward: TextForward, words: torch.Tensor, units: Mapping[str, int], labels: int, uniform: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Compute the scores of one batch, summed over its places, float64 on the CPU.

    Args:
        forward: the model.
        words: B·T.
        units: the number of units of every vector to be scored.
        labels: drawn per place.
        uniform: a number in [0, 1) of every text's own, from which its labels follow.
    """
    like = forward.model.clusters.weight
    shape = {"dtype": like.dtype, "device": like.device}
    generators = [torch.Generator().manual_seed(int(start * 2**53)) for start in uniform]
    with torch.enable_grad():
        gates = {name: torch.ones(len(words), 1, size, **shape, requires_grad=True) for name, size in units.items()}  # type: ignore[call-overload]
        read = forward(words, gates)
        head = next(forward.groups(read)).double().log_softmax(-1)
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in units.items()}
    for _ in range(labels):
        draws = torch.stack([torch.rand(2, words.shape[1], generator=g, dtype=torch.float64) for g in generators])
        with torch.enable_grad():
            of_labels = _drawn(forward, read, head, draws.to(like.device)).sum()
        gradients = torch.autograd.grad(of_labels, list(gates.values()), retain_graph=True, materialize_grads=True)
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += 0.5 / labels * gradient[:, 0].double().square().sum(0).cpu()
    return sums


def _drawn(forward: TextForward, read: torch.Tensor, head: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Compute log-probabilities (B·T) of one word per place, drawn from the model by ``draws`` (B, 2, T) in [0, 1)."""
    first, second = (part.flatten() for part in draws.unbind(1))
    chosen = _draw(head.detach().flatten(0, 1), first)
    found = head.flatten(0, 1).gather(1, chosen[:, None])[:, 0]
    for b, part in enumerate(forward.split(read)[1:], start=1):
        rows = torch.nonzero(chosen == len(forward.arch.bands[0]) + b - 1)[:, 0]
        tail = forward.model.tail(part.flatten(0, 1)[rows], b).double().log_softmax(-1)
        inside = tail.gather(1, _draw(tail.detach(), second[rows])[:, None])[:, 0]
        found = found.index_add(0, rows, inside)
    return found


def _draw(log_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one index per row of ``log_p`` (N, K), where ``uniform`` (N,) meets the distribution function."""
    return torch.searchsorted(log_p.exp().cumsum(1), uniform[:, None], right=True)[:, 0].clamp(max=log_p.shape[1] - 1)
