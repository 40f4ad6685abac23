"""Re-estimating the BatchNorm statistics of a model that was cut, which belong to other inputs or to none at all.

A convolution that has just taken attention's place has mean 0 and variance 1; until its statistics are estimated, the
model's outputs are meaningless.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UserError

__all__ = ["recalibrate"]

STEM = "patch_embed.backbone."  # timm's name for what is in front of a ViT's patch embedding


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Estimate the running statistics of all BatchNorms anew; return the number of BatchNorms.

    Mean and variance become the plain average over ``batches`` of what each batch has, with all BatchNorms of the model
    working with the batch's own statistics meanwhile, as in training. Everything else of the model stays as it is:
    stochastic depth and dropout are off meanwhile. BatchNorms of a ViT's stem, which no cut changes, keep theirs.

    Args:
        model: runs on the device where it is.
        batches: (images B·C·H·W, labels B); as large as those of training, labels are not used.

    Raises:
        UserError: there is a BatchNorm, and no batch.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not name.startswith(STEM)
    ]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device, seen = next(model.parameters()).device, 0
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then keeps the average over batches
        norm.train()
    try:
        for images, _ in batches:
            model(images.to(device))
            seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise UserError("no batch to recalibrate BatchNorm with: give at least one")
    return len(norms)
