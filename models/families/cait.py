"""CaiT: talking-heads attention of patches, and behind it class attention, which is kept but for the stream's channels.

A head is cut with its row and its column of both mixings of heads, so that what it gave to other heads goes with it.
The blocks of the class token cost a fiftieth of a model's MACs; their attention and MLPs stay whole. timm's class
token, its blocks and the last norm are a pool here, and LayerScale of its blocks is in the layers in front of it, so a
timm model is adopted (``families.eva``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block, ClassAttention, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS
from prunesweep.models.layers.class_attention import ClassAttentionPool
from prunesweep.models.layers.talking_heads import TalkingHeadsAttention

from .base import Family
from .block_costs import Cost, Counts
from .checks import PLAIN, check_at_least, check_one_of
from .reading import Require, activation_of, block_record, isotropic_record, layer_norms, require, shared_eps
from .spaces import BLOCK, NORMS, WHOLE, AxisUse, Table, linear, scales, writes
from .views import AttentionView, Reader, attention_view, consecutive
from .vit import VisionTransformerFamily, build_vit
from .vit_models import HeteroVisionTransformer

__all__ = ["CAIT", "ClassPooledTransformer"]

CLASS_BLOCK = re.compile(r"attn_pool\.blocks\.\d+\.")


class ClassPooledTransformer(HeteroVisionTransformer):
    """A VisionTransformer of patches alone, whose pool is a class token with blocks of its own.

    Args:
        record: of the class attention.
        qkv_bias: its queries, keys and values have biases.
        num_classes: of the classifier; 0 for none.
        options: timm's, ``embed_dim``, ``norm_layer`` and ``act_layer`` among them.
    """

    pool_class: ClassVar[Any] = ClassAttentionPool

    def __init__(self, record: ClassAttention, qkv_bias: bool, *, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes=num_classes, **{**options, "global_pool": "avg"})
        own = {name: options[name] for name in ("act_layer", "norm_layer")}
        self.attn_pool: Any = self.pool_class(self.embed_dim, record, bias=qkv_bias, **own)
        self.global_pool = "map"

    def no_weight_decay(self) -> set[str]:
        """Name the weights that are not to decay; the class token is among them."""
        return {*super().no_weight_decay(), "attn_pool.cls_token"}


def _talking_heads(arch: Arch, block: Block, norm_layer: Any) -> TalkingHeadsAttention:
    (stage,) = arch.stages
    options = {"qkv_bias": arch.qkv_bias, "norm_layer": norm_layer}
    return TalkingHeadsAttention(stage.width, block.heads, block.qk, block.v_widths, block.scale, **options)


class CaitFamily(VisionTransformerFamily):
    """timm's CaiT: patches in one stage, talking heads, and class attention as its pool."""

    name = "cait"
    capabilities = frozenset({*VisionTransformerFamily.capabilities, "mixed_maps"} - {"token_scale", "mixed_heads"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (Cait,)
    adopts = True
    one_head_only = "a head has a place of its own in the mixing of heads"
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in PLAIN.items() if name != "class_attention"},
        "class_token": False,
        "dist_token": False,
        "reg_tokens": 0,
        "pool_prefix": False,
        "attn_pool": None,
        "head_norm": "pooled",
        "pre_norm": False,
        "qk_norm": False,
        "pos_embed": True,
    }
    block_tensors: ClassVar[Table] = {
        **BLOCK,
        **{f"attn.{mix}.weight": (scales("heads"), scales("heads")) for mix in ("proj_l", "proj_w")},
        **{f"attn.{mix}.bias": (scales("heads"),) for mix in ("proj_l", "proj_w")},
    }
    outer_tensors: ClassVar[Table] = {
        **VisionTransformerFamily.outer_tensors,
        "attn_pool.cls_token": (WHOLE, WHOLE, writes("out")),
    }
    class_tensors: ClassVar[Table] = {  # of a block of the class token
        **NORMS,
        **{name: uses for part in "qkv" for name, uses in linear(f"attn.{part}", "", "embed").items()},
        **linear("attn.proj", "embed", ""),
        **linear("mlp.fc1", "", "embed"),
        **linear("mlp.fc2", "embed", ""),
    }

    def takes(self, model: Any) -> bool:
        """Whether a model is a Cait."""
        return True

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a Cait, which knows its image size."""
        needs = partial(require, name)
        embed = model.patch_embed
        needs(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        needs(isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
        needs(model.global_pool == "token", f"its pooling is {model.global_pool!r}, not 'token'")
        eps = shared_eps(layer_norms(model, needs), needs)
        blocks, features = zip(*(_read_block(i, b, needs) for i, b in enumerate(model.blocks)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in bias or activation")
        qkv_bias, act = features[0]
        tokens = [_read_class_block(i, b, qkv_bias, act, needs) for i, b in enumerate(model.blocks_token_only)]
        needs(bool(tokens) and len(set(tokens)) == 1, "its blocks of the class token differ, or there are none")
        heads, hidden = tokens[0]
        pool = ClassAttention(blocks=len(tokens), width=model.embed_dim, heads=heads, mlp=hidden)
        fields = {"qkv_bias": qkv_bias, "layer_scale": True, "norm_eps": eps, "act": act, "head_norm": "pooled"}
        arch = isotropic_record(model, self.name, name, blocks, pool="map", class_attention=pool, **fields)
        return dataclasses.replace(arch, class_token=False)

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Name a timm model's weights as here, and move LayerScale of the class token's blocks into their layers."""
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        found = {}
        for name, tensor in state.items():
            new = re.sub(r"^blocks\.(\d+)\.gamma_(\d)$", r"blocks.\1.ls\2.gamma", name)
            new = re.sub(r"^(cls_token|blocks)(_token_only)?", r"attn_pool.\1", new) if _of_pool(name) else new
            found[re.sub(r"^norm\.", "fc_norm.", new)] = tensor
        for i in range(len(model.blocks_token_only)):
            for half, layer in (("1", "attn.proj"), ("2", "mlp.fc2")):
                gain = found.pop(f"attn_pool.blocks.{i}.gamma_{half}")
                where = f"attn_pool.blocks.{i}.{layer}"
                found[f"{where}.weight"] = found[f"{where}.weight"] * gain[:, None]
                found[f"{where}.bias"] = found[f"{where}.bias"] * gain
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a ``ClassPooledTransformer``."""
        kind: Any = HeteroVisionTransformer
        if arch.class_attention is not None:
            kind = partial(ClassPooledTransformer, arch.class_attention, arch.qkv_bias)
        return build_vit(arch, drop_path=drop_path, model_class=kind, attention=_talking_heads)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, with its mixing of heads."""
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v), attend=block.attn.attend)

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the layers of the class token's blocks that read its stream or the patches', and the classifier."""
        if arch.class_attention is None:
            return super().heads(model, arch)
        pool, readers = model.attn_pool, list[Reader]()
        for i, block in enumerate(pool.blocks):
            readers += _class_readers(pool, i, block)
        if arch.num_classes:
            readers.append(Reader("head", model.head, model.fc_norm, lambda x: model.fc_norm(pool(x))))
        return tuple(readers)

    def current(self, model: Any, arch: Arch) -> Arch:
        """Follow timm's methods; without its pool, a model has no class attention."""
        now = super().current(model, arch)
        return now if now.pool == "map" else dataclasses.replace(now, class_attention=None)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for an impossible pool."""
        Family.check_fields(self, arch)
        check_one_of("act", arch.act, ACTIVATIONS)
        check_one_of("pool", arch.pool, ("map", "avg"))
        record = arch.class_attention
        if (record is None) == (arch.pool == "map"):
            needs = "needs class_attention" if record is None else "leaves no room for class_attention; use 'map'"
            raise UserError(f"pool = {arch.pool!r}: {needs}")
        if record is None:
            return
        for name in ("blocks", "width", "heads", "mlp"):
            check_at_least(f"class_attention.{name}", getattr(record, name), 1)
        if record.width % record.heads:
            raise UserError(
                f"class_attention.width = {record.width}: must be a multiple of class_attention.heads = {record.heads}"
            )

    def block_spaces(self, arch: Arch, block: Block) -> dict[str, int]:
        """Return the size of the spaces within a block; a head also has its rows and columns of the mixings."""
        return super().block_spaces(arch, block) | {"heads": block.heads}

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention over all tokens, and 2 N N H H MACs of two mixings of H heads."""
        macs, params = super().attention_cost(arch, stage, block, tokens)
        mixed = 2 * block.heads**2
        return macs + tokens**2 * mixed, params + mixed + 2 * block.heads

    def outside_cost(self, arch: Arch) -> Cost:
        """Count as for a ViT, and class attention: N patches of width D, blocks of width W and M hidden units.

        A block has 2 D W (N + 2) MACs of projections, 2 W (N + 1) of products, and 2 D M of its MLP.
        """
        found, record = super().outside_cost(arch), arch.class_attention
        if record is None:
            return found
        (stage,) = arch.stages
        places, D, W, M = math.prod(stage.grid), stage.width, record.width, record.mlp
        macs = 2 * D * W * (places + 2) + 2 * W * (places + 1) + 2 * D * M
        params = 4 * D * W + 3 * W * arch.qkv_bias + D + 2 * D * M + M + D + 4 * D
        return Cost(found.macs + record.blocks * macs, found.params + record.blocks * params + D)

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Return what axes count; those of the class token's blocks but the stream's are kept whole."""
        if not CLASS_BLOCK.match(tensor):
            return super().uses(arch, tensor)
        return tuple(
            AxisUse(use.axis and "stages.0.embed", use.role) for use in self.class_tensors[CLASS_BLOCK.sub("", tensor)]
        )


def _of_pool(name: str) -> bool:
    return name == "cls_token" or name.startswith("blocks_token_only.")


def _class_readers(pool: ClassAttentionPool, i: int, block: Any) -> list[Reader]:
    def token(x: torch.Tensor) -> torch.Tensor:
        return pool.token(x, i)

    def all_tokens(x: torch.Tensor) -> torch.Tensor:
        return block.read(token(x), x)  # type: ignore[no-any-return]

    where, attn = f"attn_pool.blocks.{i}", block.attn
    return [
        Reader(f"{where}.attn.q", attn.q, block.norm1, lambda x: all_tokens(x)[:, :1]),
        Reader(f"{where}.attn.k", attn.k, block.norm1, all_tokens),
        Reader(f"{where}.attn.v", attn.v, block.norm1, all_tokens),
        Reader(f"{where}.mlp.fc1", block.mlp.fc1, block.norm2, lambda x: block.norm2(block.attended(token(x), x))),
    ]


def _read_block(index: int, block: Any, require: Require) -> tuple[Block, tuple[bool, str]]:
    where = f"block {index}"
    require(type(block) is LayerScaleBlock, f"{where} is a {type(block).__name__}")
    attn = block.attn
    require(type(attn) is TalkingHeadAttn, f"{where} has a {type(attn).__name__}")
    act = activation_of(block.mlp, Mlp, where, require)
    return block_record(index, block, float(attn.scale)), (attn.qkv.bias is not None, act)


def _read_class_block(index: int, block: Any, bias: bool, act: str, require: Require) -> tuple[int, int]:
    where = f"block {index} of the class token"
    require(type(block) is LayerScaleBlockClassAttn, f"{where} is a {type(block).__name__}")
    require(type(block.attn) is ClassAttn, f"{where} has a {type(block.attn).__name__}")
    own = activation_of(block.mlp, Mlp, where, require)
    require((block.attn.q.bias is not None, own) == (bias, act), f"{where} has another bias or activation")
    return block.attn.num_heads, block.mlp.fc1.out_features


CAIT = CaitFamily()
