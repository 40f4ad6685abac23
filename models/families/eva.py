"""timm's ``Eva`` class: EVA and EVA-02, DINOv3, Perception Encoders, and ViTs with rotary position embedding.

They are built as ViTs (``families.vit``) whose attention turns pairs of channels by their token's place
(``layers.rotary``). timm lays pairs out in two ways, joins projections or not, and keeps some biases apart; here all
have one layout, so a timm model is *adopted*: its weights are given the names and the order of rows of this one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers import AttentionRope, PatchEmbed, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block, Rope, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.rotary import Places, RotaryAttention

from .attention_pool import read_pool
from .block_costs import Counts
from .checks import check_at_least, check_one_of
from .reading import Require, isotropic_record, layer_norms, require, shared_eps
from .spaces import BLOCK, WHOLE, AxisUse, Table, linear, per_channel, scales
from .views import AttentionView, LinearView, attention_view
from .vit import VisionTransformerFamily, build_vit, read_mlp
from .vit_models import AttentionPooledTransformer, HeteroVisionTransformer

__all__ = ["EVA", "RotaryVisionTransformer"]

Features = tuple[tuple[str, Any], ...]
KINDS: Mapping[type[nn.Module], str] = {
    RotaryEmbeddingCat: "axial",
    RotaryEmbeddingDinoV3: "centred",
    RotaryEmbeddingMixed: "mixed",
}


class RotaryVisionTransformer(HeteroVisionTransformer):
    """A VisionTransformer whose blocks share the places of its patches."""

    @property
    def places(self) -> Places | None:
        """What the blocks share; None where nothing is turned."""
        return next((block.places for block in self.blocks), None)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another size of images or patches, as ``HeteroVisionTransformer``; tokens are turned by the new places.

        Raises:
            UserError: a block's token plan is for one grid of patches.
        """
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if self.places is not None:
            self.places.resize(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """Name the weights that are not to decay; learned frequencies are among them."""
        return {*super().no_weight_decay(), "blocks.*.attn.freqs"}


class RotaryPooledTransformer(RotaryVisionTransformer, AttentionPooledTransformer):
    """The same with an attention pool."""


def _attention(places: Places | None, arch: Arch, block: Block, norm_layer: Any) -> RotaryAttention:
    (stage,) = arch.stages
    return RotaryAttention(
        stage.width,
        block.heads,
        block.qk,
        block.v_widths,
        block.scale,
        places,
        prefix_tokens=arch.prefix_tokens,
        qkv_bias=arch.qkv_bias,
        k_bias=arch.k_bias,
        out_norm=arch.attn_norm,
        norm_layer=norm_layer,
    )


class EvaFamily(VisionTransformerFamily):
    """timm's Eva models, whose queries and keys have pairs of channels that are turned by places."""

    name = "eva"
    capabilities = frozenset({*VisionTransformerFamily.capabilities, "rotary"} - {"token_scale"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (Eva,)
    adopts = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        "dist_token": False,
        "qk_norm": False,
    }
    block_tensors: ClassVar[Table] = {
        **{
            name: uses
            for name, uses in BLOCK.items()
            if not name.startswith(("attn.qkv", "attn.q_norm", "attn.k_norm"))
        },
        **linear("attn.q_proj", "turned_q", "embed"),
        **linear("attn.k_proj", "turned_k", "embed"),
        **linear("attn.v_proj", "v", "embed"),
        **per_channel("attn.norm", "v"),
        "attn.pairs": (scales("q"),),
        "attn.freqs": (WHOLE, scales("q")),
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of an Eva, which knows its image size; one for images of any size is read for that one."""
        needs = partial(require, name)
        embed = model.patch_embed
        needs(type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        needs(isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
        pools = ("token", "avg", "map")
        needs(model.global_pool in pools, f"its pooling is {model.global_pool!r}, not one of {', '.join(pools)}")
        if model.dynamic_img_size:
            size = "x".join(map(str, embed.img_size))
            warnings.warn(f"{name} takes images of any size; its record is for {size} images", stacklevel=2)
        kinds = {type(block).__name__ for block in model.blocks}
        needs("EvaBlockPostNorm" not in kinds, "its blocks normalise behind each half, where no linear layer follows")
        eps = shared_eps(layer_norms(model, needs), needs)
        rotates = model.rope is not None
        blocks, features = zip(*(_read_block(i, b, rotates, needs) for i, b in enumerate(model.blocks)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in biases, norms, layer scale or MLPs")
        norms = [not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm)]
        needs(not all(norms), "it has a norm in front of the pooling and another one behind it")
        return isotropic_record(
            model,
            self.name,
            name,
            blocks,
            reg_tokens=0 if model.reg_token is None else model.reg_token.shape[1],
            pool_prefix=model.attn_pool is not None and model.num_prefix_tokens > 0,
            attn_pool=None if model.attn_pool is None else read_pool(model.attn_pool, dict(features[0])["act"], needs),
            head_norm="tokens" if norms[0] else "pooled" if norms[1] else "none",
            norm_eps=eps,
            rope=_read_rope(model, blocks[0].v, needs) if rotates else None,
            **dict(features[0]),
        )

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Lay out a timm Eva's weights: pairs apart, three projections, two halves of a gated MLP side by side."""
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        found = {name: tensor for name, tensor in state.items() if not name.startswith(("blocks.", "rope."))}
        for i, block in enumerate(model.blocks):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            found |= {prefix + name: tensor for name, tensor in _adopted_block(arch, block, own).items()}
            if arch.rope is not None and arch.rope.kind == "mixed":
                found[f"{prefix}attn.freqs"] = state["rope.freqs"][:, i].flatten(1).contiguous()
            elif arch.rope is not None:
                like = own["attn.proj.weight"]
                pairs = torch.arange(arch.rope.pairs, device=like.device).repeat(block.attn.num_heads)
                found[f"{prefix}attn.pairs"] = pairs
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a ``RotaryVisionTransformer``."""
        (stage,) = arch.stages
        places = None if arch.rope is None else Places(arch.rope, stage.grid)
        attention = partial(_attention, places)
        kind: Any = RotaryVisionTransformer
        if arch.attn_pool is not None:
            kind = partial(RotaryPooledTransformer, arch.attn_pool)
        return build_vit(arch, drop_path=drop_path, model_class=kind, attention=attention, places=places)

    def set_patch_drop_rate(self, model: Any, arch: Arch, rate: float) -> None:
        """Leave out a share of the patches in training, where none is turned by its place."""
        if arch.rope is not None:
            raise UserError(
                f"patch_drop_rate = {rate}: {arch.source} turns every patch by its place; use drop_path_rate"
            )
        super().set_patch_drop_rate(model, arch, rate)

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Let position embeddings be resampled for every batch, where nothing is turned by places."""
        if arch.rope is not None:
            raise UserError(f"dynamic_img_size = True: {arch.source} turns patches by their places; give img_size")
        super().make_dynamic(model, arch)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, whose projections are apart."""
        if record.mixer != "attn":
            return None
        q, k, v = (LinearView(f"attn.{name}", getattr(block.attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
        attn = block.attn
        return attention_view(block, record, (q, k, v), rotary=attn, coordinates=block.coordinates, out_norm=attn.norm)

    def _block_use(self, arch: Arch, stage: int, index: int, use: AxisUse) -> AxisUse:
        if arch.rope is None and use.axis.startswith("turned_"):
            use = AxisUse(use.axis.removeprefix("turned_"), use.role)
        return super()._block_use(arch, stage, index, use)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for impossible pooling or an impossible rotation."""
        super().check_fields(arch)
        if arch.rope is not None:
            check_one_of("rope.kind", arch.rope.kind, KINDS.values())
            check_at_least("rope.pairs", arch.rope.pairs, 2)
            if arch.rope.pairs % 2:
                raise UserError(f"rope.pairs = {arch.rope.pairs}: must be even, half of them for each coordinate")
            if not arch.rope.temperature > 0:
                raise UserError(f"rope.temperature = {arch.rope.temperature!r}: must be above 0")

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention over all tokens, and two weights for every pair with frequencies that are learned."""
        macs, params = super().attention_cost(arch, stage, block, tokens)
        learned = arch.rope is not None and arch.rope.kind == "mixed"
        return macs, params + 2 * learned * block.heads * block.qk

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        own, i = space.rpartition(".")[2], space.split(".")[1]
        if own in ("q", "k") and arch.rope is not None:
            return "pairs of queries' and keys' channels are turned by places"
        if own == "v" and arch.attn_norm and arch.blocks[int(i)].mixer == "attn":
            return "a norm acts on the value channels"
        return super().only_chosen(arch, space)


def _read_block(index: int, block: Any, rotates: bool, require: Require) -> tuple[Block, Features]:
    """Read the record of one block, and the fields that all blocks of a model must share."""
    where = f"block {index}"
    require(type(block) is EvaBlock, f"{where} is a {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    require(type(attn) in (EvaAttention, AttentionRope), f"{where} has a {type(attn).__name__}")
    require(attn.gate is None, f"{where} gates its attention")
    require(getattr(attn, "num_kv_groups", 1) == 1, f"{where} has fewer heads of keys and values than of queries")
    require(isinstance(attn.q_norm, nn.Identity), f"{where} normalises queries and keys")
    require((block.gamma_1 is None) == (block.gamma_2 is None), f"{where} has a layer scale in one half only")
    require(attn.proj.bias is not None, f"{where} has no projection bias")
    if type(mlp) is SwiGLU:
        require(type(mlp.act) is nn.SiLU, f"{where} has activation {type(mlp.act).__name__} in a SwiGLU")
        require(mlp.fc1_g.bias is not None and mlp.fc2.bias is not None, f"{where} has no biases in its MLP")
        units, act, glu, mlp_norm = mlp.fc2.in_features, "silu", True, not isinstance(mlp.norm, nn.Identity)
    else:
        units, act, glu, mlp_norm = read_mlp(mlp, where, require)
    q, k, v = (bias is not None for bias in _projections(attn, "bias"))
    require(q == v and q >= k, f"{where} has biases of keys without those of queries, or of values")
    width = attn.head_dim
    record = Block(
        src=index,
        heads=attn.num_heads,
        qk=width // 2 if rotates else width,
        v=width,
        scale=float(attn.scale),
        mlp=units,
    )
    features = {
        "qkv_bias": q,
        "k_bias": k or not q,
        "attn_norm": not isinstance(attn.norm, nn.Identity),
        "layer_scale": block.gamma_1 is not None,
        "act": act,
        "glu": glu,
        "mlp_norm": mlp_norm,
    }
    return record, tuple(features.items())


def _read_rope(model: Any, width: int, require: Require) -> Rope:
    """Read how a model with heads of ``width`` channels turns them."""
    rope = model.rope
    require(type(rope) in KINDS, f"its position embedding is a {type(rope).__name__}")
    kind = KINDS[type(rope)]
    own = rope.dim // model.blocks[0].attn.num_heads if kind == "mixed" else rope.dim
    require(own == width and width % 4 == 0, f"it turns {own} of a head's {width} channels, or not a multiple of 4")
    require(not rope.aug_active, "it changes its coordinates at random in training")
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
    if attn.qkv is None:
        return tuple(getattr(layer, part) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    if part == "bias" and getattr(attn, "q_bias", None) is not None:
        return attn.q_bias, None, attn.v_bias
    joint = getattr(attn.qkv, part)
    return (None,) * 3 if joint is None else joint.chunk(3)


def _adopted_block(arch: Arch, block: Any, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lay out the weights ``own`` of a timm block, by their names within it."""
    joined = ("attn.q", "attn.k", "attn.v", "mlp.fc1", "gamma_")
    found = {name: tensor for name, tensor in own.items() if not name.startswith(joined)}
    for half in "12":
        if f"gamma_{half}" in own:
            found[f"ls{half}.gamma"] = own[f"gamma_{half}"]
    for part in ("weight", "bias"):
        for name, rows in zip("qkv", _projections(block.attn, part), strict=True):
            if rows is not None:
                rows = rows.detach()
                apart = name != "v" and arch.rope is not None
                found[f"attn.{name}_proj.{part}"] = _pairs_apart(block.attn, rows) if apart else rows
        names = ("fc1_g", "fc1_x") if type(block.mlp) is SwiGLU else ("fc1",)
        found[f"mlp.fc1.{part}"] = torch.cat([own[f"mlp.{name}.{part}"] for name in names])
    return found


def _pairs_apart(attn: Any, rows: torch.Tensor) -> torch.Tensor:
    """Order rows (H·E, ...) of queries or keys so that the first channels of all pairs come first."""
    layout = "(h two p)" if attn.rotate_half else "(h p two)"
    return rearrange(rows, f"{layout} ... -> (two h p) ...", two=2, h=attn.num_heads)


EVA = EvaFamily()
