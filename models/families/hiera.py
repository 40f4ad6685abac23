"""Hiera: plain blocks on maps, in windows or not, and stages that begin with attention whose queries are pooled.

A block of timm's that widens the stream is two things here: what leads to its stage (its norm, the projection of the
stream, and its attention, which stays whole but for the streams that it reads and writes), and a block of the stage
that is its MLP alone. timm keeps patches in an order in which windows lie together; here they are maps, and position
embeddings, which timm may keep as a small table and that of a window, are those of every place. So a timm model is
adopted (``families.eva``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, calculate_drop_path_rates
from timm.models.hiera import Hiera, HieraBlock
from timm.models.hieradet_sam2 import HieraDet, MultiScaleBlock
from torch import nn

from prunesweep.models.arch import Arch, Block, QueryPool, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import ACTIVATIONS
from prunesweep.models.layers.conv_mixing import ConvSharing
from prunesweep.models.layers.query_pooling import PooledTransformer

from .base import Family
from .block_costs import Cost, Counts, projection_params
from .checks import PYRAMID, check_at_least, check_one_of
from .reading import Require, activation_of, layer_norms, require, shared_eps
from .spaces import BLOCK, WHOLE, Table, linear, per_channel, reads, scales, writes
from .views import AttentionView, WindowView, attention_view, consecutive

__all__ = ["HIERA", "HieraFamily", "PlainWindows"]

_WIDENING = re.compile(r"(norm1|proj|attn|ls1)\.(.*)")  # tensors of a widening block that lead to its stage


class PlainWindows(WindowView):
    """Windows that a map is a whole number of, without position biases."""

    def logit_bias(self, windows: int) -> torch.Tensor | None:
        """Return None: nothing is added to logits."""
        return None


class HieraFamily(Family):
    """timm's Hiera and SAM 2's: maps halved between stages by pooling, attention in windows or over the whole map."""

    name = "hiera"
    leaves_windows = True
    capabilities = frozenset(
        {"images", "width", "depth", "convolutions", "mixers", "windows", "pooled_queries", "mixed_heads"}
    )
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (Hiera, HieraDet)
    lacks: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("tokens", "global_attention"), "windows and pooling need the whole grid of patches"),
        "streams": "what leads to a stage takes maxima and attends at once: no one layer can be fitted in its place",
        "spatial_reduction": "keys and values are read from the whole map, it is queries that are pooled",
    }
    stages_name = "stages"
    adopts = True
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in PYRAMID.items() if name not in ("layer_scale", "query_pool")},
        "head_norm": "pooled",
        "qkv_bias": True,
        "patch_size": (4, 4),
    }
    probe_patch = 4
    conv_sharing: ClassVar[ConvSharing] = ConvSharing(alpha=1e-2)
    block_tensors: ClassVar[Table] = BLOCK
    stage_tensors: ClassVar[Table] = {
        **per_channel("downsample.norm", "in"),
        **linear("downsample.proj", "out", "in"),
        "downsample.mix.weight": (writes("out"), reads("pooled")),
        **linear("downsample.attn.qkv", "", "in"),
        **linear("downsample.attn.proj", "out", ""),
        "downsample.ls.gamma": (scales("out"),),
    }
    outer_tensors: ClassVar[Table] = {
        **linear("patch_embed.proj", "in", ""),
        "pos_embed": (WHOLE, WHOLE, WHOLE, writes("in")),
        **per_channel("head.norm", "out"),
        **linear("head.fc", "", "out"),
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a Hiera, which knows its image size, or of one of SAM 2, for images of ``img_size``."""
        needs = partial(require, name)
        if isinstance(model, HieraDet):
            return _read_detector(model, name, img_size, needs)
        conv, stages = model.patch_embed.proj, len(model.stage_ends)
        needs(type(conv) is nn.Conv2d, "it reads videos")
        needs(model.q_pool == stages - 1 and tuple(model.q_stride) == (2, 2), "not every stage halves the map")
        needs(conv.in_channels == model.in_chans, "its patch embedding reads other channels")
        grid = tuple(model.tokens_spatial_shape)
        unit = tuple(model.mask_unit_size)
        units = {(side, side) for side in (2**s for s in range(stages))}
        needs(unit in units, f"its mask units of {unit[0]}x{unit[1]} patches are no squares that stages halve")
        size = (4 * grid[0], 4 * grid[1])
        windows: list[tuple[int, ...]] = []
        for s, end in enumerate(model.stage_ends):
            # the block that widens the stream, the first of the next stage, has this one's windows
            attend = model.blocks[model.stage_ends[s - 1] + 2 if s else 0 : end + 2]
            within = any(block.attn.use_mask_unit_attn for block in attend)
            needs(not within or unit[0] >> s > 0, f"stage {s} attends within mask units of no patches")
            windows.append(tuple(side >> s for side in (unit if within else grid)))
        return _read_stages(model, name, size, windows, HieraBlock, needs)

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Name a timm model's weights as here, and compute the positions of every place."""
        return _adopted_stages(model, arch, _positions(model, arch.stages[0].grid))

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> PooledTransformer:
        """Build a ``PooledTransformer``."""
        rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
        return PooledTransformer(arch, rates, partial(LayerNorm, eps=arch.norm_eps))

    def set_img_size(self, model: Any, arch: Arch, img_size: tuple[int, int]) -> Arch:
        """Refuse: positions of a window repeat from window to window, which no resampling keeps."""
        raise UserError(
            f"img_size = {list(img_size)}: position embeddings of {arch.source} repeat from window to window "
            f"(arXiv 2311.05613), so they cannot be resampled; it is for {arch.img_size[0]}x{arch.img_size[1]} images. "
            "Where timm's own model takes that size (img_size, or input_size in pretrained_cfg_overlay), adopt it there"
        )

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, which is within windows; there may be one that is the whole map."""
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v), windows=PlainWindows(block))

    def classifiers(self, arch: Arch) -> str:
        """Return ``head.fc``: timm pools within ``head``."""
        return "head.fc"

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why channels can only be chosen: a maximum of single channels is taken between stages."""
        where, _, own = space.rpartition(".")
        if own == "embed" and arch.query_pool is not None:
            s = int(where.split(".")[1])
            if s or (arch.query_pool.average and s + 1 < len(arch.stages)):
                return "the maximum over four places is taken of single channels"
        return super().only_chosen(arch, space)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for an impossible pool of queries or activation, or as every family does."""
        super().check_fields(arch)
        check_one_of("act", arch.act, ACTIVATIONS)
        record = arch.query_pool
        if record is None:
            raise UserError("family = 'hiera': needs query_pool, width and heads of what leads to stages")
        for name in ("width", "heads"):
            check_at_least(f"query_pool.{name}", getattr(record, name), 1)
        if record.width % record.heads:
            raise UserError(f"query_pool.width = {record.width}: must be a multiple of heads = {record.heads}")

    def check_whole(self, arch: Arch) -> None:
        """Raise UserError for a grid that windows do not fill or pooling does not halve, and for another mixer."""
        for s, stage in enumerate(arch.stages):
            assert stage.window is not None
            for i, (side, window) in enumerate(zip(stage.grid, stage.window, strict=True)):
                if side % window:
                    raise UserError(f"stages[{s}].window[{i}] = {window}: must divide {side}, the grid's side")
                if s + 1 < len(arch.stages) and window % 2:
                    raise UserError(
                        f"stages[{s}].window[{i}] = {window}: must be even, it is halved for the next stage"
                    )
        for i, block in enumerate(arch.blocks):
            if block.shifted:
                raise UserError(f"blocks[{i}].shifted: windows of family 'hiera' are not shifted")

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention within windows, or over the whole map."""
        assert stage.window is not None
        qk, v = block.heads * block.qk, block.total_v
        keys = math.prod(stage.grid if block.whole_map else stage.window)
        macs = tokens * (2 * stage.width + keys) * (qk + v)
        return macs, projection_params(arch, stage, block, stage.width)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count the patch embedding, positions, what leads to stages, the last norm and the classifier.

        Of P patches of width I, K of them in a window, to P / 4 of width D, with attention of width W:

            P I (D + 3 W)               projections of the stream, and to queries, keys and values
            P / 4 W (2 K + D)           products of queries with keys, of the map with values, and the output

        or, with the stream's own maximum and mean, P / 4 2 I D for its projection.
        """
        first, last, record = arch.stages[0], arch.stages[-1], arch.query_pool
        assert record is not None
        places, pixels = math.prod(first.grid), 49 * arch.in_chans
        macs = places * pixels * first.width + last.width * arch.num_classes
        params = first.width * (pixels + 1 + places) + 2 * last.width + (last.width + 1) * arch.num_classes
        for s, (before, stage) in enumerate(zip(arch.stages, arch.stages[1:], strict=False), start=1):
            assert before.window is not None
            many, few, width = math.prod(before.grid), math.prod(stage.grid), record.width << s
            own, D = before.width, stage.width
            macs += many * own * 3 * width + few * width * (2 * math.prod(before.window) + D)
            macs += few * 2 * own * D if record.average else many * own * D
            params += 2 * own + 3 * width * (own + 1) + D * (width + 1) + D * arch.layer_scale
            params += 2 * own * D if record.average else D * (own + 1)
        return Cost(macs, params)

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of a map: rows, columns and channels."""
        return (*stage.grid, stage.width), {}


def _read_detector(model: Any, name: str, img_size: tuple[int, int], require: Require) -> Arch:
    """Read the record of a Hiera of SAM 2, which takes images of any size."""
    stages = len(model.stage_ends)
    halved = len(model.q_pool_blocks) == stages - 1 and tuple(model.q_stride) == (2, 2)
    require(halved, "not every stage halves the map")
    for end in model.stage_ends[:-1]:
        require(model.blocks[end + 1].is_windowed, f"block {end + 1} widens the stream, and attends over the whole map")
    windows = [(side, side) for side in model.window_spec]
    return _read_stages(model, name, img_size, windows, MultiScaleBlock, require)


def _read_stages(
    model: Any,
    name: str,
    img_size: tuple[int, int],
    windows: Sequence[tuple[int, ...]],
    kind: type[nn.Module],
    require: Require,
) -> Arch:
    """Read the record of a model of blocks that may widen the stream.

    Args:
        model: timm's, with ``blocks`` and ``stage_ends``.
        name: of the source.
        img_size: rows and columns of its images.
        windows: of every stage, rows and columns of its windows.
        kind: the class of its blocks.
        require: ``require`` with the model's name bound.

    Raises:
        UserError: the model has a part that the record lacks; the message says which.
    """
    conv, head = model.patch_embed.proj, model.head
    shape = (conv.kernel_size, conv.stride, conv.padding)
    require(shape == ((7, 7), (4, 4), (3, 3)), "its patch embedding is not a 7x7 convolution of stride 4")
    require(head.pool_type == "avg", f"its pooling is {head.pool_type!r}, not 'avg'")
    require(not head.hidden_size and isinstance(head.norm, nn.LayerNorm), "its head is not a norm and a classifier")
    eps = shared_eps(layer_norms(model, require), require)
    blocks = [_read_block(i, block, kind, require) for i, block in enumerate(model.blocks)]
    acts, scaled = {act for _, act, _ in blocks}, {own for *_, own in blocks}
    require(len(acts) == len(scaled) == 1, "its blocks differ in activation or layer scale")
    starts = [0, *(end + 1 for end in model.stage_ends[:-1])]
    width, heads = _heads(model.blocks[0].attn)
    for s, first in enumerate(starts):
        same = _heads(model.blocks[first].attn) == (width << s, heads << s)
        require(same, "widths and heads do not double from stage to stage")
    projected = {model.blocks[first].proj is not None for first in starts[1:]}
    require(len(projected) < 2, "some stages are entered by a projection, others are not")
    grid, unit = tuple(-(-side // 4) for side in img_size), 1 << (len(starts) - 1)
    halves = all(side % unit == 0 for side in grid)
    require(halves, f"maps of images of {img_size[0]}x{img_size[1]} are not halved by all stages without a rest")
    stages = []
    for s, (first, end, window) in enumerate(zip(starts, model.stage_ends, windows, strict=True)):
        own, side = (grid[0] >> s, grid[1] >> s), (window[0], window[1])
        records = [record for record, _, _ in blocks[first : end + 1]]
        if own == side:  # whether windows are those of the map or there are none
            records = [dataclasses.replace(record, whole_map=False) for record in records]
        stages.append(Stage(width=width << s, grid=own, blocks=tuple(records), window=side))
    return Arch(
        family=HieraFamily.name,
        source=name,
        img_size=img_size,
        patch_size=(4, 4),
        in_chans=conv.in_channels,
        num_classes=model.num_classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        head_norm="pooled",
        layer_scale=scaled.pop(),
        norm_eps=eps,
        act=acts.pop(),
        query_pool=QueryPool(width=width, heads=heads, average=projected == {False}),
    )


def _adopted_stages(model: Any, arch: Arch, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the weights of a timm model of blocks that may widen the stream as ``PooledTransformer`` does.

    Args:
        model: timm's.
        arch: its record.
        positions: (1, rows, columns, D), of every place.
    """
    starts = [0, *(end + 1 for end in model.stage_ends[:-1])]
    found = {"pos_embed": positions}
    for name, tensor in model.state_dict().items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            if not name.startswith("pos_embed"):
                found[name] = tensor
            continue
        i, part = int(match[1]), match[2]
        s = max(s for s, start in enumerate(starts) if start <= i)
        own = _WIDENING.fullmatch(part)
        if s and i == starts[s] and own is not None:
            found[f"stages.{s}.downsample.{own[1].removesuffix('1')}.{own[2]}"] = tensor
        else:
            found[f"stages.{s}.blocks.{i - starts[s]}.{part}"] = tensor
    if arch.query_pool is not None and arch.query_pool.average:  # maximum and mean side by side
        for s, stage in enumerate(arch.stages[1:], start=1):
            found[f"stages.{s}.downsample.mix.weight"] = torch.eye(
                stage.width, dtype=positions.dtype, device=positions.device
            )
    return found


def _positions(model: Any, grid: tuple[int, int]) -> torch.Tensor:
    """Compute what timm adds to patches, (1, rows, columns, D), in the order of rows and columns."""
    with torch.no_grad():
        detects = isinstance(model, HieraDet)
        window = model.pos_embed_window if detects else model.pos_embed_win
        if window is None:
            found: torch.Tensor = model.pos_embed.unflatten(1, grid)
        else:
            near = window.tile([side // own for side, own in zip(grid, window.shape[2:], strict=True)])
            far = F.interpolate(model.pos_embed, size=grid, mode="bicubic", antialias=not detects)
            found = (far + near).permute(0, 2, 3, 1)
    return found.contiguous()


def _read_block(index: int, block: Any, kind: type[nn.Module], require: Require) -> tuple[Block, str, bool]:
    """Read a block, its activation, and whether it has layer scale; of a widening block, its MLP alone."""
    where = f"block {index}"
    require(type(block) is kind, f"{where} is a {type(block).__name__}")
    act, scaled = activation_of(block.mlp, Mlp, where, require), not isinstance(block.ls2, nn.Identity)
    if block.dim != block.dim_out:
        mlp = block.mlp.fc1.out_features
        return Block(src=index, mixer="none", heads=0, qk=0, v=0, scale=0.0, mlp=mlp), act, scaled
    width, heads = _heads(block.attn)
    each = width // heads
    mlp = block.mlp.fc1.out_features
    record = Block(src=index, heads=heads, qk=each, v=each, scale=float(block.attn.scale), mlp=mlp)
    whole = not getattr(block, "is_windowed", True)  # of SAM 2
    return dataclasses.replace(record, whole_map=whole), act, scaled


def _heads(attn: Any) -> tuple[int, int]:
    """Return the channels of all heads, and the heads, of attention of either of timm's classes."""
    return attn.proj.in_features, getattr(attn, "heads", None) or attn.num_heads


HIERA = HieraFamily()
