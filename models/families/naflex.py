"""timm's ``NaFlexVit`` at one size of images: the ViT that it is then, with positions of that grid.

It takes patches of images of any size and shape, and resamples its positions for each; a record is for one size. What
it computes of whole images of that size is what a ViT with the resampled positions computes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.without_values import without_values

from .reading import Require

__all__ = ["AtOneSize", "adopted_embedding", "at_one_size"]


class AtOneSize(SimpleNamespace):
    """What is read of a ``NaFlexVit``, under the names of timm's ViTs."""


def at_one_size(model: Any, img_size: tuple[int, int], require: Require) -> AtOneSize:
    """View a ``NaFlexVit`` as a ViT for images of one size.

    Args:
        model: the timm model.
        img_size: rows and columns.
        require: ``require`` with the model's name bound; raises UserError where the model is no ViT of that size.
    """
    embeds, size = model.embeds, "x".join(map(str, img_size))
    require(model.rope is None, "it has rotary position embedding for images of any size")
    require(embeds.norm_input is None, "it normalises pixels in front of the patch embedding")
    whole = all(side % patch == 0 for side, patch in zip(img_size, embeds.patch_size, strict=True))
    require(whole, f"images of {size} are no whole patches of {embeds.patch_size}; give another img_size")
    with without_values():
        embed: Any = PatchEmbed(
            img_size,
            embeds.patch_size,
            embeds.in_chans,
            model.embed_dim,
            bias=embeds.proj.bias is not None,
            strict_img_size=False,
        )
    embed.norm = embeds.norm
    learned = embeds.pos_embed_type != "none"
    return AtOneSize(
        **{name: getattr(model, name) for name in ("embed_dim", "norm_pre", "norm", "fc_norm", "attn_pool", "blocks")},
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        pool_include_prefix=model.pool_include_prefix,
        num_prefix_tokens=model.num_prefix_tokens,
        patch_embed=embed,
        cls_token=embeds.cls_token,
        reg_token=embeds.reg_token,
        pos_embed=learned or None,
        no_embed_class=True,
        rope=None,
        named_modules=model.named_modules,
    )


@torch.no_grad()
def adopted_embedding(model: Any, arch: Arch) -> dict[str, torch.Tensor]:
    """Name a ``NaFlexVit``'s weights as a ViT's, and give it the positions of the record's grid.

    Args:
        model: the timm model.
        arch: its record.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        inner = name.removeprefix("embeds.")
        if inner == name or inner in ("cls_token", "reg_token"):
            found[inner] = tensor
        elif not inner.startswith("pos_embed"):
            found[f"patch_embed.{inner}"] = tensor
    embeds, rows, columns = model.embeds, *arch.patch_size
    if isinstance(embeds.proj, nn.Linear):
        layout = "d (p q c) -> d c p q" if embeds.channels_last else "d (c p q) -> d c p q"
        weight = rearrange(found["patch_embed.proj.weight"], layout, p=rows, q=columns)
        found["patch_embed.proj.weight"] = weight.contiguous()
    if arch.pos_embed:
        (stage,) = arch.stages
        like = found["patch_embed.proj.weight"]
        positions = torch.zeros(1, stage.grid[0] * stage.grid[1], stage.width, dtype=like.dtype, device=like.device)
        factorized = embeds.pos_embed_type == "factorized"
        add = embeds._apply_factorized_pos_embed if factorized else embeds._apply_learned_pos_embed
        add(positions, grid_size=list(stage.grid))
        found["pos_embed"] = positions
    return found
