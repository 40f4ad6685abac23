"""Views of a block's attention and MLP: which layers, rows and columns are queries, keys, values and hidden units.

Scorers, supernets and token scores read a block through these views, so that none of them depends on how a family names
its layers or whether queries, keys and values come from one projection or from several. A view holds the block's own
modules: it sees every later change of their weights, and stays right where a block is wrapped.

Shapes: B batch, N tokens, P tokens that keys and values are read from, D residual width, H heads, E query/key width of
a head, V value channels of all heads, M hidden units of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from prunesweep.models.arch import Block

__all__ = ["AttentionView", "LinearView", "MlpView", "ReductionView", "attention_view", "consecutive", "mlp_view"]


@dataclass(frozen=True, eq=False)
class LinearView:
    """All or some output rows of a linear layer.

    Args:
        name: of the layer within its block, such as ``attn.qkv``.
        layer: the whole layer.
        rows: those that are meant.
    """

    name: str
    layer: nn.Linear
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> torch.Tensor:
        """The rows' weights (rows, inputs), sharing memory with the layer's."""
        return self.layer.weight[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """The rows' biases (rows,), sharing memory with the layer's; None where it has none."""
        return None if self.layer.bias is None else self.layer.bias[self.rows]

    @property
    def weight_name(self) -> str:
        """Name of the layer's weight within the block."""
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        """Name of the layer's bias within the block, whether it has one or not."""
        return f"{self.name}.bias"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the rows' outputs (..., rows) of ``x`` (..., inputs)."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class ReductionView:
    """The layers that make the smaller map which keys and values are read from (PVTv2)."""

    conv: nn.Conv2d
    norm: nn.Module

    def convolve(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Convolve a map (B, N, D) of ``rows`` rows to the reduced map (B, P, channels), before its norm."""
        return rearrange(self.conv(rearrange(x, "b (h w) d -> b d h w", h=rows)), "b r h w -> b (h w) r")


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A block's attention.

    Args:
        name: of the attention within its block.
        module: all of it.
        record: the block's record, which has the number of heads, their widths and the scale.
        norm: what its input comes from.
        q, k, v: the layers and rows of queries (H·E), keys (H·E) and values (V), each head after head.
        out: the output projection, whose columns are the value channels.
        q_norm, k_norm: norms of a head's query and key; identities where there are none.
        reduction: what keys and values are read from, where that is not the attention's own input.
    """

    name: str
    module: nn.Module
    record: Block
    norm: nn.Module
    q: LinearView
    k: LinearView
    v: LinearView
    out: LinearView
    q_norm: nn.Module
    k_norm: nn.Module
    reduction: ReductionView | None = None

    @property
    def token_scale(self) -> torch.Tensor | None:
        """(N, 1), a frozen factor on each token's query, key and value; None where there is none."""
        return self.module.get_buffer("token_scale") if self.record.token_scale else None

    @property
    def inputs(self) -> tuple[LinearView, ...]:
        """The layers that queries, keys and values come from, whole and each once."""
        layers = {part.name: part.layer for part in (self.q, self.k, self.v)}
        return tuple(LinearView(name, layer) for name, layer in layers.items())

    def split(self, rows: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split tensors by layer name, whose first axis has the rows of ``inputs``, into query, key and value rows."""
        q, k, v = (rows[part.name][part.rows] for part in (self.q, self.k, self.v))
        return q, k, v

    def by_head(self, q: torch.Tensor) -> torch.Tensor:
        """Reshape queries or keys (B, N, H·E) to (B, H, N, E)."""
        return rearrange(q, "b n (h e) -> b h n e", h=self.record.heads)

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute (B, N, H·E), (B, N, H·E) and (B, N, V) of ``x`` (B, N, D), before the norms; each layer runs once."""
        outputs = {view.name: view.layer(x) for view in self.inputs}
        q, k, v = (outputs[part.name][..., part.rows] for part in (self.q, self.k, self.v))
        scale = self.token_scale
        return (q, k, v) if scale is None else (q * scale, k * scale, v * scale)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Compute queries (B, n, H·E) of the attention's first n tokens (B, n, D), before ``q_norm``."""
        q = self.q(x)
        return q if self.token_scale is None else q * self.token_scale[: x.shape[1]]

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute keys (B, P, H·E), before ``k_norm``, and values (B, P, V) from the tokens that they are read from."""
        if self.k.layer is self.v.layer and self.k.rows.stop == self.v.rows.start:  # side by side: one multiplication
            joint = LinearView(self.k.name, self.k.layer, slice(self.k.rows.start, self.v.rows.stop))
            kv = joint(x)
            kv = kv if self.token_scale is None else kv * self.token_scale
            k, v = torch.split(kv, [self.record.heads * self.record.qk, self.record.total_v], dim=-1)
            return k, v
        k, v = self.k(x), self.v(x)
        return (k, v) if self.token_scale is None else (k * self.token_scale, v * self.token_scale)


@dataclass(frozen=True, eq=False)
class MlpView:
    """A block's MLP.

    Args:
        name: of the MLP within its block.
        module: all of it.
        norm: what its input comes from.
        inputs: the layers whose rows are the hidden units; a gated MLP has two.
        out: the layer whose columns are the hidden units.
        act_name: of the activation within the block.
        conv: a depthwise convolution of the hidden units before the activation, where there is one (PVTv2).
    """

    name: str
    module: nn.Module
    norm: nn.Module
    inputs: tuple[LinearView, ...]
    out: LinearView
    act_name: str
    conv: nn.Module | None = None

    @property
    def act(self) -> nn.Module:
        """The activation that the MLP has now."""
        return self.module.get_submodule(self.act_name.removeprefix(f"{self.name}."))

    def hidden(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Compute the hidden units behind the activation, (B, N, M), from the norm's output (B, N, D).

        ``rows`` are those of the map that the tokens are; only a convolution needs them.
        """
        (layer,) = self.inputs
        y = layer.layer(x)
        if self.conv is not None:
            y = self.conv(rearrange(y, "b (h w) m -> b m h w", h=rows))
            y = rearrange(y, "b m h w -> b (h w) m")
        return self.act(y)


def consecutive(name: str, layer: nn.Linear, *widths: int) -> tuple[LinearView, ...]:
    """View consecutive groups of a layer's rows, from the first row on.

    Args:
        name: of the layer within the block.
        layer: the layer.
        widths: number of rows in every group.
    """
    ends = list(accumulate(widths))
    return tuple(LinearView(name, layer, slice(end - width, end)) for end, width in zip(ends, widths, strict=True))


def attention_view(
    block: nn.Module,
    record: Block,
    projections: tuple[LinearView, LinearView, LinearView],
    reduction: ReductionView | None = None,
) -> AttentionView:
    """View ``block.attn``, which follows ``block.norm1`` and ends with ``proj``.

    Args:
        block: the block's module.
        record: its record.
        projections: the rows of queries, keys and values.
        reduction: what keys and values are read from, if not the attention's input.
    """
    attn: Any = block.get_submodule("attn")
    q, k, v = projections
    return AttentionView(
        name="attn",
        module=attn,
        record=record,
        norm=block.get_submodule("norm1"),
        q=q,
        k=k,
        v=v,
        out=LinearView("attn.proj", attn.proj),
        q_norm=getattr(attn, "q_norm", nn.Identity()),
        k_norm=getattr(attn, "k_norm", nn.Identity()),
        reduction=reduction,
    )


def mlp_view(block: nn.Module, conv: nn.Module | None = None) -> MlpView:
    """View ``block.mlp``: behind ``block.norm2``, the layers ``fc1``, ``conv`` if it is given, ``act`` and ``fc2``.

    Args:
        block: the block's module.
        conv: a depthwise convolution in front of the activation.
    """
    mlp: Any = block.get_submodule("mlp")
    return MlpView(
        name="mlp",
        module=mlp,
        norm=block.get_submodule("norm2"),
        inputs=(LinearView("mlp.fc1", mlp.fc1),),
        out=LinearView("mlp.fc2", mlp.fc2),
        act_name="mlp.act",
        conv=conv,
    )
