"""Reading the record of a timm model, or refusing, with the reason, a model that the record cannot express."""

from __future__ import annotations

import timm
from timm.layers import to_2tuple
from torch import nn

from .arch import Arch
from .errors import UserError, nearest
from .families import FAMILIES, family_of
from .without_values import without_values

__all__ = ["arch_from_timm"]


def arch_from_timm(model: str | nn.Module, img_size: int | tuple[int, int] | None = None) -> Arch:
    """Read the full record of a timm model of a known family.

    Args:
        model: timm's name of it, or a module.
        img_size: side, or (rows, columns), of its images, for a model that takes any; by default that of its
            ``pretrained_cfg``.

    Raises:
        UserError: the name is unknown, the family is not supported, the model has a part that the record lacks, or
            ``img_size`` is not the one that the model is built for.
    """
    if isinstance(model, str):
        name = model
        bare = name.split(".")[0]
        if ":" not in name and not timm.is_model(bare):
            raise UserError(f"unknown timm model {name!r}. {nearest(bare, timm.list_models())}".strip())
        with without_values():
            module: nn.Module = timm.create_model(name)
    else:
        module = model
    arch = getattr(module, "arch", None)
    cfg = getattr(module, "pretrained_cfg", {})
    name = str(cfg.get("architecture") or type(module).__name__)
    if isinstance(arch, Arch):
        now = family_of(arch).current(module, arch)
        if now is not arch:
            now.validate()
        arch = now
    else:
        readers = [family for family in FAMILIES.values() if type(module) in family.timm_classes]
        family = next((reader for reader in readers if reader.takes(module)), None)
        if family is None:
            known = ", ".join({kind.__name__: None for own in FAMILIES.values() for kind in own.timm_classes})
            raise UserError(f"{name} is a {type(module).__name__}: this version represents timm's {known}")
        arch = family.read(module, name, to_2tuple(img_size or tuple(cfg.get("input_size", (3, 224, 224))[1:])))
        arch.validate()
    if img_size is not None and to_2tuple(img_size) != arch.img_size:
        raise UserError(f"img_size = {img_size}: {name} is built for {arch.img_size[0]}x{arch.img_size[1]} images")
    return arch
