"""Finetuning with weights that stay mixed: SPViT's own form of its convolutions, and their freezing.

A convolution's weights are mixed in every pass from the full value and output weights of the attention that it came
from, so that ``head_probs`` and all heads go on learning (arXiv 2111.11802, section 3.2; the released code). Frozen, it
is a ``models.layers.mixers.ConvMixer`` with equal outputs and fewer parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from einops import rearrange
from pydantic import Field
from torch import nn

from prunesweep.models import Cut, UserError, arch_of, block_views, blocks_of, cut, cut_arch
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView
from prunesweep.models.layers.conv_mixing import ConvSharing, MixedConv, mix_conv
from prunesweep.models.layers.mixers import ConvMixer
from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners.hook import Hook

from .supernet import run_bottleneck

__all__ = ["MixedConvMixer", "SPViTMixed", "SPViTMixedSettings"]


class SPViTMixedSettings(SettingsTable):
    """Settings of finetuning with mixed weights."""

    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Temperature of the softmax over heads; left out: SPViT's, 0.01 for ViT, 100 for Swin.",
    )


class MixedConvMixer(nn.Module):
    """A ``ConvMixer`` whose weights are mixed from value and output weights of H heads; takes its BatchNorm over.

    Args:
        frozen: the mixer to stand in for; not registered here, so that no weight is there twice.
        attention: a block's, with heads of equal value widths; its weights are copied.
        columns, alpha: as in ``models.layers.conv_mixing``.
    """

    def __init__(self, frozen: ConvMixer, attention: AttentionView, columns: torch.Tensor, alpha: float) -> None:
        super().__init__()
        block, out = attention.record, attention.out.layer
        weight, bias = attention.v.weight.detach(), attention.v.bias
        self.grid, self.prefix_tokens, self.alpha = frozen.grid, frozen.prefix_tokens, alpha
        self.head_probs = nn.Parameter(weight.new_ones(block.heads, 9))
        self.v = nn.Linear(weight.shape[1], block.total_v, device="meta")
        self.proj = nn.Linear(block.total_v, weight.shape[1], device="meta")
        v_bias = weight.new_zeros(block.total_v) if bias is None else bias.detach()
        self.v.weight, self.v.bias = nn.Parameter(weight.clone()), nn.Parameter(v_bias.clone())
        self.proj.weight, self.proj.bias = (nn.Parameter(p.detach().clone()) for p in out.parameters())
        self.bn = frozen.bconv[1]
        self.columns: torch.Tensor
        self.register_buffer("columns", columns.to(weight.device), persistent=False)

    def mixed(self, dtype: torch.dtype | None = None) -> MixedConv:
        """Mix the weights of the convolution."""
        shared = (self.head_probs, self.v.weight, self.v.bias, self.proj.weight, self.proj.bias)
        return mix_conv(*(tensor.to(dtype) for tensor in shared), columns=self.columns, alpha=self.alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens, (B, N, D) to (B, N, D), prefix tokens passing through."""
        prefix, patches = x.tensor_split([self.prefix_tokens], dim=1)
        x_map = rearrange(patches, "b (h w) d -> b d h w", h=self.grid[0])
        patches = rearrange(run_bottleneck(x_map, self.mixed(), self.bn), "b d h w -> b (h w) d")
        return torch.cat([prefix.to(patches.dtype), patches], dim=1)

    @torch.no_grad()
    def freeze(self, frozen: ConvMixer) -> None:
        """Write the weights, mixed in double precision, into ``frozen``; its BatchNorm is this one's already."""
        conv = self.mixed(torch.float64)
        for layer, weight, bias in ((0, conv.weight, conv.bias), (3, conv.out_weight, conv.out_bias)):
            into: Any = frozen.bconv[layer]
            into.weight.copy_(weight)
            into.bias.copy_(bias)


class SPViTMixed(Hook):
    """Finetunes ``models.cut(dense, decision)`` in the mixed form.

    ``finish`` freezes the convolutions and returns their number.

    Args:
        dense: the model that was cut, whose weights the convolutions start from; not changed.
        decision: the cut. Widths may be cut too: the shared weights are then those of the narrowed heads.
        settings: of the finetuning; by default those of ``SPViTMixedSettings``.
    """

    def __init__(self, dense: nn.Module, decision: Cut, settings: SPViTMixedSettings | None = None) -> None:
        self.dense, self.decision = dense, decision
        self.settings = SPViTMixedSettings() if settings is None else settings
        self._swapped: list[tuple[Any, ConvMixer, MixedConvMixer]] = []

    def wrap(self, model: nn.Module) -> None:
        """Put mixed convolutions in the place of all that the decision made.

        Raises:
            UserError: the model is not what the decision makes of the dense one, or a convolution comes from heads of
                unequal value widths.
        """
        arch = arch_of(model)
        if cut_arch(arch_of(self.dense), self.decision) != arch:
            raise UserError("the model to finetune is not models.cut(dense, decision): give the two that it came from")
        choices = [choice for choice in self.decision.blocks if choice.keep]
        alone = (dataclasses.replace(choice, mixer=None, tokens=None) for choice in self.decision.blocks)
        narrow = cut(self.dense, dataclasses.replace(self.decision, blocks=tuple(alone)))
        sharing = family_of(arch).conv_sharing or ConvSharing(alpha=1.0)
        alpha = sharing.alpha if self.settings.alpha is None else self.settings.alpha
        device = next(model.parameters()).device
        for choice, block, source in zip(choices, blocks_of(model), block_views(narrow), strict=True):
            if source.attention is None or not (choice.mixer or "").startswith("conv"):
                continue
            if not isinstance(source.record.v, int):
                widths = list(source.record.v)
                raise UserError(f"blocks[{source.index}].v = {widths}: heads must have equal widths to be mixed")
            here: Any = block
            frozen: ConvMixer = here.attn
            columns = sharing.columns(frozen.bconv[0].kernel_size[0])  # type: ignore[arg-type,index]
            here.attn = MixedConvMixer(frozen, source.attention, columns, alpha).to(device)
            here.attn.train(model.training)
            self._swapped.append((here, frozen, here.attn))

    def state_dict(self) -> dict[str, Any]:
        return {"mixed": self.settings.model_dump()}

    def finish(self) -> int:
        for block, frozen, mixed in self._swapped:
            mixed.freeze(frozen)
            block.attn = frozen.train(mixed.training)
        return len(self._swapped)
