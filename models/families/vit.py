"""Vision transformers whose blocks may all differ, from stock timm parts.

``VisionTransformer`` takes ``block_fn`` and passes it the block's index, which is all the freedom that a heterogeneous
record needs. So the model is a stock timm class with stock parameter names, and a full record has timm's own state
dict. timm's ``Attention`` holds a block whose query, key and value widths agree; ``HeteroAttention`` holds every other
one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import (
    Attention,
    DropPath,
    Format,
    GluMlp,
    HybridEmbed,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    RmsNorm,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS
from prunesweep.models.layers.conv_mixing import ConvSharing
from prunesweep.models.layers.mixers import ConvMixer, HeteroAttention
from prunesweep.models.layers.rotary import Places, merged_places
from prunesweep.models.layers.token_merging import DenseMerge, SparseMerge, make_merge
from prunesweep.models.layers.tokens_to_token import sinusoids
from prunesweep.models.layers.twice_normed import TwiceNormedGluMlp

from .attention_pool import check_pool, pool_cost, read_pool
from .base import Family
from .block_costs import Cost
from .checks import PLAIN, check_fixed, check_one_of
from .layouts import is_plain
from .reading import Require, isotropic_record, layer_norms, read_mlp, require, shared_eps
from .spaces import BLOCK, CLASSIFIERS, WHOLE, AxisUse, Table, linear, per_channel, writes
from .stem import (
    StemEmbed,
    check_stem,
    first_convolution,
    has_fixed_positions,
    read_stem,
    stem_cost,
    stem_uses_stream,
)
from .views import Reader
from .vit_models import (
    AttentionPooledTransformer,
    FactoredPatchEmbed,
    HeteroVisionTransformer,
    HeteroVisionTransformerDistilled,
    check_size,
)

__all__ = [
    "VIT",
    "HeteroBlock",
    "HeteroVisionTransformer",
    "VisionTransformerFamily",
    "build_vit",
    "stock_attention",
]

MakeAttention = Callable[[Arch, Block, Any], nn.Module]  # of the record, a block's, and the class of norms
# fields that timm's VisionTransformerDistilled fixes
DISTILLED = {
    "class_token": True,
    "reg_tokens": 0,
    "prefix_pos_embed": True,
    "pool": "token",
    "pool_prefix": False,
    "head_norm": "tokens",
}


class HeteroBlock(nn.Module):
    """Pre-norm transformer block of one record: either half may be missing. Parameter names are timm's.

    A convolution is called ``attn`` too, with the names of SPViT's released checkpoints behind it; ``token_merge``
    holds a token plan.
    """

    def __init__(
        self,
        arch: Arch,
        block: Block,
        *,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = LayerNorm,
        attention: MakeAttention | None = None,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        (stage,) = arch.stages
        dim = stage.width

        def scale(half: bool) -> nn.Module:
            return LayerScale(dim) if arch.layer_scale and half else nn.Identity()

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.mixer, self.norm_residual, self.has_mlp = block.mixer, block.norm_residual, block.mlp > 0
        self.post_norm, self.parallel = arch.post_norm, arch.parallel
        self.places, self.prefix_tokens = places, arch.prefix_tokens
        self.token_merge: SparseMerge | DenseMerge | None = None
        if block.tokens is not None:
            self.token_merge = make_merge(block.merge, arch.tokens, block.tokens, arch.prefix_tokens)
        if block.mixer != "none" or block.norm_residual:
            self.norm1 = norm_layer(dim)
            self.attn = _mixer(arch, block, norm_layer, attention or stock_attention)
            self.ls1, self.drop_path1 = scale(True), drop()
        if self.has_mlp:
            self.norm2 = norm_layer(dim)
            self.mlp = _mlp(arch, block, act_layer, norm_layer)
            self.ls2, self.drop_path2 = scale(arch.mlp_scale), drop()

    @property
    def coordinates(self) -> Callable[[], torch.Tensor] | None:
        """Gives the places of merged tokens; None where there is no token plan, or nothing is turned by places."""
        places, merge = self.places, self.token_merge
        if places is None or merge is None:
            return None
        return lambda: merged_places(merge, places.coordinates, self.prefix_tokens)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Run the block on tokens, (B, N, D) to the same."""
        z = entered = x if self.token_merge is None else self.token_merge.merge(x)
        if self.mixer == "attn":
            merged = {} if self.coordinates is None else {"coordinates": self.coordinates()}
            options = {"attn_mask": attn_mask, "is_causal": is_causal, **merged}
            z = z + self.drop_path1(self._normed(self.norm1, self.ls1, partial(self.attn, **options), z))
        elif self.mixer != "none" or self.norm_residual:
            z = z + self.drop_path1(self._normed(self.norm1, self.ls1, self.attn, z))
        if self.has_mlp:
            read = entered if self.parallel else z
            z = z + self.drop_path2(self._normed(self.norm2, self.ls2, self.mlp, read))
        return z if self.token_merge is None else self.token_merge.spread(z, x)

    def _normed(self, norm: nn.Module, scale: nn.Module, branch: Callable[..., Any], z: torch.Tensor) -> torch.Tensor:
        """Run a half of the block with its norm in front of it or behind it, and its layer scale."""
        found: torch.Tensor = scale(norm(branch(z)) if self.post_norm else branch(norm(z)))
        return found


def _mlp(arch: Arch, block: Block, act_layer: Any, norm_layer: Any) -> nn.Module:
    (stage,) = arch.stages
    options = {"act_layer": act_layer, "norm_layer": norm_layer if arch.mlp_norm else None}
    options["bias"] = arch.mlp_bias
    if arch.mlp_entry_norm:
        return TwiceNormedGluMlp(stage.width, 2 * block.mlp, gate_last=False, entry_norm=norm_layer, **options)
    if arch.glu:
        return GluMlp(stage.width, 2 * block.mlp, gate_last=False, **options)
    return Mlp(stage.width, block.mlp, **options)


def _mixer(arch: Arch, block: Block, norm_layer: Any, attention: MakeAttention) -> nn.Module:
    (stage,) = arch.stages
    if block.mixer == "none":
        return nn.Identity()
    if block.conv_kernel:
        return ConvMixer(stage.width, block.total_v, block.conv_kernel, stage.grid, arch.prefix_tokens)
    return attention(arch, block, norm_layer)


def stock_attention(arch: Arch, block: Block, norm_layer: Any) -> nn.Module:
    """Make the attention of a ViT's block: timm's own where that can hold its heads."""
    (stage,) = arch.stages
    options = {"qkv_bias": arch.qkv_bias, "qk_norm": arch.qk_norm, "norm_layer": norm_layer}
    if block.stock_heads and not block.token_scale:
        return Attention(stage.width, block.heads, attn_head_dim=block.qk, **options)
    tokens = arch.tokens if block.token_scale else None
    return HeteroAttention(stage.width, block.heads, block.qk, block.v_widths, block.scale, tokens=tokens, **options)


def build_vit(
    arch: Arch,
    *,
    drop_path: float = 0.0,
    model_class: type[VisionTransformer] = HeteroVisionTransformer,
    attention: MakeAttention = stock_attention,
    places: Places | None = None,
    block_class: Any = None,
) -> VisionTransformer:
    """Build a timm VisionTransformer with ``arch``'s blocks.

    Args:
        arch: the record.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
        model_class: VisionTransformer, or a class of the same arguments.
        attention: makes the attention of a block from the record, the block's, and the class of norms.
        places: of the patches, where pairs of channels are turned by them.
        block_class: of blocks, instead of ``HeteroBlock``; takes the record, the block's, and timm's options.
    """
    (stage,) = arch.stages

    def block_fn(*, depth: int, **options: Any) -> nn.Module:
        own = {name: options[name] for name in ("drop_path", "act_layer", "norm_layer")}
        if block_class is not None:
            made: nn.Module = block_class(arch, stage.blocks[depth], **own)
            return made
        return HeteroBlock(arch, stage.blocks[depth], attention=attention, places=places, **own)

    norm_layer = partial(RmsNorm if arch.norm == "rms" else LayerNorm, eps=arch.norm_eps)
    options: dict[str, Any] = {"reg_tokens": arch.reg_tokens} if arch.reg_tokens else {}
    if arch.stem is not None:
        options["embed_layer"] = partial(StemEmbed, arch.stem)
    if arch.patch_factors:
        options["embed_layer"] = FactoredPatchEmbed
    if not arch.dist_token:
        options["pool_include_prefix"] = arch.pool_prefix
    model: VisionTransformer = model_class(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        global_pool=arch.pool,
        embed_dim=stage.width,
        depth=len(stage.blocks),
        num_heads=1,  # the real numbers are in the record; timm would only pass this one on to block_fn
        class_token=arch.class_token,
        pos_embed="learn" if arch.pos_embed else "none",
        no_embed_class=not arch.prefix_pos_embed,
        pre_norm=arch.pre_norm,
        final_norm=arch.head_norm != "none",
        fc_norm=arch.head_norm == "pooled",
        drop_path_rate=drop_path,
        norm_layer=norm_layer,
        embed_norm_layer=norm_layer if arch.embed_norm else None,
        act_layer=ACTIVATIONS[arch.act],
        block_fn=block_fn,
        **options,
    )
    if arch.head_norm == "both":
        model.fc_norm = norm_layer(stage.width)
    if has_fixed_positions(arch) and model.pos_embed is not None:
        model.pos_embed = nn.Parameter(sinusoids(*model.pos_embed.shape[1:]), requires_grad=False)
    return model


class VisionTransformerFamily(Family):
    """timm's ViT and DeiT: one stage, class, distillation and register tokens, every switch of the record."""

    name = "vit"
    capabilities = frozenset(
        {
            "images",
            "width",
            "isotropic",
            "depth",
            "convolutions",
            "mixers",
            "tokens",
            "token_scale",
            "global_attention",
            "mixed_heads",
            "features",
            "streams",
        }
    )
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, VisionTransformerDistilled)
    single_stage = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        name: value for name, value in PLAIN.items() if name not in ("glu", "mlp_norm", "stem", "patch_factors")
    }
    conv_sharing: ClassVar[ConvSharing] = ConvSharing(alpha=1e-2)
    block_tensors = BLOCK
    outer_tensors: ClassVar[Table] = {
        **{f"{tokens}_token": (WHOLE, WHOLE, writes("in")) for tokens in ("cls", "dist", "reg")},
        "pos_embed": (WHOLE, WHOLE, writes("in")),
        **linear("patch_embed.proj", "in", ""),
        **per_channel("patch_embed.norm", "in"),
        "patch_embed.factor": (),
        **per_channel("norm_pre", "in"),
        **per_channel("norm", "out"),
        **per_channel("fc_norm", "out"),
        "attn_pool.latent": (),
        **linear("attn_pool.q", "", ""),
        **linear("attn_pool.kv", "", "out"),
        **linear("attn_pool.proj", "", ""),
        "attn_pool.norm.weight": (),
        "attn_pool.norm.bias": (),
        **linear("attn_pool.mlp.fc1", "", ""),
        **linear("attn_pool.mlp.fc2", "", ""),
        **CLASSIFIERS,
    }

    def takes(self, model: Any) -> bool:
        """Whether a VisionTransformer's blocks have no part that only adopted ones have (``layouts.is_plain``)."""
        return is_plain(model)

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a VisionTransformer or VisionTransformerDistilled, which know their image size."""
        needs = partial(require, name)
        embed = model.patch_embed
        hybrid = type(embed) is HybridEmbed
        needs(hybrid or type(embed) is PatchEmbed, f"its patch embedding is a {type(embed).__name__}, not a PatchEmbed")
        needs(hybrid or isinstance(embed.norm, nn.Identity), "it has a LayerNorm in the patch embedding")
        padded = embed.dynamic_img_pad and any(i % p for i, p in zip(embed.img_size, embed.patch_size, strict=True))
        needs(not padded, f"it pads images of {embed.img_size} to whole patches of {embed.patch_size}")
        if model.dynamic_img_size:
            size = "x".join(map(str, embed.img_size))
            warnings.warn(f"{name} takes images of any size; its record is for {size} images", stacklevel=2)
        pools = ("token", "avg", "map")
        needs(model.global_pool in pools, f"its pooling is {model.global_pool!r}, not one of {', '.join(pools)}")
        stem = read_stem(embed, needs) if hybrid else None
        eps = shared_eps(layer_norms(model, needs), needs)
        blocks, features = zip(*(_read_block(i, b, needs) for i, b in enumerate(model.blocks)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in bias, q/k norm, layer scale or activation")
        qkv_bias, qk_norm, layer_scale, act, glu, mlp_norm = features[0]
        return isotropic_record(
            model,
            self.name,
            name,
            blocks,
            dist_token=isinstance(model, VisionTransformerDistilled),
            reg_tokens=model.num_reg_tokens,
            pool_prefix=model.pool_include_prefix and model.global_pool != "token",
            attn_pool=None if model.attn_pool is None else read_pool(model.attn_pool, act, needs),
            head_norm=_head_norm(model),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            norm_eps=eps,
            act=act,
            glu=glu,
            mlp_norm=mlp_norm,
            stem=stem,
        )

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a timm VisionTransformer, or VisionTransformerDistilled where there is a distillation token."""
        kind: Any = HeteroVisionTransformerDistilled if arch.dist_token else HeteroVisionTransformer
        if arch.attn_pool is not None:
            kind = partial(AttentionPooledTransformer, arch.attn_pool)
        return build_vit(arch, drop_path=drop_path, model_class=kind)

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute tokens (B, N, D) with their positions from images."""
        found: torch.Tensor = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        return found

    def stem_norm(self, model: Any) -> nn.Module | None:
        """Return the norm in front of the first block, if there is one."""
        norm: nn.Module = model.norm_pre
        return None if isinstance(norm, nn.Identity) else norm

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the classifier, and that of the distillation token; none of a backbone without a head.

        An attention pool reads the stream by its keys and values; what follows them is as in the source.
        """
        if not arch.num_classes and arch.attn_pool is None:
            return ()
        if arch.dist_token:
            return (
                Reader("head", model.head, model.norm, lambda x: model.norm(x)[:, 0]),
                Reader("head_dist", model.head_dist, model.norm, lambda x: model.norm(x)[:, 1]),
            )
        norm = {"tokens": model.norm, "pooled": model.fc_norm, "both": model.fc_norm, "none": None}[arch.head_norm]
        if arch.attn_pool is not None:
            first = 0 if arch.pool_prefix else arch.prefix_tokens
            return (Reader("attn_pool.kv", model.attn_pool.kv, norm, lambda x: model.norm(x)[:, first:]),)
        return (Reader("head", model.head, norm, lambda x: model.fc_norm(model.pool(model.norm(x)))),)

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K) from the last tokens."""
        found: torch.Tensor = model.forward_head(model.norm(x))
        return found

    def current(self, model: Any, arch: Arch) -> Arch:
        """Follow ``set_input_size`` too; token plans and factors are for one grid of patches, and refuse another."""
        arch, embed = super().current(model, arch), model.patch_embed
        if arch.attn_pool is not None and arch.pool != "map":
            arch = dataclasses.replace(arch, attn_pool=None)
        img_size, patch_size = tuple(embed.img_size), tuple(embed.feat_ratio(as_scalar=False))
        if (img_size, patch_size) == (arch.img_size, arch.patch_size):
            return arch
        check_size(arch, img_size, patch_size)
        (stage,) = arch.stages
        stage = dataclasses.replace(stage, grid=tuple(embed.grid_size))
        return dataclasses.replace(arch, img_size=img_size, patch_size=patch_size, stages=(stage,))

    def set_patch_drop_rate(self, model: Any, arch: Arch, rate: float) -> None:
        """Leave out a share of the patches in training, where every block is attention over whatever is there."""
        model.patch_drop = PatchDropout(rate, num_prefix_tokens=_check_any_tokens(arch, f"patch_drop_rate = {rate}"))

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Let position embeddings be resampled for every batch, where every block is attention over any tokens."""
        _check_any_tokens(arch, "dynamic_img_size = True")
        if arch.patch_factors:
            raise UserError(f"dynamic_img_size = True: {arch.source} has a factor for every patch of one grid")
        model.dynamic_img_size = True
        embed = model.patch_embed
        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC

    def first_convolution(self, arch: Arch) -> str | None:
        """Name the patch embedding, or the first convolution of a stem, if it has one."""
        return super().first_convolution(arch) if arch.stem is None else first_convolution(arch.stem)

    def classifiers(self, arch: Arch) -> str | tuple[str, ...]:
        """Return ``head``, and ``head_dist`` of a distilled model."""
        return ("head", "head_dist") if arch.dist_token else "head"

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for impossible pooling, or fields that timm's VisionTransformerDistilled does not allow."""
        super().check_fields(arch)
        check_one_of("act", arch.act, ACTIVATIONS)
        if arch.pool == "none":
            raise UserError("pool = 'none': is for family 'lm' only; use 'token' or 'avg'")
        if arch.pool == "token" and arch.pool_prefix:
            raise UserError("pool_prefix = True: is for pool = 'avg' or 'map' only")
        check_pool(arch)
        check_stem(arch)
        if arch.patch_factors and (arch.stem is not None or arch.pre_norm):
            raise UserError("patch_factors = true: needs stem = None and pre_norm = False")
        if arch.pool == "token" and not arch.class_token:
            raise UserError("pool = 'token': needs class_token = true; use pool = 'avg'")
        if arch.dist_token:
            check_fixed(arch, "dist_token = true", DISTILLED)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count patch embedding, prefix tokens, positions, norms, pool and classifiers."""
        (stage,) = arch.stages
        width, patches = stage.width, stage.grid[0] * stage.grid[1]
        embed = _embed_cost(arch, stage) if arch.stem is None else stem_cost(arch)
        pool = pool_cost(arch, stage)
        features = width if arch.attn_pool is None else arch.attn_pool.width
        macs = embed.macs + features * (1 + arch.dist_token) * arch.num_classes + pool.macs
        positions = arch.pos_embed * (patches + (arch.prefix_tokens if arch.prefix_pos_embed else 0))
        norms = (arch.head_norm != "none") + (arch.head_norm == "both") + arch.pre_norm + arch.embed_norm
        heads = (1 + arch.dist_token) * (features + 1) * arch.num_classes + pool.params
        return Cost(macs, embed.params + width * (arch.prefix_tokens + positions + arch.norm_tensors * norms) + heads)

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Return what axes count; a classifier behind an attention pool reads features, not the stream.

        Of a stem, only a convolution that writes the stream has an axis that counts channels of it.
        """
        if tensor.startswith("patch_embed.backbone."):
            return (AxisUse("stages.0.embed", "writes"),) if stem_uses_stream(arch, tensor) else ()
        return (WHOLE, WHOLE) if arch.attn_pool is not None and tensor == "head.weight" else super().uses(arch, tensor)

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        if arch.head_norm == "both" and space.endswith(".embed"):
            return "the gain of the norm over tokens acts on single channels in front of the norm over their average"
        return super().only_chosen(arch, space)

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True with ``pre_norm``: the blocks' residual stream then begins with the first norm's output.

        So it does with ``embed_norm``, before positions are added; with ``post_norm`` every block's do.
        """
        return arch.pre_norm or arch.embed_norm or arch.post_norm


def _embed_cost(arch: Arch, stage: Stage) -> Cost:
    """Count a patch embedding that reads pixels."""
    weights = stage.width * arch.patch_size[0] * arch.patch_size[1] * arch.in_chans
    return Cost(stage.grid[0] * stage.grid[1] * weights, weights + (0 if arch.pre_norm else stage.width))


def _check_any_tokens(arch: Arch, option: str) -> int:
    """Return the number of prefix tokens. Raises UserError where a block is bound to the grid of patches."""
    for i, block in enumerate(arch.blocks):
        if block.conv_kernel or block.tokens is not None or block.token_scale:
            what = f"is a {block.mixer} over" if block.conv_kernel else "has a plan or factors for"
            raise UserError(
                f"{option}: block {i} of {arch.source} {what} the whole grid of {arch.stages[0].grid} patches; "
                "leave the option out"
            )
    return arch.prefix_tokens


def _read_block(index: int, block: Any, require: Require) -> tuple[Block, tuple[bool, bool, bool, str, bool, bool]]:
    """Read the record of one block, and the features that all blocks of a model must share."""
    where = f"block {index}"
    require(type(block) is TimmBlock, f"{where} is a {type(block).__name__}")
    attn, mlp = block.attn, block.mlp
    require(type(attn) is Attention, f"{where} has a {type(attn).__name__}")
    require(attn.gate is None, f"{where} gates its attention")
    require(isinstance(attn.norm, nn.Identity), f"{where} normalises its attention output")
    require(attn.proj.bias is not None, f"{where} has no projection bias")
    units, act, glu, mlp_norm = read_mlp(mlp, where, require)
    require(mlp.fc1.bias is not None and mlp.fc2.bias is not None, f"{where} has no biases in its MLP")
    record = Block(
        src=index,
        heads=attn.num_heads,
        qk=attn.head_dim,
        v=attn.head_dim,
        scale=float(attn.scale),
        mlp=units,
    )
    features = (
        attn.qkv.bias is not None,
        not isinstance(attn.q_norm, nn.Identity),
        isinstance(block.ls1, LayerScale),
        act,
        glu,
        mlp_norm,
    )
    return record, features


def _head_norm(model: Any) -> str:
    if not isinstance(model.norm, nn.Identity):
        return "tokens"
    return "none" if isinstance(model.fc_norm, nn.Identity) else "pooled"


VIT = VisionTransformerFamily()
