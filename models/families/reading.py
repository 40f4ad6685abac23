"""Shared parts of reading a timm model into a record: refusals with their reasons, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS, activation_name

__all__ = ["Require", "activation_of", "isotropic_record", "layer_norms", "pyramid_record", "require", "shared_eps"]

Require = Callable[[bool, str], None]  # ``require`` with the name given


def require(name: str, met: bool, reason: str) -> None:
    """Raise UserError where a model is not what the record can express.

    Args:
        name: of the model.
        met: whether the condition holds; if so, nothing happens.
        reason: what the model has that the record cannot express.
    """
    if not met:
        raise UserError(f"{name} cannot be represented: {reason}")


def layer_norms(model: nn.Module, require: Require) -> list[Any]:
    """List all normalisation layers, each of which must be a LayerNorm with weight and bias.

    Args:
        model: the timm model.
        require: ``require`` with the model's name bound.
    """
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    require(all(type(m) in (LayerNorm, nn.LayerNorm) for m in norms), "it has a normalisation that is not LayerNorm")
    require(all(isinstance(m, nn.LayerNorm) and m.bias is not None for m in norms), "it has a LayerNorm without bias")
    return norms


def shared_eps(norms: list[Any], require: Require) -> float:
    """Return the eps of the norms, which must be the same for all.

    Args:
        norms: the model's LayerNorms.
        require: ``require`` with the model's name bound.
    """
    eps = {m.eps for m in norms}
    require(len(eps) == 1, f"its LayerNorms have different eps: {sorted(eps)}")
    return float(eps.pop())


def activation_of(
    mlp: Any, kind: type[nn.Module], where: str, require: Require, known: Collection[str] = tuple(ACTIVATIONS)
) -> str:
    """Return the record's name of an MLP's activation.

    Args:
        mlp: the MLP; it must be exactly of type ``kind``.
        kind: the MLP class that the family's blocks have.
        where: the block, for the message.
        require: ``require`` with the model's name bound.
        known: names of the activations that the family's records may have.
    """
    require(type(mlp) is kind, f"{where} has a {type(mlp).__name__} instead of an {kind.__name__}")
    act = activation_name(mlp.act)
    require(act in known, f"{where} has activation {act or type(mlp.act).__name__}; known: {', '.join(known)}")
    return str(act)


def isotropic_record(model: Any, family: str, name: str, blocks: Sequence[Block], **fields: Any) -> Arch:
    """Make the record of a model of one stage, whose tokens, positions and pooling are told as by timm's ViTs.

    Args:
        model: the timm model.
        family: name of its family.
        name: name of the source.
        blocks: the blocks that were read.
        fields: further fields of the record.

    Raises:
        UserError: the patch embedding has a bias and a norm behind it, or neither.
    """
    embed, pre_norm = model.patch_embed, not isinstance(model.norm_pre, nn.Identity)
    rows, columns = embed.grid_size
    arch = Arch(
        family=family,
        source=name,
        img_size=tuple(embed.img_size),
        patch_size=tuple(embed.patch_size),
        in_chans=embed.proj.in_channels,
        num_classes=model.num_classes,
        stages=(Stage(width=model.embed_dim, grid=(rows, columns), blocks=tuple(blocks)),),
        class_token=model.cls_token is not None,
        pos_embed=model.pos_embed is not None,
        prefix_pos_embed=not model.no_embed_class,
        pool=model.global_pool,
        pre_norm=pre_norm,
        **fields,
    )
    require(name, (embed.proj.bias is None) == pre_norm, "its patch embedding has a bias and a norm_pre, or neither")
    return arch


def pyramid_record(model: Any, family: str, name: str, stages: list[Stage], biases: set[bool], **fields: Any) -> Arch:
    """Make the record of a model of several stages, without prefix tokens, whose head averages over places.

    Args:
        model: the timm model.
        family: name of its family.
        name: name of the source.
        stages: the stages that were read.
        biases: for every block, whether queries, keys and values have biases; must be the same for all.
        fields: further fields of the record.

    Raises:
        UserError: the blocks differ in these biases.
    """
    require(name, len(biases) == 1, "its blocks differ in the bias of queries, keys and values")
    return Arch(
        family=family,
        source=name,
        num_classes=model.num_classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        qkv_bias=biases.pop(),
        **fields,
    )
