"""Whether a model and data go together."""

from __future__ import annotations

from prunesweep.models import Arch, UserError

from .data import Data, check_words

__all__ = ["check_fits"]

REMEDY = "take data of its classes, or give the model a new head"


def check_fits(
    arch: Arch, data: Data, *, name: str | None = None, remedy: str = REMEDY, all_classes: bool = True
) -> None:
    """Raise UserError where a model's words, classes, or images are not those of the data.

    A language model reads texts of any length, so only its words matter.

    Args:
        arch: of the model.
        data: opened.
        name: what messages call the model; the name of its source by default.
        remedy: what can be done about other classes.
        all_classes: the numbers of classes are the same; where nothing is trained, the model may know more.
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
