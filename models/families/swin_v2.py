"""Swin V2: cosine attention in windows, position biases by an MLP of distances, and norms behind the branches.

A norm acts on what a branch adds to the stream, and its gain on single channels: a residual stream is chosen here, not
projected. timm keeps queries, keys and values in one projection and the biases of queries and values apart; here each
has a projection of its own, so a timm model is adopted (``families.eva``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    WindowAttention,
)
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.cosine_attention import HIDDEN, CosineWindowAttention

from .block_costs import Cost, Counts, projection_params
from .checks import PYRAMID
from .reading import Require, activation_of, block_record
from .spaces import MLP, NORMS, WHOLE, Table, linear, per_channel, reads, scales, writes
from .swin import SwinFamily, fill_stages, neighbours, set_halves, skeleton
from .views import AttentionView, Entrance, LinearView, Reader, WindowView, attention_view

__all__ = ["SWIN_V2", "HeteroSwinV2Block"]


class HeteroSwinV2Block(SwinTransformerV2Block):  # type: ignore[misc]  # timm is untyped
    """Swin V2 block of one record: windows of any heads or no mixer; any MLP or none."""

    post_norm = True

    def __init__(self, arch: Arch, stage: Stage, block: Block, *, drop_path: float, norm_layer: Any) -> None:
        options = {**skeleton(stage, block), "drop_path": drop_path, "norm_layer": norm_layer}
        super().__init__(stage.width, stage.grid, **options)
        mixer: nn.Module | None = None
        if block.mixer == "attn":
            windows = stage.window or (1, 1), stage.reference_window
            mixer = CosineWindowAttention(stage.width, block, *windows, arch.qkv_bias)
        set_halves(self, stage, block, mixer)
        for name in ("norm1", "norm2"):  # as timm begins: every branch adds nothing
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)

    def set_input_size(self, feat_size: tuple[int, int], window_size: Any, **options: Any) -> None:
        """Take another grid, as timm's ``set_input_size`` of the whole model asks of every block."""
        if self.mixer == "attn":
            super().set_input_size(feat_size, window_size, **options)
        else:
            self.input_resolution = feat_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on a map, (B, rows, columns, D) to the same."""
        if self.mixer == "attn":
            x = x + self.drop_path1(self.norm1(self._attn(x)))
        elif self.norm_residual:
            x = x + self.drop_path1(self.norm1(x))
        if self.has_mlp:
            x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x


def _skeleton(arch: Arch, norm_layer: Any) -> SwinTransformerV2:
    stages = len(arch.stages)
    return SwinTransformerV2(
        img_size=arch.img_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        embed_dim=arch.stages[0].width,
        depths=(0,) * stages,
        num_heads=(1,) * stages,
        window_size=[stage.window for stage in arch.stages],  # timm scales them when the image size is set anew
        norm_layer=norm_layer,
        drop_path_rate=0.0,
        pretrained_window_sizes=(0,) * stages,
    )


class SwinV2Family(SwinFamily):
    """timm's Swin V2: cosine attention in windows, norms behind the branches and behind patch merging."""

    name = "swin_v2"
    capabilities = frozenset({"images", "width", "depth", "windows", "streams"})
    lacks: ClassVar[dict[str, str]] = {
        **SwinFamily.lacks,
        "mixers": "a convolution reads what a norm in front of it gives, and its norms stand behind what they norm",
    }
    timm_classes = (SwinTransformerV2,)
    adopts = True
    fixed_fields: ClassVar[dict[str, Any]] = {**PYRAMID, "act": "gelu", "k_bias": False, "post_norm": True}
    conv_sharing: ClassVar[Any] = None
    refers_to_windows = True
    block_tensors: ClassVar[Table] = {
        **NORMS,
        **MLP,
        **linear("attn.q_proj", "q", "embed"),
        **linear("attn.k_proj", "k", "embed"),
        **linear("attn.v_proj", "v", "embed"),
        **linear("attn.proj", "embed", "v"),
        "attn.logit_scale": (scales("heads"),),
        "attn.cpb_mlp.0.weight": (),
        "attn.cpb_mlp.0.bias": (),
        "attn.cpb_mlp.2.weight": (scales("heads"), WHOLE),
    }
    stage_tensors: ClassVar[Table] = {
        **per_channel("downsample.norm", "out"),  # behind the reduction
        "downsample.reduction.weight": (writes("out"), reads("merged")),
    }

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> nn.Module:
        """Build a timm SwinTransformerV2 with the blocks and widths of ``arch``."""
        norm_layer = partial(nn.LayerNorm, eps=arch.norm_eps)
        model = _skeleton(arch, norm_layer)
        fill_stages(model, arch, PatchMerging, HeteroSwinV2Block, drop_path=drop_path, norm_layer=norm_layer)
        return model

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Lay out a timm model's weights: queries, keys and values apart, with the biases of two of them."""
        state: dict[str, torch.Tensor] = dict(model.state_dict())
        found = {n: t for n, t in state.items() if not n.endswith((".attn.qkv.weight", ".q_bias", ".v_bias"))}
        for name, tensor in state.items():
            if name.endswith(".attn.qkv.weight"):
                where = name.removesuffix("qkv.weight")
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{where}{part}_proj.weight"] = rows
            elif name.endswith(("q_bias", "v_bias")):
                found[name.removesuffix("_bias") + "_proj.bias"] = tensor
        return found

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, which is within windows."""
        if record.mixer != "attn":
            return None
        q, k, v = (LinearView(f"attn.{name}", getattr(block.attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
        return attention_view(block, record, (q, k, v), windows=WindowView(block))

    def entrance(self, model: Any, arch: Arch, stage: int) -> Entrance:
        """View the patch merging in front of a stage: a layer without bias that reads four neighbours, then a norm."""
        merging = model.layers[stage].downsample
        name = f"layers.{stage}.downsample.reduction"
        return Entrance(Reader(name, merging.reduction, None, neighbours), merging.norm, merging)

    def check_whole(self, arch: Arch) -> None:
        """Raise UserError where logits are scaled: cosines are, by factors of their own."""
        for i, block in enumerate(arch.blocks):
            if block.mixer == "attn" and block.scale != 1:
                raise UserError(f"blocks[{i}].scale = {block.scale!r}: must be 1, a head scales its cosines itself")

    def outside_cost(self, arch: Arch) -> Cost:
        """Count as for Swin, with the norm of patch merging behind the reduction."""
        found = super().outside_cost(arch)
        merged = sum(8 * stage.width for stage in arch.stages[:-1])
        return Cost(found.macs, found.params - merged + sum(2 * stage.width for stage in arch.stages[1:]))

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention within windows, a factor per head, and biases, which an MLP computes once per pass."""
        assert stage.window is not None
        macs, _ = super().attention_cost(arch, stage, block, tokens)
        weights = HIDDEN * (2 + block.heads)
        params = projection_params(arch, stage, block, stage.width) + weights + HIDDEN + block.heads
        return macs + math.prod(2 * side - 1 for side in stage.window) * weights, params

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True everywhere: whatever is added to a stream is a norm's output."""
        return True

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        if space.rpartition(".")[2] in ("q", "k"):
            return "queries and keys are divided by their lengths"
        return super().only_chosen(arch, space)

    def _stage_fields(self, layer: Any) -> dict[str, Any]:
        reference = tuple(layer.blocks[0].attn.pretrained_window_size)
        return {"reference_window": reference if any(reference) else None}

    def _read_block(self, index: int, block: Any, require: Require) -> tuple[Block, bool]:
        where = f"block {index}"
        require(type(block) is SwinTransformerV2Block, f"{where} is a {type(block).__name__}")
        attn = block.attn
        require(type(attn) is WindowAttention, f"{where} has a {type(attn).__name__}")
        require(not block.always_partition, f"{where} is built with always_partition")
        activation_of(block.mlp, Mlp, where, require, known=("gelu",))
        hidden = attn.cpb_mlp[0].out_features
        require(hidden == HIDDEN, f"{where} has {hidden} units for position biases, not {HIDDEN}")
        record = block_record(index, block, 1.0, shifted=any(block.shift_size))
        return record, attn.q_bias is not None


SWIN_V2 = SwinV2Family()
