"""A second opinion on cutting: the source model with the cut's complement masked out, at full size.

Nothing is gathered: channels are zeroed where they are produced, LayerNorms average over kept channels only, dropped
blocks pass their input on. What ``models.cut`` returns must be the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from models import BlockCut, Cut, arch_of


def _indicator(size: int, kept: tuple[int, ...] | None, like: torch.Tensor) -> torch.Tensor:
    if kept is None:
        return torch.ones(size, dtype=like.dtype)
    mask = torch.zeros(size, dtype=like.dtype)
    mask[list(kept)] = 1
    return mask


def _masked_norm(keep: torch.Tensor):
    def hook(norm: nn.LayerNorm, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        x, n = args[0], keep.sum()
        mean = (x * keep).sum(-1, keepdim=True) / n
        var = ((x - mean) ** 2 * keep).sum(-1, keepdim=True) / n
        return keep * (norm.weight * (x - mean) / (var + norm.eps).sqrt() + norm.bias)

    return hook


@contextlib.contextmanager
def masked(model: nn.Module, decision: Cut) -> Iterator[nn.Module]:
    """``model`` computing the masked function of ``decision``; as it was afterwards."""
    arch = arch_of(model)
    (stage,) = arch.stages
    weight = next(model.parameters())
    embed = _indicator(stage.width, decision.embed, weight)
    hooks = []

    def hook(module: nn.Module, function, *, before: bool = False) -> None:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hooks.append(register(function))

    def scale_output(module: nn.Module, mask: torch.Tensor) -> None:
        hook(module, lambda _m, _a, y: y * mask)

    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not name.endswith(("q_norm", "k_norm")):
            hook(module, _masked_norm(embed))
        if name in ("head", "head_dist"):
            hook(module, lambda _m, args: (args[0] * embed,), before=True)
    for block, record, choice in zip(model.blocks, stage.blocks, decision.blocks, strict=True):
        if not choice.keep:
            hook(block, lambda _m, args, _y: args[0])
            continue
        _mask_block(block, record, choice, weight, hook, scale_output)
    try:
        yield model
    finally:
        for handle in hooks:
            handle.remove()


def _mask_block(block: nn.Module, record, choice: BlockCut, weight: torch.Tensor, hook, scale_output) -> None:
    if choice.qk is not None and choice.v is not None:
        width, total_v = record.heads * record.qk, sum(record.v_widths)
        qk = _indicator(width, tuple(c for head in choice.qk for c in head), weight)
        v = _indicator(total_v, tuple(c for head in choice.v for c in head), weight)
        scale_output(block.attn.qkv, torch.cat([qk, qk, v]))
        if not isinstance(block.attn.q_norm, nn.Identity):
            channels = _indicator(record.qk, tuple(sorted(c % record.qk for c in choice.qk[0])), weight)
            hook(block.attn.q_norm, _masked_norm(channels))
            hook(block.attn.k_norm, _masked_norm(channels))
    if choice.mlp is not None:
        mlp = _indicator(record.mlp, choice.mlp, weight)
        hook(block.mlp.fc2, lambda _m, args: (args[0] * mlp,), before=True)
