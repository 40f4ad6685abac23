"""Whether a model is no better than chance on data, and whether it was trained with their classes in another order."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from prunesweep.models import preprocessing_of
from prunesweep.models.families.lm import LanguageModel
from prunesweep.models.feature_head import is_headless
from prunesweep.models.precision import widened

from .data import Batch, Data
from .evaluation import EVAL_BATCH, evaluate
from .metrics import EvalMetrics, wilson_interval

__all__ = ["chance_warning", "warn_at_chance"]

DRAWN, CALIBRATION_BATCH = 512, 64  # training images that tell whether a model is at chance
OTHER_ORDER = (
    "the model has no such class names of its own and was trained in that order. Give --class-order or "
    "data.class_order, or save the model with models.save(model, folder, classes=[...]), and data are matched with "
    "it by name"
)


def chance_warning(
    model: nn.Module, data: Data, found: EvalMetrics, *, drawn: int | None = None, untrained: bool = False
) -> str | None:
    """Explain why an image model may be no more accurate than chance, have no accuracy, or be better in another order.

    Where only an order says which class is which, and the two usual orders differ, both are measured on at most 512
    training images of the classes that they number differently.

    Args:
        model: the evaluated model; its ``pretrained_cfg`` may have ``label_names``.
        data: the data set that it was evaluated on.
        found: result of the evaluation.
        drawn: number of training images that it is a result of, drawn with seed 0; by default it is of validation.
        untrained: the model may be cut or new, so that only another order of classes is worth a word.

    Returns:
        The likely cause in words, also of an accuracy that is NaN; None for a language model, for a model that is
        better than chance and not clearly better in the other order (both Wilson intervals), and without labels.
    """
    if found.top1 is None:
        return None
    if math.isnan(found.top1):
        return "an answer of the model is NaN, so it has no accuracy: its training diverged, or its weights are damaged"
    info = data.info
    chance = 100 / info.num_classes
    if isinstance(model, LanguageModel):
        return None
    if found.top1 > chance:
        return _better_order(model, data, found.top1)
    where = "" if drawn is None else f" on {drawn:,} training images"
    said = (
        f"top-1 of {found.top1:.2f} %{where} is no better than chance ({chance:.2f} % for {info.num_classes} classes)"
    )
    names, same = preprocessing_of(model).get("label_names"), _same_names(model, data)
    if not same and (other := data.in_other_order()) is not None:
        order, listed = other
        top1 = evaluate(model, _batches(listed, drawn))["top1"]
        between = _between(listed, order)
        if top1 > chance:
            return f"{said}, but {top1:.2f} % with the classes in the order {between}: {OTHER_ORDER}"
        said += f", nor is {top1:.2f} % with the classes in the order {between}"
    if untrained:
        return None
    if info.classes and names and not same:
        named = f"the model's classes are named otherwise ({names[0]}, ..) than the data's ({info.classes[0]}, ..)"
        return f"{said}: {named}"
    return f"{said}: it may be untrained, or trained on other data or with other preprocessing"


def _same_names(model: nn.Module, data: Data) -> bool:
    """Whether a model's classes have the data's names, so that they were matched by name."""
    names = preprocessing_of(model).get("label_names") or ()
    return bool(names) and set(names) == set(data.info.classes)


def _between(data: Data, order: str) -> str:
    return f"{data.info.classes[0]} .. {data.info.classes[-1]} (class_order = {order!r})"


@torch.inference_mode()
def _better_order(model: nn.Module, data: Data, top1: float) -> str | None:
    """Say that a model is clearly better with its classes in the other usual order; None if it is not."""
    found = None if _same_names(model, data) else data.in_other_order()
    if found is None:
        return None
    order, other = found
    number = {name: label for label, name in enumerate(other.info.classes)}
    there = torch.tensor([number[name] for name in data.info.classes])  # labels in that order, by those in this one
    labels = data.train_labels()
    rows = torch.nonzero(there[labels] != labels)[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:DRAWN]]
    run, training = widened(model), model.training
    like, right, images = next(run.parameters()), torch.zeros(2), 0
    run.eval()
    for x, y in data.plain_loader(rows.tolist(), CALIBRATION_BATCH):
        best = run(x.to(like.device, like.dtype)).argmax(1).cpu()
        right += torch.stack([(best == labels).sum() for labels in (y, there[y])])
        images += len(y)
    run.train(training)
    here, other_share = (right / max(images, 1)).tolist()
    if not images or wilson_interval(other_share, images)[0] <= wilson_interval(here, images)[1]:
        return None
    return (
        f"top-1 of {top1:.2f} % is with the classes in the order {data.info.classes[0]} .. {data.info.classes[-1]}. "
        f"In the order {_between(other, order)}, {int((there != torch.arange(len(there))).sum())} of them have other "
        f"labels; of {images:,} training images of these, {100 * here:.2f} % are right as it is, and "
        f"{100 * other_share:.2f} % in that order: {OTHER_ORDER}"
    )


def warn_at_chance(
    name: str, model: nn.Module, data: Data, found: EvalMetrics | None = None, *, untrained: bool = False
) -> None:
    """Warn where a source is no better than chance, or clearly better with its classes in another order.

    Args:
        name: what the warning calls the source.
        model, data, found, untrained: as for ``chance_warning``; without ``found``, the model is evaluated on a few
            training images.
    """
    drawn = None
    if found is None:
        if not data.info.labelled or isinstance(model, LanguageModel) or is_headless(model):
            return
        drawn = min(DRAWN, data.train_images)
        found = EvalMetrics.of(evaluate(model, _batches(data, drawn)))
    if warning := chance_warning(model, data, found, drawn=drawn, untrained=untrained):
        warnings.warn(f"{name}: {warning}", stacklevel=2)


def _batches(data: Data, drawn: int | None) -> Iterable[Batch]:
    return data.val_loader(EVAL_BATCH) if drawn is None else data.calibration(drawn, CALIBRATION_BATCH, 0)
