"""UVC's models (ICLR 2022, openreview 9jsZiUgkCZP): DeiTs with masks and block gates, of either training stage.

A weight counts multiplied by its mask, biases count whole, and a block runs if its logit for running is greater than
that for being skipped. Masks and gates determine the cut that makes the physically small model.
Trained patch gates multiply every patch by their sigmoid, as in the training that they are from: they stay as factors.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import arch_of
from prunesweep.models.cutting import BlockCut, Cut, cut

from .tensors import Given, Tensors, one_number_of_heads
from .vit import timm_attention, vit_arch

__all__ = ["read_uvc"]


def read_uvc(tensors: Tensors, given: Given) -> nn.Module:
    """Build the physically small model of a UVC checkpoint.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; the number of heads is needed.

    Returns:
        The cut model in eval mode.

    Raises:
        UserError: a key, a shape or ``given`` does not fit.
    """
    gates = tensors.take("block_skip_gating", tensors.count("blocks."), 2)
    masks = _apply_masks(tensors)
    tensors.discard(r"gumbel\.(weight|bias)|blocks\.\d+\.(attn|mlp)_skip_gating")  # without effect once trained
    heads = one_number_of_heads(given, tensors.shape("cls_token", 3)[2], tensors.layout)
    arch = vit_arch(tensors, given, lambda i, width, _: timm_attention(tensors, f"blocks.{i}", width, heads))
    if "patch_gating" in tensors.left:
        (stage,) = arch.stages
        gating = tensors.take("patch_gating", 1, math.prod(stage.grid), 1, why="a logit for every patch")
        tensors.built["patch_embed.factor"] = gating[0].sigmoid()
        arch = replace(arch, patch_factors=True)
    dense = tensors.finish(arch)
    return cut(dense, _decision(arch_of(dense), (gates[:, 1] > gates[:, 0]).tolist(), masks))


def _apply_masks(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Multiply every weight by its mask; return the masks by layer, bool."""
    layers = [key.removesuffix(".weight") for key in tensors.left if key.endswith(".weight")]
    masks = {name: tensors.flags(f"{name}.mask", *tensors.left[f"{name}.weight"].shape) for name in layers}
    for name, mask in masks.items():
        tensors.left[f"{name}.weight"] = tensors.left[f"{name}.weight"] * mask
    return masks


def _decision(arch: Arch, runs: list[bool], masks: dict[str, torch.Tensor]) -> Cut:
    """Cut to the blocks that run, with the heads, value channels and MLP units that their outputs still read."""
    choices = []
    for i, block in enumerate(arch.blocks):
        read = set(_live_columns(masks[f"blocks.{i}.attn.proj"]))
        spans = [range(h * block.qk, (h + 1) * block.qk) for h in range(block.heads)]
        live = [span for span in spans if not read.isdisjoint(span)]
        choices.append(
            BlockCut(
                keep=runs[i],
                qk=tuple(map(tuple, live)),
                v=tuple(tuple(c for c in span if c in read) for span in live),
                mlp=_live_columns(masks[f"blocks.{i}.mlp.fc2"]),
            )
        )
    return Cut(blocks=tuple(choices))


def _live_columns(mask: torch.Tensor) -> tuple[int, ...]:
    """List the columns that are not masked out; where all are, the first, because a layer must have a column."""
    return tuple(mask.any(0).nonzero()[:, 0].tolist()) or (0,)
