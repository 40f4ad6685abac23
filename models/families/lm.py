"""A decoder-only language model with adaptive input and adaptive softmax, each block with widths of its own.

It is fairseq's ``transformer_lm_wiki103`` (Baevski and Auli, "Adaptive Input Representations for Neural Language
Modeling", arXiv 1809.10853): norms in front of attention and MLP and none at the end, sinusoidal positions, word
vectors whose width depends on the word's band of frequency, projected to the residual width and scaled, and a softmax
in two steps (Grave et al., arXiv 1609.04309) that shares tables and projections with the input. Blocks are those of
``models.families.vit``, in timm's names.

After pruning, ``columns`` lists the columns of the source's sinusoids that the residual channels have; the sinusoids
are computed as they are read, so a text of any length has positions.

Shapes: B batch, T words of a text, D residual width, V words of the vocabulary, n and d words and width of a band.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunesweep.models.arch import Arch, Block, Stage, Text
from prunesweep.models.errors import UserError

from .base import Family
from .block_costs import Cost
from .checks import PYRAMID, check_at_least, check_one_of
from .spaces import BLOCK, WHOLE, AxisUse, Table, reads, shares, writes
from .views import AttentionView, Reader
from .vit import HeteroBlock

__all__ = ["LM", "LanguageModel", "build_lm", "lm_arch"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
TIED = ("all", "tables", "none")  # what the softmax shares with the input


class Words(nn.Module):
    """Adaptive input: word numbers (B, T) to vectors (B, T, D). Every band is computed for every word."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        (stage,), text = arch.stages, arch.text
        assert text is not None
        self.bands, widths = arch.bands, (stage.width, *text.tails)
        self.tables = nn.ModuleList(nn.Embedding(len(band), d) for band, d in zip(self.bands, widths, strict=True))
        self.projections = nn.ModuleList(nn.Linear(d, stage.width, bias=False) for d in widths)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Look up vectors (B, T, D) of word numbers (B, T)."""
        parts = [
            projection(table((words - band.start).clamp(0, len(band) - 1)))
            for band, table, projection in zip(self.bands, self.tables, self.projections, strict=True)
        ]
        x = parts[0]
        for band, part in zip(self.bands[1:], parts[1:], strict=True):
            x = torch.where((words >= band.start)[..., None], part, x)
        return x


class Softmax(nn.Module):
    """Tables and projections of the adaptive softmax, by band, where it does not share the input's."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        (stage,), text = arch.stages, arch.text
        assert text is not None
        widths = (stage.width, *text.tails)
        tables = enumerate(widths) if text.tied == "none" else ()
        self.tables = nn.ModuleDict({str(b): nn.Embedding(len(arch.bands[b]), d) for b, d in tables})
        projections = () if text.tied == "all" else enumerate(text.tails, start=1)
        self.projections = nn.ModuleDict({str(b): nn.Linear(d, stage.width, bias=False) for b, d in projections})


class LanguageModel(nn.Module):
    """Next-word distributions of texts, (B, T) word numbers to (B, T, V) log-probabilities."""

    columns: torch.Tensor

    def __init__(self, arch: Arch, *, drop_path: float = 0.0) -> None:
        super().__init__()
        (stage,) = arch.stages
        assert arch.text is not None
        self.text, self.num_classes, self.num_features = arch.text, arch.num_classes, stage.width
        rates = torch.linspace(0, drop_path, len(stage.blocks), device="cpu").tolist()
        norm_layer = partial(LayerNorm, eps=arch.norm_eps)
        self.words = Words(arch)
        self.register_buffer("columns", torch.arange(stage.width))
        self.blocks = nn.ModuleList(
            HeteroBlock(arch, block, drop_path=rate, act_layer=ACTIVATIONS[arch.act], norm_layer=norm_layer)
            for block, rate in zip(stage.blocks, rates, strict=True)
        )
        self.clusters = nn.Linear(stage.width, len(self.text.tails), bias=False)
        self.softmax = Softmax(arch)
        self.grad_checkpointing = False
        self.apply(_init)

    def forward(self, words: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return log-probabilities (B, T, V) of every next word or, of ``targets`` (B, T) alone, (B, T)."""
        hidden = self.hidden(words)
        return self.log_prob(hidden) if targets is None else self.log_prob_of(hidden, targets)

    def hidden(self, words: torch.Tensor) -> torch.Tensor:
        """Compute the last block's output, (B, T, D)."""
        x = self.embed(self.words(words))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, is_causal=True, use_reentrant=False)
            else:
                x = block(x, is_causal=True)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what is in them, or stop doing so."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Refuse another classifier.

        Raises:
            UserError: always: the words that it predicts are those that it reads.
        """
        raise UserError(f"reset_classifier({num_classes}): the classes of a language model are its vocabulary")

    def embed(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute scaled word vectors with their positions, (B, T, D)."""
        return self.text.embed_scale * vectors + self.positions(vectors.shape[1])

    def positions(self, length: int) -> torch.Tensor:
        """Compute position vectors (T, D): the kept columns of the source's [sines | cosines].

        They are in float32 at least, as in fairseq.
        """
        weight, half = self.clusters.weight, self.text.positions // 2
        shape = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        rates = torch.exp(torch.arange(half, **shape) * -(math.log(10000) / (half - 1)))  # type: ignore[call-overload]
        places = torch.arange(length, **shape) + self.text.first_position  # type: ignore[call-overload]
        angles = places[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)[:, self.columns].to(weight.dtype)

    def table(self, band: int) -> torch.Tensor:
        """Return the softmax's word vectors of a band, (n, d)."""
        tables = self.softmax.tables
        return (tables[str(band)] if tables else self.words.tables[band]).weight  # type: ignore[return-value]

    def projection(self, band: int) -> torch.Tensor:
        """Return the weights that project the hidden state to a tail's width, (D, d)."""
        own = self.softmax.projections
        return (own[str(band)] if own else self.words.projections[band]).weight  # type: ignore[return-value]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., n + tails) of the words of band 0 and of every other band as a whole."""
        return torch.cat([F.linear(hidden, self.table(0)), self.clusters(hidden)], dim=-1)

    def project(self, hidden: torch.Tensor, band: int) -> torch.Tensor:
        """Project the hidden state to a tail's width, (..., d)."""
        return F.linear(hidden, self.projection(band).T)

    def tail(self, projected: torch.Tensor, band: int) -> torch.Tensor:
        """Compute logits (..., n) within a band other than the first, from the output of ``project``."""
        return F.linear(projected, self.table(band))

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute log-probabilities (..., V) of all words.

        log p(w) = log softmax(head)[w]                               w in band 0
        log p(w) = log softmax(head)[band] + log softmax(tail)[w]     w in another band
        """
        bands = self.words.bands
        head = _log_softmax(self.head(hidden))
        words, clusters = head.tensor_split([len(bands[0])], dim=-1)
        tails = [
            _log_softmax(self.tail(self.project(hidden, b), b)) + clusters[..., b - 1 : b] for b in range(1, len(bands))
        ]
        return torch.cat([words, *tails], dim=-1)

    def log_prob_of(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute log-probabilities of ``targets`` alone, in their shape.

        A tail is computed only for the words that are in it.
        """
        bands = self.words.bands
        hidden, words = hidden.flatten(0, -2), targets.flatten()
        which = torch.zeros_like(words)
        for band in bands[1:]:
            which += words >= band.start
        place = torch.where(which == 0, words, len(bands[0]) + which - 1)
        found = _log_softmax(self.head(hidden)).gather(1, place[:, None])[:, 0]
        for b, band in enumerate(bands[1:], start=1):
            rows = torch.nonzero(which == b)[:, 0]  # may be empty, which leaves the tail in the graph
            inside = _log_softmax(self.tail(self.project(hidden[rows], b), b))
            found = found.index_add(0, rows, inside.gather(1, (words[rows] - band.start)[:, None])[:, 0])
        return found.view(targets.shape)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Compute the logarithm of a softmax, in float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _init(module: nn.Module) -> None:
    """Initialise as fairseq does: word vectors of unit length in the mean, Glorot's uniform weights elsewhere."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_lm(arch: Arch, *, drop_path: float = 0.0) -> LanguageModel:
    """Build the language model of ``arch``, with random weights.

    Args:
        arch: the record.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
    """
    return LanguageModel(arch, drop_path=drop_path)


class LanguageModelFamily(Family):
    """The family ``lm``: the decoder of this module; its grid is one row of words."""

    name = "lm"
    lacks: ClassVar[dict[str, str]] = {
        "global_attention": "a word attends to itself and to those before it",
        "images": "it takes words",
    }
    capabilities = frozenset({"text", "width", "depth", "mixed_heads", "streams"})
    single_stage = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        **PYRAMID,
        "pool": "none",
        "head_norm": "none",
        "in_chans": 1,
        "patch_size": (1, 1),
    }
    first_conv = None
    block_tensors = BLOCK
    outer_tensors: ClassVar[Table] = {
        "columns": (writes("in"),),  # which of the source's sinusoids are added
        "clusters.weight": (WHOLE, reads("in")),
    }

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> LanguageModel:
        """Build the language model of ``arch``."""
        return build_lm(arch, drop_path=drop_path)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, whose words attend to those before them."""
        view = super().attention_view(block, record)
        return view and dataclasses.replace(view, causal=True)

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute scaled word vectors with their positions (B, T, D) from word numbers (B, T)."""
        found: torch.Tensor = model.embed(model.words(x))
        return found

    def run_block(self, arch: Arch, stage: Stage, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute the stream behind a block, whose words attend to those before them."""
        found: torch.Tensor = block(x, is_causal=True)
        return found

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the layer of the bands' logits; those of the words share their weights with the word vectors."""
        return (Reader("clusters", model.clusters, None, lambda x: x),)

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute log-probabilities (B, T, V) from the last stream."""
        found: torch.Tensor = model.log_prob(x)
        return found

    def classifiers(self, arch: Arch) -> None:
        """Return no names: the classes are the words of the vocabulary, whose number cannot change."""

    def example_input(self, arch: Arch, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Make random word numbers (B, T)."""
        return torch.randint(arch.num_classes, (batch, arch.tokens), generator=generator)

    def check_whole(self, arch: Arch) -> None:
        """Raise UserError where the vocabulary, its bands or the positions are impossible."""
        text = arch.text
        assert text is not None
        check_one_of("act", arch.act, ACTIVATIONS)
        check_one_of("text.tied", text.tied, TIED)
        if arch.img_size[0] != 1:
            raise UserError(f"img_size = {list(arch.img_size)}: a text has one row of words, [1, length]")
        if not text.cutoffs or any(len(band) == 0 for band in arch.bands):
            raise UserError(
                f"text.cutoffs = {list(text.cutoffs)}: must be one or more, ascending in 1..{arch.num_classes - 1}"
            )
        if len(text.tails) != len(text.cutoffs):
            raise UserError(f"text.tails = {list(text.tails)}: must have one width per cutoff, {len(text.cutoffs)}")
        for j, width in enumerate(text.tails):
            check_at_least(f"text.tails[{j}]", width, 1)
        if not isinstance(text.embed_scale, float) or not text.embed_scale > 0:
            raise UserError(
                f"text.embed_scale = {text.embed_scale!r}: must be a positive float (the source's D ** 0.5)"
            )
        check_at_least("text.positions", text.positions, max(4, arch.stages[0].width))
        if text.positions % 2:
            raise UserError(f"text.positions = {text.positions}: must be even, as many sines as cosines")
        check_at_least("text.first_position", text.first_position, 0)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count tables and projections of all bands, and clusters; parameters that the softmax shares count once."""
        (stage,), text = arch.stages, arch.text
        assert text is not None
        width, tails = stage.width, sum(text.tails)
        vectors = [len(band) * own for band, own in zip(arch.bands, (width, *text.tails), strict=True)]
        projections, clusters = width * (width + tails), width * len(text.tails)
        macs = projections + clusters + sum(vectors) + width * tails
        own = width * tails * (text.tied != "all") + sum(vectors) * (text.tied == "none")
        return Cost(macs, sum(vectors) + projections + clusters + own)

    def block_cost(self, arch: Arch, stage: Stage, block: Block) -> Cost:
        """Count MACs per word, each of which attends to a whole context, and parameters."""
        whole = super().block_cost(arch, stage, block)
        return Cost(whole.macs // (stage.grid[0] * stage.grid[1]), whole.params)

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Word vectors of band 0 have the residual channels, those of band B from the second on ``bands.B.tail``."""
        match = re.fullmatch(r"(words|softmax)\.(tables|projections)\.(\d+)\.weight", tensor)
        if match is None:
            return super().uses(arch, tensor)
        assert arch.text is not None
        part, kind, band = match[1], match[2], int(match[3])
        residual, channels = "stages.0.embed", f"bands.{band}.tail" if band else "stages.0.embed"
        if kind == "tables":
            shared = shares if arch.text.tied != "none" else writes
            return WHOLE, (shared if part == "words" else reads)(channels)
        if part == "softmax":  # from the hidden state to the band's channels, transposed
            return reads(residual), writes(channels)
        shared_here = band > 0 and arch.text.tied == "all"
        return (shares(residual), shares(channels)) if shared_here else (writes(residual), reads(channels))

    def spaces(self, arch: Arch) -> dict[str, int]:
        """Return the size of every space, with the word channels of the bands from the second on."""
        assert arch.text is not None
        tails = {f"bands.{band}.tail": width for band, width in enumerate(arch.text.tails, start=1)}
        return super().spaces(arch) | tails

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why a space's channels can only be chosen: of the residual stream, because of its positions."""
        if space.endswith(".embed"):
            return "positions are columns of the source's sinusoids"
        return super().only_chosen(arch, space)


LM = LanguageModelFamily()


def lm_arch(
    *,
    words: int,
    cutoffs: tuple[int, ...],
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    length: int = 512,
    factor: int = 4,
    source: str = "adaptive_lm",
    vocabulary: str = "",
) -> Arch:
    """Make a uniform record in fairseq's proportions, everything tied: band j has ``width // factor ** j`` channels.

    ``transformer_lm_wiki103`` has 267,744 words, cutoffs 20,000 and 60,000, width 1024, depth 16, 8 heads and MLPs of
    4096. The result is not validated.

    Args:
        words: V, words of the vocabulary.
        cutoffs: number of the first word of every band from the second on.
        width: D, the residual width, and that of the first band.
        depth: number of blocks.
        heads: heads of every block; each has ``width // heads`` channels.
        mlp: hidden units of every block.
        length: T, words of the texts that the model is trained on.
        factor: ratio of the widths of a band and the next.
        source: name of the source model.
        vocabulary: digest of the list of words, where it is known.
    """
    qk = width // heads
    blocks = tuple(Block(src=i, heads=heads, qk=qk, v=qk, scale=qk**-0.5, mlp=mlp) for i in range(depth))
    return Arch(
        family="lm",
        source=source,
        img_size=(1, length),
        patch_size=(1, 1),
        in_chans=1,
        num_classes=words,
        stages=(Stage(width=width, grid=(1, length), blocks=blocks),),
        class_token=False,
        pool="none",
        head_norm="none",
        norm_eps=1e-5,
        act="relu",
        text=Text(
            cutoffs=cutoffs,
            tails=tuple(width // factor**j for j in range(1, len(cutoffs) + 1)),
            embed_scale=width**0.5,
            positions=width,
            vocabulary=vocabulary,
        ),
    )
