"""Views of a block's attention and MLP: which layers, rows and columns are queries, keys, values and hidden units.

Scorers, supernets and token scores read a block through these views, so that none of them depends on how a family names
its layers or whether queries, keys and values come from one projection or from several. A view holds the block's own
modules: it sees every later change of their weights, and stays right where a block is wrapped.

Shapes: B batch, N tokens, P tokens that keys and values are read from, D residual width, H heads, E query/key width of
a head, V value channels of all heads, M hidden units of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import GluMlp
from torch import nn

from prunesweep.models.arch import Block
from prunesweep.models.layers.mixers import attend
from prunesweep.models.layers.rotary import RotaryAttention

__all__ = [
    "AttentionView",
    "Entrance",
    "LinearView",
    "MlpView",
    "Reader",
    "ReductionView",
    "WindowView",
    "attention_view",
    "consecutive",
    "mlp_view",
    "patches",
]


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
class Reader:
    """A layer that reads a residual stream, as a matrix that multiplies rows.

    Args:
        name: of the layer, within its block or, outside the blocks, within the model.
        layer: linear, or a convolution.
        norm: what its rows come from directly; None where that is no norm.
        rows: computes of a stream (B, ..., D) the rows (..., F) that the flattened weight (G, F) multiplies.
        padded: some rows are zeros that no token of the stream gave, so the norm's bias is not part of all rows.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None
    rows: Callable[[torch.Tensor], torch.Tensor]
    padded: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """(G, F), sharing memory with the layer's."""
        return self.layer.get_parameter("weight").flatten(1)

    @property
    def bias(self) -> torch.Tensor | None:
        """(G,), sharing memory with the layer's; None where it has none."""
        return getattr(self.layer, "bias", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output (..., G) of a stream (B, ..., D)."""
        return F.linear(self.rows(x), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Entrance:
    """What leads from the last stream of a stage to the first one of the next.

    Args:
        reader: the layer, which reads the one and writes the other.
        norm: behind the layer; None where its output is the stream.
        run: computes the first stream of the stage from the last one of the stage before.
    """

    reader: Reader
    norm: nn.Module | None
    run: Callable[[torch.Tensor], torch.Tensor]


def patches(x: torch.Tensor, rows: int, conv: nn.Module) -> torch.Tensor:
    """Lay out a map of tokens (B, N, D) of ``rows`` rows as the rows (B, P, D k k) that a convolution multiplies."""
    own: Any = conv
    image = rearrange(x, "b (h w) d -> b d h w", h=rows)
    return F.unfold(image, own.kernel_size, padding=own.padding, stride=own.stride).mT


@dataclass(frozen=True, eq=False)
class WindowView:
    """The windows of a map that attention is within (Swin): shifted or not, the map padded to whole ones."""

    block: Any

    def padded(self, grid: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of a padded map of ``grid`` rows and columns."""
        rows, columns = (-(-side // w) * w for side, w in zip(grid, self.block.window_size, strict=True))
        return rows, columns

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Split a map (B, rows, columns, D) into windows (windows*B, N, D)."""
        (rows, columns), (h, w) = self.padded(x.shape[1:3]), self.block.window_size
        down, right = self.block.shift_size
        x = torch.roll(x, (-down, -right), (1, 2)) if down or right else x
        x = F.pad(x, (0, 0, 0, columns - x.shape[2], 0, rows - x.shape[1]))
        return rearrange(x, "b (r h) (c w) d -> (b r c) (h w) d", h=h, w=w)

    def join(self, windows: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Put windows (windows*B, N, V) together to a map (B, rows, columns, V) of ``grid`` rows and columns."""
        (rows, columns), (h, w) = self.padded(grid), self.block.window_size
        down, right = self.block.shift_size
        x = rearrange(windows, "(b r c) (h w) v -> b (r h) (c w) v", h=h, w=w, r=rows // h, c=columns // w)
        x = x[:, : grid[0], : grid[1]]
        return torch.roll(x, (down, right), (1, 2)) if down or right else x

    def logit_bias(self, windows: int) -> torch.Tensor | None:
        """Compute what is added to the logits of ``windows`` windows, (windows or 1, H, N, N); None for nothing."""
        bias, mask = self.block.attn._get_rel_pos_bias(), self.block.attn_mask
        return bias if mask is None else (bias + mask[:, None]).repeat(windows // len(mask), 1, 1, 1)


@dataclass(frozen=True, eq=False)
class ReductionView:
    """The layers that make the smaller map which keys and values are read from (PVTv2).

    Args:
        conv: its stride is its kernel.
        norm: behind it.
        pool: averages the map in front of a 1x1 convolution (PVTv2-li); else the identity.
        act: an activation behind the norm, likewise.
    """

    conv: nn.Conv2d
    norm: nn.Module
    pool: nn.Module = field(default_factory=nn.Identity)
    act: nn.Module = field(default_factory=nn.Identity)

    def rows(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Lay out a map (B, N, D) of ``rows`` rows as the rows that the convolution multiplies."""
        if isinstance(self.pool, nn.Identity):
            return patches(x, rows, self.conv)
        return self.pool(rearrange(x, "b (h w) d -> b d h w", h=rows)).flatten(2).mT  # type: ignore[no-any-return]

    def read(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Compute what keys and values are read from, (B, P, channels), of a map (B, N, D) of ``rows`` rows."""
        found: torch.Tensor = self.act(self.norm(self.convolve(x, rows)))
        return found

    def convolve(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Convolve a map (B, N, D) of ``rows`` rows to the reduced map (B, P, channels), before its norm."""
        return rearrange(self.conv(self.pool(rearrange(x, "b (h w) d -> b d h w", h=rows))), "b r h w -> b (h w) r")


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A block's attention.

    Args:
        name: of the attention within its block.
        module: all of it.
        record: the block's record, which has the number of heads, their widths and the scale.
        norm: what its input comes from; the identity where that is the stream.
        q, k, v: the layers and rows of queries (H·E), keys (H·E) and values (V), each head after head.
        out: the output projection, whose columns are the value channels.
        q_norm, k_norm: norms of a head's query and key; identities where there are none.
        reduction: what keys and values are read from, where that is not the attention's own input.
        windows: those that attention is within, where it is not over all tokens.
        causal: a token attends to itself and those before it only.
        scale: LayerScale on its output, or the norm that stands behind it; the identity where there is none.
        rotary: the attention, where pairs of its channels are turned or its queries and keys are laid out in pairs.
        coordinates: gives the places of merged tokens, in a block with a token plan whose tokens are turned.
        out_norm: over the value channels of all heads; the identity where there is none.
        bias: gives position biases (1, H, N, N), which are added to logits; None where there are none.
        attend: computes attention of queries, keys and values; ``models.layers.mixers.attend`` says how.
        passing: factors on the stream that passes by (MetaFormer); the identity where there are none.
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
    windows: WindowView | None = None
    causal: bool = False
    scale: nn.Module = field(default_factory=nn.Identity)
    rotary: RotaryAttention | None = None
    coordinates: Callable[[], torch.Tensor] | None = None
    out_norm: nn.Module = field(default_factory=nn.Identity)
    bias: Callable[[], torch.Tensor] | None = None
    attend: Callable[..., torch.Tensor] = attend
    passing: nn.Module = field(default_factory=nn.Identity)

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

    def per_unit(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum what belongs to the rows of queries, or of keys, over units: (H, E, ...) or (H, P, ...).

        Args:
            rows: (H·E, ...), or (2 H P, ...).
        """
        return rows.view(-1, self.record.heads, self.record.qk, *rows.shape[1:]).sum(0)

    def by_head(self, q: torch.Tensor) -> torch.Tensor:
        """Reshape queries or keys (B, N, H·E) to (B, H, N, E)."""
        return (
            rearrange(q, "b n (h e) -> b h n e", h=self.record.heads) if self.rotary is None else self.rotary.by_head(q)
        )

    def turned(self, q: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys (B, H, n, E) of the first n tokens by their places, behind the norms."""
        if self.rotary is None:
            return q
        return self.rotary.rotate(q, None if self.coordinates is None else self.coordinates())

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

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the projections read of a stream: its norm's output, in windows where there are some."""
        normed = self.norm(x)
        return normed if self.windows is None else self.windows.split(normed)

    def readers(self, grid: Sequence[int]) -> tuple[Reader, ...]:
        """List the layers that read the stream, those that others depend on first.

        Args:
            grid: rows and columns of the map that the stream is.
        """
        if self.reduction is None:
            padded = self.windows is not None and self.windows.padded(grid) != tuple(grid)
            norm_in_front = _norm_or_none(self.norm)
            return tuple(Reader(view.name, view.layer, norm_in_front, self.tokens, padded) for view in self.inputs)
        reduce, norm, rows = self.reduction, self.norm, grid[0]
        last = reduce.norm if isinstance(reduce.act, nn.Identity) else None
        return (
            Reader(self.q.name, self.q.layer, norm, norm),
            Reader(f"{self.name}.sr", reduce.conv, norm, lambda x: reduce.rows(norm(x), rows)),
            Reader(self.k.name, self.k.layer, last, lambda x: reduce.read(norm(x), rows)),
        )

    def attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, v_widths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Compute what ``out`` reads, in the order of the stream.

        Args:
            q, k, v: (B, N, H·E), (B, P, H·E) and (B, P, V), before their norms; E may differ from the block's, and
                queries may be those of the first tokens alone.
            x: the stream, for its shape.
            v_widths: value width of every head; the block's by default.
        """
        options: dict[str, Any] = {"is_causal": True} if self.causal else {}
        if self.windows is not None:
            bias = self.windows.logit_bias(len(q))
            options["attn_mask"] = None if bias is None else bias.to(q.dtype)
        elif self.bias is not None:
            options["attn_mask"] = self.bias()[:, :, : q.shape[1]].to(q.dtype)
        q, k = self.turned(self.q_norm(self.by_head(q))), self.turned(self.k_norm(self.by_head(k)))
        out = self.out_norm(self.attend(q, k, v, v_widths or self.record.v_widths, self.record.scale, **options))
        return out if self.windows is None else self.windows.join(out, x.shape[1:3])

    def projected(self, x: torch.Tensor, grid: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute queries (B, N, H·E), keys (B, P, H·E) and values (B, P, V) of a stream; B counts windows, too.

        Args:
            x: (B, ..., D), the stream.
            grid: rows and columns of the map that it is.
        """
        outputs = {reader.name: reader(x) for reader in self.readers(grid) if reader.name in self._projections}
        q, k, v = (outputs[part.name][..., part.rows] for part in (self.q, self.k, self.v))
        scale = self.token_scale
        return (q, k, v) if scale is None else (q * scale, k * scale, v * scale)

    def mixed(self, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Compute what ``out`` reads of a stream ``x`` (B, ..., D) that is a map of ``grid`` rows and columns."""
        return self.attended(*self.projected(x, grid), x)

    def after(self, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Compute the stream behind the attention."""
        found: torch.Tensor = self.passing(x) + self.scale(self.out(self.mixed(x, grid)))
        return found

    @property
    def _projections(self) -> set[str]:
        return {part.name for part in (self.q, self.k, self.v)}


@dataclass(frozen=True, eq=False)
class MlpView:
    """A block's MLP.

    Args:
        name: of the MLP within its block.
        module: all of it.
        norm: what its input comes from; the identity where that is the stream.
        inputs: the layers whose rows are the hidden units; of a gated MLP, first those that are activated, then those
            that they multiply.
        out: the layer whose columns are the hidden units.
        act_name: of the activation within the block.
        conv: a depthwise convolution of the hidden units before the activation, where there is one (PVTv2).
        before_conv: what acts on hidden units in front of it; the identity where there is nothing.
        scale: LayerScale on its output, or the norm that stands behind it; the identity where there is none.
        gated: every unit has two rows.
        inner_norm: over the hidden units, behind the activation; the identity where there is none.
        entry_norm: a second norm, behind ``norm``; the identity where there is none.
        passing: factors on the stream that passes by (MetaFormer); the identity where there are none.
    """

    name: str
    module: nn.Module
    norm: nn.Module
    inputs: tuple[LinearView, ...]
    out: LinearView
    act_name: str
    conv: nn.Module | None = None
    before_conv: nn.Module = field(default_factory=nn.Identity)
    scale: nn.Module = field(default_factory=nn.Identity)
    gated: bool = False
    inner_norm: nn.Module = field(default_factory=nn.Identity)
    entry_norm: nn.Module = field(default_factory=nn.Identity)
    passing: nn.Module = field(default_factory=nn.Identity)

    def per_unit(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum what belongs to the rows of a layer of ``inputs`` over those of a unit, (M,)."""
        return rows.view(2, -1).sum(0) if self.gated else rows

    @property
    def act(self) -> nn.Module:
        """The activation that the MLP has now."""
        return self.module.get_submodule(self.act_name.removeprefix(f"{self.name}."))

    def hidden(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Compute the hidden units behind the activation, (B, N, M), from the norm's output (B, N, D).

        ``rows`` are those of the map that the tokens are; only a convolution needs them.
        """
        (layer,) = self.inputs
        return self.activated(layer.layer(self.entry_norm(x)), rows)

    def after(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Compute the stream behind the MLP, from the one in front of its norm."""
        found: torch.Tensor = self.passing(x) + self.scale(self.out(self.hidden(self.norm(x), rows)))
        return found

    def readers(self) -> tuple[Reader, ...]:
        """List the layers that read the stream."""
        last = _norm_or_none(self.entry_norm) or _norm_or_none(self.norm)
        return tuple(Reader(v.name, v.layer, last, lambda x: self.entry_norm(self.norm(x))) for v in self.inputs)

    def activated(self, y: torch.Tensor, rows: int) -> torch.Tensor:
        """Compute the hidden units (B, N, M) from the output of the layer in front of them, (B, N, its rows)."""
        if self.conv is not None:
            y = self.conv(self.before_conv(rearrange(y, "b (h w) m -> b m h w", h=rows)))
            y = rearrange(y, "b m h w -> b (h w) m")
        if not self.gated:
            return self.inner_norm(self.act(y))  # type: ignore[no-any-return]
        gate, value = y.chunk(2, -1)
        return self.inner_norm(self.act(gate) * value)  # type: ignore[no-any-return]


def _norm_or_none(module: nn.Module) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


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
    *,
    windows: WindowView | None = None,
    causal: bool = False,
    **rotary: Any,
) -> AttentionView:
    """View ``block.attn``, which follows ``block.norm1`` and ends with ``proj``.

    Args:
        block: the block's module.
        record: its record.
        projections: the rows of queries, keys and values.
        reduction: what keys and values are read from, if not the attention's input.
        windows: those that attention is within, if not over all tokens.
        causal: a token attends to itself and those before it only.
        rotary: ``rotary``, ``coordinates``, ``out_norm``, ``bias``, ``attend`` and ``passing`` of ``AttentionView``.
    """
    attn: Any = block.get_submodule("attn")
    q, k, v = projections
    norm, scale = _norm_and_scale(block, "1")
    return AttentionView(
        name="attn",
        module=attn,
        record=record,
        norm=norm,
        q=q,
        k=k,
        v=v,
        out=LinearView("attn.proj", attn.proj),
        q_norm=getattr(attn, "q_norm", nn.Identity()),
        k_norm=getattr(attn, "k_norm", nn.Identity()),
        reduction=reduction,
        windows=windows,
        causal=causal,
        scale=scale,
        **rotary,
    )


def _norm_and_scale(block: nn.Module, half: str) -> tuple[nn.Module, nn.Module]:
    """Return what stands in front of a half of a block, and what behind it."""
    norm = block.get_submodule(f"norm{half}")
    if getattr(block, "post_norm", False):
        return nn.Identity(), norm
    return norm, getattr(block, f"ls{half}", nn.Identity())


def mlp_view(
    block: nn.Module,
    conv: nn.Module | None = None,
    before_conv: nn.Module | None = None,
    *,
    passing: nn.Module | None = None,
) -> MlpView:
    """View ``block.mlp``: behind ``block.norm2``, ``fc1``, ``conv`` if it is given, ``act``, ``norm`` and ``fc2``.

    Args:
        block: the block's module.
        conv: a depthwise convolution in front of the activation.
        before_conv: an activation in front of that.
        passing: factors on the stream that passes by.
    """
    mlp: Any = block.get_submodule("mlp")
    norm, scale = _norm_and_scale(block, "2")
    return MlpView(
        name="mlp",
        module=mlp,
        norm=norm,
        inputs=(LinearView("mlp.fc1", mlp.fc1),),
        out=LinearView("mlp.fc2", mlp.fc2),
        act_name="mlp.act",
        conv=conv,
        before_conv=before_conv or nn.Identity(),
        scale=scale,
        gated=isinstance(mlp, GluMlp),
        inner_norm=getattr(mlp, "norm", nn.Identity()),
        entry_norm=getattr(mlp, "entry_norm", nn.Identity()),
        passing=nn.Identity() if passing is None else passing,
    )
