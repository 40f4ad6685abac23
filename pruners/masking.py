"""Pruning a model while it trains: full-size tensors whose pruned entries are zero, and stay zero.

Everything that ``models.cut`` would take away is zeroed, on both sides of a unit. A norm over residual channels
then has to average over those that are kept, or the masked model is another function than the cut one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm
from torch import nn

from prunesweep.models import Arch
from prunesweep.models.families import family_of
from prunesweep.models.layers.difference import HeadNorm
from prunesweep.models.layers.metaformer import TokenGroupNorm
from prunesweep.models.without_values import without_values

__all__ = ["KeptGroupNorm", "KeptHeadNorm", "KeptLayerNorm", "KeptRmsNorm", "Masking", "space_masks"]


class KeptLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels in ``kept``; the others are 0 in its output. It shares the parameters of ``norm``."""

    kept: torch.Tensor | None

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D) to the same shape; kept channels are as in the cut model."""
        if self.kept is None:
            return super().forward(x)
        weight = self.weight.index_select(0, self.kept)
        bias = self.bias.index_select(0, self.kept) if self.bias is not None else None
        y = F.layer_norm(x.index_select(-1, self.kept), (len(self.kept),), weight, bias, self.eps)
        return y.new_zeros(x.shape).index_copy(-1, self.kept, y)


class KeptLayerNorm2d(KeptLayerNorm):
    """The same of a norm over the channels of maps (B, D, rows, columns)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a map to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class KeptRmsNorm(RmsNorm):  # type: ignore[misc]  # timm is untyped
    """The same of an RMSNorm."""

    kept: torch.Tensor | None

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight = norm.weight
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D) to the same shape; kept channels are as in the cut model."""
        if self.kept is None:
            return super().forward(x)  # type: ignore[no-any-return]
        weight = self.weight.index_select(0, self.kept)
        y = F.rms_norm(x.index_select(-1, self.kept), (len(self.kept),), weight, self.eps)
        return y.new_zeros(x.shape).index_copy(-1, self.kept, y)


class KeptGroupNorm(TokenGroupNorm):
    """The same of a GroupNorm of one group."""

    kept: torch.Tensor | None

    def __init__(self, norm: TokenGroupNorm) -> None:
        with without_values():
            super().__init__(len(norm.weight), norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (B, N, D) to the same shape; kept channels are as in the cut model."""
        if self.kept is None:
            return super().forward(x)
        own = x.index_select(-1, self.kept)
        y = F.layer_norm(own, own.shape[1:], eps=self.eps) * self.weight.index_select(0, self.kept)
        y = y if self.bias is None else y + self.bias.index_select(0, self.kept)
        return y.new_zeros(x.shape).index_copy(-1, self.kept, y)


class KeptHeadNorm(HeadNorm):
    """The same of a norm over every head's values; a head of which nothing is kept gives 0."""

    kept: torch.Tensor | None

    def __init__(self, norm: HeadNorm) -> None:
        super().__init__(norm.v_dims)
        self.weight = norm.weight
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., V) to the same shape; kept channels are as in the cut model."""
        if self.kept is None:
            return super().forward(x)
        there = x.new_zeros(x.shape[-1]).index_fill(0, self.kept, 1)
        heads = []
        widths = list(self.v_dims)
        for y, own in zip(torch.split(x, widths, -1), torch.split(there, widths), strict=True):
            mean = (y.square() * own).sum(-1, keepdim=True) / own.sum().clamp_min(1)
            heads.append(y * own * (mean + self.eps).rsqrt())
        return torch.cat(heads, -1) * self.weight


KEPT: Mapping[type[nn.Module], Any] = {  # by the norm that it stands in for, the first that fits
    LayerNorm2d: KeptLayerNorm2d,
    nn.LayerNorm: KeptLayerNorm,
    RmsNorm: KeptRmsNorm,
    TokenGroupNorm: KeptGroupNorm,
    HeadNorm: KeptHeadNorm,
}


class Masking:
    """Holds a ViT's or Swin's parameters at the masks of ``set``.

    Gradients of pruned entries are zeroed before they are used, so what an optimizer remembers of an entry fades after
    it was pruned, and bears on that entry alone, which is zeroed after every step.
    """

    def __init__(self, model: nn.Module, arch: Arch, *, kept_norms: bool) -> None:
        self._model, self._arch = model, arch
        self._norms: dict[str, tuple[nn.Module, Any]] = {}
        family = family_of(arch)
        for name, module in list(model.named_modules()):
            kind = next((kept for norm, kept in KEPT.items() if isinstance(module, norm)), None)
            if not kept_norms or kind is None:
                continue
            if not any(family.axes(arch, f"{name}.weight")):  # over channels that always stay
                continue
            self._norms[name] = module, kind(module)
        self._pruned: list[tuple[nn.Parameter, list[torch.Tensor]]] = []
        self._place(1)

    def set(self, keep: Mapping[str, torch.Tensor]) -> None:
        """Keep only the units in ``keep`` (bool, by vector) from now on; all others are zeroed."""
        device, family = next(self._model.parameters()).device, family_of(self._arch)
        kept = space_masks(self._arch, keep)
        narrowed = {space for space, mask in kept.items() if not mask.all()}
        masks = {space: mask.to(device) for space, mask in kept.items()}

        def of_axis(units: str) -> torch.Tensor | None:
            """The mask of an axis; None where nothing of it is gone."""
            spaces = family.parts(units)
            return None if narrowed.isdisjoint(spaces) else torch.cat([masks[space] for space in spaces])

        self._pruned = []
        for name, parameter in self._model.named_parameters():
            found = enumerate(map(of_axis, family.axes(self._arch, name)))
            gone = [~mask.view(-1, *[1] * (parameter.dim() - 1 - axis)) for axis, mask in found if mask is not None]
            if gone:
                self._pruned.append((parameter, gone))
        for name, (_, norm) in self._norms.items():
            (mask,) = map(of_axis, family.axes(self._arch, f"{name}.weight"))
            norm.kept = None if mask is None else torch.nonzero(mask)[:, 0]
        self.zero_weights()

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Zero the weights of all pruned entries."""
        for parameter, masks in self._pruned:
            for gone in masks:
                parameter.masked_fill_(gone, 0)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zero the gradients of all pruned entries."""
        for parameter, masks in self._pruned:
            if parameter.grad is not None:
                for gone in masks:
                    parameter.grad.masked_fill_(gone, 0)

    @contextlib.contextmanager
    def stock_norms(self) -> Iterator[None]:
        """Put the model's own norms back within the context, as ``Arch.from_timm`` expects it."""
        self._place(0)
        try:
            yield
        finally:
            self._place(1)

    def remove(self) -> None:
        """Give the model its own norms back for good; its weights stay as they are."""
        self._place(0)

    def _place(self, which: int) -> None:
        for name, pair in self._norms.items():
            pair[which].train(pair[1 - which].training)
            self._model.set_submodule(name, pair[which])


def space_masks(arch: Arch, keep: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make bool masks of a family's spaces from masks of units aligned over heads.

    Args:
        arch: a ViT or Swin whose heads have equal widths.
        keep: bool masks by vector, such as ``stages.0.embed`` or ``blocks.3.qk``, True for a unit that stays.

    Returns:
        Masks by space (``Family.spaces``); a space without scored units is left out.
    """
    masks: dict[str, torch.Tensor] = {}
    for s in range(len(arch.stages)):
        masks[f"stages.{s}.embed"] = keep[f"stages.{s}.embed"]
    for i in range(arch.depth):
        own = {kind: keep[name] for kind in ("heads", "qk", "v", "mlp") if (name := f"blocks.{i}.{kind}") in keep}
        if "mlp" in own:
            masks[f"blocks.{i}.mlp"] = own["mlp"]
        if "v" in own and "heads" not in own:  # of a separable convolution
            masks[f"blocks.{i}.v"] = own["v"]
        if "heads" in own:
            heads, block = own["heads"][:, None], arch.blocks[i]
            whole = torch.ones_like(own["heads"][:1]).expand(block.qk)  # of attention between channels, heads alone
            qk, values = own.get("qk", whole), own.get("v", whole)
            q, v = (heads & qk).flatten(), (heads & values).flatten()
            spaces = {"q": q, "k": q, "v": v, "heads": own["heads"], "qk_norm": qk}
            masks |= {f"blocks.{i}.{space}": mask for space, mask in spaces.items()}
    return masks
