"""How timm lays out ViTs whose weights are adopted: reading their blocks and positions, and naming their tensors anew.

Adopted weights are those of ``families.eva``: queries, keys and values in projections of their own, the first channels
of all pairs before the second ones where pairs are turned, and a gated MLP's two halves side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from timm.layers import Attention, AttentionRope, DiffAttention, Mlp, RmsNorm, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models import beit
from timm.models.deepseek_vit import DeepseekVitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import nn

from prunesweep.models.arch import Arch, Block, Rope
from prunesweep.models.without_values import without_values

from .reading import Require, activation_of, read_mlp

__all__ = [
    "KINDS",
    "Features",
    "adopted_block",
    "has_differences",
    "is_plain",
    "is_there",
    "read_block",
    "read_rope",
    "with_halves",
]

Features = tuple[tuple[str, Any], ...]
KINDS: Mapping[type[nn.Module], str] = {
    RotaryEmbeddingCat: "axial",
    RotaryEmbeddingDinoV3: "centred",
    RotaryEmbeddingMixed: "mixed",
}
# names of a gated MLP's two layers, first the one that is activated
INPUTS: Mapping[type[nn.Module], tuple[str, str]] = {SwiGLU: ("fc1_g", "fc1_x"), GeGluMlp: ("w0", "w1")}
POST_NORM = (EvaBlockPostNorm, ResPostBlock, ResPostRelPosBlock)
ATTENTION = (EvaAttention, AttentionRope, Attention, DiffAttention, beit.Attention, RelPosAttention)
PARALLEL = (ParallelScalingBlock, DiffParallelScalingBlock)
# what timm makes lambda of, as attention has it: two numbers, or four vectors
LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class Halves(nn.Module):
    """A timm block whose MLP reads what its attention reads, with modules of its own for both, on the same weights.

    Args:
        block: one of ``PARALLEL``.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        differs, fused = type(block) is DiffParallelScalingBlock, block.out_proj is not None
        dim, hidden = block.in_split[1], block.in_split[0]
        joint, bias = block.in_proj.weight, block.in_proj.bias
        attn_out, mlp_out = (block.out_proj,) * 2 if fused else (block.attn_out_proj, block.mlp_out_proj)
        attention: Any = DiffAttention if differs else Attention
        with without_values():
            self.attn: Any = attention(dim, block.num_heads, qkv_bias=bias is not None)
            self.mlp = Mlp(dim, hidden)
        self.norm1 = self.norm2 = block.in_norm
        self.ls1 = self.ls2 = block.ls
        self.attn.q_norm, self.attn.k_norm, self.mlp.act = block.q_norm, block.k_norm, block.mlp_act
        first_bias = block.mlp_bias if bias is None else bias[:hidden]
        last_bias = torch.zeros_like(joint[0]) if fused or mlp_out.bias is None else mlp_out.bias
        columns = (slice(dim), slice(dim, None)) if fused else (slice(None),) * 2
        for layer, weight, own in (
            (self.attn.qkv, joint[hidden:], None if bias is None else bias[hidden:]),
            (self.attn.proj, attn_out.weight[:, columns[0]], attn_out.bias),
            (self.mlp.fc1, joint[:hidden], first_bias),
            (self.mlp.fc2, mlp_out.weight[:, columns[1]], last_bias),
        ):
            layer.weight = nn.Parameter(weight.detach())
            layer.bias = None if own is None else nn.Parameter(own.detach())
        if differs:
            self.attn.sub_norm, self.attn.lambda_init = block.sub_norm, block.lambda_init
            for name in LAMBDAS:
                setattr(self.attn, name, getattr(block, name))


BLOCKS = (EvaBlock, TimmBlock, DeepseekVitBlock, beit.Block, RelPosBlock, Halves, *POST_NORM)


def with_halves(block: Any) -> Any:
    """Return a timm block with its attention and its MLP in modules of their own, which it may be itself."""
    return Halves(block) if type(block) in PARALLEL else block


def has_differences(model: Any) -> bool:
    """Whether attention of a VisionTransformer is differential."""
    differs = (type(block) is DiffParallelScalingBlock for block in model.blocks)
    return any(differs) or any(type(getattr(block, "attn", None)) is DiffAttention for block in model.blocks)


def read_block(index: int, block: Any, rotates: bool, require: Require) -> tuple[Block, Features]:
    """Read the record of one block, and the fields that all blocks of a model must share."""
    where = f"block {index}"
    require(type(block) in BLOCKS, f"{where} is a {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    require(type(attn) in ATTENTION, f"{where} has a {type(attn).__name__}")
    require(getattr(attn, "gate", None) is None, f"{where} gates its attention")
    normed = {part: is_there(attn, part) for part in ("q_norm", "norm")}
    scaled = [_scale_of(block, half) is not None for half in "12"]
    require(scaled[0] or not scaled[1], f"{where} has a layer scale in its MLP only")
    first: Any = mlp.fc1_g if type(mlp) is SwiGLU else getattr(mlp, "fc1", None)
    last: Any = getattr(mlp, "fc2", None)
    if type(mlp) is GeGluMlp:
        act = activation_of(mlp, GeGluMlp, where, require)
        units, glu, mlp_norm, first, last = mlp.w2.in_features, True, False, mlp.w0, mlp.w2
    elif type(mlp) is SwiGLU:
        require(type(mlp.act) is nn.SiLU, f"{where} has activation {type(mlp.act).__name__} in a SwiGLU")
        units, act, glu, mlp_norm = mlp.fc2.in_features, "silu", True, not isinstance(mlp.norm, nn.Identity)
    else:
        units, act, glu, mlp_norm = read_mlp(mlp, where, require)
    mlp_bias = first.bias is not None
    require(mlp_bias == (last.bias is not None), f"{where} has a bias in one layer of its MLP only")
    q, k, v = (bias is not None for bias in _projections(attn, "bias"))
    require(q == v and q >= k, f"{where} has biases of keys without those of queries, or of values")
    width = attn.proj.in_features // attn.num_heads
    record = Block(
        src=index,
        heads=attn.num_heads,
        qk=width // 2 if rotates or type(attn) is DiffAttention else width,
        v=width,
        scale=float(attn.scale),
        mlp=units,
    )
    features = {
        "qkv_bias": q,
        "k_bias": k or not q,
        "post_norm": type(block) in POST_NORM,
        "parallel": type(block) is Halves,
        "qk_norm": normed["q_norm"],
        "attn_norm": normed["norm"],
        "layer_scale": scaled[0],
        "mlp_scale": scaled == [True, True] or not scaled[0],
        "act": act,
        "glu": glu,
        "mlp_norm": mlp_norm,
        "mlp_entry_norm": type(mlp) is GeGluMlp,
        "proj_bias": attn.proj.bias is not None,
        "mlp_bias": mlp_bias,
    }
    return record, tuple(features.items())


def is_plain(model: Any) -> bool:
    """Whether a VisionTransformer's weights are named as those of family ``vit``, and its norms are LayerNorms there.

    Otherwise its norms stand behind the halves of its blocks or are RMSNorms, its attention's output is normalised, its
    gated MLPs have layers apart, or linear layers are without bias.
    """
    norms = (type(module) is RmsNorm for module in model.modules())
    return not any(norms) and not any(
        type(block) in (ResPostBlock, *PARALLEL)
        or is_there(getattr(block, "attn", None), "norm")
        or type(getattr(block, "mlp", None)) in (SwiGLU, GeGluMlp)
        for block in model.blocks
    )


def is_there(module: Any, part: str) -> bool:
    """Whether a module has a part that does something."""
    return not isinstance(getattr(module, part, nn.Identity()), nn.Identity)


def _scale_of(block: Any, half: str) -> torch.Tensor | None:
    """Return the layer scale of a block's first or second half; timm has it in the block or in a module of its own."""
    own = getattr(block, f"gamma_{half}", None)
    return getattr(getattr(block, f"ls{half}", None), "gamma", None) if own is None else own


def read_rope(model: Any, width: int, require: Require) -> Rope:
    """Read how a model with heads of ``width`` channels turns them."""
    rope = model.rope
    require(type(rope) in KINDS, f"its position embedding is a {type(rope).__name__}")
    kind = KINDS[type(rope)]
    own = rope.dim // model.blocks[0].attn.num_heads if kind == "mixed" else rope.dim
    require(own == width and width % 4 == 0, f"it turns {own} of a head's {width} channels, or not a multiple of 4")
    require(kind != "axial" or rope.grid_type == "index", "it turns by pixels, not by rows and columns")
    centred = kind != "centred" or (rope.normalize_coords == "separate" and rope.min_period is None)
    require(centred, "it scales its coordinates by one side of the grid, or has a range of periods")
    reference = getattr(rope, "ref_feat_shape", None)
    columns_first = rope.grid_indexing == "xy"
    return Rope(
        kind=kind,
        pairs=width // 2,
        temperature=float(rope.temperature),
        column_first=columns_first,
        offset=float(getattr(rope, "grid_offset", 0.0)),
        reference=None if reference is None else (int(reference[0]), int(reference[1])),
    )


def _projections(attn: Any, part: str) -> tuple[torch.Tensor | None, ...]:
    """Return ``weight`` or ``bias`` of queries, keys and values; None for a bias that is not there."""
    if getattr(attn, "qkv", None) is None:
        return tuple(getattr(layer, part) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    if part == "bias" and getattr(attn, "q_bias", None) is not None:
        return attn.q_bias, None, attn.v_bias
    joint = getattr(attn.qkv, part)
    return (None,) * 3 if joint is None else joint.chunk(3)


def adopted_block(arch: Arch, block: Any, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lay out the weights ``own`` of a timm block, by their names within it."""
    joined = (
        "attn.qkv.",
        "attn.q_proj.",
        "attn.k_proj.",
        "attn.v_proj.",
        "attn.q_bias",
        "attn.v_bias",
        "attn.lambda_",
        "attn.sub_norm.",
        "mlp.fc1",
        "gamma_",
    )
    found = {name: tensor for name, tensor in own.items() if not name.startswith(joined)}
    if type(block.mlp) is GeGluMlp:
        for name, new in (("norm", "entry_norm"), ("w2", "fc2")):
            parts = [part for part in ("weight", "bias") if f"mlp.{name}.{part}" in found]
            found |= {f"mlp.{new}.{part}": found.pop(f"mlp.{name}.{part}") for part in parts}
        found = {name: tensor for name, tensor in found.items() if not name.startswith(("mlp.w0.", "mlp.w1."))}
    if type(block.attn) is DiffAttention:
        found |= _differences(block.attn)
    for half in "12":
        if f"gamma_{half}" in own:
            found[f"ls{half}.gamma"] = own[f"gamma_{half}"]
    for part in ("weight", "bias"):
        for name, rows in zip("qkv", _projections(block.attn, part), strict=True):
            if rows is not None:
                rows = rows.detach()
                if name != "q":
                    rows = _for_every_head(block.attn, rows)
                apart = name != "v" and arch.qk_rows == 2
                found[f"attn.{name}_proj.{part}"] = _pairs_apart(block.attn, rows) if apart else rows
        for name in ("attn.q_norm", "attn.k_norm"):
            if f"{name}.{part}" in own and arch.rope is not None:
                found[f"{name}.{part}"] = _pairs_apart(block.attn, own[f"{name}.{part}"], heads=1)
        names = INPUTS.get(type(block.mlp), ("fc1",))
        if part == "weight" or arch.mlp_bias:
            found[f"mlp.fc1.{part}"] = torch.cat([own[f"mlp.{name}.{part}"] for name in names])
    return found


def _differences(attn: Any) -> dict[str, torch.Tensor]:
    """Compute lambda, and gains of all heads' values with the factor behind them, of differential attention."""
    gains = attn.sub_norm.weight.detach() * (1 - attn.lambda_init)
    with torch.no_grad():
        return {
            "attn.lambda_full": attn._compute_lambda().to(gains.dtype),
            "attn.norm.weight": gains.repeat(attn.num_heads),
        }


def _for_every_head(attn: Any, rows: torch.Tensor) -> torch.Tensor:
    """Give every head rows of keys or values of its own, (H·E, ...), where several share them."""
    groups = getattr(attn, "num_kv_groups", 1)
    if groups == 1:
        return rows
    return repeat(rows, "(h e) ... -> (h groups e) ...", h=attn.num_kv_heads, groups=groups)


def _pairs_apart(attn: Any, rows: torch.Tensor, heads: int | None = None) -> torch.Tensor:
    """Order rows (H·E, ...) of queries or keys so that the first channels of all pairs come first."""
    layout = "(h two p)" if type(attn) is DiffAttention or attn.rotate_half else "(h p two)"
    return rearrange(rows, f"{layout} ... -> (two h p) ...", two=2, h=heads or attn.num_heads)
