"""torchvision's ViT and Swin, by the state dict alone: widths follow from shapes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, check_heads, one_number_of_heads
from .translation import model_of, record_of, renamed

__all__ = ["read_torchvision"]

LAYOUT = "torchvision"
HEADS = {768: 12, 1024: 16, 1280: 16}  # of torchvision's ViTs by width, which the file does not tell
BLOCK = [(r"(.*\.)mlp\.(0|linear_1)\.", r"\1mlp.fc1."), (r"(.*\.)mlp\.(3|linear_2)\.", r"\1mlp.fc2.")]
VIT = [
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(.*\.)self_attention\.in_proj_", r"\1attn.qkv."),
    (r"(.*\.)self_attention\.out_proj\.", r"\1attn.proj."),
    (r"(.*\.)ln_([12])\.", r"\1norm\2."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
    *BLOCK,
]


def read_torchvision(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of torchvision's ``VisionTransformer`` or ``SwinTransformer``.

    Args:
        tensors: the checkpoint's tensors.
        given: ``heads`` for a ViT of an unusual width; ``img_size`` for a Swin of other images than 224 x 224.

    Raises:
        UserError: keys or shapes are another model's, or a fact is needed that the file does not tell.
    """
    return _read_vit(tensors, given) if "class_token" in tensors.left else _read_swin(tensors, given)


def _read_vit(tensors: Tensors, given: Given) -> nn.Module:
    width, channels, *patch = tensors.shape("conv_proj.weight", 4)
    places = tensors.shape("encoder.pos_embedding", 3)[1] - 1
    weights = renamed(tensors.left, VIT)
    depth = tensors.count("encoder.layers.encoder_layer_")
    side = math.isqrt(places)
    size = given.img_size or (side * patch[0], side * patch[1])
    if (size[0] // patch[0]) * (size[1] // patch[1]) != places:
        raise UserError(f"the file has positions for {places} patches, images of {list(size)} give others: --img-size")
    usual = HEADS.get(width) if given.heads is None else None
    make = partial(
        VisionTransformer,
        img_size=size,
        patch_size=tuple(patch),
        in_chans=channels,
        num_classes=_rows(weights, "head.weight"),
        embed_dim=width,
        depth=depth,
        num_heads=usual or one_number_of_heads(given, width, LAYOUT),
        mlp_ratio=_rows(weights, "blocks.0.mlp.fc1.weight") / width,
        norm_layer=partial(LayerNorm, eps=1e-6),
    )
    return model_of(record_of(make, f"{LAYOUT}_vit"), weights, LAYOUT, _preprocessing())


def _read_swin(tensors: Tensors, given: Given) -> nn.Module:
    width, channels, *patch = tensors.shape("features.0.0.weight", 4)
    stages = tensors.count("features.") // 2  # an embedding or a merging of patches in front of each
    depths = [tensors.count(f"features.{2 * s + 1}.") for s in range(stages)]
    tables = [tensors.shape(f"features.{2 * s + 1}.0.attn.relative_position_bias_table", 2) for s in range(stages)]
    heads = [check_heads(f"heads of stage {s}", table[1], width << s) for s, table in enumerate(tables)]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    weights = renamed(tensors.left, _swin_rules(stages))
    size = given.img_size or (224, 224)
    make = partial(
        SwinTransformer,
        img_size=size,
        patch_size=tuple(patch),
        in_chans=channels,
        num_classes=_rows(weights, "head.fc.weight"),
        embed_dim=width,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        mlp_ratio=_rows(weights, "layers.0.blocks.0.mlp.fc1.weight") / width,
    )
    return model_of(record_of(make, f"{LAYOUT}_swin"), weights, LAYOUT, _preprocessing())


def _swin_rules(stages: int) -> list[tuple[str, str]]:
    """Stages are odd numbers of ``features``, the merging of patches in front of them even ones."""
    rules = [(r".*relative_position_index", ""), (r"features\.0\.0\.", "patch_embed.proj."), (r"head\.", "head.fc.")]
    rules.append((r"features\.0\.2\.", "patch_embed.norm."))
    for s in range(stages):
        rules.append((rf"features\.{2 * s + 1}\.", f"layers.{s}.blocks."))
        rules.append((rf"features\.{2 * s + 2}\.", f"layers.{s + 1}.downsample."))
    return [*rules, *BLOCK]


def _rows(weights: dict[str, torch.Tensor], name: str) -> int:
    if name not in weights or not weights[name].ndim:
        raise UserError(f"the file lacks {name}, which layout {LAYOUT!r} needs; is it another layout?")
    return len(weights[name])


def _preprocessing() -> dict[str, Any]:
    return {"interpolation": "bilinear", "crop_pct": 0.875}
