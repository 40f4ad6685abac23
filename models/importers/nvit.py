"""NViT's dense models (arXiv 2110.04869; ReViT's have the same layout).

In these files Q, K and V are separate tensors, the entry ``dim`` gives the widths of every block, the patch embedding
is a 1x1 convolution on rearranged pixels, and a trained factor per token scales query, key and value. The attention
scale stays that of the source model, 64 ** -0.5, also where heads have become narrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import nn

from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, agree
from .vit import vit_arch

__all__ = ["read_nvit"]

SCALE = 64**-0.5
WIDTHS = ("head", "QK", "V", "MLP")  # one number per block; QK and V are per head
CHANNELS = 3  # the rearranged pixels do not tell them


def read_nvit(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of an NViT checkpoint.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; ``heads`` must agree with the file's entry ``dim``.

    Returns:
        The model in eval mode.

    Raises:
        UserError: keys, shapes and ``dim`` contradict each other, or ``given`` does not fit.
    """
    dim = _dim(tensors)
    if given.heads is not None:
        said = given.heads * len(dim["head"]) if len(given.heads) == 1 else given.heads
        if list(said) != dim["head"]:
            raise UserError(f"heads = {list(given.heads)}: the file's entry 'dim' says {dim['head']}; leave heads out")
    _rearrange_patches(tensors)

    def read_mixer(index: int, width: int, tokens: int) -> dict[str, Any]:
        where = f"blocks.{index}"
        heads, qk, v = (dim[name][index] for name in ("head", "QK", "V"))
        agree(f"dim['MLP'][{index}]", dim["MLP"][index], tensors.shape(f"{where}.mlp.fc1.weight", 2)[0])
        rows = {"Q": heads * qk, "K": heads * qk, "V": heads * v}
        why = f"'dim' says {heads} heads, queries and keys {qk} wide, values {v}"
        for leaf, axes in (("weight", (width,)), ("bias", ())):
            parts = [tensors.take(f"{where}.attn.qkv.{p}.{leaf}", n, *axes, why=why) for p, n in rows.items()]
            tensors.built[f"{where}.attn.qkv.{leaf}"] = torch.cat(parts)
        tensors.layer(f"{where}.attn.proj.proj", width, heads * v, to=f"{where}.attn.proj", why=why)
        tensors.move(f"{where}.attn.qkv.token_mask", tokens, 1, to=f"{where}.attn.token_scale")
        return {"heads": heads, "qk": qk, "v": v, "scale": SCALE, "token_scale": True}

    return tensors.finish(vit_arch(tensors, given, read_mixer))


def _dim(tensors: Tensors) -> dict[str, list[int]]:
    dim, depth = tensors.beside.get("dim"), tensors.count("blocks.")
    if not isinstance(dim, Mapping) or not all(name in dim for name in ("EMB", *WIDTHS)):
        found = "it is missing" if dim is None else f"got {dim!r}"
        raise UserError(
            f"layout 'nvit' reads its widths from the file's entry 'dim' (EMB, {', '.join(WIDTHS)}): {found}"
        )
    for name in WIDTHS:
        widths = dim[name]
        if not isinstance(widths, list) or not all(type(n) is int and n > 0 for n in widths) or len(widths) != depth:
            raise UserError(f"dim[{name!r}] = {widths!r}: must be {depth} positive whole numbers, one per block")
    agree("dim['EMB']", dim["EMB"], tensors.shape("cls_token", 3)[2])
    return {name: dim[name] for name in WIDTHS}


def _rearrange_patches(tensors: Tensors) -> None:
    """Turn (D, pixels, 1, 1), pixels counted by row, column and channel, into timm's (D, channels, rows, columns)."""
    key = "patch_embed.proj.weight"
    width, pixels, *_ = tensors.shape(key, 4)
    side = math.isqrt(pixels // CHANNELS)
    if side * side * CHANNELS != pixels:
        raise UserError(f"{key} has {pixels} inputs: layout 'nvit' has square patches of {CHANNELS} channels")
    flat = tensors.take(key, width, pixels, 1, 1)
    tensors.left[key] = rearrange(flat, "e (p1 p2 c) 1 1 -> e c p1 p2", p1=side, p2=side).contiguous()
