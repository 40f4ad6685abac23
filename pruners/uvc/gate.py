"""A transformer block behind UVC's gate, while the model trains.

    x <- w block(x) + (1 - w) x,   w a sample of the gate, the same for the whole batch

Source: UVC, ICLR 2022 (openreview 9jsZiUgkCZP). In evaluation the block is what would be cut out now: it runs or not,
and what its projections would lose is masked (the released code evaluates random gates, without masks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunesweep.models.families.views import AttentionView, MlpView

from .primal_dual import TAU, TOKEN_START

__all__ = ["CONTROL", "GatedBlock", "TokenGates"]

CONTROL = ("skip_noise", "keep_noise", "sampled", "level", "eps")


class GatedBlock(nn.Module):
    """A transformer block with a parameter ``gate`` (2,): logits of skipping it and of keeping it.

    ``control`` holds what ``CONTROL`` names, to be written from outside: with ``sampled`` 1 the gate decides, with 0
    the keep weight is ``level``. ``runs``, ``v_keep`` and ``mlp_keep`` are the decision as evaluation sees it.
    """

    def __init__(
        self,
        block: nn.Module,
        attention: AttentionView,
        mlp: MlpView,
        control: torch.Tensor,
        kind: str,
        *,
        frozen_as: bool | None,
        tokens: TokenGates | None = None,
    ) -> None:
        """Wrap ``block``, whose views are ``attention`` and ``mlp``.

        ``frozen_as`` fixes whether it runs; with None its gate is learned. ``tokens`` says which tokens it runs on.
        """
        super().__init__()
        self._tokens = () if tokens is None else (tokens,)  # a tuple: they are the model's, not the block's
        if tokens is not None and getattr(block, "places", None) is not None:
            own: Any = block
            own.token_merge = _PlacesAlone(tokens)
        self.block, self.kind, self.frozen_as = block, kind, frozen_as
        proj, fc2 = attention.out.layer, mlp.out.layer
        like = proj.weight
        self.gate = nn.Parameter(like.new_tensor([-1.0, 1.0]), requires_grad=frozen_as is None)
        self.control: torch.Tensor
        self.runs: torch.Tensor
        self.v_keep: torch.Tensor
        self.mlp_keep: torch.Tensor
        self.register_buffer("control", control, persistent=False)
        self.register_buffer("runs", like.new_ones((), dtype=torch.bool))
        self.register_buffer("v_keep", like.new_ones(proj.in_features, dtype=torch.bool))
        self.register_buffer("mlp_keep", like.new_ones(fc2.in_features, dtype=torch.bool))
        self._handles = [
            proj.register_forward_pre_hook(self._mask_values),
            fc2.register_forward_pre_hook(self._mask_units),
        ]
        self._learned = {name for name, p in block.named_parameters() if p.requires_grad}
        if frozen_as is False:  # DDP waits for the gradient of every parameter that wants one
            block.requires_grad_(False)

    def keep_weight(self) -> torch.Tensor:
        """Compute the keep weight w, a scalar."""
        if not self.training:
            return self.runs.to(self.gate.dtype)
        noise, (sampled, level, eps) = self.control[:2], self.control[2:]
        if self.kind == "soft_l0":
            weight = self.gate[1] ** 2 / (self.gate[1] ** 2 + eps)
        else:
            weight = ((self.gate + noise) / TAU).softmax(0)[1]
        return sampled * weight + (1 - sampled) * level

    def forward(self, x: torch.Tensor, *places: Any, **options: Any) -> torch.Tensor:
        """Run the gated block on its stage's stream, to the same shape; ``places`` and ``options`` are the block's."""
        if self.frozen_as is False:
            return x
        index = self._tokens[0].index if self._tokens else None
        z = x if index is None else x.index_select(1, index)
        found = self.block(z, *places, **options)
        if self.frozen_as is None:
            w = self.keep_weight()
            found = w * found + (1 - w) * z
        return found if index is None else x.index_copy(1, index, found.to(x.dtype))

    def release(self) -> nn.Module:
        """Return the block as it was before wrapping."""
        for handle in self._handles:
            handle.remove()
        if isinstance(getattr(self.block, "token_merge", None), _PlacesAlone):
            own: Any = self.block
            own.token_merge = None
        for name, parameter in self.block.named_parameters():
            parameter.requires_grad_(name in self._learned)
        return self.block

    def _mask_values(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return None if self.training else (inputs[0] * self.v_keep,)

    def _mask_units(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return None if self.training else (inputs[0] * self.mlp_keep,)


class TokenGates(nn.Module):
    """Gates of a model's patches: factors on their embeddings while they are learned, and which of them blocks run on.

        patch_j <- (1 - soft + soft sigmoid(q_j)) patch_j        of those that stay

    ``gate`` (P,) is q, logits of keeping a patch. ``keep`` (N,) bool are the tokens that blocks run on, prefix tokens
    among them; the others pass all blocks by. ``soft`` is 1 where the gates are learned, 0 where they have decided. In
    evaluation there are no factors, as in what would be cut out now.
    """

    def __init__(self, embed: nn.Module, patches: int, prefix: int) -> None:
        """Gate the patches that ``embed`` gives."""
        super().__init__()
        like = next(embed.parameters())
        self.prefix = prefix
        self.index: torch.Tensor | None = None  # of ``keep``, in this forward pass; None for all
        self.keep: torch.Tensor
        self.soft: torch.Tensor
        self.gate = nn.Parameter(like.new_full((patches,), TOKEN_START))
        self.register_buffer("keep", like.new_ones(prefix + patches, dtype=torch.bool))
        self.register_buffer("soft", like.new_ones(()), persistent=False)
        self._handle = embed.register_forward_hook(self._scale)

    def _scale(self, _: nn.Module, __: Any, patches: torch.Tensor) -> torch.Tensor:
        index = self.keep.nonzero()[:, 0]
        self.index = None if len(index) == len(self.keep) else index
        if not self.training:
            return patches
        factor = 1 - self.soft * self.keep[self.prefix :] * (1 - self.gate.sigmoid())
        return patches * factor[:, None].to(patches.dtype)

    def release(self) -> None:
        """Leave the patch embedding as it was."""
        self._handle.remove()


class _PlacesAlone:
    """What a block that turns tokens by their places asks a token plan, where the tokens are selected already."""

    def __init__(self, tokens: TokenGates) -> None:
        self.tokens = tokens

    @property
    def kept(self) -> int:
        return int(self.tokens.keep.sum())

    @property
    def assign(self) -> torch.Tensor:
        keep = self.tokens.keep
        return torch.where(keep, keep.cumsum(0) - 1, -1)

    @property
    def weight(self) -> torch.Tensor:
        return torch.ones_like(self.tokens.keep, dtype=torch.float32)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def spread(self, z: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return z
