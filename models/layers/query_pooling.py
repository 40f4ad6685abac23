"""Hiera (arXiv 2306.00989): attention within windows of a map, and what leads from a stage to the next by pooling.

Maps are B x rows x columns x D, row by row as in the image, in windows that they are whole numbers of. timm keeps
patches in an order in which windows and pooled patches lie together; the functions are the same.

Shapes: B batch, D residual width, I width of the stage before, W width of queries, keys and values, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import ClNormMlpClassifierHead, DropPath, LayerNorm, LayerScale
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunesweep.models.arch import Arch, QueryPool, Stage

from .map_block import MapBlock, join_windows, split_windows

__all__ = [
    "PooledEntrance",
    "PooledTransformer",
    "largest_of_four",
    "mean_of_four",
]


def largest_of_four(x: torch.Tensor) -> torch.Tensor:
    """Take the maximum over two rows and two columns, (B, rows, columns, D) to (B, rows / 2, columns / 2, D)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)  # sixty times as fast as ``amax`` on a CPU


def mean_of_four(x: torch.Tensor) -> torch.Tensor:
    """Take the mean over two rows and two columns, (B, rows, columns, D) to (B, rows / 2, columns / 2, D)."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class PooledAttention(nn.Module):
    """Attention within windows whose queries are pooled, from a map of a stage to the smaller one of the next."""

    def __init__(self, before: Stage, stage: Stage, width: int, heads: int) -> None:
        super().__init__()
        assert before.window is not None
        self.num_heads, self.window = heads, before.window
        self.qkv, self.proj = nn.Linear(before.width, 3 * width), nn.Linear(width, stage.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, (B, rows, columns, I) to (B, rows / 2, columns / 2, D)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, half = largest_of_four(q), [side // 2 for side in self.window]
        parts = (split_windows(q, half), split_windows(k, self.window), split_windows(v, self.window))
        q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=self.num_heads) for part in parts)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)")
        found: torch.Tensor = self.proj(join_windows(y, half, [side // 2 for side in x.shape[1:3]]))
        return found


class PooledEntrance(nn.Module):
    """What leads from a stage to the next: attention with pooled queries, added to a pooled map of the next width.

    That map is the maximum of ``proj`` of the norm's output; or, where the record says ``average``, ``mix`` of the
    stream's own maximum and mean.
    """

    def __init__(self, arch: Arch, record: QueryPool, s: int, *, drop_path: float, norm_layer: Any) -> None:
        super().__init__()
        before, stage = arch.stages[s - 1], arch.stages[s]
        self.norm = norm_layer(before.width)
        self.proj = self.mix = None
        if record.average:
            self.mix = nn.Linear(2 * before.width, stage.width, bias=False)
        else:
            self.proj = nn.Linear(before.width, stage.width)
        self.attn = PooledAttention(before, stage, record.width << s, record.heads << s)
        self.ls = LayerScale(stage.width) if arch.layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @property
    def writers(self) -> list[nn.Linear]:
        """List the layers whose outputs are the channels of the stage's stream."""
        first = self.mix if self.proj is None else self.proj
        assert first is not None
        return [first, self.attn.proj]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the first map of a stage, (B, rows, columns, I) to (B, rows / 2, columns / 2, D)."""
        normed = self.norm(x)
        if self.mix is not None:
            shortcut = self.mix(torch.cat([largest_of_four(x), mean_of_four(x)], -1))
        else:
            assert self.proj is not None
            shortcut = largest_of_four(self.proj(normed))
        found: torch.Tensor = shortcut + self.drop_path(self.ls(self.attn(normed)))
        return found


class _PatchEmbed(nn.Module):
    """Overlapping patches: a 7x7 convolution of stride 4, images (B, C, rows, columns) to a map (B, r, c, D)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class _Stage(nn.Module):
    """What leads to a stage, for the first one nothing, and its blocks."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(self.downsample(x))
        for module in (self.downsample, *self.blocks):
            x = checkpoint(module, x, use_reentrant=False)
        return x


class PooledTransformer(nn.Module):
    """A Hiera of one record, with the functions that timm's models have.

    Args:
        arch: the record.
        rates: of every block, its rate of stochastic depth; what leads to a stage has that of the first block.
        norm_layer: makes a norm of a width.
    """

    def __init__(self, arch: Arch, rates: Sequence[Sequence[float]], norm_layer: Any = LayerNorm) -> None:
        super().__init__()
        widths = [stage.width for stage in arch.stages]
        self.num_classes, self.in_chans = arch.num_classes, arch.in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.patch_embed = _PatchEmbed(arch.in_chans, widths[0])
        self.pos_embed = nn.Parameter(torch.zeros(1, *arch.stages[0].grid, widths[0]))
        stages, record = [], arch.query_pool
        for s, (stage, own) in enumerate(zip(arch.stages, rates, strict=True)):
            entrance = None
            if s:
                assert record is not None
                entrance = PooledEntrance(arch, record, s, drop_path=own[0] if own else 0.0, norm_layer=norm_layer)
            pairs = zip(stage.blocks, own, strict=True)
            blocks = [MapBlock(arch, stage, block, drop_path=rate, norm_layer=norm_layer) for block, rate in pairs]
            stages.append(_Stage(entrance, blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (s + 2), "module": f"stages.{s}"} for s, width in enumerate(widths)
        ]
        self.head = ClNormMlpClassifierHead(widths[-1], arch.num_classes, pool_type=arch.pool, norm_layer=norm_layer)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling."""
        return str(self.head.pool_type)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that no weight decay is for."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of what belongs to the stem and to a block; ``coarse`` takes stages whole."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^pos_embed|patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations of blocks anew for gradients, or keep them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]  # nn.Module has tensors only

    def get_classifier(self) -> nn.Module:
        """Return the classifier, an identity where there is none."""
        found: nn.Module = self.head.fc
        return found

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier, and the norm in front of it where ``reset_other`` takes it away, as timm does."""
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        options = {"device": like.device, "dtype": like.dtype}
        self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **options)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the first map of images."""
        found: torch.Tensor = self.patch_embed(x) + self.pos_embed
        return found

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last map of images."""
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute logits, or features, from the last map."""
        found: torch.Tensor = self.head(x, pre_logits=pre_logits)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K), or features, of images."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute maps behind stages, as timm's function of this name; ``norm`` is not there to be had.

        Raises:
            ValueError: a norm, or another format, is asked for.
        """
        if norm or output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"norm = {norm}, output_fmt = {output_fmt!r}: must be False, and NCHW or NHWC")
        taken, last = feature_take_indices(len(self.stages), indices)
        maps, x = [], self.embed(x)
        for s, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if s in taken:
                maps.append(x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is behind the last stage of ``indices``, as timm's function of this name."""
        taken: list[int]
        taken, last = feature_take_indices(len(self.stages), indices)
        cut_off = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if cut_off:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut_off:
            self.reset_classifier(0, reset_other=True)
        return taken


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
