"""Reading the record of a timm model, and refusing, with the reason, a model that the record cannot express."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .arch import Arch, Block, Stage
from .errors import UserError, nearest
from .vit import ACTIVATIONS

__all__ = ["arch_from_timm"]


def arch_from_timm(model: str | nn.Module) -> Arch:
    """The full record of a timm ViT or DeiT, given by name or as a module.

    Raises:
        UserError: the name is unknown, the family is not supported, or the model has a part that the record lacks.
    """
    if isinstance(model, str):
        name = model
        bare = name.split(".")[0]
        if ":" not in name and not timm.is_model(bare):
            raise UserError(f"unknown timm model {name!r}. {nearest(bare, timm.list_models())}".strip())
        with torch.device("meta"):
            model = timm.create_model(name)
    arch = getattr(model, "arch", None)
    if isinstance(arch, Arch):
        return arch
    name = str(getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__)
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UserError(
            f"{name} is a {type(model).__name__}: this version represents timm's VisionTransformer and "
            "VisionTransformerDistilled"
        )
    return _vit_arch(model, name)


def _vit_arch(model: Any, name: str) -> Arch:
    def require(met: bool, reason: str) -> None:
        if not met:
            raise UserError(f"{name} cannot be represented: {reason}")

    embed = model.patch_embed
    require(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
    require(isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
    require(not model.dynamic_img_size, "it is built with dynamic_img_size")
    require(model.attn_pool is None, "it has an attention pool")
    require(model.global_pool in ("token", "avg"), f"its pooling is {model.global_pool!r}, not 'token' or 'avg'")
    require(not model.pool_include_prefix, "its pooling includes the prefix tokens")
    require(model.pos_embed is not None, "it has no learned position embedding")
    require(isinstance(model.head, nn.Linear), "it has no classifier (num_classes = 0)")
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    require(all(type(m) in (LayerNorm, nn.LayerNorm) for m in norms), "it has a normalisation that is not LayerNorm")
    eps = {m.eps for m in norms}
    require(len(eps) == 1, f"its LayerNorms have different eps: {sorted(eps)}")
    blocks, features = zip(*(_vit_block(i, b, require) for i, b in enumerate(model.blocks)), strict=True)
    require(len(set(features)) == 1, "its blocks differ in bias, q/k norm, layer scale or activation")
    qkv_bias, qk_norm, layer_scale, act = features[0]
    rows, columns = embed.grid_size
    arch = Arch(
        family="vit",
        source=name,
        img_size=tuple(embed.img_size),
        patch_size=tuple(embed.patch_size),
        in_chans=embed.proj.in_channels,
        num_classes=model.num_classes,
        stages=(Stage(width=model.embed_dim, grid=(rows, columns), blocks=blocks),),
        class_token=model.cls_token is not None,
        dist_token=isinstance(model, VisionTransformerDistilled),
        reg_tokens=model.num_reg_tokens,
        prefix_pos_embed=not model.no_embed_class,
        pool=model.global_pool,
        head_norm=_head_norm(model),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        layer_scale=layer_scale,
        norm_eps=eps.pop(),
        act=act,
    )
    arch.validate()
    require((embed.proj.bias is None) == arch.pre_norm, "its patch embedding has a bias and a norm_pre, or neither")
    return arch


def _head_norm(model: Any) -> str:
    if not isinstance(model.norm, nn.Identity):
        return "tokens"
    return "none" if isinstance(model.fc_norm, nn.Identity) else "pooled"


def _vit_block(index: int, block: Any, require: Any) -> tuple[Block, tuple[bool, bool, bool, str]]:
    """The record of one block, and the features that all blocks of a model must share."""
    where = f"block {index}"
    require(type(block) is TimmBlock, f"{where} is a {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    require(type(attn) is Attention, f"{where} has a {type(attn).__name__}")
    require(attn.gate is None, f"{where} gates its attention")
    require(isinstance(attn.norm, nn.Identity), f"{where} normalises its attention output")
    require(attn.proj.bias is not None, f"{where} has no projection bias")
    require(type(mlp) is Mlp, f"{where} has a {type(mlp).__name__} instead of an Mlp")
    require(isinstance(mlp.norm, nn.Identity), f"{where} normalises inside its MLP")
    act = next((key for key, cls in ACTIVATIONS.items() if type(mlp.act) is cls), None)
    require(act is not None, f"{where} has activation {type(mlp.act).__name__}; known: {', '.join(ACTIVATIONS)}")
    require(getattr(mlp.act, "approximate", "none") == "none", f"{where} approximates GELU")
    record = Block(
        src=index,
        heads=attn.num_heads,
        qk=attn.head_dim,
        v=attn.head_dim,
        scale=float(attn.scale),
        mlp=mlp.fc1.out_features,
    )
    features = (
        attn.qkv.bias is not None,
        not isinstance(attn.q_norm, nn.Identity),
        isinstance(block.ls1, LayerScale),
        str(act),
    )
    return record, features
