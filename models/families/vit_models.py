"""timm's ViTs with what records have beyond them: sizes that blocks follow or refuse, and pools of narrower streams."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, AttentionPool
from prunesweep.models.errors import UserError
from prunesweep.models.layers.attention_pool import LatentAttentionPool
from prunesweep.models.layers.mixers import ConvMixer

__all__ = [
    "AttentionPooledTransformer",
    "FactoredPatchEmbed",
    "HeteroVisionTransformer",
    "HeteroVisionTransformerDistilled",
    "check_size",
]


class FactoredPatchEmbed(PatchEmbed):  # type: ignore[misc]  # timm is untyped
    """timm's patch embedding with a frozen factor per patch, ``factor`` (P, 1), behind it (UVC's patch gates)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("factor", torch.ones(self.num_patches, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute patches (B, P, D) of images."""
        found: torch.Tensor = super().forward(x) * self.factor
        return found


class HeteroVisionTransformer(VisionTransformer):  # type: ignore[misc]  # timm is untyped
    """timm's ViT, whose ``set_input_size`` lets convolutions follow and refuses what token plans are not for."""

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another size of images or patches, as timm's; position embeddings are resampled.

        Raises:
            UserError: a block's token plan or factors are for one grid of patches.
        """
        embed, arch = self.patch_embed, getattr(self, "arch", None)
        if arch is not None:
            if arch.stem is not None and patch_size is not None:
                raise UserError(f"patch_size = {patch_size}: the patches of {arch.source} follow from its stem")
            sizes = (img_size or embed.img_size, patch_size or embed.feat_ratio(as_scalar=False))
            check_size(arch, *(to_2tuple(size) for size in sizes))
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            if isinstance(conv := getattr(block, "attn", None), ConvMixer):
                conv.grid = tuple(embed.grid_size)


class HeteroVisionTransformerDistilled(HeteroVisionTransformer, VisionTransformerDistilled):  # type: ignore[misc]  # as above
    """The same of timm's distilled DeiT."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers, as timm's.

        Raises:
            UserError: another pooling is asked for: the classifiers read the class and the distillation token.
        """
        if global_pool not in (None, "", "token"):
            raise UserError(f"global_pool = {global_pool!r}: must be 'token' with a distillation token")
        super().reset_classifier(num_classes, global_pool)


class AttentionPooledTransformer(HeteroVisionTransformer):
    """A VisionTransformer whose attention pool may read a narrower stream than it gives features.

    Args:
        pool: the pool's record.
        num_classes: of the classifier, which reads the pooled features; 0 for none.
        options: timm's, ``embed_dim``, ``norm_layer`` and ``act_layer`` among them.
    """

    def __init__(self, pool: AttentionPool, *, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes=num_classes, **{**options, "global_pool": "avg", "fc_norm": False})
        own = {name: options[name] for name in ("act_layer", "norm_layer")}
        self.attn_pool: Any = LatentAttentionPool(self.embed_dim, pool.width, pool.heads, pool.mlp, **own)
        self.global_pool, self.head_hidden_size = "map", pool.width
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pool where another one is named, as timm does."""
        if global_pool not in (None, "map"):
            self.head_hidden_size = self.embed_dim
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.head_hidden_size != self.embed_dim:
            like = self.attn_pool.latent
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)


def check_size(arch: Arch, img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise UserError where a block is bound to a grid of patches that would change.

    Args:
        arch: the record.
        img_size: rows and columns of the images that are asked for.
        patch_size: those of the patches.
    """
    if (tuple(img_size), tuple(patch_size)) == (arch.img_size, arch.patch_size):
        return
    asked, own = f"img_size = {list(img_size)}, patch_size = {list(patch_size)}", "x".join(map(str, arch.img_size))
    if arch.patch_factors:
        raise UserError(f"{asked}: {arch.source} has a factor for every patch of {own} images; use it at that size")
    bound = [i for i, block in enumerate(arch.blocks) if block.tokens is not None or block.token_scale]
    if bound:
        raise UserError(
            f"{asked}: block {bound[0]} merges or scales tokens by a plan for {own} images; set the size of the model "
            "before it is planned"
        )
