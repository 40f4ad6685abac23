"""T2T-ViT's checkpoints (arXiv 2101.11986): a tokens-to-token module in front of a ViT, Performer or Transformer."""

from __future__ import annotations

import math

from torch import nn

from prunesweep.models.arch import Arch, Block, Stage, Stem
from prunesweep.models.errors import UserError
from prunesweep.models.layers.tokens_to_token import kernel

from .tensors import Given, Tensors, agree, one_number_of_heads
from .translation import model_of, renamed

__all__ = ["read_t2t"]

LAYOUT = "t2t"
STRIDES = (4, 2, 2)
PREPROCESSING = {"interpolation": "bicubic", "crop_pct": 0.9}
ATTENTION = r"tokens_to_token\.attention"
RULES = [
    (rf"{ATTENTION}1\.", "patch_embed.backbone.attention.0."),
    (rf"{ATTENTION}2\.", "patch_embed.backbone.attention.1."),
    (r"tokens_to_token\.project\.", "patch_embed.proj."),
]


def read_t2t(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of a T2T-ViT checkpoint. Attention logits are scaled by the width of a head to the power -0.5.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; the number of heads is needed, and ``img_size`` where the patches are no square.

    Returns:
        The model in eval mode.

    Raises:
        UserError: a key, a shape or ``given`` does not fit.
    """
    arch = _arch(tensors, given)
    weights = renamed(tensors.left, RULES)
    project = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = project[:, :, None, None]
    return model_of(arch, weights, LAYOUT, PREPROCESSING)


def _arch(tensors: Tensors, given: Given) -> Arch:
    width = tensors.shape("cls_token", 3)[2]
    places = tensors.shape("pos_embed", 3)[1] - 1
    heads = one_number_of_heads(given, width, LAYOUT)
    tensors.shape("tokens_to_token.project.weight", 2)
    features, narrow = (tensors.shape(f"tokens_to_token.attention1.norm{i}.weight", 1)[0] for i in (1, 2))
    pixels = kernel(STRIDES[0]) ** 2
    if features % pixels:
        raise UserError(
            f"tokens_to_token.attention1.norm1.weight has {features} channels: no patches of {pixels} pixels"
        )
    second = tensors.shape("tokens_to_token.attention2.norm2.weight", 1)[0]
    performer = tensors.has("tokens_to_token.attention1.kqv.")
    qk = width // heads
    blocks = tuple(
        Block(
            src=i,
            heads=heads,
            qk=qk,
            v=qk,
            scale=qk**-0.5,
            mlp=tensors.shape(f"blocks.{i}.mlp.fc1.weight", 2)[0],
        )
        for i in range(tensors.count("blocks."))
    )
    side = math.prod(STRIDES)
    size = given.img_size or (math.isqrt(places) * side, math.isqrt(places) * side)
    grid = (size[0] // side, size[1] // side)
    agree(f"img_size = {list(size)}: number of patches", grid[0] * grid[1], places)
    return Arch(
        family="vit",
        source=LAYOUT,
        img_size=size,
        patch_size=(side, side),
        in_chans=features // pixels,
        num_classes=tensors.shape("head.weight", 2)[0],
        stages=(Stage(width=width, grid=grid, blocks=blocks),),
        qkv_bias=tensors.has("blocks.0.attn.qkv.bias"),
        norm_eps=1e-5,
        stem=Stem(kind="t2t_performer" if performer else "t2t_transformer", channels=(narrow, second), strides=STRIDES),
    )
