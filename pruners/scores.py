"""Importance scores: one float64 vector per prunable group of a model, with where they come from.

A vector is named by its place in the record, ``stages.0.embed`` or ``blocks.3.mlp`` (blocks are counted over all
stages), or ``depth`` (one entry per block). Larger is more important. The kinds of units:

    embed   channels of a stage's residual stream
    heads   attention heads; those of attention between channels go whole, and methods that score ``attn`` score them
    qk, v   channels within a head, query/key and value, aligned over the heads of a block; ``v`` also those of a
            separable convolution, which methods that score ``attn`` score, too
    attn    channels of all heads, where query, key and value channels go together; heads and dims follow from it
    mlp     hidden units of an MLP
    sr      channels of PVTv2's spatially reduced map
    tail    channels of the words of a language model's band, from band 1 on (``bands.1.tail``)
    tokens  patches, scored for token plans (``pmvit``), of no meaning to widths
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prunesweep.models import Arch, UserError
from prunesweep.models.arch import Block
from prunesweep.models.io.digest import read_tensors, tensors_digest

__all__ = ["DEPTH", "FORMAT", "KINDS", "LEARNED", "TOKENS", "Scores", "kind_of", "unit_counts", "vector_sizes"]

KINDS = ("embed", "heads", "qk", "v", "attn", "mlp", "sr", "tail")
DEPTH, LEARNED, TOKENS = "depth_kl", "uvc_gates", "pmvit"  # scores of blocks and of tokens: no width method's
FORMAT = "prunesweep/scores/2"  # to be counted up when a method's scores change, so that no cache is believed
CONTENT = "sha256"  # of all else, in a file's metadata; absent from files that older versions wrote


def kind_of(name: str) -> str:
    """Return the kind of unit that a vector scores."""
    return name.rpartition(".")[2]


def unit_counts(arch: Arch) -> dict[str, int]:
    """Return name and number of units of every vector that a method may score in ``arch``.

    A block has ``attn`` where all its heads have one width for query, key and value (where pairs of channels are turned
    by places, a unit is one with two value channels), and ``heads``, ``qk`` and ``v``
    where values are at least equally wide in all heads; ragged values have none of them. One with a separable
    convolution has ``v``.
    """
    counts = {f"stages.{s}.embed": stage.width for s, stage in enumerate(arch.stages)}
    for i, block in enumerate(arch.blocks):
        counts |= {f"blocks.{i}.{kind}": count for kind, count in _block_counts(block, arch.qk_rows)}
    tails = arch.text.tails if arch.text else ()
    return counts | {f"bands.{b}.tail": width for b, width in enumerate(tails, start=1)}


def _block_counts(block: Block, qk_rows: int) -> Iterator[tuple[str, int]]:
    if block.mixer == "attn" and isinstance(block.v, int):
        yield from (("heads", block.heads), ("qk", block.qk), ("v", block.v))
        if block.v == block.qk * qk_rows:
            yield "attn", block.heads * block.qk
    if block.mixer == "xca":
        yield "heads", block.heads
    if block.mixer == "sepconv":
        yield "v", block.total_v
    if block.mlp:
        yield "mlp", block.mlp
    if block.sr:
        yield "sr", block.sr


def vector_sizes(arch: Arch, kinds: tuple[str, ...]) -> dict[str, int]:
    """Return name and number of units of every vector that a method which scores ``kinds`` must fill.

    Args:
        arch: the model's record.
        kinds: kinds of units, see this module.

    Raises:
        UserError: a block has heads of unequal widths, which units aligned over heads cannot describe.
    """
    counts = unit_counts(arch)
    of_heads = next((kind for kind in kinds if kind in ("heads", "qk", "v", "attn")), None)
    for i, block in enumerate(arch.blocks):
        if of_heads and block.mixer == "attn" and f"blocks.{i}.{of_heads}" not in counts:
            widths = "ragged" if isinstance(block.v, tuple) else f"{block.v}, query/key width {block.qk * arch.qk_rows}"
            raise UserError(f"blocks[{i}].v is {widths}: {of_heads!r} scores need equal widths in all heads")
    wanted = set(kinds)
    if "attn" in kinds:
        wanted |= {f"blocks.{i}.v" for i, block in enumerate(arch.blocks) if block.convolves}
        wanted |= {f"blocks.{i}.heads" for i, block in enumerate(arch.blocks) if block.mixer == "xca"}
    return {name: count for name, count in counts.items() if kind_of(name) in wanted or name in wanted}


@dataclass(frozen=True)
class Scores:
    """Importance scores of a model's units: ``vectors`` by name, and their ``provenance``.

    ``provenance`` holds JSON-ready facts: method, model, data, settings, number of images.
    """

    vectors: Mapping[str, torch.Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file; the caller names a scratch path and publishes it."""
        tensors = {name: v.detach().cpu().double().contiguous() for name, v in self.vectors.items()}
        text = json.dumps(dict(self.provenance))
        save_file(tensors, path, {"format": FORMAT, "provenance": text, CONTENT: tensors_digest(tensors, text)})

    @classmethod
    def load(cls, path: Path, remedy: str = "delete it to score again") -> Scores:
        """Read what ``save`` wrote. Raises UserError, ending with ``remedy``, if it is damaged or of another kind."""
        try:
            vectors, metadata = read_tensors(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise UserError(f"{path}: format {found!r}, this version reads {FORMAT!r}; {remedy}")
        text, seal = metadata.get("provenance", ""), metadata.get(CONTENT)
        # earlier versions wrote one of the numbers alone
        if seal is not None and seal not in (tensors_digest(vectors, text), tensors_digest(vectors)):
            raise UserError(f"{path} is damaged: its numbers are not those that were written; {remedy}")
        try:
            return cls(vectors, json.loads(text))
        except ValueError as error:
            raise UserError(f"{path} is damaged: provenance: {error}; {remedy}") from error


def check_scores_finite(scores: Scores, method: str = "") -> None:
    """Raise UserError where a score is no number, naming the vectors; only blocks that must stay may be infinite.

    Args:
        scores: those to check.
        method: the name of the method that they are of.
    """
    bad = [
        name
        for name, v in scores.vectors.items()
        if torch.isnan(v).any() or (kind_of(name) != "depth" and torch.isinf(v).any())
    ]
    if bad:
        whose = f" of {method!r}" if method else ""
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"scores{whose} are not finite in {', '.join(bad[:3])}{more}: the model's outputs or gradients on the "
            "calibration images are not; check the model with `prunesweep eval`"
        )
