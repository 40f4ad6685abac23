"""UP-ViT's importance: the change of the output distribution when one unit is removed.

Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers", SCIS 66(7), 2023 (arXiv 2111.15127). A unit's
score is KL(source || without the unit) in nats, summed over unlabelled images; all scores are of the unpruned model,
so they serve every target (``pruners.upvit.rules``). Units are residual channels, channels of query, key and value
together, MLP units, channels of PVTv2's reduced map, those of a language model's rarer words, and blocks.

Of a language model every word that is predicted is an image (``pruners.upvit.lm``); where images are counted here, its
texts are.

Three ways to the same quantity:

- ``exact`` removes every unit (``pruners.upvit.exact``): the definition, and the reference for the others.
- ``fisher`` is its second-order approximation, hundreds of times cheaper and more (``pruners.upvit.fisher``).
- ``hybrid`` takes residual channels exactly and all others by Fisher. Residual channels are few (4 % of the exact
  cost), and removing one is far from a small change: there the approximation is worst. For channels inside a block its
  error is far below what another draw of as many images changes.

A score is a plain sum over images, so parts over some images and some vectors add up exactly (``merge``): a unit of
work for one machine is (vectors x images), and a file of ``Scores`` is its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from prunesweep.models import Arch, UserError, arch_of, blocks_of, weights_digest
from prunesweep.models.errors import nearest
from prunesweep.models.families import FamiliesWith, family_of
from prunesweep.pruners.divergence import kl_divergence
from prunesweep.pruners.drawn_targets import image_digest, uniform_of
from prunesweep.pruners.scores import Scores, kind_of, vector_sizes

from .exact import Exact
from .fisher import fisher_sums
from .forward import Forward
from .lm import TextExact, TextForward, text_fisher_sums
from .maps import MapForward
from .windows import WindowForward

__all__ = ["FAMILIES", "IMPORTANCES", "KINDS", "SKIP", "merge", "score", "score_blocks", "score_depth"]

KINDS = ("embed", "attn", "mlp", "sr", "tail")
FAMILIES = FamiliesWith(
    "width",
    without={
        "mixed_maps": "its own passes, which leave one unit out after the other, mix no maps of heads",
        "difference_maps": "its own passes, which leave one unit out after the other, have one map for a head",
        "single_channels": "its own passes, which leave one unit out after the other, read a stage by linear layers",
        "channel_attention": "its own passes, which leave one unit out after the other, have attention of tokens alone",
        "local_mixers": "its own passes, which leave one unit out after the other, neither pool nor convolve",
        "pooled_queries": "its own passes, which leave one unit out after the other, pool no queries between stages",
    },
)
IMPORTANCES: Mapping[str, tuple[str, ...]] = {"exact": KINDS, "fisher": (), "hybrid": ("embed",)}  # what is exact
SKIP = "skip"  # the vector of ``score_blocks``
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[int, int], None]


class _Parts(NamedTuple):
    """The scoring code for a family: a model in pieces, exact scores of a batch, Fisher's."""

    forward: type[Forward]
    exact: Callable[[Any, torch.Tensor, int], Exact]
    fisher: Callable[..., dict[str, torch.Tensor]]


_IMAGES, _WINDOWS = _Parts(Forward, Exact, fisher_sums), _Parts(WindowForward, Exact, fisher_sums)
_MAPS = _Parts(MapForward, Exact, fisher_sums)
_TEXTS = _Parts(TextForward, TextExact, text_fisher_sums)


def score(
    model: nn.Module,
    batches: Batches,
    *,
    importance: str | None = None,
    labels_per_image: int | str = 4,
    seed: int = 0,
    vectors: Collection[str] | None = None,
    memory_mb: int = 1024,
    progress: Progress | None = None,
) -> Scores:
    """Compute the importance of every unit of ``vectors``, in nats, summed over all images.

    Args:
        model: a ViT, PVTv2 or language model that ``Arch.from_timm`` accepts; left in the mode it came in, without
            gradients.
        batches: (images B·C·H·W or word numbers B·T, labels); labels are not used.
        importance: ``exact``, ``fisher`` or ``hybrid``; by default the last for images, and ``fisher`` for texts, where
            every exact score compares distributions over a whole vocabulary.
        labels_per_image: Fisher's samples per image or word, or "all" for every class of an image weighted by its
            probability. They follow from ``seed`` and the image, so neither order nor batches nor shards of the images
            matter.
        seed: of these samples.
        vectors: names of ``vector_sizes(arch, KINDS)`` to score; all by default.
        memory_mb: about what the activations of one step of exact scoring may take, in MiB.
        progress: called with (steps done, steps in all), a step being one exact vector, or all Fisher ones, of a batch.

    Raises:
        UserError: a setting is not allowed, the images are not the model's, or a block's heads have unequal or
            different query/key and value widths.
    """
    arch = _checked(model, batches)
    importance = importance or ("fisher" if arch.text is not None else "hybrid")
    if importance not in IMPORTANCES:
        hint = nearest(importance, IMPORTANCES)
        raise UserError(f"importance = {importance!r}: must be one of {', '.join(IMPORTANCES)}. {hint}".strip())
    if labels_per_image != "all" and (not isinstance(labels_per_image, int) or labels_per_image < 1):
        raise UserError(f"labels_per_image = {labels_per_image!r}: must be a whole number of at least 1, or 'all'")
    if labels_per_image == "all" and arch.text is not None:
        raise UserError("labels_per_image = 'all': there are too many words; give the number to draw per word, e.g. 4")
    parts, sizes = _parts(arch), _chosen(vector_sizes(arch, KINDS), vectors)
    exact = [name for name in sizes if kind_of(name) in IMPORTANCES[importance]]
    fisher = {name: size for name, size in sizes.items() if name not in exact}

    def of_batch(forward: Forward, x: torch.Tensor, digests: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        if exact:
            trace = parts.exact(forward, x, memory_mb)
            yield from ({name: trace.score(name)} for name in exact)
        if fisher:
            yield parts.fisher(forward, x, fisher, labels_per_image, [uniform_of(seed, d) for d in digests])

    settings = {"importance": importance, "labels_per_image": labels_per_image, "seed": seed}
    steps = len(batches) * (len(exact) + bool(fisher))
    return _accumulate("upvit", model, batches, sizes, settings, of_batch, steps, progress)


def score_blocks(
    model: nn.Module, batches: Batches, *, memory_mb: int = 1024, progress: Progress | None = None
) -> Scores:
    """Compute the importance of the 2L pairs of sublayers, as the vector ``skip``; always exact.

    Entry 2i is block i left out. Entry 2i + 1 is the MLP of block i left out together with the mixer of block i + 1;
    the MLP alone where block i is the last of its stage. Errors are those of ``score``.

    Args:
        model: as for ``score``.
        batches: as for ``score``.
        memory_mb: memory of one step, in MiB.
        progress: called with (batches done, batches in all).
    """
    arch = _checked(model, batches)

    def of_batch(forward: Forward, x: torch.Tensor, _: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        yield {SKIP: _parts(arch).exact(forward, x, memory_mb).score_skips()}

    sizes = {SKIP: 2 * arch.depth}
    return _accumulate("upvit_blocks", model, batches, sizes, {}, of_batch, len(batches), progress)


@torch.no_grad()
def score_depth(
    model: nn.Module, batches: Batches, *, memory_mb: int = 1024, progress: Progress | None = None
) -> Scores:
    """Score every block by leaving it out; ascending order is the order in which to drop blocks.

    The importance of a block is KL(source || without the block), summed over the images. It is taken progressively:
    the least important block goes, and the others are scored again without it. An entry of the vector ``depth`` (L,)
    is the divergence in nats at the time when its block went, made to rise along the order. Every stage keeps its last
    block, whose entry is infinite. These scores do not add up over images.

    Args:
        model, batches, memory_mb: as for ``score``.
        progress: called with (blocks dropped, blocks to drop).

    Raises:
        UserError: images or texts are not what the model takes.
    """
    arch = arch_of(model)
    _check_batches(arch, batches)
    # behind what is left out; else whole passes are compared
    resumes = arch.family in FAMILIES and not arch.parallel
    depth = torch.full((arch.depth,), torch.inf, dtype=torch.float64)
    rounds, last = arch.depth - len(arch.stages), 0.0
    stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
    with _evaluating(model):
        forward = _parts(arch).forward(model) if resumes else None
        for done in range(rounds):
            gone = frozenset(torch.nonzero(depth.isfinite())[:, 0].tolist())
            left = [stage_of[i] for i in range(arch.depth) if i not in gone]
            trials = {i: 0.0 for i in range(arch.depth) if i not in gone and left.count(stage_of[i]) > 1}
            for x in _images(model, batches):
                if forward is None:
                    trials = {i: kl + _without(model, x, gone | {i}) for i, kl in trials.items()}
                    continue
                trace = _parts(arch).exact(forward, x, memory_mb)
                trials = {i: kl + trace.without(gone | {i}) for i, kl in trials.items()}
            least = min(trials, key=lambda i: (trials[i], i))
            # strictly rising, so that sorting the vector gives the order back
            last = max(trials[least], last + torch.finfo(torch.float64).eps * max(last, 1.0))
            depth[least] = last
            if progress:
                progress(done + 1, rounds)
    provenance = {"method": "depth_kl", "arch": arch.hash, "images": sum(len(x) for x, _ in batches)}
    return Scores({"depth": depth}, provenance)


def _without(model: nn.Module, x: torch.Tensor, gone: frozenset[int]) -> float:
    """Compute KL(model || model without these blocks), summed over images, by two passes."""
    whole = model(x)
    blocks = blocks_of(model)
    handles = [blocks[i].register_forward_hook(lambda _, inputs, __: inputs[0]) for i in gone]
    try:
        return kl_divergence(whole, model(x)).sum().item()
    finally:
        for handle in handles:
            handle.remove()


def merge(parts: Iterable[Scores]) -> Scores:
    """Merge parts over some images or vectors into the scores of all; in any order, the result has the same bits.

    Args:
        parts: results of ``score`` (or all of ``score_blocks``) that together have every vector on every shard of the
            images once. A shard is the images of one call; shards are told apart by their content, so that the same
            one is not counted twice, but an image in two shards is.

    Raises:
        UserError: parts of different models, methods or settings, a part twice, or one that is missing.
    """
    parts = list(parts)
    if not parts:
        raise UserError("no parts of scores to merge")
    for part in parts:
        _check_mergeable(parts[0].provenance, part.provenance)
    images = {str(part.provenance["shard"]): int(part.provenance["images"]) for part in parts}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for part in parts:
        shard = str(part.provenance["shard"])
        for name, vector in part.vectors.items():
            own = found.setdefault(name, {})
            if shard in own:
                raise UserError(f"{name} of image shard {shard} ({images[shard]} images) is given twice")
            own[shard] = vector
    for name, own in found.items():
        for shard in images:
            if shard not in own:
                raise UserError(
                    f"{name} of image shard {shard} ({images[shard]} images) is missing: score that part too"
                )
    vectors = {name: torch.stack([own[shard] for shard in sorted(own)]).sum(0) for name, own in sorted(found.items())}
    whole = {"images": sum(images.values()), "shard": _hex(sum(int(shard, 16) for shard in images))}
    return Scores(vectors, {**parts[0].provenance, **whole})


def _check_mergeable(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if "shard" not in other:
        raise UserError(f"scores of method {other.get('method')!r} do not add up over images")
    for key in sorted({*first, *other} - {"shard", "images"}):
        if first.get(key) != other.get(key):
            raise UserError(f"parts of scores differ in {key}: {first.get(key)!r} and {other.get(key)!r}")


def _parts(arch: Arch) -> _Parts:
    if arch.text is not None:
        return _TEXTS
    family = family_of(arch)
    if not family.supports("windows"):
        return _IMAGES
    return _MAPS if family.single_stage else _WINDOWS


def _checked(model: nn.Module, batches: Batches) -> Arch:
    arch = arch_of(model)
    if arch.family not in FAMILIES:
        why = FAMILIES.why_not(arch.family)
        raise UserError(f"{arch.source} is a {arch.family!r}: UP-ViT scores families {', '.join(FAMILIES)}; {why}")
    if arch.parallel:
        raise UserError(
            f"{arch.source}: its MLPs read what attention reads, and UP-ViT's passes go on behind either half of a "
            "block; use a method that scores by gradients, as taylor"
        )
    _check_batches(arch, batches)
    return arch


def _check_batches(arch: Arch, batches: Batches) -> None:
    if not batches:
        raise ValueError("no batches to score on")
    want = (arch.in_chans, *arch.img_size)
    for x, _ in batches:
        if arch.text is not None:
            if x.dim() != 2 or x.is_floating_point() or not 0 <= int(x.min()) <= int(x.max()) < arch.num_classes:
                shape = f"{x.dtype} of shape {tuple(x.shape)}"
                raise UserError(f"{shape}: {arch.source} takes texts B·T of word numbers below {arch.num_classes}")
        elif tuple(x.shape[1:]) != want:
            raise UserError(f"images of shape {tuple(x.shape[1:])}: {arch.source} is built for {want}")


def _chosen(sizes: Mapping[str, int], vectors: Collection[str] | None) -> dict[str, int]:
    for name in vectors or ():
        if name not in sizes:
            raise UserError(f"unknown vector {name!r}: this model has {len(sizes)}. {nearest(name, sizes)}".strip())
    return {name: size for name, size in sizes.items() if vectors is None or name in vectors}


def _accumulate(
    method: str,
    model: nn.Module,
    batches: Batches,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    of_batch: Callable[[Forward, torch.Tensor, list[int]], Iterator[dict[str, torch.Tensor]]],
    steps: int,
    progress: Progress | None,
) -> Scores:
    """Scores that are sums over batches of what ``of_batch`` yields, step by step, for each."""
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    done, digests = 0, []
    with torch.no_grad(), _evaluating(model):
        forward = _parts(arch_of(model)).forward(model)
        for x in _images(model, batches):
            own = [image_digest(image) for image in x]
            digests += own
            for part in of_batch(forward, x, own):
                for name, vector in part.items():
                    sums[name] += vector
                done += 1
                if progress:
                    progress(done, steps)
    of_model = {"arch": forward.arch.hash, "weights": weights_digest(model)}
    of_images = {"images": len(digests), "shard": _hex(sum(digests))}
    return Scores(sums, {"method": method, **of_model, **settings, **of_images})


def _images(model: nn.Module, batches: Batches) -> Iterator[torch.Tensor]:
    device = next(model.parameters()).device
    return (x.to(device) for x, _ in batches)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and no gradients of weights, which would keep activations alive; both are restored afterwards."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        model.train(training)


def _hex(total: int) -> str:
    """Write a sum of digests: those of images add up to that of a shard, those of shards to that of all images."""
    return f"{total % 2**64:016x}"
