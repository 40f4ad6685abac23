"""Linear maps in place of a classifier, by which narrower backbones give features of their source's width."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .arch import Arch
from .builder import arch_of, build_with
from .families import family_of
from .precision import keep_dtype

__all__ = ["is_headless", "with_feature_head"]


def is_headless(model: nn.Module) -> bool:
    """Whether a model gives features, not answers; its record is not read, so blocks may be wrapped meanwhile."""
    arch, classes = getattr(model, "arch", None), getattr(model, "num_classes", None)
    return classes == 0 or (isinstance(arch, Arch) and arch.feature_head and arch.num_classes == classes)


def with_feature_head(model: nn.Module) -> nn.Module:
    """Give a backbone without a head the identity as one, which is cut and fitted as a classifier is.

    Args:
        model: the backbone; it is not changed.

    Returns:
        A model of the same outputs, whose other weights are the backbone's own; a model that has a head, as it is.
    """
    arch = arch_of(model)
    if arch.num_classes:
        return model
    family, weights, width = family_of(arch), model.state_dict(), arch.outputs
    like = next(model.parameters())
    names = family.classifiers(arch)
    for name in (names,) if isinstance(names, str) else names or ():
        weights[f"{name}.weight"] = torch.eye(width, dtype=like.dtype, device=like.device)
        weights[f"{name}.bias"] = torch.zeros(width, dtype=like.dtype, device=like.device)
    whole = dataclasses.replace(arch, num_classes=width, feature_head=True)
    mapped = build_with(whole, weights, pretrained_cfg=getattr(model, "pretrained_cfg", None))
    keep_dtype(mapped, model)
    return mapped.train(model.training)
