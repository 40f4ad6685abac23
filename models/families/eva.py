"""timm's ``Eva`` (EVA-02, DINOv3, Perception Encoders, rotary ViTs), NaFlex ViTs, AIMv2, BEiT-3, Qwen's and DeepSeek's.

They are ViTs that may have rotary position embedding, gated MLPs, norms within attention and MLPs, RMSNorm, and linear
layers without bias. They are built as ViTs (``families.vit``) whose attention turns pairs of channels by their token's
place (``layers.rotary``). timm lays pairs out in two ways, joins projections or not, and keeps some biases apart; here
all have one layout, so a timm model is *adopted*: its weights are given the names and the order of rows of this one.
Where attention and MLP stand side by side behind one norm and in front of one layer scale, each gets them as its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder, resample_pos_embed_grid
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.rotary import Places, RotaryAttention

from .attention_pool import read_pool
from .block_costs import Counts
from .checks import check_at_least, check_one_of
from .layouts import KINDS, adopted_block, has_differences, is_plain, is_there, read_block, read_rope, with_halves
from .naflex import AtOneSize, adopted_embedding, at_one_size
from .reading import Require, all_norms, isotropic_record, require, shared_eps
from .spaces import BLOCK, WHOLE, AxisUse, Table, linear, per_channel, scales
from .stem import read_stem
from .views import AttentionView, LinearView, attention_view
from .vit import VisionTransformerFamily, build_vit
from .vit_models import AttentionPooledTransformer, HeteroVisionTransformer

__all__ = ["EVA", "EvaFamily", "RotaryVisionTransformer", "attention_apart"]

# image towers of language models
TOWERS = (Qwen3VitClassifier, Qwen3VitEncoder, DeepseekVitClassifier, DeepseekVitEncoder)

# by whether there is a norm over tokens, and one over their average
HEAD_NORMS = {(True, False): "tokens", (False, True): "pooled", (True, True): "both", (False, False): "none"}

Attention = TypeVar("Attention", bound=RotaryAttention)


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


def attention_apart(kind: Callable[..., Attention], arch: Arch, block: Block, norm_layer: Any, **own: Any) -> Attention:
    """Build attention of a class that has queries, keys and values apart; ``own`` are arguments of that class alone."""
    (stage,) = arch.stages
    return kind(
        stage.width,
        block.heads,
        block.qk,
        block.v_widths,
        block.scale,
        prefix_tokens=arch.prefix_tokens,
        qkv_bias=arch.qkv_bias,
        k_bias=arch.k_bias,
        proj_bias=arch.proj_bias,
        out_norm=arch.attn_norm,
        norm_layer=norm_layer,
        **own,
    )


class EvaFamily(VisionTransformerFamily):
    """ViTs with queries, keys and values apart, pairs of whose channels may be turned by places."""

    name = "eva"
    capabilities = frozenset({*VisionTransformerFamily.capabilities, "rotary"} - {"token_scale"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (
        Eva,
        VisionTransformer,
        NaFlexVit,
        *TOWERS,
    )
    adopts = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        "dist_token": False,
        "differential": False,
        "position_bias": None,
        "class_attention": None,
        "norm_bias": True,
        "head_mlp": 0,
        "neck": 0,
        "patch_factors": False,
        "pooled_map": 0,
    }
    block_tensors: ClassVar[Table] = {
        **{
            name: uses
            for name, uses in BLOCK.items()
            if not name.startswith(("attn.qkv", "attn.q_norm", "attn.k_norm"))
        },
        **linear("attn.q_proj", "turned_q", "embed"),
        **linear("attn.k_proj", "turned_k", "embed"),
        **per_channel("attn.q_norm", "turned_qk_norm"),
        **per_channel("attn.k_norm", "turned_qk_norm"),
        **linear("attn.v_proj", "v", "embed"),
        **per_channel("attn.norm", "v"),
        "attn.pairs": (scales("q"),),
        "attn.freqs": (WHOLE, scales("q")),
    }

    def takes(self, model: Any) -> bool:
        """Whether a model is no VisionTransformer that family ``vit`` or ``diff`` reads."""
        return type(model) is not VisionTransformer or not (is_plain(model) or has_differences(model))

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a model of ``timm_classes``; one for images of any size is read for its nominal one."""
        needs = partial(require, name)
        if isinstance(model, TOWERS):
            return self._read_tower(model, name, needs)
        if isinstance(model, NaFlexVit):
            model = at_one_size(model, img_size, needs)
        norms = [not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm)]
        reg_token, attn_pool = (getattr(model, part, None) for part in ("reg_token", "attn_pool"))
        if isinstance(model, (VisionTransformer, AtOneSize)):
            pool_prefix = model.pool_include_prefix and model.global_pool != "token"
        else:
            pool_prefix = attn_pool is not None and model.num_prefix_tokens > 0
        return self._read_trunk(
            model,
            name,
            needs,
            reg_tokens=0 if reg_token is None else reg_token.shape[1],
            pool_prefix=pool_prefix,
            head_norm=HEAD_NORMS[norms[0], norms[1]],
        )

    def _read_trunk(self, model: Any, name: str, needs: Require, **fields: Any) -> Arch:
        """Read all but what ``fields`` tell."""
        embed, hybrid = model.patch_embed, type(model.patch_embed) is HybridEmbed
        needs(hybrid or type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        pools = ("token", "avg", "map")
        pool = fields.get("pool") or model.global_pool
        needs(pool in pools, f"its pooling is {pool!r}, not one of {', '.join(pools)}")
        if getattr(model, "dynamic_img_size", False) or not embed.strict_img_size:
            size = "x".join(map(str, embed.img_size))
            warnings.warn(f"{name} takes images of any size; its record is for {size} images", stacklevel=4)
        norm, norms = all_norms(model, needs)
        rotates = getattr(model, "rope", None) is not None
        parts = [with_halves(block) for block in model.blocks]
        blocks, features = zip(*(read_block(i, b, rotates, needs) for i, b in enumerate(parts)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in biases, norms, layer scale or MLPs")
        if shared := [i for i, b in enumerate(parts) if getattr(b.attn, "num_kv_groups", 1) > 1]:
            warnings.warn(
                f"{name}: in {len(shared)} blocks several heads share keys and values; its record gives every head "
                "its own, which is the same function of more weights",
                stacklevel=4,
            )
        own = dict(features[0])
        attn_pool = getattr(model, "attn_pool", None)
        return isotropic_record(
            model,
            self.name,
            name,
            blocks,
            norm=norm,
            norm_eps=shared_eps(norms, needs),
            embed_norm=is_there(embed, "norm"),
            attn_pool=None if attn_pool is None else read_pool(attn_pool, own["act"], needs),
            rope=read_rope(model, blocks[0].v, needs) if rotates else None,
            stem=read_stem(embed, needs) if hybrid else None,
            **own,
            **fields,
        )

    def _read_tower(self, model: Any, name: str, needs: Require) -> Arch:
        """Read an image tower of Qwen or DeepSeek: the average and, with a head, a norm without weights.

        Qwen's positions are resampled for one grid; DeepSeek's tower has a norm over tokens, too.
        """
        trunk = getattr(model, "encoder", model)
        single, option = trunk is model, "global_pool = 'avg'" if trunk is model else "encoder_pool = ''"
        aligner = getattr(trunk, "aligner", None)
        side = 2 if aligner is None else aligner.downsample_ratio
        cells = f"{side}x{side} patches"
        gives = f"gives one vector for every {cells}" if single else f"reads {cells} at once behind its blocks"
        merges = aligner is not None or getattr(trunk, "merger", None) is not None
        needs(not merges, f"it {gives}, as a language model wants them; create it with {option}")
        needs(model.global_pool == "avg", f"its pooling is {model.global_pool!r}, not 'avg'")
        normed = not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity)
        eps = [model.norm.eps] if normed else []
        needs({*eps, trunk.blocks[0].norm1.eps} == {trunk.blocks[0].norm1.eps}, "its norms differ")
        over_tokens = not isinstance(getattr(trunk, "norm", nn.Identity()), nn.Identity)
        behind = normed and not (single and over_tokens)  # what a tower by itself calls norm is over tokens
        head_norm = HEAD_NORMS[over_tokens, behind]
        padded = getattr(trunk.patch_embed, "dynamic_img_pad", False)
        needs(not padded, "it pads images to whole patches; create it with dynamic_img_pad = False")
        head = {"pool": "avg", "num_classes": model.num_classes, "head_norm": head_norm}
        return self._read_trunk(trunk, name, needs, **head)

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Lay out a timm model's weights: pairs apart, three projections, halves of a gated MLP side by side."""
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        if isinstance(model, NaFlexVit):
            state = adopted_embedding(model, arch)
        elif isinstance(model, TOWERS):
            state, model = _adopted_tower(model, arch, state), getattr(model, "encoder", model)
        found = {name: tensor for name, tensor in state.items() if not name.startswith(("blocks.", "rope."))}
        for i, block in enumerate(model.blocks):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            if (apart := with_halves(block)) is not block:
                block, own = apart, apart.state_dict()
            found |= {prefix + name: tensor for name, tensor in adopted_block(arch, block, own).items()}
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
        attention = partial(attention_apart, RotaryAttention, places=places, qk_norm=arch.qk_norm)
        kind = self._model_class(arch)
        return build_vit(arch, drop_path=drop_path, model_class=kind, attention=attention, places=places)

    def _model_class(self, arch: Arch) -> Any:
        pool = arch.attn_pool
        return RotaryVisionTransformer if pool is None else partial(RotaryPooledTransformer, pool)

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
        if arch.qk_rows == 1 and use.axis.startswith("turned_"):
            use = AxisUse(use.axis.removeprefix("turned_"), use.role)
        return super()._block_use(arch, stage, index, use)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for impossible pooling or an impossible rotation."""
        super().check_fields(arch)
        check_one_of("norm", arch.norm, ("layer", "rms"))
        if arch.post_norm and arch.layer_scale:
            raise UserError("post_norm = true: needs layer_scale = False, the norms have gains of their own")
        if arch.mlp_entry_norm and not arch.glu:
            raise UserError("mlp_entry_norm = true: needs glu = True, it is ViTamin's gated MLPs that have such a norm")
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
        if own == "embed" and arch.mlp_entry_norm and any(block.mlp for block in arch.blocks):
            return "the gain of an MLP's first norm acts on single channels in front of its second one"
        if own == "v" and arch.attn_norm and arch.blocks[int(i)].mixer == "attn":
            return "a norm acts on the value channels"
        return super().only_chosen(arch, space)


def _adopted_tower(model: Any, arch: Arch, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name a tower's weights without their prefix, give its last norm weights, and Qwen's positions to the grid."""
    encoder, grid = getattr(model, "encoder", model), arch.stages[0].grid
    found = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    if arch.pos_embed:
        positions = resample_pos_embed_grid(found["pos_embed"], encoder.pos_embed_grid_size, grid)
        found["pos_embed"] = positions.detach().clone()
    if arch.head_norm in ("pooled", "both"):
        like = found["patch_embed.proj.bias"]
        found["fc_norm.weight"] = torch.ones_like(like)
        if arch.norm == "layer":
            found["fc_norm.bias"] = torch.zeros_like(like)
    return found


EVA = EvaFamily()
