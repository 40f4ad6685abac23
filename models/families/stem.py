"""Stems of ViTs: convolutions, or attention between patches, in front of the patch embedding, kept as they are.

Sources: the hybrids of ViT (arXiv 2010.11929, 2106.10270), whose stem is a ResNet or its first convolution;
MobileCLIP's image tower (arXiv 2311.17049) and ViTamin (2404.02132), whose stems of convolutions and of inverted
bottlenecks write the residual stream themselves; and T2T-ViT
(arXiv 2101.11986), whose tokens-to-token module unfolds an image into overlapping patches again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from timm.layers import HybridEmbed, StdConv2dSame, make_divisible, to_2tuple
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import MbConvStages, VitCfg
from torch import nn

from prunesweep.models.arch import Arch, Stem
from prunesweep.models.errors import UserError
from prunesweep.models.layers.tokens_to_token import KINDS as TOKENS
from prunesweep.models.layers.tokens_to_token import TokensToToken, kernel
from prunesweep.models.without_values import without_values

from .block_costs import Cost
from .checks import check_at_least, check_one_of
from .reading import Require

__all__ = [
    "StemEmbed",
    "check_stem",
    "first_convolution",
    "has_fixed_positions",
    "read_stem",
    "stem_cost",
    "stem_uses_stream",
    "stream_layer",
]

KINDS = ("convolutions", "resnet", "mbconv", "conv3x3", *TOKENS)
WRITES = ("convolutions", "mbconv", "conv3x3")  # kinds whose last convolution is the patch embedding
GROUPS = 32  # of channels, which timm's norms of a ResNet have
STD_EPS = 1e-8  # of the standardised weights of its convolutions
MOST_STAGES = 4  # of a ResNet; timm dilates what follows them


class StemEmbed(HybridEmbed):  # type: ignore[misc]  # timm is untyped
    """timm's patch embedding behind a stem. Its sizes follow from the stem's strides; timm runs the stem to find them.

    Args:
        stem: the record.
        img_size: rows and columns of images, multiples of ``patch_size``.
        patch_size: rows and columns of a patch, in pixels.
        in_chans: channels of images.
        embed_dim: the residual width.
        options: timm's.
    """

    def __init__(
        self, stem: Stem, *, img_size: Any, patch_size: tuple[int, int], in_chans: int, embed_dim: int, **options: Any
    ) -> None:
        self.stride = _stride(stem)
        self.width = embed_dim if stem.kind in WRITES else _width(stem, in_chans)
        super().__init__(
            _stem(stem, in_chans, embed_dim),
            img_size=img_size,
            patch_size=tuple(side // self.stride for side in patch_size),
            in_chans=in_chans,
            embed_dim=embed_dim,
            proj=stem.kind not in WRITES,
            **options,
        )

    def _init_backbone(self, img_size: Any = 224, patch_size: Any = 1, **_: Any) -> tuple[Any, ...]:
        """Return the sizes of images, patches, the stem's map, a place of it and the grid, the channels, the patches.

        Raises:
            UserError: the images are not of whole patches.
        """
        images, patches = to_2tuple(img_size), to_2tuple(patch_size)
        whole = tuple(self.stride * side for side in patches)
        if any(side % patch for side, patch in zip(images, whole, strict=True)):
            raise UserError(f"img_size = {list(images)}: the model's stem needs multiples of {list(whole)}")
        features = tuple(side // self.stride for side in images)
        grid = tuple(side // patch for side, patch in zip(features, patches, strict=True))
        return images, patches, features, (self.stride, self.stride), self.width, grid, math.prod(grid)


def has_fixed_positions(arch: Arch) -> bool:
    """Whether positions are sinusoids that are not trained, as they are behind a tokens-to-token module."""
    return arch.stem is not None and arch.stem.kind in TOKENS


def _stride(stem: Stem) -> int:
    if stem.kind == "mbconv":
        return 16
    if stem.kind == "conv3x3":
        return int(2 ** (len(stem.channels) + 1))
    if stem.kind != "resnet":
        return math.prod(stem.strides)
    return 2 ** (len(stem.blocks) + 1) if stem.blocks else 4


def _width(stem: Stem, in_chans: int) -> int:
    """Return the channels that a patch embedding behind a stem reads."""
    channels = (in_chans, *stem.channels)[-1]
    return channels * kernel(stem.strides[-1]) ** 2 if stem.kind in TOKENS else channels


def _stem(stem: Stem, in_chans: int, width: int) -> nn.Module:
    if stem.kind == "convolutions":
        options = {"kernel_size": stem.strides, "stride": stem.strides, "padding": 0, "act_layer": nn.GELU}
        made: nn.Module = ConvStem(in_chans, len(stem.strides), (*stem.channels, width), **options)
        return made
    if stem.kind == "conv3x3":
        return _halving((in_chans, *stem.channels, width))
    if stem.kind in TOKENS:
        return TokensToToken(stem.kind, in_chans, stem.channels, stem.strides)
    first, *channels = stem.channels
    if stem.kind == "mbconv":
        return MbConvStages(
            VitCfg(embed_dim=(*channels, width), depths=stem.blocks, stem_width=first), in_chans=in_chans
        )
    options = {"stem_type": "same", "preact": False, "conv_layer": partial(StdConv2dSame, eps=STD_EPS)}
    if not stem.blocks:
        return create_resnetv2_stem(in_chans, first, **options)
    head = {"num_classes": 0, "global_pool": "", "in_chans": in_chans}
    return ResNetV2(stem.blocks, tuple(channels), stem_chs=first, **head, **options)


def _halving(channels: tuple[int, ...]) -> nn.Sequential:
    """Make convolutions that halve a map, with BatchNorms, and activations between them."""
    layers: list[nn.Module] = []
    for before, out in pairwise(channels):
        conv = nn.Conv2d(before, out, 3, stride=2, padding=1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(out)), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def read_stem(embed: Any, require: Require) -> Stem:
    """Read the record of a timm model's stem.

    Args:
        embed: the model's patch embedding.
        require: ``require`` with the model's name bound; raises UserError where the stem is of another form.
    """
    backbone, kind = embed.backbone, type(embed.backbone).__name__
    if isinstance(backbone, ConvStem):
        layers = [layer.conv for layer in backbone]
        strides = tuple(layer.stride[0] for layer in layers)
        stem = Stem(kind="convolutions", channels=tuple(layer.out_channels for layer in layers[:-1]), strides=strides)
        width = layers[-1].out_channels
    elif isinstance(backbone, MbConvStages):
        channels = (backbone.stem.out_chs, *(stage[-1].out_chs for stage in backbone.stages))
        stem = Stem(kind="mbconv", channels=channels, blocks=tuple(len(stage) for stage in backbone.stages))
        width = backbone.pool.proj.out_channels
    else:
        resnet = isinstance(backbone, ResNetV2)
        parts = dict((backbone.stem if resnet else backbone).named_children())
        require("conv" in parts, f"its stem is a {kind} of another form than timm's hybrids have")
        stages = backbone.stages if resnet else ()
        channels = tuple(stage.blocks[-1].conv3.out_channels for stage in stages)
        blocks = tuple(len(stage.blocks) for stage in stages)
        stem = Stem(kind="resnet", channels=(parts["conv"].out_channels, *channels), blocks=blocks)
        width = 0
    with without_values():
        own = _stem(stem, embed.in_chans, width)
    same = repr(own) == repr(backbone) and _standardising(own) == _standardising(backbone)
    projects = not isinstance(embed.proj, nn.Identity)
    require(
        same and projects == (stem.kind == "resnet"), f"its stem is a {kind} of another form than timm's hybrids have"
    )
    return stem


def _standardising(backbone: nn.Module) -> list[float]:
    return [module.eps for module in backbone.modules() if isinstance(module, StdConv2dSame)]


def stream_layer(embed: Any) -> Any:
    """Return the layer of a patch embedding whose output is the residual stream; with a stem it may be its last one."""
    if not isinstance(embed.proj, nn.Identity):
        return embed.proj
    if isinstance(embed.backbone, MbConvStages):
        return embed.backbone.pool.proj
    last = embed.backbone[-1]
    return last[0] if isinstance(last, nn.Sequential) else last.conv


def stem_uses_stream(arch: Arch, tensor: str) -> bool:
    """Whether a stem's tensor is of the convolution that writes the residual stream."""
    stem = arch.stem
    if stem is None or stem.kind not in ("convolutions", "mbconv"):
        return False
    last = "pool.proj" if stem.kind == "mbconv" else f"{len(stem.strides) - 1}.conv"
    return tensor.startswith(f"patch_embed.backbone.{last}.")


def first_convolution(stem: Stem) -> str | None:
    """Return the name of the convolution that reads images; None where attention does."""
    if stem.kind in TOKENS:
        return None
    names = {
        "convolutions": "0.conv",
        "conv3x3": "0.0",
        "mbconv": "stem.conv1",
        "resnet": "stem.conv" if stem.blocks else "conv",
    }
    within = names[stem.kind]
    return f"patch_embed.backbone.{within}"


def check_stem(arch: Arch) -> None:
    """Raise UserError where a record's stem is impossible."""
    stem = arch.stem
    if stem is None:
        return
    check_one_of("stem.kind", stem.kind, KINDS)
    for name in ("channels", "strides", "blocks"):
        for i, value in enumerate(getattr(stem, name)):
            check_at_least(f"stem.{name}[{i}]", value, 1)
    if stem.kind == "convolutions":
        if not stem.strides or len(stem.channels) != len(stem.strides) - 1 or stem.blocks:
            raise UserError(
                f"stem.channels = {list(stem.channels)}: needs one number for each of stem.strides but the last, whose "
                "channels are the residual stream's; stem.blocks is for kind 'resnet'"
            )
    elif stem.kind == "mbconv":
        if (len(stem.channels), len(stem.blocks), stem.strides) != (3, 2, ()):
            raise UserError(
                f"stem.channels = {list(stem.channels)}: needs those of the first convolution and of two stages, and "
                "stem.blocks the number of blocks of both; stem.strides is for other kinds"
            )
    elif stem.kind == "conv3x3":
        if stem.strides or stem.blocks or arch.family != "xcit":
            raise UserError("stem.kind = 'conv3x3': is for family 'xcit', without stem.strides and stem.blocks")
    elif stem.kind in TOKENS:
        _check_tokens(stem)
    else:
        _check_resnet(stem)
    if stem.kind in WRITES and arch.pre_norm:
        raise UserError(f"stem.kind = {stem.kind!r}: needs pre_norm = False, its last convolution has a bias")
    stride = _stride(stem)
    whole = all(side % stride == 0 for side in arch.patch_size)
    if not whole or (stem.kind in WRITES and arch.patch_size != (stride, stride)):
        needs = "be" if stem.kind in WRITES else "have multiples of"
        raise UserError(f"patch_size = {list(arch.patch_size)}: must {needs} {[stride] * 2}, the stem's stride")
    if any(side % patch for side, patch in zip(arch.img_size, arch.patch_size, strict=True)):
        raise UserError(f"img_size = {list(arch.img_size)}: a stem needs multiples of {list(arch.patch_size)}")


def _check_tokens(stem: Stem) -> None:
    if not stem.strides or len(stem.channels) != len(stem.strides) - 1 or stem.blocks:
        raise UserError(
            f"stem.channels = {list(stem.channels)}: needs one number for each of stem.strides but the last, behind "
            "which is no attention; stem.blocks is for kind 'resnet'"
        )
    for i, channels in enumerate(stem.channels):
        check_at_least(f"stem.channels[{i}]", channels, 2)  # half as many random features


def _check_resnet(stem: Stem) -> None:
    if len(stem.channels) != len(stem.blocks) + 1 or stem.strides or len(stem.blocks) > MOST_STAGES:
        raise UserError(
            f"stem.channels = {list(stem.channels)}: needs those of the first convolution and one number for each of "
            f"stem.blocks, {MOST_STAGES} at the most; stem.strides is for the other kinds"
        )
    for i, channels in enumerate(stem.channels):
        step = 4 * GROUPS if i else GROUPS  # a block's inner convolutions have a quarter of its channels
        if channels % step:
            raise UserError(
                f"stem.channels[{i}] = {channels}: must be a multiple of {step}, channels are normed in groups"
            )


def stem_cost(arch: Arch) -> Cost:
    """Count MACs and parameters of the stem and of the patch embedding behind it.

    A convolution of K x K taps from C to D channels on P places costs P K K C D MACs. A Performer of P patches of F
    numbers, tokens of E and M features costs P (3 F E + 4 E M + M + 3 E E); softmax attention has 2 P E in place of
    4 E M + M. Random features are not trained and no parameters.

    Args:
        arch: the record of a ViT with a stem.
    """
    assert arch.stem is not None
    (stage,) = arch.stages
    macs = params = 0
    if arch.stem.kind in TOKENS:
        for attention in _attention_costs(arch, arch.stem):
            macs, params = macs + attention.macs, params + attention.params
    else:
        for channels, out, taps, stride, rest in _convolutions(arch.stem, arch.in_chans, stage.width):
            macs += math.prod(side // stride for side in arch.img_size) * taps * channels * out
            params += taps * channels * out + rest
    if arch.stem.kind not in WRITES:
        taps = math.prod(arch.patch_size) // _stride(arch.stem) ** 2
        weights = taps * _width(arch.stem, arch.in_chans) * stage.width
        macs += math.prod(stage.grid) * weights
        params += weights + (0 if arch.pre_norm else stage.width)
    return Cost(macs, params)


def _attention_costs(arch: Arch, stem: Stem) -> Iterator[Cost]:
    """Count attention and MLP behind every unfolding but the last."""
    places, before = math.prod(arch.img_size), arch.in_chans
    for stride, width in zip(stem.strides, stem.channels, strict=False):
        places //= stride**2
        features, joint = before * kernel(stride) ** 2, stem.kind == "t2t_performer"
        attending = 4 * width * (width // 2) + width // 2 if joint else 2 * places * width
        weights = 3 * features * width + 3 * width**2
        biases = 3 * width + 3 * width * joint  # of output and MLP, and where there are any of keys, queries, values
        yield Cost(places * (weights + attending), weights + biases + 2 * (features + width))
        before = width


def _convolutions(stem: Stem, in_chans: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """List channels in and out, taps, pixels to a place, and weights of bias and norm, of every convolution."""
    if stem.kind == "convolutions":
        before, pixels = in_chans, 1
        for i, stride in enumerate(stem.strides):
            last, pixels = i == len(stem.strides) - 1, pixels * stride
            out = width if last else stem.channels[i]
            yield before, out, stride**2, pixels, out if last else 2 * out
            before = out
        return
    if stem.kind == "conv3x3":
        for i, (before, out) in enumerate(pairwise((in_chans, *stem.channels, width))):
            yield before, out, 9, int(2 ** (i + 1)), 2 * out
        return
    before, *channels = stem.channels
    if stem.kind == "mbconv":
        yield in_chans, before, 9, 2, 3 * before
        yield before, before, 9, 2, before
        pixels = 2
        for out, blocks in zip(channels, stem.blocks, strict=True):
            inner = make_divisible(4 * out)
            for b in range(blocks):
                inside, pixels = pixels, pixels if b else 2 * pixels
                yield before, inner, 1, inside, inner + 2 * before
                yield 1, inner, 9, pixels, inner
                yield inner, out, 1, pixels, out
                if before != out:
                    yield before, out, 1, pixels, out
                before = out
        yield before, width, 9, 2 * pixels, width + 2 * before
        return
    yield in_chans, before, 49, 2, 2 * before
    pixels = 4
    for s, (out, blocks) in enumerate(zip(channels, stem.blocks, strict=True)):
        inner, inside = out // 4, pixels
        pixels *= 2 if s else 1
        for b in range(blocks):
            if not b:
                yield before, out, 1, pixels, 2 * out
            yield before, inner, 1, pixels if b else inside, 2 * inner
            yield inner, inner, 9, pixels, 2 * inner
            yield inner, out, 1, pixels, 2 * out
            before = out
