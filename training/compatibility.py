"""Check that a model, a data set and a recipe fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunesweep.models import Arch, UserError, arch_of, preprocessing_of

from .data import Data, check_words, open_data
from .recipe import Recipe

__all__ = ["check_features", "check_fits", "check_labels", "check_order", "open_fitting"]

REMEDY = "take data of its classes, or give the model a new head"


def check_fits(arch: Arch, data: Data, *, name: str | None = None, remedy: str = REMEDY) -> None:
    """Check that a model's words, classes and image size are those of the data.

    Only the words of a language model are checked: it reads texts of any length. Data without labels fit models of any
    number of classes, and data of any classes a backbone without a head; where labels are numbers, of which not all
    need to occur, the model may have more classes.

    Args:
        arch: architecture of the model.
        data: the opened data set.
        name: the model's name in messages; ``arch.source`` by default.
        remedy: advice that the message gives when the classes differ.

    Raises:
        UserError: the model and the data do not fit.
    """
    check_words(arch, data)
    if arch.text is not None:
        return
    info, name = data.info, name or arch.source
    more_fit = info.open_ended or not info.labelled or arch.headless
    if (arch.num_classes < info.num_classes and not arch.headless) or (
        arch.num_classes > info.num_classes and not more_fit
    ):
        raise UserError(f"{name} has {arch.num_classes} classes, {info.name} has {info.num_classes}: {remedy}")
    size = (arch.in_chans, *arch.img_size)
    if size != info.input_size:
        channels, *sides = info.input_size
        raise UserError(
            f"{name} takes images of {size}, {info.name} has {info.input_size}: save one that takes them, made by "
            f"timm.create_model('local-dir:MODEL', pretrained=True, img_size={tuple(sides)}, in_chans={channels})"
        )


def open_fitting(data: str | Data, model: Any, **options: Any) -> Data:
    """Open data with a model's preprocessing, and check that they fit the model as it is.

    Args:
        data: name of the data set, as for ``open_data``; or the data set, which is only checked.
        model: the model.
        options: keyword arguments of ``open_data``.

    Raises:
        UserError: as for ``open_data`` and ``check_fits``.
    """
    opened = open_data(data, preprocessing_of(model), **options) if isinstance(data, str) else data
    check_fits(arch_of(model), opened)
    return opened


def check_order(preprocessing: Mapping[str, Any], data: Data, name: str) -> None:
    """Check that a model that others are compared with or learn from numbers the classes as the data do.

    Args:
        preprocessing: the model's ``pretrained_cfg``; its ``label_names`` are compared, if it has any.
        data: the data set, opened for another model.
        name: the model's name in messages.

    Raises:
        UserError: the model's classes have the data's names in another order.
    """
    names, own = tuple(preprocessing.get("label_names") or ()), data.info.classes
    if set(names) == set(own) and names != own:
        raise UserError(
            f"{name}: its classes are those of {data.info.name} in another order, from {names[0]!r} to {names[-1]!r} "
            f"instead of from {own[0]!r} to {own[-1]!r}: list the classes in its order (data.classes or --classes)"
        )


def check_labels(data: Data, recipe: Recipe) -> None:
    """Check that data without labels are trained on by the answers of a teacher alone.

    Args:
        data: the opened data set.
        recipe: gives the losses.

    Raises:
        UserError: the recipe's loss needs labels, and the data have none.
    """
    taught = any(term.weight and term.teacher == "source" for term in recipe.distill)
    if not data.info.labelled and (recipe.loss_weight or not taught):
        raise UserError(
            f"{data.info.name} has no labels to train on: set the recipe's loss_weight = 0 and "
            'distill = [{kind = "soft"}], so that the model learns from the source\'s answers, take recipe "gentle", '
            "which does without them, or give data with labels"
        )


def check_features(recipe: Recipe, name: str) -> None:
    """Check that a backbone without a head, which gives no answers, is trained by its features alone.

    Args:
        recipe: gives the losses.
        name: the model's, for the message.

    Raises:
        UserError: a loss of the recipe needs answers, or it has none.
    """
    terms = [term for term in recipe.distill if term.weight]
    if recipe.loss_weight or not terms or any(term.kind != "feature" for term in terms):
        raise UserError(
            f"{name} has no head, so it gives features and no answers: set the recipe's loss_weight = 0 and distill = "
            '[{kind = "feature"}], so that it learns its source\'s features, take recipe "gentle", '
            "which then does so, or give it a classifier"
        )
