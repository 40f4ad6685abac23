"""Compute exact accuracy and perplexity with any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import UserError
from prunesweep.models.families.lm import LanguageModel
from prunesweep.models.feature_head import is_headless
from prunesweep.models.precision import widened
from prunesweep.pruners.divergence import FeatureQuality, feature_sums, kl_divergence

from .data import NO_LABEL, Data
from .data.text import IGNORED
from .metrics import EvalMetrics
from .own_measure import Measure, measured_by
from .world import World

__all__ = [
    "EVAL_BATCH",
    "Compared",
    "evaluate",
    "evaluate_all",
    "evaluate_on",
]

EVAL_BATCH = 256
TOP5_ABOVE = 10  # classes: among fewer, five answers say little
LOGITS_AT_A_TIME = 2**26  # words x vocabulary of language models, all together
LOGITS_KEPT = 2**25  # images x classes: 128 MiB


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, ...]],
    world: World | None = None,
    *,
    source: nn.Module | None = None,
    per_class: bool = False,
    quality: Measure | None = None,
) -> dict[str, Any]:
    """Measure accuracy and loss over all images, and agreement with a source; leave the model's mode as it was.

    A language model is measured over all words that it has to predict, images being words. Models in half precision are
    measured in float32, one in double precision as it is. A backbone without a head has no answers: its features are
    compared with the source's.

    Args:
        model: a classifier, a ``LanguageModel`` or a backbone, on its device.
        batches: (images, labels) or (words, next words) per batch; with a ``world``, only this worker's share. A third
            item, a source's logits (B, K) (``Compared``), stands for ``source``.
        world: the workers that evaluate together; every one of them gets the result over all shares.
        source: a model in evaluation mode, on the same device and of the same classes or as many features, to compare
            with.
        per_class: give ``recall`` too.
        quality: a function with the decorator ``own_quality``, for one worker; ``batches`` are a list or a DataLoader.

    Returns:
        What ``quality`` gives, by the function's name. ``images``, their number. ``top1`` in percent, ``top5`` where
        there are more than ten classes, ``loss`` (mean cross-entropy) and, of images, ``balanced``, the mean over
        classes of the share of their images that are answered right, in percent; for a language model, ``ppl``, the
        perplexity exp(loss), infinite where that is too large for a float; none of them where no image has a label.
        With ``per_class``, ``recall`` lists that share by label, None where no image has it. With a ``source``, ``kl``
        (mean KL divergence of its distribution to the model's, in nats) and ``agreement`` (equal answers, in percent).
        Of features, ``cosine`` and ``relative_error`` (``pruners.FeatureQuality``) in place of all of them. All but the
        number are NaN where an answer of the model is NaN: the order of such answers says nothing.

    Raises:
        UserError: no image has a label, or the model has no head, and there is no source.
        ValueError: there are no images.
    """
    own: dict[str, Any] = {}
    if quality is not None:
        own[quality.__name__] = measured_by(quality, model, batches)
        if source is None and is_headless(model):
            return own
    return {**own, **evaluate_all([model], batches, world, source=source, per_class=per_class)[0]}


@torch.inference_mode()
def evaluate_all(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[torch.Tensor, ...]],
    world: World | None = None,
    *,
    source: nn.Module | None = None,
    per_class: bool = False,
) -> list[dict[str, Any]]:
    """Measure several models of the same classes in one pass over the images, as ``evaluate`` measures one.

    Args:
        models: on one device; the source may be among them, and is run once a batch all the same.
        batches, world, source, per_class: as for ``evaluate``.

    Returns:
        ``evaluate``'s figures of every model.

    Raises:
        UserError, ValueError: as ``evaluate``.
    """
    own = {id(model): widened(model) for model in (*models, *([] if source is None else [source]))}
    place = {key: i for i, key in enumerate(own)}
    run: list[Any] = list(own.values())
    modes = [model.training for model in run]
    for model in run:
        model.eval()
    device = next(run[0].parameters()).device
    if any(map(is_headless, run)):  # a model that a method wraps does not say so itself
        features, wanted = _features(run, batches, device)
        for model, training in zip(run, modes, strict=True):
            model.train(training)
        wanted = wanted if source is None else features[place[id(source)]]
        return [_feature_figures(features[place[id(model)]], wanted, world or World(), device) for model in models]
    # sums of: right, right among five, loss, images with labels, images, divergence, same answers
    sums = torch.zeros(len(models), 7, dtype=torch.float64, device=device)
    compared, texts = source is not None, isinstance(run[0], LanguageModel)
    # by class: images, and those answered right; known without a batch, as a worker's share may be empty
    classes = 0 if texts else getattr(models[0], "num_classes", 0) or 0
    by_class = torch.zeros(len(models), 2, classes, dtype=torch.float64, device=device)
    for answers, y, known in _answers(run, batches, device):
        wanted = known if source is None else answers[place[id(source)]]
        compared = compared or wanted is not None
        for row, counts, model in zip(sums, by_class, models, strict=True):
            row += _sums(answers[place[id(model)]], y, wanted)
            if classes:
                labelled = y[y != NO_LABEL]
                right = labelled[answers[place[id(model)]][y != NO_LABEL].argmax(1) == labelled]
                counts += torch.stack([torch.bincount(own, minlength=classes)[:classes] for own in (labelled, right)])
    for model, training in zip(run, modes, strict=True):
        model.train(training)
    totals = (world or World()).all_reduce(sums).tolist()
    by_class = (world or World()).all_reduce(by_class) if classes else by_class
    found = [_figures(total, texts=texts, compared=compared) for total in totals]
    for figures, (number, right) in zip(found, by_class.cpu(), strict=True):
        if classes and classes <= TOP5_ABOVE:
            figures.pop("top5", None)
        if classes and "top1" in figures:
            recall = 100 * right / number
            broken = math.isnan(figures["top1"])
            figures["balanced"] = math.nan if broken else recall[number > 0].mean().item()
            if per_class:
                figures["recall"] = [None if math.isnan(one) or broken else one for one in recall.tolist()]
    return found


def _sums(logits: torch.Tensor, y: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    best = logits.topk(min(5, logits.shape[1])).indices
    right = best == y[:, None]
    labelled = y != NO_LABEL
    loss = F.cross_entropy(logits[labelled], y[labelled], reduction="sum")
    divergence = same = loss.new_zeros(())
    if wanted is not None:
        divergence = kl_divergence(wanted, logits).sum()
        same = (best[:, 0] == wanted.argmax(1)).sum()
    found = [right[:, 0].sum(), right.sum(), loss, labelled.sum(), y.new_tensor(len(y)), divergence, same]
    return torch.stack([one.double() for one in found])


def _figures(sums: Sequence[float], *, texts: bool, compared: bool) -> dict[str, Any]:
    top1, top5, loss, known, images, divergence, same = sums
    if images == 0:
        raise ValueError("no images to evaluate on")
    if not known and not compared:
        raise UserError("the images have no labels to be right about: compare with a source model, its teacher")
    figures = {"top1": 100 * top1 / known, "top5": 100 * top5 / known, "loss": loss / known} if known else {}
    if texts:
        figures["ppl"] = _perplexity(figures["loss"])
    if compared:
        figures |= {"kl": divergence / images, "agreement": 100 * same / images}
    figures = dict.fromkeys(figures, math.nan) if math.isnan(loss + divergence) else figures
    return {**figures, "images": int(images)}


def _features(
    models: Sequence[Any], batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Compute every model's features (images, D), kept on the CPU: they are centred by the mean over all images.

    Returns:
        The features, and those of a source that came with the images.
    """
    known_by = next(filter(is_headless, models))
    width = known_by.num_classes or known_by.num_features
    parts = [[torch.empty(0, width)] for _ in models]  # a share may be empty
    given = list[torch.Tensor]()
    for answers, _, known in _answers(models, batches, device):
        for own, one in zip(parts, answers, strict=True):
            own.append(one.cpu())
        given += [] if known is None else [known.cpu()]
    return [torch.cat(own) for own in parts], torch.cat(given) if given else None


def _feature_figures(
    features: torch.Tensor, wanted: torch.Tensor | None, world: World, device: torch.device
) -> dict[str, float]:
    if wanted is None:
        raise UserError(
            "the model has no head, so it gives features and no answers: compare them with its source's, the teacher"
        )
    if features.shape[1] != wanted.shape[1]:
        raise UserError(
            f"the model gives {features.shape[1]} features, the source {wanted.shape[1]}: give its own source"
        )
    total = torch.cat([wanted.double().sum(0), wanted.new_tensor([len(wanted)], dtype=torch.float64)])
    *mean, images = world.all_reduce(total.to(device)).tolist()
    if images == 0:
        raise ValueError("no images to evaluate on")
    sums = feature_sums(wanted, features, torch.tensor(mean, dtype=torch.float64) / images)
    quality = FeatureQuality.of(world.all_reduce(sums.to(device)), int(images))
    return {**quality._asdict(), "images": int(images)}


def evaluate_on(
    model: nn.Module, data: Data, world: World | None = None, *, source: nn.Module | None
) -> dict[str, float]:
    """Measure a model on the validation split: by labels, or by comparison with the source where there are none.

    Args:
        model, world: as for ``evaluate``.
        data: the data set.
        source: the model to compare with, as for ``evaluate``; not used for answers where the data have labels.
    """
    batches = data.val_loader(EVAL_BATCH, world)
    return evaluate(model, batches, world, source=None if data.info.labelled and not is_headless(model) else source)


class Compared:
    """Batches of images that stay the same, with a source's logits as a third item, for ``evaluate``.

    The logits are computed once, at the first iteration, as far as ``LOGITS_KEPT`` of them may be kept in memory.

    Args:
        batches: (images, labels) per batch, the same ones in every iteration.
        source: a classifier in evaluation mode, or a ``LanguageModel``, which ``measure`` asks every time.
        further: gives more figures of a model on batches (``Quality.figures``).
    """

    def __init__(
        self,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        source: nn.Module,
        further: Callable[[nn.Module, Iterable[Any]], Mapping[str, float]] | None = None,
    ) -> None:
        self.batches, self.source, self.further = batches, source, further
        self._kept: list[torch.Tensor] = []
        self._room = LOGITS_KEPT

    @torch.inference_mode()
    def _logits(self, index: int, images: torch.Tensor) -> torch.Tensor:
        if index < len(self._kept):
            return self._kept[index]
        like = next(self.source.parameters())
        logits: torch.Tensor = self.source(images.to(like.device, like.dtype))
        if index == len(self._kept) and logits.numel() <= self._room:
            self._kept.append(logits)
            self._room -= logits.numel()
        return logits

    def measure(self, model: nn.Module) -> EvalMetrics:
        """Measure a model over all images, and its agreement with the source."""
        own = {} if self.further is None else self.further(model, self.batches)
        if isinstance(model, LanguageModel):  # logits of all words are too many to keep
            return EvalMetrics.of({**evaluate(model, self.batches, source=self.source), **own})
        return EvalMetrics.of({**evaluate(model, self), **own})

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for index, (x, y) in enumerate(batch for batch in self.batches if len(batch[1])):
            yield x, y, self._logits(index, x)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _answers(
    models: Sequence[Any], batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]]:
    """Yield every model's logits (B, K), labels (B,), and logits that come with the batch, if any.

    For language models, some words at a time.
    """
    for x, y, *known in batches:
        if not len(y):  # all of them cannot be read
            continue
        x, y = x.to(device), y.to(device)
        if not isinstance(models[0], LanguageModel):
            answers = [model(x.to(next(model.parameters(), x).dtype)) for model in models]
            yield answers, y, known[0].to(device) if known else None
            continue
        wanted = y != IGNORED
        hidden, words = [model.hidden(x)[wanted] for model in models], y[wanted]
        step = max(1, LOGITS_AT_A_TIME // (models[0].num_classes * len(models)))
        for own in range(0, len(words), step):
            logits = [m.log_prob(h[own : own + step]) for m, h in zip(models, hidden, strict=True)]
            yield logits, words[own : own + step], None
