"""From a record to a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from torch import nn

from .arch import Arch
from .errors import UserError
from .vit import build_vit

__all__ = ["ENTRY_POINT", "arch_of", "build", "create", "num_params"]

ENTRY_POINT = "prunesweep"  # the one architecture name that timm knows us by (models.store registers it)
BUILDERS = {"vit": build_vit}


def build(arch: Arch, *, drop_path: float = 0.0, pretrained_cfg: Mapping[str, Any] | None = None) -> nn.Module:
    """A randomly initialised timm module of this shape; it carries its record as ``model.arch``.

    Args:
        arch: the record; validated first.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
        pretrained_cfg: timm's description of the preprocessing (``mean``, ``std``, ``crop_pct``, ...), usually the
            source model's. Without it, ImageNet's or, for another number of channels, 0.5 everywhere.

    Raises:
        UserError: the record is impossible.
    """
    return create(arch, pretrained=False, pretrained_cfg=pretrained_cfg, drop_path=drop_path)


def create(
    arch: Arch, *, pretrained: bool, pretrained_cfg: Mapping[str, Any] | None, drop_path: float = 0.0, **options: Any
) -> nn.Module:
    """``build`` through timm's factory, which also loads the weights that ``pretrained_cfg`` points to."""
    arch.validate()
    cfg = _pretrained_cfg(arch, pretrained_cfg or {})

    def construct(*, arch: Arch, drop_path: float, **given: Any) -> nn.Module:
        for name, own in (("in_chans", arch.in_chans), ("img_size", arch.img_size), ("global_pool", arch.pool)):
            value = given.pop(name, own)
            if (to_2tuple(value) if name == "img_size" else value) != own:
                raise UserError(f"{name} = {value!r}: this model's record says {own!r}")
        classes = given.pop("num_classes", arch.num_classes)  # timm drops the classifier's weights where it differs
        if given:
            raise UserError(f"unknown model argument {', '.join(given)}: the record alone says what the model is")
        arch = dataclasses.replace(arch, num_classes=classes)
        model = BUILDERS[arch.family](arch, drop_path=drop_path)
        model.arch = arch  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        return model

    return build_model_with_cfg(
        construct, ENTRY_POINT, pretrained, pretrained_cfg=cfg, arch=arch, drop_path=drop_path, **options
    )


def _pretrained_cfg(arch: Arch, given: Mapping[str, Any]) -> dict[str, Any]:
    half = (0.5,) * arch.in_chans
    own = {"architecture": ENTRY_POINT, "num_classes": arch.num_classes, "input_size": (arch.in_chans, *arch.img_size)}
    fixed = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "custom_load": False}
    no_download = {"url": "", "hf_hub_id": None}
    classifier = ("head", "head_dist") if arch.dist_token else "head"
    defaults = {} if arch.in_chans == 3 else {"mean": half, "std": half}
    return {
        **defaults,
        **{k: v for k, v in given.items() if v is not None},
        **fixed,
        **no_download,
        **own,
        "classifier": classifier,
    }


def arch_of(model: nn.Module) -> Arch:
    """The record that a built or cut model carries, or that of a stock timm model."""
    return Arch.from_timm(model)


def num_params(model: nn.Module) -> int:
    """Number of weights, each counted once."""
    return sum(p.numel() for p in model.parameters())
