"""XCiT: attention between channels, whose heads are cut whole, and convolutions of single channels.

In cross-covariance attention a head's map has a row for every query channel and a column for every key channel. A
softmax runs along the columns, so a key channel, and the value channel that it weighs, cannot go without changing all
rows. A query channel could, with the output channel that is its row; but records have one width for a head's channels,
so heads go whole: with their queries, keys, values, temperature and columns of the output. MLP units, the stream's
channels and blocks can be cut, too. Positions, which timm computes by a convolution of
Fourier features, become those of every place here, so a timm model is adopted (``families.eva``).
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from timm.models.cait import ClassAttn
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import LPI, XCA, ClassAttentionBlock, ConvPatchEmbed, XCABlock, Xcit
from torch import nn

from prunesweep.models.arch import Arch, Block, ClassAttention, Stage, Stem
from prunesweep.models.errors import UserError
from prunesweep.models.layers.cross_covariance import CrossCovarianceBlock, NormingClassPool

from .base import Family
from .block_costs import Cost
from .cait import CaitFamily, ClassPooledTransformer
from .reading import Require, activation_of, layer_norms, require, shared_eps
from .spaces import MLP, AxisUse, Table, linear, per_channel, scales
from .stem import check_stem
from .views import AttentionView
from .vit import build_vit
from .vit_models import HeteroVisionTransformer

__all__ = ["XCIT", "CrossCovarianceTransformer"]

BATCH_EPS = 1e-5  # of its BatchNorms


class CrossCovarianceTransformer(ClassPooledTransformer):
    """A VisionTransformer of patches whose blocks have convolutions for one grid."""

    pool_class = NormingClassPool

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another size of images, as ``HeteroVisionTransformer``; convolutions follow."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            if block.mixer == "xca":
                block.local_mp.grid = tuple(self.patch_embed.grid_size)


def _batch_norm(name: str, role: AxisUse) -> Table:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (role,) for part in parts}, f"{name}.num_batches_tracked": ()}


class XcitFamily(CaitFamily):
    """timm's XCiT: patches in one stage behind convolutions, and a class token that reads them at the end."""

    name = "xcit"
    capabilities = frozenset({"images", "width", "depth", "features", "channel_attention"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (Xcit,)
    lacks: ClassVar[dict[str, str]] = {
        "tokens": "in every block a convolution reads neighbours on the whole grid of patches",
        **dict.fromkeys(("mixers", "global_attention"), "it has no attention of tokens: channels attend to each other"),
        "streams": "its blocks have a third part, a convolution of the stream, which no layer can be refitted for",
    }
    one_head_only = "in attention between channels a softmax runs over all channels of a head"
    conv_sharing: ClassVar[Any] = None
    norm_residuals = False
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in CaitFamily.fixed_fields.items() if name not in ("stem", "pos_embed")},
        "layer_scale": True,
    }
    block_tensors: ClassVar[Table] = {
        **MLP,
        **{name: uses for i in "123" for name, uses in per_channel(f"norm{i}", "embed").items()},
        **{f"ls{i}.gamma": (scales("embed"),) for i in "123"},
        **linear("attn.qkv", "qkv", "embed"),
        **linear("attn.proj", "embed", "v"),
        "attn.temperature": (scales("heads"),),
        **per_channel("local_mp.conv1", "embed"),
        **per_channel("local_mp.conv2", "embed"),
        **_batch_norm("local_mp.bn", scales("embed")),
    }
    class_tensors: ClassVar[Table] = {
        **CaitFamily.class_tensors,
        **{f"gamma{i}": (scales("embed"),) for i in "12"},
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of an Xcit, which knows its image size."""
        needs = partial(require, name)
        needs(model.global_pool == "token", f"its pooling is {model.global_pool!r}, not 'token'")
        eps = shared_eps(_layer_norms(model, needs), needs)
        blocks, features = zip(*(_read_block(i, b, needs) for i, b in enumerate(model.blocks)), strict=True)
        needs(len(set(features)) == 1, "its blocks differ in bias or activation")
        qkv_bias, act = features[0]
        tokens = [_read_class_block(i, b, qkv_bias, act, needs) for i, b in enumerate(model.cls_attn_blocks)]
        needs(bool(tokens) and len(set(tokens)) == 1, "its blocks of the class token differ, or there are none")
        own_heads, hidden, normed = tokens[0]
        embed, width = model.patch_embed, model.embed_dim
        side = embed.patch_size
        return Arch(
            family=self.name,
            source=name,
            img_size=tuple(embed.img_size),
            patch_size=(side, side),
            in_chans=embed.proj[0][0].in_channels,
            num_classes=model.num_classes,
            stages=(Stage(width=width, grid=tuple(i // side for i in embed.img_size), blocks=blocks),),  # type: ignore[arg-type]
            class_token=False,
            pool="map",
            head_norm="pooled",
            class_attention=ClassAttention(
                blocks=len(tokens), width=width, heads=own_heads, mlp=hidden, norm_patches=normed
            ),
            qkv_bias=qkv_bias,
            layer_scale=True,
            norm_eps=eps,
            act=act,
            pos_embed=model.pos_embed is not None,
            stem=_read_stem(embed, act, needs),
        )

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Name a timm model's weights as here, and compute the positions of every place."""
        found = {}
        for name, tensor in model.state_dict().items():
            if name.startswith("pos_embed."):
                continue
            new = re.sub(r"^(blocks\.\d+\.)gamma(\d)$", r"\1ls\2.gamma", name)
            new = re.sub(r"^patch_embed\.proj\.", "patch_embed.backbone.", new)
            new = re.sub(r"^cls_attn_blocks\.", "attn_pool.blocks.", re.sub(r"^norm\.", "fc_norm.", new))
            found["attn_pool.cls_token" if new == "cls_token" else new] = tensor
        if model.pos_embed is not None:
            with torch.no_grad():
                found["pos_embed"] = model.pos_embed(1, *arch.stages[0].grid).flatten(2).mT.contiguous()
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a ``CrossCovarianceTransformer``."""
        kind: Any = HeteroVisionTransformer
        if arch.class_attention is not None:
            kind = partial(CrossCovarianceTransformer, arch.class_attention, arch.qkv_bias)
        return build_vit(arch, drop_path=drop_path, model_class=kind, block_class=CrossCovarianceBlock)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """Return None: attention between channels is no attention of tokens."""
        return None

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Refuse: convolutions are for one grid."""
        Family.make_dynamic(self, model, arch)

    def set_patch_drop_rate(self, model: Any, arch: Arch, rate: float) -> None:
        """Refuse: convolutions need all patches."""
        Family.set_patch_drop_rate(self, model, arch, rate)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for an impossible pool or stem."""
        super().check_fields(arch)
        check_stem(arch)

    def check_whole(self, arch: Arch) -> None:
        """Raise UserError for a block with another mixer."""
        for i, block in enumerate(arch.blocks):
            if block.mixer not in ("xca", "none") or block.norm_residual:
                raise UserError(f"blocks[{i}].mixer = {block.mixer!r}: must be 'xca' or 'none', without norm_residual")

    def block_spaces(self, arch: Arch, block: Block) -> dict[str, int]:
        """Return the size of the spaces within a block; heads also have a temperature."""
        width = block.heads * block.qk
        return {"q": width, "k": width, "v": width, "heads": block.heads, "mlp": block.mlp}

    def block_cost(self, arch: Arch, stage: Stage, block: Block) -> Cost:
        """Count a block of N patches, D channels, attention of H heads of width E.

        N (4 D H E + 2 H E E) MACs of attention, 18 N D of two convolutions, and those of the MLP.
        """
        places, D = math.prod(stage.grid), stage.width
        macs = params = 0
        if block.mixer == "xca":
            H, W = block.heads, block.heads * block.qk
            macs += places * (4 * D * W + 2 * W * block.qk + 18 * D)
            params += 4 * D * W + 3 * W * arch.qkv_bias + D + H + 22 * D + 6 * D
        if block.mlp:
            mlp = self.mlp_cost(arch, stage, block, places)
            macs, params = macs + mlp[0], params + mlp[1] + 3 * D
        return Cost(macs, params)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count as for CaiT, and the factors of the class token's blocks."""
        found, record = super().outside_cost(arch), arch.class_attention
        own = 0 if record is None else 2 * record.blocks * arch.stages[0].width
        return Cost(found.macs, found.params + own)

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Return what axes count; a stem's last convolution and its norm have the stream's channels."""
        if arch.stem is None or not tensor.startswith("patch_embed.backbone."):
            return super().uses(arch, tensor)
        last = f"patch_embed.backbone.{2 * len(arch.stem.channels)}."
        if not tensor.startswith(last) or tensor.endswith("num_batches_tracked"):
            return ()
        return (AxisUse("stages.0.embed", "writes"),)

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        if space.rpartition(".")[2] in ("q", "k", "v"):
            return self.one_head_only
        return super().only_chosen(arch, space)

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True: the stream begins with a norm's output, and convolutions of single channels act on it."""
        return True


def _layer_norms(model: nn.Module, require: Require) -> list[Any]:
    """List all LayerNorms of a model whose other norms are BatchNorms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            require(module.eps == BATCH_EPS, f"it has a BatchNorm of eps {module.eps}, not {BATCH_EPS}")
    own = nn.ModuleList(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return layer_norms(own, require)


def _read_stem(embed: Any, act: str, require: Require) -> Stem:
    require(type(embed) is ConvPatchEmbed, f"its patch embedding is a {type(embed).__name__}")
    require(act == "gelu", f"its patch embedding has activation {act}")
    return Stem(kind="conv3x3", channels=tuple(layer[0].out_channels for layer in embed.proj[:-1:2]))


def _read_block(index: int, block: Any, require: Require) -> tuple[Block, tuple[bool, str]]:
    where = f"block {index}"
    require(type(block) is XCABlock, f"{where} is a {type(block).__name__}")
    require(type(block.attn) is XCA and type(block.local_mp) is LPI, f"{where} has other parts than XCiT's")
    require(block.local_mp.conv1.kernel_size == (3, 3), f"{where} has convolutions of another size than 3x3")
    act = activation_of(block.mlp, Mlp, where, require)
    heads = block.attn.num_heads
    each = block.attn.proj.in_features // heads
    record = Block(src=index, mixer="xca", heads=heads, qk=each, v=each, scale=0.0, mlp=block.mlp.fc1.out_features)
    return record, (block.attn.qkv.bias is not None, act)


def _read_class_block(index: int, block: Any, bias: bool, act: str, require: Require) -> tuple[int, int, bool]:
    where = f"block {index} of the class token"
    require(
        type(block) is ClassAttentionBlock and type(block.attn) is ClassAttn, f"{where} has other parts than XCiT's"
    )
    require(isinstance(block.gamma1, nn.Parameter), f"{where} has no layer scale")
    own = activation_of(block.mlp, Mlp, where, require)
    require((block.attn.q.bias is not None, own) == (bias, act), f"{where} has another bias or activation")
    return block.attn.num_heads, block.mlp.fc1.out_features, block.tokens_norm


XCIT = XcitFamily()
