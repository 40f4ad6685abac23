"""SPViT's models (arXiv 2111.11802): DeiT or Swin with attention, convolutions or nothing, before and after freezing.

Before freezing, a convolution's weights are mixed from value and output weights in every pass; it is frozen here. A
block without a mixer adds its normalised input, as in SPViT's finetuning. The run's configuration gives what the
tensors do not show: heads, size of images, Swin's windows and the temperature of the mixture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.conv_mixing import ConvSharing, mix_conv

from .spvit_config import Settings, read_settings
from .tensors import Given, Tensors, agree, check_heads
from .vit import mlp_and_norms, vit_arch

__all__ = ["read_spvit"]

SWIN_EPS = 1e-5


def read_spvit(tensors: Tensors, given: Given) -> nn.Module:
    """Build the frozen model of an SPViT checkpoint.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; the run's configuration is needed.

    Returns:
        The model in eval mode.

    Raises:
        UserError: keys, shapes and configuration do not fit together.
    """
    swin = tensors.has("layers.")
    settings = read_settings(given, "swin" if swin else "vit")
    return tensors.finish((_swin_arch if swin else _deit_arch)(tensors, settings))


def _deit_arch(tensors: Tensors, settings: Settings) -> Arch:
    if len(settings.heads) != 1:
        raise UserError(f"heads = {list(settings.heads)}: a DeiT has one number of heads for all blocks")
    agree("the configuration's number of blocks", len(settings.choices), tensors.count("blocks."))
    patch = settings.patch_size
    agree("patch_size", None if patch is None else (patch, patch), tensors.shape("patch_embed.proj.weight", 4)[2:])
    heads = check_heads("num_heads", settings.heads[0], tensors.shape("cls_token", 3)[2])

    def read(index: int, width: int, _: int) -> dict[str, Any]:
        return _mixer(tensors, f"blocks.{index}", settings.choices[index], width, heads, settings.sharing)

    return vit_arch(tensors, Given(img_size=settings.img_size), read)


def _swin_arch(tensors: Tensors, settings: Settings) -> Arch:
    depths = [tensors.count(f"layers.{s}.blocks.") for s in range(tensors.count("layers."))]
    agree("MODEL.SWIN.DEPTHS", settings.depths, tuple(depths))
    agree("number of entries in MODEL.SWIN.NUM_HEADS", len(settings.heads), len(depths))
    agree("number of blocks in EXTRA.assigned_indicators", len(settings.choices), sum(depths))
    first, in_chans, *patch = tensors.shape("patch_embed.proj.weight", 4)
    agree("MODEL.SWIN.EMBED_DIM", settings.width, first)
    agree("MODEL.SWIN.PATCH_SIZE", settings.patch_size, patch[0])
    tensors.layer("patch_embed.proj", first, in_chans, *patch)
    tensors.layer("patch_embed.norm", first)
    grid = settings.img_size[0] // patch[0], settings.img_size[1] // patch[1]
    stages: list[Stage] = []
    for s, depth in enumerate(depths):
        width = tensors.shape(f"layers.{s}.blocks.0.norm1.weight", 1)[0]
        stages.append(_swin_stage(tensors, settings, sum(depths[:s]), s, width, depth, grid))
        if s + 1 < len(depths):
            after = tensors.shape(f"layers.{s + 1}.blocks.0.norm1.weight", 1)[0]
            # it ends a stage there and begins the next one here
            there, here = f"layers.{s}.downsample", f"layers.{s + 1}.downsample"
            tensors.layer(f"{there}.norm", 4 * width, to=f"{here}.norm")
            tensors.move(f"{there}.reduction.weight", after, 4 * width, to=f"{here}.reduction.weight")
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    classes = tensors.shape("head.weight", 2)[0]
    tensors.layer("norm", width)
    tensors.layer("head", classes, width, to="head.fc")
    return Arch(
        family="swin",
        source=tensors.layout,
        img_size=settings.img_size,
        patch_size=(patch[0], patch[1]),
        in_chans=in_chans,
        num_classes=classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        norm_eps=SWIN_EPS,
    )


def _swin_stage(
    tensors: Tensors, settings: Settings, src: int, s: int, width: int, depth: int, grid: tuple[int, int]
) -> Stage:
    """Read stage ``s``; odd blocks are shifted, unless one window covers the map."""
    heads = check_heads(f"MODEL.SWIN.NUM_HEADS[{s}]", settings.heads[s], width)
    window = min(settings.window, *grid)
    if grid[0] % window or grid[1] % window:
        raise UserError(
            f"img_size = {list(settings.img_size)}: makes the map of stage {s} {grid[0]} x {grid[1]}, "
            f"which windows of MODEL.SWIN.WINDOW_SIZE = {window} do not divide"
        )
    blocks = []
    for j in range(depth):
        where, shifted = f"layers.{s}.blocks.{j}", j % 2 == 1 and window < min(grid)
        if shifted:  # derived, and there in every shifted block, whatever its mixer
            windows = (grid[0] // window) * (grid[1] // window)
            tensors.take(f"{where}.attn_mask", windows, window**2, window**2, why=_windows(settings, window))
        choice = settings.choices[src + j]
        fields = _mixer(tensors, where, choice, width, heads, settings.sharing)
        if choice == "attn":
            table = f"{where}.attn.relative_position_bias_table"
            tensors.move(table, (2 * window - 1) ** 2, heads, why=_windows(settings, window))
            tensors.take(f"{where}.attn.relative_position_index", window**2, window**2)  # derived
            fields["shifted"] = shifted
        blocks.append(Block(src=src + j, mlp=mlp_and_norms(tensors, where, width), **fields))
    return Stage(width=width, grid=grid, blocks=tuple(blocks), window=(window, window))


def _windows(settings: Settings, window: int) -> str:
    return f"windows of {window} on images of {settings.img_size[0]} x {settings.img_size[1]}"


def _mixer(tensors: Tensors, where: str, choice: str, width: int, heads: int, sharing: ConvSharing) -> dict[str, Any]:
    """Move the tensors of a block's mixer; return the fields of its record. ``choice`` is the configuration's."""
    found = _choice_of(tensors, where)
    agree(f"the configuration's choice for {where}", choice, found)
    if choice == "attn":
        return _attention(tensors, where, width, heads)
    record: dict[str, Any] = {"mixer": choice, "heads": 0, "qk": 0, "v": 0, "scale": 0.0}
    if choice == "none":
        return {**record, "norm_residual": True}
    kernel, bottleneck = int(choice[-1]), width // heads
    if tensors.has(f"{where}.attn.bconv."):
        _frozen_conv(tensors, f"{where}.attn.bconv", width, bottleneck, kernel, heads)
    else:
        _mixed_conv(tensors, where, width, heads, kernel, sharing)
    return {**record, "v": bottleneck}


def _choice_of(tensors: Tensors, where: str) -> str:
    """Find the mixer that a block's keys stand for."""
    attn = f"{where}.attn"
    if f"{attn}.bconv.0.weight" in tensors.left:
        return "conv{0}x{0}".format(tensors.shape(f"{attn}.bconv.0.weight", 4)[2])
    signs = {"qk.": "attn", "bn_1x1.": "conv1x1", "bn_3x3.": "conv3x3"}
    choice = next((choice for sign, choice in signs.items() if tensors.has(f"{attn}.{sign}")), "none")
    if choice == "none" and tensors.has(f"{attn}."):
        raise UserError(f"{attn} has keys, but none of {', '.join(signs)} or bconv.: it is no mixer of layout 'spvit'")
    return choice


def _attention(tensors: Tensors, where: str, width: int, heads: int) -> dict[str, Any]:
    for leaf, axes in (("weight", (width,)), ("bias", ())):
        parts = (("qk", 2 * width), ("v", width))
        taken = [tensors.take(f"{where}.attn.{part}.{leaf}", rows, *axes) for part, rows in parts]
        tensors.built[f"{where}.attn.qkv.{leaf}"] = torch.cat(taken)
    tensors.layer(f"{where}.attn.proj", width, width)
    return {"heads": heads, "qk": width // heads, "v": width // heads, "scale": (width // heads) ** -0.5}


def _frozen_conv(tensors: Tensors, conv: str, width: int, bottleneck: int, kernel: int, heads: int) -> None:
    tensors.layer(f"{conv}.0", bottleneck, width, kernel, kernel, why=f"{heads} heads in {width} channels")
    tensors.batch_norm(f"{conv}.1", bottleneck, to=f"{conv}.1")
    tensors.layer(f"{conv}.3", width, bottleneck, 1, 1)


def _mixed_conv(tensors: Tensors, where: str, width: int, heads: int, kernel: int, sharing: ConvSharing) -> None:
    attn, conv = f"{where}.attn", f"{where}.attn.bconv"
    shares = tensors.take(f"{attn}.head_probs", heads, 9, why=f"{heads} heads")
    shapes = {"v.weight": (width, width), "v.bias": (width,), "proj.weight": (width, width), "proj.bias": (width,)}
    shared = [tensors.take(f"{attn}.{name}", *shape) for name, shape in shapes.items()]
    mixed = mix_conv(
        shares.double(),  # once and for all, so exactly
        *(tensor.double() for tensor in shared),
        columns=sharing.columns(kernel),
        alpha=sharing.alpha,
    )
    for name, tensor in zip(("0.weight", "0.bias", "3.weight", "3.bias"), mixed, strict=True):
        tensors.built[f"{conv}.{name}"] = tensor.to(shares.dtype)
    tensors.batch_norm(f"{attn}.bn_{kernel}x{kernel}", width // heads, to=f"{conv}.1")
