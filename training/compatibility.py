"""Check that a model and a data set fit together."""

from __future__ import annotations

from prunesweep.models import Arch, UserError

from .data import Data, check_words

__all__ = ["check_fits"]

REMEDY = "take data of its classes, or give the model a new head"


def check_fits(
    arch: Arch, data: Data, *, name: str | None = None, remedy: str = REMEDY, all_classes: bool = True
) -> None:
    """Check that a model's words, classes and image size are those of the data.

    Only the words of a language model are checked: it reads texts of any length.

    Args:
        arch: architecture of the model.
        data: the opened data set.
        name: the model's name in messages; ``arch.source`` by default.
        remedy: advice that the message gives when the classes differ.
        all_classes: require equal numbers of classes. Without it the model may have more, which is enough where nothing
            is trained.

    Raises:
        UserError: the model and the data do not fit.
    """
    check_words(arch, data)
    if arch.text is not None:
        return
    info, name = data.info, name or arch.source
    if arch.num_classes < info.num_classes or (all_classes and arch.num_classes != info.num_classes):
        raise UserError(f"{name} has {arch.num_classes} classes, {info.name} has {info.num_classes}: {remedy}")
    size = (arch.in_chans, *arch.img_size)
    if size != info.input_size:
        raise UserError(f"{name} takes images of {size}, {info.name} has {info.input_size}")
