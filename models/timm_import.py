"""Reading the record of a timm model, and refusing, with the reason, a model that the record cannot express."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed, to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import Block as PvtBlock
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.families.vit import ACTIVATIONS

from .arch import Arch, Block, Stage
from .errors import UserError, nearest

__all__ = ["arch_from_timm"]


def arch_from_timm(model: str | nn.Module, img_size: int | tuple[int, int] | None = None) -> Arch:
    """The full record of a timm ViT, DeiT, Swin or PVTv2, given by name or as a module.

    Raises:
        UserError: the name is unknown, the family is not supported, the model has a part that the record lacks, or
            ``img_size`` is not the one that the model is built for.
    """
    if isinstance(model, str):
        name = model
        bare = name.split(".")[0]
        if ":" not in name and not timm.is_model(bare):
            raise UserError(f"unknown timm model {name!r}. {nearest(bare, timm.list_models())}".strip())
        with torch.device("meta"):
            module: nn.Module = timm.create_model(name)
    else:
        module = model
    arch = getattr(module, "arch", None)
    cfg = getattr(module, "pretrained_cfg", {})
    name = str(cfg.get("architecture") or type(module).__name__)
    if not isinstance(arch, Arch):
        reader = _READERS.get(type(module))
        if reader is None:
            known = ", ".join(cls.__name__ for cls in _READERS)
            raise UserError(f"{name} is a {type(module).__name__}: this version represents timm's {known}")
        arch = reader(module, name, to_2tuple(img_size or tuple(cfg.get("input_size", (3, 224, 224))[1:])))
        arch.validate()
    if img_size is not None and to_2tuple(img_size) != arch.img_size:
        raise UserError(f"img_size = {img_size}: {name} is built for {arch.img_size[0]}x{arch.img_size[1]} images")
    return arch


def _require(name: str, met: bool, reason: str) -> None:
    if not met:
        raise UserError(f"{name} cannot be represented: {reason}")


def _vit_arch(model: Any, name: str, _: tuple[int, int]) -> Arch:
    require = partial(_require, name)

    embed = model.patch_embed
    require(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
    require(isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
    require(not model.dynamic_img_size, "it is built with dynamic_img_size")
    require(model.attn_pool is None, "it has an attention pool")
    require(model.global_pool in ("token", "avg"), f"its pooling is {model.global_pool!r}, not 'token' or 'avg'")
    require(not model.pool_include_prefix, "its pooling includes the prefix tokens")
    require(model.pos_embed is not None, "it has no learned position embedding")
    require(isinstance(model.head, nn.Linear), "it has no classifier (num_classes = 0)")
    eps = _shared_eps(_norms(model, require), require)
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
        norm_eps=eps,
        act=act,
    )
    require((embed.proj.bias is None) == arch.pre_norm, "its patch embedding has a bias and a norm_pre, or neither")
    return arch


def _norms(model: nn.Module, require: Any) -> list[Any]:
    """All normalisation layers; each must be a LayerNorm with weight and bias."""
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    require(all(type(m) in (LayerNorm, nn.LayerNorm) for m in norms), "it has a normalisation that is not LayerNorm")
    require(all(isinstance(m, nn.LayerNorm) and m.bias is not None for m in norms), "it has a LayerNorm without bias")
    return norms


def _shared_eps(norms: list[Any], require: Any) -> float:
    eps = {m.eps for m in norms}
    require(len(eps) == 1, f"its LayerNorms have different eps: {sorted(eps)}")
    return eps.pop()


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
    act = _activation(mlp, Mlp, where, require)
    require(isinstance(mlp.norm, nn.Identity), f"{where} normalises inside its MLP")
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
        act,
    )
    return record, features


def _activation(mlp: Any, kind: type[nn.Module], where: str, require: Any) -> str:
    require(type(mlp) is kind, f"{where} has a {type(mlp).__name__} instead of an {kind.__name__}")
    act = next((key for key, cls in ACTIVATIONS.items() if type(mlp.act) is cls), None)
    require(act is not None, f"{where} has activation {type(mlp.act).__name__}; known: {', '.join(ACTIVATIONS)}")
    require(getattr(mlp.act, "approximate", "none") == "none", f"{where} approximates GELU")
    return str(act)


def _swin_arch(model: Any, name: str, _: tuple[int, int]) -> Arch:
    require = partial(_require, name)
    embed = model.patch_embed
    require(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
    require(isinstance(embed.norm, nn.LayerNorm), "it has no LayerNorm in the patch embedding")
    require(not model.dynamic_img_size, "it is built for images of any size (strict_img_size = False)")
    require(model.global_pool == "avg", f"its pooling is {model.global_pool!r}, not 'avg'")
    require(isinstance(model.head.fc, nn.Linear), "it has no classifier (num_classes = 0)")
    eps = _shared_eps(_norms(model, require), require)
    grid, index, stages, biases = tuple(embed.grid_size), 0, [], set()
    for s, layer in enumerate(model.layers):
        grid = grid if s == 0 else tuple((side + 1) // 2 for side in grid)
        require(len(layer.blocks) > 0, f"stage {s} has no blocks")
        blocks = []
        for block in layer.blocks:
            blocks.append(_swin_block(index, block, require))
            biases.add(block.attn.qkv.bias is not None)
            index += 1
        window = tuple(layer.blocks[0].window_size)
        stages.append(Stage(width=layer.blocks[0].dim, grid=grid, blocks=tuple(blocks), window=window))
    shape = {
        "img_size": tuple(embed.img_size),
        "patch_size": tuple(embed.patch_size),
        "in_chans": embed.proj.in_channels,
    }
    return _pyramid(model, "swin", name, stages, biases, norm_eps=eps, **shape)


def _swin_block(index: int, block: Any, require: Any) -> Block:
    where = f"block {index}"
    require(type(block) is SwinTransformerBlock, f"{where} is a {type(block).__name__}")
    attn = block.attn
    require(type(attn) is WindowAttention, f"{where} has a {type(attn).__name__}")
    require(not block.always_partition, f"{where} is built with always_partition")
    _activation(block.mlp, Mlp, where, require)
    width = attn.proj.in_features // attn.num_heads
    return Block(
        src=index,
        heads=attn.num_heads,
        qk=width,
        v=width,
        scale=float(attn.scale),
        mlp=block.mlp.fc1.out_features,
        shifted=any(block.shift_size),
    )


def _pvt_arch(model: Any, name: str, img_size: tuple[int, int]) -> Arch:
    require = partial(_require, name)
    require(isinstance(model.head, nn.Linear), "it has no classifier (num_classes = 0)")
    require(model.global_pool == "avg", f"its pooling is {model.global_pool!r}, not 'avg'")
    embeds = [model.patch_embed, *(layer.downsample for layer in model.stages[1:])]
    _norms(model, require)
    fixed = {m.norm.eps for m in embeds} | {m.norm.eps for m in model.modules() if hasattr(m, "sr") and m.norm}
    require(fixed == {1e-5}, "a LayerNorm of its embeddings or reductions has eps other than 1e-5")
    eps = _shared_eps([n for s in model.stages for n in (s.norm, *(b.norm1 for b in s.blocks))], require)
    grid: tuple[int, ...] = tuple((side + 3) // 4 for side in img_size)
    index, stages, biases = 0, [], set()
    for s, layer in enumerate(model.stages):
        grid = grid if s == 0 else tuple((side + 1) // 2 for side in grid)
        blocks = []
        for block in layer.blocks:
            blocks.append(_pvt_block(index, block, require))
            biases.add(block.attn.q.bias is not None)
            index += 1
        sr = layer.blocks[0].attn.sr
        ratio = 1 if sr is None else int(sr.kernel_size[0])
        stages.append(
            Stage(width=embeds[s].proj.out_channels, grid=(grid[0], grid[1]), blocks=tuple(blocks), sr_ratio=ratio)
        )
    shape = {"img_size": img_size, "patch_size": (4, 4), "in_chans": model.in_chans}
    return _pyramid(model, "pvt_v2", name, stages, biases, norm_eps=eps, **shape)


def _pyramid(model: Any, family: str, name: str, stages: list[Stage], biases: set[bool], **facts: Any) -> Arch:
    """The record of a model of several stages, which has no prefix tokens and averages over places."""
    _require(name, len(biases) == 1, "its blocks differ in the bias of queries, keys and values")
    return Arch(
        family=family,
        source=name,
        num_classes=model.num_classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        qkv_bias=biases.pop(),
        **facts,
    )


def _pvt_block(index: int, block: Any, require: Any) -> Block:
    where = f"block {index}"
    require(type(block) is PvtBlock, f"{where} is a {type(block).__name__}")
    attn = block.attn
    require(attn.pool is None, f"{where} has linear attention (pooled keys and values)")
    _activation(block.mlp, MlpWithDepthwiseConv, where, require)
    return Block(
        src=index,
        heads=attn.num_heads,
        qk=attn.head_dim,
        v=attn.head_dim,
        scale=float(attn.scale),
        mlp=block.mlp.fc1.out_features,
        sr=0 if attn.sr is None else attn.dim,
    )


_READERS: dict[type[nn.Module], Any] = {
    VisionTransformer: _vit_arch,
    VisionTransformerDistilled: _vit_arch,
    SwinTransformer: _swin_arch,
    PyramidVisionTransformerV2: _pvt_arch,
}
