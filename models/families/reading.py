"""Shared parts of reading a timm model into a record: refusals with their reasons, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from timm.layers import GluMlp, LayerNorm, Mlp, RmsNorm, RmsNormFp32
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS, activation_name

__all__ = [
    "Require",
    "activation_of",
    "all_norms",
    "block_record",
    "isotropic_record",
    "layer_norms",
    "pyramid_record",
    "read_mlp",
    "require",
    "shared_eps",
]

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
    norms = _norms(model)
    require(all(type(m) in (LayerNorm, nn.LayerNorm) for m in norms), "it has a normalisation that is not LayerNorm")
    require(all(isinstance(m, nn.LayerNorm) and m.bias is not None for m in norms), "it has a LayerNorm without bias")
    return norms


def all_norms(model: nn.Module, require: Require) -> tuple[str, list[Any]]:
    """List all normalisation layers with ``Arch.norm``: RMSNorms, all of them, or LayerNorms as for ``layer_norms``."""
    norms = _norms(model)
    if norms and all(type(m) in (RmsNorm, RmsNormFp32) and m.weight is not None for m in norms):
        return "rms", norms
    return "layer", layer_norms(model, require)


def _norms(model: nn.Module) -> list[Any]:
    outside = ((name, m) for name, m in model.named_modules() if not name.startswith("patch_embed.backbone."))
    # a stem is read by itself, and so is the norm over the values of differential attention
    named = (m for name, m in outside if "norm" in type(m).__name__.lower() and not name.endswith(".sub_norm"))
    return [m for m in named if not any(m.children())]  # blocks may be called after theirs


def shared_eps(norms: list[Any], require: Require) -> float:
    """Return the eps of the norms, which must be the same for all.

    Args:
        norms: the model's LayerNorms.
        require: ``require`` with the model's name bound.
    """
    eps = {m.eps for m in norms}
    require(len(eps) == 1, f"its norms have different eps: {sorted(eps)}")
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


def block_record(index: int, block: Any, scale: float, **fields: Any) -> Block:
    """Record one of timm's blocks whose heads are of equal width, with a plain MLP.

    Args:
        index: of the block.
        block: has ``attn`` with ``proj`` and ``num_heads``, and ``mlp`` with ``fc1``.
        scale: on the products of queries and keys.
        fields: further ones of the record.
    """
    attn = block.attn
    width = attn.proj.in_features // attn.num_heads
    mlp = block.mlp.fc1.out_features
    return Block(src=index, heads=attn.num_heads, qk=width, v=width, scale=scale, mlp=mlp, **fields)


def isotropic_record(model: Any, family: str, name: str, blocks: Sequence[Block], **fields: Any) -> Arch:
    """Make the record of a model of one stage, whose tokens, positions and pooling are told as by timm's ViTs.

    Args:
        model: the timm model.
        family: name of its family.
        name: name of the source.
        blocks: the blocks that were read.
        fields: further fields of the record, or others than ``num_classes`` and ``pool`` of the model.

    Raises:
        UserError: the patch embedding has a bias and a norm behind it, or neither.
    """
    embed, pre_norm = model.patch_embed, not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity)
    rows, columns = embed.grid_size
    fields = {"num_classes": model.num_classes, "pool": model.global_pool, **fields}
    arch = Arch(
        family=family,
        source=name,
        img_size=tuple(embed.img_size),
        patch_size=tuple(embed.feat_ratio(as_scalar=False)),
        in_chans=embed.proj.in_channels if fields.get("stem") is None else embed.in_chans,
        stages=(Stage(width=model.embed_dim, grid=(rows, columns), blocks=tuple(blocks)),),
        class_token=getattr(model, "cls_token", None) is not None,
        pos_embed=getattr(model, "pos_embed", None) is not None,
        prefix_pos_embed=not getattr(model, "no_embed_class", False),
        pre_norm=pre_norm,
        **fields,
    )
    biased = isinstance(embed.proj, nn.Identity) or embed.proj.bias is not None  # a stem's last convolution has one
    require(name, biased != pre_norm, "its patch embedding has a bias and a norm_pre, or neither")
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


def read_mlp(mlp: Any, where: str, require: Require) -> tuple[int, str, bool, bool]:
    """Read hidden units, activation, whether it is gated and whether it normalises its units, of a block's MLP.

    Args:
        mlp: timm's Mlp or GluMlp.
        where: the block, for the message.
        require: ``require`` with the model's name bound.
    """
    glu = type(mlp) is GluMlp
    act = activation_of(mlp, GluMlp if glu else Mlp, where, require)
    require(not (glu and mlp.gate_last), f"{where} activates the second half of a gated MLP's inputs")
    return mlp.fc2.in_features, act, glu, not isinstance(mlp.norm, nn.Identity)
