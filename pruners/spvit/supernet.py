"""SPViT's single-path supernet: convolutions inside an attention layer's own weights, gates on mixers and MLP units.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", arXiv 2111.11802, sections 3.2
and 3.3, and the released code. With cumulated gates g0, g1, g2 of a block's mixer,

    y = g2 MSA(h) + g1 (1 - g2) CONV3(h) + g0 (1 - g1) (1 - g2) CONV1(h)        h = LN1(x)

and both convolutions are mixed from the value and output weights of that attention (``models.layers.conv_mixing``).
Training computes all three, because gates get their gradients from the mixers that they did not choose, and both
BatchNorms keep up; evaluation computes the chosen one. Where no gate is open, y = 0.

Different from the released code: a Swin's convolution sees the whole map, as it does once it is frozen, not a window
(``conv_scope="window"`` gives that back).

Shapes: B batch, N tokens, D residual width, M hidden units; maps are B·D·rows·columns for convolutions and
B·rows·columns·D in Swin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import window_partition, window_reverse
from torch import nn

from prunesweep.models import Arch, BlockView, UserError, block_views
from prunesweep.models.arch import Block, Stage
from prunesweep.models.families import family_of
from prunesweep.models.families.swin import shift
from prunesweep.models.families.views import AttentionView
from prunesweep.models.layers.conv_mixing import ConvSharing, MixedConv, mix_conv

from .cost import has_mixer_gates
from .gates import choice_of, cumulate, expect, is_open, sample, uniforms

__all__ = ["MixerGates", "SearchAttention", "SearchSwinBlock", "Supernet", "UnitGates", "run_bottleneck"]


def run_bottleneck(x: torch.Tensor, conv: MixedConv, norm: nn.Module) -> torch.Tensor:
    """Run a bottleneck: convolution with zero padding, BatchNorm, ReLU, 1x1 convolution.

    Args:
        x: B·D·rows·columns.
        conv: weights of both convolutions.
        norm: the BatchNorm between them.

    Returns:
        B·D·rows·columns.
    """
    y = F.relu(norm(F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)))
    return F.conv2d(y, conv.out_weight, conv.out_bias)


class MixerGates(nn.Module):
    """Three gates of one mixer, and the parameters of its convolutions alone: ``head_probs`` and a BatchNorm each."""

    def __init__(self, sharing: ConvSharing, block: Block, *, theta: float, alpha: float) -> None:
        super().__init__()
        self.alpha, self.heads, self.total_v = alpha, block.heads, block.total_v
        self.theta = nn.Parameter(torch.full((3,), theta))
        self.head_probs = nn.Parameter(torch.ones(block.heads, 9))
        self.bn_1x1, self.bn_3x3 = (nn.BatchNorm2d(block.total_v // block.heads) for _ in range(2))
        for kernel in (1, 3):
            self.register_buffer(f"columns_{kernel}", sharing.columns(kernel), persistent=False)
        self.u = torch.full((3,), 0.5)  # no buffer: DDP would give all ranks the first one's

    def mix(
        self, h: torch.Tensor, attend: Callable[[], torch.Tensor], convolve: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """Compute y, from functions that compute attention and the convolution with a kernel of a given side."""
        if self.training:
            g0, g1, g2 = cumulate(sample(self.theta, self.u))
            return g2 * attend() + g1 * (1 - g2) * convolve(3) + g0 * (1 - g1) * (1 - g2) * convolve(1)
        choice = choice_of(self.theta)
        if choice == "skip":
            return torch.zeros_like(h)
        return attend() if choice == "msa" else convolve(3 if choice == "conv3x3" else 1)

    def convolve(self, x: torch.Tensor, kernel: int, attention: AttentionView) -> torch.Tensor:
        """Convolve B·D·rows·columns to the same, with weights mixed from those of ``attention``."""
        rows, bias, out = attention.v.weight, attention.v.bias, attention.out.layer
        bias = rows.new_zeros(self.total_v) if bias is None else bias
        columns = self.get_buffer(f"columns_{kernel}")
        conv = mix_conv(self.head_probs, rows, bias, out.weight, out.bias, columns=columns, alpha=self.alpha)
        return run_bottleneck(x, conv, self.bn_3x3 if kernel == 3 else self.bn_1x1)


class SearchAttention(nn.Module):
    """Replaces a ViT's attention during the search.

    Prefix tokens have no place on the grid and bypass a convolution.
    """

    def __init__(self, attention: AttentionView, gates: MixerGates, grid: tuple[int, int], prefix_tokens: int) -> None:
        super().__init__()
        self.attn, self.attention = attention.module, attention
        self.gates, self.grid, self.prefix_tokens = gates, grid, prefix_tokens

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Mix tokens, (B, N, D) to the same; ``options`` are the attention's."""
        return self.gates.mix(x, lambda: self.attn(x, **options), lambda kernel: self._convolve(x, kernel))

    def _convolve(self, x: torch.Tensor, kernel: int) -> torch.Tensor:
        prefix, patches = x.tensor_split([self.prefix_tokens], dim=1)
        x_map = rearrange(patches, "b (h w) d -> b d h w", h=self.grid[0])
        patches = rearrange(self.gates.convolve(x_map, kernel, self.attention), "b d h w -> b (h w) d")
        return torch.cat([prefix.to(patches.dtype), patches], dim=1)


class SearchSwinBlock(nn.Module):
    """Replaces a whole block of Swin or Hiera during the search: attention sees windows, a convolution the map."""

    def __init__(
        self,
        block: Any,
        attention: AttentionView,
        gates: MixerGates,
        window: tuple[int, int] | None,
        shift: tuple[int, int],
    ) -> None:
        super().__init__()
        self.block, self.attention = block, attention
        self.gates, self.window, self.shift = gates, window, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block, (B, rows, columns, D) to the same."""
        block = self.block
        h = block.norm1(x)
        # what timm's block calls between its norm and its residual connection: shift, windows, attention, and back
        y = self.gates.mix(h, lambda: block._attn(h), lambda kernel: self._convolve(h, kernel))
        x = x + block.drop_path1(_scaled(block, "ls1", y))
        return x + block.drop_path2(_scaled(block, "ls2", block.mlp(block.norm2(x)))) if hasattr(block, "mlp") else x

    def _convolve(self, h: torch.Tensor, kernel: int) -> torch.Tensor:
        if self.window is None:
            return self._on_map(h, kernel)
        rows, columns = h.shape[1:3]
        moved = torch.roll(h, shifts=(-self.shift[0], -self.shift[1]), dims=(1, 2))
        windows = self._on_map(window_partition(moved, self.window), kernel)
        return torch.roll(window_reverse(windows, self.window, rows, columns), shifts=self.shift, dims=(1, 2))

    def _on_map(self, h: torch.Tensor, kernel: int) -> torch.Tensor:
        y = self.gates.convolve(rearrange(h, "b h w d -> b d h w"), kernel, self.attention)
        return rearrange(y, "b d h w -> b h w d")


class UnitGates(nn.Module):
    """Replaces an MLP's activation during the search: a gate on each of its M hidden units."""

    def __init__(self, act: nn.Module, units: int, *, theta: float) -> None:
        super().__init__()
        self.act, self.theta = act, nn.Parameter(torch.full((units,), theta))
        self.u = torch.full((units,), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate and gate hidden units, (..., M) to the same."""
        gates = sample(self.theta, self.u) if self.training else is_open(self.theta)
        return self.act(x) * gates.to(x.dtype)


class Supernet:
    """A ViT, Swin or Hiera with gates inside; ``remove`` makes it stock again.

    ``mixers`` and ``units`` hold the gates of every block, None where it has none: a block without attention, with
    heads of unequal widths or with a token plan keeps its mixer, one without MLP has no units.

    Args:
        model: changed in place; its weights stay the same tensors.
        arch: its record.
        theta: where all gates start.
        alpha: temperature of the softmax over heads; None is SPViT's for the family.
        conv_scope: a Swin's convolution reads the whole ``map``, or the attention's ``window``.

    Raises:
        UserError: windows do not divide the map, and convolutions are to be inside of them.
    """

    def __init__(
        self, model: nn.Module, arch: Arch, *, theta: float, alpha: float | None = None, conv_scope: str = "map"
    ) -> None:
        self.model, self.arch, self.conv_scope = model, arch, conv_scope
        self.mixers: list[MixerGates | None] = []
        self.units: list[UnitGates | None] = []
        like = next(model.parameters())
        self._views = block_views(model, arch)
        if conv_scope == "window":
            self._check_windows()
        for block in self._views:
            gates = units = None
            if block.mlp is not None:
                units = UnitGates(block.mlp.act, block.record.mlp, theta=theta).to(like)
                block.module.set_submodule(block.mlp.act_name, units)
            if has_mixer_gates(block.record):
                sharing = family_of(arch).conv_sharing
                assert sharing is not None  # has_mixer_gates
                own = sharing.alpha if alpha is None else alpha
                gates = MixerGates(sharing, block.record, theta=theta, alpha=own).to(like)
                self._put_in(block, gates)
            self.mixers.append(gates)
            self.units.append(units)
        model.train(model.training)  # what is new is in the model's mode too

    def _check_windows(self) -> None:
        for s, stage in enumerate(self.arch.stages):
            if stage.window and any(side % w for side, w in zip(stage.grid, stage.window, strict=True)):
                raise UserError(
                    f"conv_scope = 'window': windows of {list(stage.window)} do not divide the map of stage {s}, "
                    f"{list(stage.grid)}; use conv_scope = 'map'"
                )

    def _put_in(self, block: BlockView, gates: MixerGates) -> None:
        stage, attention = self.arch.stages[block.stage], block.attention
        assert attention is not None, "only attention has gates"
        if stage.window is None:
            search = SearchAttention(attention, gates, stage.grid, self.arch.prefix_tokens)
            block.module.set_submodule(attention.name, search)
        else:
            within = self.conv_scope == "window" and not block.record.whole_map
            window, moved = stage.window if within else None, _shift_of(stage, block.record)
            self.model.set_submodule(block.name, SearchSwinBlock(block.module, attention, gates, window, moved))

    @property
    def thetas(self) -> list[nn.Parameter]:
        """List the parameters of all gates, block by block: the mixer's, then the units'."""
        return [gates.theta for gates in self._all()]

    def _all(self) -> list[MixerGates | UnitGates]:
        pairs = zip(self.mixers, self.units, strict=True)
        return [gates for pair in pairs for gates in pair if gates is not None]

    def draw(self, seed: int, step: int, rank: int = 0) -> None:
        """Draw new uniform numbers for all gates, from (seed, step, rank) alone."""
        self.set_uniforms(uniforms([theta.numel() for theta in self.thetas], seed, step, rank))

    def set_uniforms(self, draws: Sequence[torch.Tensor]) -> None:
        """Use these numbers in [0, 1) for the next training passes, in the order of ``thetas``."""
        for gates, u in zip(self._all(), draws, strict=True):
            gates.u = u.to(gates.theta)

    def expected(self) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Return gates for the complexity loss: cumulated ones of all mixers (3,), and of all units (M,)."""
        mixers = [None if gates is None else expect(gates.theta).cumprod(-1) for gates in self.mixers]
        return mixers, [None if gates is None else expect(gates.theta) for gates in self.units]

    @property
    def choices(self) -> tuple[str, ...]:
        """List the mixer that every block's gates choose now; ``msa`` for a block without mixer gates."""
        return tuple("msa" if gates is None else choice_of(gates.theta) for gates in self.mixers)

    def remove(self) -> None:
        """Take the gates out; the weights stay as they are."""
        for block, units in zip(self._views, self.units, strict=True):
            self.model.set_submodule(block.name, block.module)
            if block.attention is not None:
                block.module.set_submodule(block.attention.name, block.attention.module)
            if block.mlp is not None and units is not None:
                block.module.set_submodule(block.mlp.act_name, units.act)


def _scaled(block: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """Multiply by a block's layer scale, where it has one."""
    scale = getattr(block, name, None)
    return x if scale is None else scale(x)


def _shift_of(stage: Stage, block: Block) -> tuple[int, int]:
    """Return the shift of a block's windows; a side that one window covers is not shifted, as in timm."""
    rows, columns = shift(stage, block)
    window = stage.window or (0, 0)
    return (0 if stage.grid[0] <= window[0] else rows, 0 if stage.grid[1] <= window[1] else columns)
