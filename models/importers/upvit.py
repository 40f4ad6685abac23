"""UP-ViT's models (arXiv 2111.15127): DeiTs in timm's names, and PVTv2 in the names of its authors."""

from __future__ import annotations

from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, check_heads, one_number_of_heads
from .vit import mlp_and_norms, timm_attention, vit_arch

__all__ = ["read_upvit"]

PVT_IMAGE = (224, 224)  # PVTv2's tensors fit images of any size; this is what the published ones are for


def read_upvit(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of a UP-ViT checkpoint.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; a DeiT needs the number of heads.

    Returns:
        The model in eval mode.

    Raises:
        UserError: a key, a shape or ``given`` does not fit.
    """
    if tensors.has("patch_embed1."):
        return tensors.finish(_pvt_arch(tensors, given))
    heads = one_number_of_heads(given, tensors.shape("cls_token", 3)[2], tensors.layout)
    arch = vit_arch(tensors, given, lambda i, width, _: timm_attention(tensors, f"blocks.{i}", width, heads))
    return tensors.finish(arch)


def _pvt_arch(tensors: Tensors, given: Given) -> Arch:
    depth = tensors.count("patch_embed", first=1)
    if given.heads is None or len(given.heads) != depth:
        said = "" if given.heads is None else f", got {list(given.heads)}"
        raise UserError(
            f"the file does not say how many heads the attention has: give heads for {depth} stages, one each "
            f"(PVTv2's are 1,2,5,8: --heads 1,2,5,8){said}"
        )
    img_size = given.img_size or PVT_IMAGE
    in_chans = channels = tensors.shape("patch_embed1.proj.weight", 4)[1]
    grid = ((img_size[0] + 3) // 4, (img_size[1] + 3) // 4)
    stages: list[Stage] = []
    for heads in given.heads:
        stages.append(_pvt_stage(tensors, stages, channels, heads, grid))
        channels, grid = stages[-1].width, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    classes = tensors.shape("head.weight", 2)[0]
    tensors.layer("head", classes, channels)
    return Arch(
        family="pvt_v2",
        source=tensors.layout,
        img_size=img_size,
        patch_size=(4, 4),
        in_chans=in_chans,
        num_classes=classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
    )


def _pvt_stage(tensors: Tensors, before: list[Stage], channels: int, heads: int, grid: tuple[int, int]) -> Stage:
    """Read the stage that follows ``before``; it reads ``channels`` channels."""
    s, src = len(before), sum(len(stage.blocks) for stage in before)
    own, kernel = f"stages.{s}", 3 if s else 7
    theirs, embed = f"block{s + 1}", f"stages.{s}.downsample" if s else "patch_embed"
    width = tensors.shape(f"patch_embed{s + 1}.proj.weight", 4)[0]
    check_heads(f"heads[{s}]", heads, width)
    tensors.layer(f"patch_embed{s + 1}.proj", width, channels, kernel, kernel, to=f"{embed}.proj")
    tensors.layer(f"patch_embed{s + 1}.norm", width, to=f"{embed}.norm")
    tensors.layer(f"norm{s + 1}", width, to=f"{own}.norm")
    reduces = f"{theirs}.0.attn.sr.weight" in tensors.left
    ratio = tensors.shape(f"{theirs}.0.attn.sr.weight", 4)[2] if reduces else 1
    blocks = []
    for b in range(tensors.count(f"{theirs}.")):
        hidden = _pvt_block(tensors, f"{theirs}.{b}", f"{own}.blocks.{b}", width, ratio)
        qk = width // heads
        reduced = width if reduces else 0
        blocks.append(Block(src=src + b, heads=heads, qk=qk, v=qk, scale=qk**-0.5, mlp=hidden, sr=reduced))
    return Stage(width=width, grid=grid, blocks=tuple(blocks), sr_ratio=ratio)


def _pvt_block(tensors: Tensors, theirs: str, own: str, width: int, ratio: int) -> int:
    """Move a block's tensors; return its hidden width."""
    tensors.layer(f"{theirs}.attn.q", width, width, to=f"{own}.attn.q")
    tensors.layer(f"{theirs}.attn.kv", 2 * width, width, to=f"{own}.attn.kv")
    tensors.layer(f"{theirs}.attn.proj", width, width, to=f"{own}.attn.proj")
    if ratio > 1:
        tensors.layer(f"{theirs}.attn.sr", width, width, ratio, ratio, to=f"{own}.attn.sr")
        tensors.layer(f"{theirs}.attn.norm", width, to=f"{own}.attn.norm")
    hidden = mlp_and_norms(tensors, theirs, width, to=own)
    tensors.layer(f"{theirs}.mlp.dwconv.dwconv", hidden, 1, 3, 3, to=f"{own}.mlp.dwconv")
    return hidden
