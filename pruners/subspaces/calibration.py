"""Calibration images in whatever form they come, checked against the model before anything is computed from them."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch

from prunesweep.models import Arch, UserError
from prunesweep.models.families import family_of

from .batches import Batches

__all__ = ["check_features", "check_source", "hold_out", "images_of", "shrinkage_for"]

KEYS = ("image", "images", "img", "pixel_values", "input_ids", "x")  # of dicts, as loaders of others name images
BATCH = 64  # images at a time; what comes in larger batches is split
ROWS_PER_FEATURE = 20  # token rows of a layer's fit for each of its features, from which on more help little
FEW_ROWS = 1e-2  # lambda where rows are fewer than features: KL 6 % lower than with 1e-3 (digits, 2 to 16 images)
UNTRAINED, ENOUGH = 0.01, 8  # of log K: what an answer says about the image, in nats; images to tell it from
CONSTANT = 1e-4  # of the features' squared length: their variance


def images_of(batches: Any, arch: Arch) -> Batches:
    """Return calibration images in batches of at most ``BATCH``; labels that come with them are not read.

    Images that are in memory already stay there; of those that a loader gives, most are written to a temporary file.
    What has been checked is returned as it is.

    Args:
        batches: one tensor (B, C, rows, columns); or a list, a loader or a data set of such tensors, of single images
            (C, rows, columns), of pairs of either and labels, or of dicts that name either by one of ``KEYS``. For a
            language model, word numbers (B, T).
        arch: of the model that they are for.

    Raises:
        UserError: there is no image, only one, or all are the same or of one colour; an image is of another size or
            number of channels than the model's, not in floating point, or has a value that is not finite; or a batch is
            no tensor.
    """
    if isinstance(batches, Batches):
        return batches
    in_memory = isinstance(batches, (torch.Tensor, list, tuple))
    found = Batches(_tensors(batches, arch), limit=sys.maxsize if in_memory else None)
    count = sum(found.lengths)
    if count < 2:
        raise UserError(f"{count} calibration images: give at least 2, better 256 or more")
    if arch.text is None:
        _check_values(found, count)
    return found


def _tensors(batches: Any, arch: Arch) -> Iterator[torch.Tensor]:
    """Yield batches of at most ``BATCH`` images; single images are stacked."""
    text = arch.text is not None
    axes = 2 if text else 4
    single = list[torch.Tensor]()
    whole = iter([batches]) if isinstance(batches, torch.Tensor) else _iterated(batches)
    for number, batch in enumerate(whole):
        images = _images_in(batch)
        if not isinstance(images, torch.Tensor):
            form = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(images).__name__
            raise UserError(
                f"calibration images: batch {number} is of type {form}; give tensors (B, C, rows, columns), pairs of "
                f"one and labels, or dicts that have one as {', '.join(KEYS)}"
            )
        if not text:
            _check_form(images, number, arch)
        if images.ndim == axes - 1:
            single.append(images)
        else:
            yield from torch.split(images, BATCH)
        if len(single) == BATCH:
            yield torch.stack(single)
            single = []
    if single:
        yield torch.stack(single)


def _images_in(batch: Any) -> Any:
    """What of a batch is its images: the first of several parts, or the one that bears a name of images."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in KEYS if name in batch), None)
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _iterated(batches: Any) -> Iterator[Any]:
    try:
        return iter(batches)
    except TypeError as error:
        raise UserError(
            f"calibration images: {type(batches).__name__} is neither a tensor (B, C, rows, columns) nor a list or "
            "loader of them"
        ) from error


def _check_form(images: torch.Tensor, number: int, arch: Arch) -> None:
    wanted = (arch.in_chans, *arch.img_size)
    if images.ndim not in (3, 4) or tuple(images.shape[-3:]) != wanted:
        raise UserError(
            f"calibration images: batch {number} is of shape {tuple(images.shape)}; {arch.source} takes images of "
            f"{wanted}, in batches (B, {', '.join(map(str, wanted))})"
        )
    if not images.is_floating_point():
        raise UserError(
            f"calibration images: batch {number} is of {images.dtype}; give them as the model was trained on them: "
            "floating point, with its mean taken off and divided by its standard deviation"
        )


def _check_values(found: Batches, count: int) -> None:
    if not all(bool(torch.isfinite(images).all()) for images in found):
        raise UserError("a calibration image has a value that is not finite")
    first = found[0][:1]
    if all(bool((images == first).all()) for images in found):
        raise UserError(f"all {count} calibration images are the same: give different ones")
    if all(bool((images == images[..., :1, :1]).all()) for images in found):
        raise UserError(f"each of the {count} calibration images is of one colour: nothing can be computed from them")


def hold_out(images: Batches, share: float) -> tuple[Batches, Batches]:
    """Split batches of images in two; the last ones are held out, at least one.

    Args:
        images: at least two images, in batches.
        share: of the images that is held out.

    Returns:
        The others, and those that are held out.
    """
    count = sum(images.lengths)
    left = count - min(max(1, round(share * count)), count - 1)
    whole = sum(end <= left for end in accumulate(images.lengths))  # batches
    left -= sum(images.lengths[:whole])
    if not left:
        return images[:whole], images[whole:]
    split = images[whole]
    return images[:whole] + Batches([split[:left]]), Batches([split[left:]]) + images[whole + 1 :]


def shrinkage_for(arch: Arch, images: Batches, shrinkage: float) -> float:
    """Return the lambda of the fits; it is raised, with a warning, where a layer has more features than token rows.

    Args:
        arch: of the model that is fitted.
        images: batches that it is fitted on.
        shrinkage: lambda where there are rows enough.
    """
    count = sum(images.lengths)
    tokens, features = max(family_of(arch).rows_and_features(arch), key=lambda own: own[1] / own[0])
    if count * tokens >= features or shrinkage >= FEW_ROWS:
        return shrinkage
    needed = math.ceil(ROWS_PER_FEATURE * features / tokens)
    warnings.warn(
        f"{count} calibration images give {count * tokens:,} token rows for layers of {features:,} features: lambda is "
        f"raised to {FEW_ROWS:g}, and the result will be poor; give {needed:,} images",
        stacklevel=3,
    )
    return FEW_ROWS


def check_source(logits: torch.Tensor, source: str) -> None:
    """Warn where a source's answers hardly depend on the image, so that being close to them means little.

    Compared is the information in an answer about its image, H(mean of p) - mean of H(p), with log K.

    Args:
        logits: the source's, (B, K).
        source: its name in the message.
    """
    p = logits.double().softmax(-1)
    known = (torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(-1).mean()).item()
    most = math.log(max(2, p.shape[-1]))
    if len(p) >= ENOUGH and known < UNTRAINED * most:
        warnings.warn(
            f"{source}: its answers hardly depend on the image ({known:.2g} of {most:.2g} nats): KL and agreement mean "
            "little. It may be untrained, or all images of one kind",
            stacklevel=3,
        )


def check_features(features: torch.Tensor, source: str) -> None:
    """Warn where a backbone's features hardly depend on the image, so that being close to them means little.

    Args:
        features: the source's, (B, D).
        source: its name in the message.
    """
    wide = features.double()
    share = ((wide - wide.mean(0)).square().sum() / wide.square().sum().clamp_min(1e-300)).item()
    if len(wide) >= ENOUGH and share < CONSTANT:
        warnings.warn(
            f"{source}: its features hardly depend on the image (their variance is {share:.2g} of their squared "
            "length): cosine and relative error mean little. It may be untrained, or all images of one kind",
            stacklevel=3,
        )
