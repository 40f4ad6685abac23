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

from .primal_dual import TAU

__all__ = ["CONTROL", "GatedBlock"]

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
    ) -> None:
        """Wrap ``block``, whose views are ``attention`` and ``mlp``.

        ``frozen_as`` fixes whether it runs; with None its gate is learned.
        """
        super().__init__()
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
        if self.frozen_as is not None:
            return self.block(x, *places, **options) if self.frozen_as else x
        w = self.keep_weight()
        return w * self.block(x, *places, **options) + (1 - w) * x

    def release(self) -> nn.Module:
        """Return the block as it was before wrapping."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self.block.named_parameters():
            parameter.requires_grad_(name in self._learned)
        return self.block

    def _mask_values(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return None if self.training else (inputs[0] * self.v_keep,)

    def _mask_units(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return None if self.training else (inputs[0] * self.mlp_keep,)
