"""A second opinion on cutting: the source model with the cut's complement masked out, at full size.

Nothing is gathered: channels are zeroed where they are produced, LayerNorms average over kept channels only, dropped
blocks pass their input on. What ``models.cut`` returns must be the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import LayerNorm2d, RmsNorm
from torch import nn

from prunesweep.models import Arch, Block, BlockCut, Cut, arch_of, blocks_of
from prunesweep.models.layers.difference import HeadNorm
from prunesweep.models.layers.metaformer import TokenGroupNorm

Hook = Callable[..., None]
NORMS = (nn.LayerNorm, RmsNorm, TokenGroupNorm)


def _indicator(size: int, kept: tuple[int, ...] | None, like: torch.Tensor) -> torch.Tensor:
    if kept is None:
        return torch.ones(size, dtype=like.dtype)
    mask = torch.zeros(size, dtype=like.dtype)
    mask[list(kept)] = 1
    return mask


def _masked_norm(keep: torch.Tensor):
    def hook(norm: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        x = args[0].to(keep.dtype)
        return normed(norm, x.movedim(1, -1)).movedim(-1, 1) if isinstance(norm, LayerNorm2d) else normed(norm, x)

    def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
        n = keep.sum()
        if isinstance(norm, RmsNorm):
            return keep * norm.weight * x / ((x**2 * keep).sum(-1, keepdim=True) / n + norm.eps).sqrt()
        over = -1
        if isinstance(norm, TokenGroupNorm):  # all places, too
            over, n = (-2, -1), n * x.shape[-2]
        mean = (x * keep).sum(over, keepdim=True) / n
        var = ((x - mean) ** 2 * keep).sum(over, keepdim=True) / n
        bias = 0 if norm.bias is None else norm.bias
        return keep * (norm.weight * (x - mean) / (var + norm.eps).sqrt() + bias)

    return hook


def _masked_head_norm(keep: torch.Tensor):
    def hook(norm: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        heads = []
        for x, own in zip(args[0].split(norm.v_dims, -1), keep.split(norm.v_dims), strict=True):
            mean = (x**2 * own).sum(-1, keepdim=True) / own.sum().clamp_min(1)
            heads.append(own * x / (mean + norm.eps).sqrt())
        return norm.weight * torch.cat(heads, -1)

    return hook


def hooks_of(model: nn.Module) -> list[str]:
    """Every hook that is registered on a module of ``model``, as ``MODULE: KIND``; an untouched model has none."""
    return [
        f"{name or 'model'}: {kind}"
        for name, module in model.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and hooks
    ]


@contextlib.contextmanager
def masked(model: nn.Module, decision: Cut) -> Iterator[nn.Module]:
    """``model`` computing the masked function of ``decision``; as it was afterwards."""
    arch = arch_of(model)
    weight = next(model.parameters())
    kept = decision.embed or (None,) * len(arch.stages)
    embed = [_indicator(stage.width, own, weight) for stage, own in zip(arch.stages, kept, strict=True)]
    hooks = []

    def hook(module: nn.Module, function: Any, *, before: bool = False) -> None:
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hooks.append(register(function))

    if arch.family == "lm":
        tables = _mask_words(model, arch, embed[0], decision, hook)
    else:
        tables = {}
        _mask_outside(model, arch, embed, hook)
    width_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
    for s, block, record, choice in zip(width_of, blocks_of(model), arch.blocks, decision.blocks, strict=True):
        if not choice.keep:
            hook(block, lambda _m, args, _y: args[0])
            continue
        for norm in (*(getattr(block, f"norm{i}", None) for i in (1, 2, 3)), _entry_norm(block)):
            if norm is not None:
                hook(norm, _masked_norm(embed[s]))
        _mask_block(block, record, choice, weight, hook)
    if arch.family == "lm":  # the softmax reads the last block without a norm in between
        hook(blocks_of(model)[-1], lambda _m, _a, y: y * embed[0])
    try:
        yield model
    finally:
        for table, original in tables.items():
            table.weight.data.copy_(original)
        for handle in hooks:
            handle.remove()


def _entry_norm(block: Any) -> nn.Module | None:
    """The norm that an MLP begins with, behind the block's second one."""
    return getattr(getattr(block, "mlp", None), "entry_norm", None)


def _mask_outside(model: nn.Module, arch: Arch, embed: list[torch.Tensor], hook: Hook) -> None:
    """Norms outside the blocks, and what reads a residual stream there without a norm in between."""
    for name, module in model.named_modules():
        if name.startswith("patch_embed.backbone."):  # of own channels, which no cut takes away
            continue
        if name.startswith("attn_pool.") and arch.class_attention is None:  # likewise
            continue
        if name.startswith("neck.") and arch.neck:  # likewise, but its first convolution reads the stream
            if name == "neck.0":
                hook(module, lambda _m, args: (args[0] * embed[-1][:, None, None],), before=True)
            continue
        if name == "attn_pool" and arch.class_attention is None:
            hook(module, lambda _m, args: (args[0] * embed[-1],), before=True)
        if name.startswith("head.fc.") and arch.head_mlp:  # of own units, which no cut takes away
            continue
        if name == "head.fc" and arch.head_mlp and not isinstance(module, nn.Linear):
            hook(module, lambda _m, args: (args[0] * embed[-1],), before=True)
        if arch.family == "metaformer" and name.endswith("downsample") and not name.startswith("stages.0"):
            s = int(name.split(".")[1]) - 1
            hook(module, lambda _m, args, s=s: (args[0] * embed[s][:, None, None],), before=True)
        pooling = name.startswith("attn_pool.")  # in blocks of a class token
        if isinstance(module, NORMS) and (pooling or ".blocks." not in f".{name}"):
            parts = name.split(".")
            staged = parts[0] in ("layers", "stages", "transformers")
            s = int(parts[1]) if staged else (0 if parts[0] == "patch_embed" else -1)
            if arch.family == "swin" and "downsample" in parts:  # over four neighbours of the stage before
                hook(module, _masked_norm(embed[s - 1].repeat(4)))
            elif arch.family in ("hiera", "metaformer") and "downsample" in parts:  # likewise in front
                hook(module, _masked_norm(embed[s - 1]))
            else:
                hook(module, _masked_norm(embed[s]))
        if name.endswith(".downsample.mix"):  # which reads maximum and mean of the stage before
            before = embed[int(name.split(".")[1]) - 1].repeat(2)
            hook(module, lambda _m, args, before=before: (args[0] * before,), before=True)
        if arch.family == "pit" and name.endswith(".pool"):  # between stages
            before = embed[int(name.split(".")[1]) - 1]
            hook(module, lambda _m, args, m=before: (args[0] * m[:, None, None], args[1] * m), before=True)
        if name == "blocks.0" and arch.post_norm:  # which reads the first stream without a norm
            hook(module, lambda _m, args: (args[0] * embed[0],), before=True)
        if name in ("head", "head_dist") and isinstance(module, nn.Linear) and arch.attn_pool is None:
            hook(module, lambda _m, args: (args[0] * embed[-1],), before=True)


def _mask_words(
    model: nn.Module, arch: Arch, embed: torch.Tensor, decision: Cut, hook: Hook
) -> dict[nn.Module, torch.Tensor]:
    """Word vectors without the channels that go, for the input and the softmax; the tables to be put back."""
    hook(model.words.projections[0], lambda _m, args: (args[0] * embed,), before=True)
    originals = {}
    tails = decision.tails or (None,) * len(arch.text.tails)
    for b, (width, kept) in enumerate(zip(arch.text.tails, tails, strict=True), start=1):
        for table in {model.words.tables[b], *([model.softmax.tables[str(b)]] if model.softmax.tables else [])}:
            originals[table] = table.weight.detach().clone()
            table.weight.data *= _indicator(width, kept, table.weight)
    return originals


def _mask_block(block: nn.Module, record: Block, choice: BlockCut, weight: torch.Tensor, hook: Hook) -> None:
    def scale(module: nn.Module, mask: torch.Tensor) -> None:
        hook(module, lambda _m, _a, y: y * mask)

    if record.mixer == "sepconv" and choice.v is not None:
        v = _indicator(record.total_v, choice.v[0], weight)
        hook(block.attn.pwconv2, lambda _m, args: (args[0] * v,), before=True)
    elif record.conv_kernel and choice.v is not None:
        v = _indicator(record.total_v, choice.v[0], weight)
        hook(block.attn.bconv[3], lambda _m, args: (args[0] * v[:, None, None],), before=True)
    elif choice.qk is not None and choice.v is not None:
        width = record.heads * record.qk
        qk = _indicator(width, tuple(c for head in choice.qk for c in head), weight)
        v = _indicator(record.total_v, tuple(c for head in choice.v for c in head), weight)
        if hasattr(block.attn, "proj_l"):  # heads that are mixed
            heads = _indicator(record.heads, tuple(head[0] // record.qk for head in choice.qk), weight)
            for mixing in (block.attn.proj_l, block.attn.proj_w):
                hook(mixing, lambda _m, args: (args[0] * heads,), before=True)
        if hasattr(block.attn, "qkv"):
            scale(block.attn.qkv, torch.cat([qk, qk, v]))
        elif hasattr(block.attn, "v_proj"):  # first channels of all pairs, then second ones
            rows = qk.repeat(block.attn.q_proj.out_features // width)
            for layer, mask in ((block.attn.q_proj, rows), (block.attn.k_proj, rows), (block.attn.v_proj, v)):
                scale(layer, mask)
            if isinstance(getattr(block.attn, "norm", None), NORMS):
                hook(block.attn.norm, _masked_norm(v))
            elif isinstance(getattr(block.attn, "norm", None), HeadNorm):
                hook(block.attn.norm, _masked_head_norm(v))
        else:
            scale(block.attn.q, qk)
            scale(block.attn.kv, torch.cat([qk, v]))
        if isinstance(getattr(block.attn, "q_norm", None), NORMS):
            channels = _indicator(record.qk, tuple(sorted(c % record.qk for c in choice.qk[0])), weight)
            channels = channels.repeat(len(block.attn.q_norm.weight) // record.qk)
            hook(block.attn.q_norm, _masked_norm(channels))
            hook(block.attn.k_norm, _masked_norm(channels))
    if choice.sr is not None:
        hook(block.attn.norm, _masked_norm(_indicator(record.sr, choice.sr, weight)))
    if choice.mlp == () and record.mlp:
        branch = block.norm2 if getattr(block, "post_norm", False) else block.mlp  # whose norm is the last of it
        scale(branch, weight.new_zeros(()))
    elif choice.mlp:
        mlp = _indicator(record.mlp, choice.mlp, weight)
        if isinstance(getattr(block.mlp, "norm", None), NORMS):
            hook(block.mlp.norm, _masked_norm(mlp))
        hook(block.mlp.fc2, lambda _m, args: (args[0] * mlp,), before=True)
