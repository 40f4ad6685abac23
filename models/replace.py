"""Replacing attention by another mixer and putting a token plan around a block, which a cut does besides narrowing.

A convolution gets its weights from the attention that it replaces (SPViT, arXiv 2111.11802, section 3.2): every tap is
the mean over the heads of their value weights, the 1x1 convolution behind it that of the output weights. It computes
another function than the attention, and its BatchNorm has no statistics yet, so recalibrate it and finetune.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from prunesweep.models.layers.conv_mixing import mix_conv
from prunesweep.models.layers.token_merging import TokenPlan

from .arch import Arch, Block
from .errors import UserError
from .families import family_of, names_with

__all__ = ["REPLACEMENTS", "replace_block", "replace_tensors"]

REPLACEMENTS = ("conv1x1", "conv3x3", "none", "norm")


def replace_block(arch: Arch, block: Block, mixer: str | None, plan: TokenPlan | None, where: str) -> Block:
    """Derive the record of a block with another mixer and a token plan.

    With ``norm`` there is no mixer either, but the block adds its normalised input in its place, as SPViT's finetuned
    models do. A convolution needs the whole grid, so a plan that the block had goes with its attention.

    Args:
        arch: the record of the model that the block is in.
        block: the block's record.
        mixer: one of ``REPLACEMENTS``; ``None`` leaves the mixer as it is.
        plan: the token plan; ``None`` leaves the block's own, if any.
        where: the block, for the message.

    Raises:
        UserError: this block cannot have that mixer or that plan.
    """
    family = family_of(arch)
    if mixer is not None:
        if mixer not in REPLACEMENTS:
            raise UserError(f"{where}.mixer = {mixer!r}: must be one of {', '.join(REPLACEMENTS)}")
        if mixer.startswith("conv"):
            if block.mixer != "attn" or not family.supports("mixers"):
                able = names_with("mixers")
                what = f"a block with mixer {block.mixer!r}" if block.mixer != "attn" else f"family {arch.family!r}"
                raise UserError(f"{where}.mixer = {mixer!r}: convolutions come from attention of {able}, not {what}")
            block = dataclasses.replace(block, mixer=mixer, v=max(block.v_widths), tokens=None, merge="sparse")
        else:
            if mixer == "norm" and block.mixer == "none" and not block.norm_residual:
                raise UserError(f"{where}.mixer = 'norm': the block has lost its norm already; use 'none'")
            block = dataclasses.replace(block, mixer="none", v=0, norm_residual=mixer == "norm")
        block = dataclasses.replace(
            block, heads=0, qk=0, scale=0.0, sr=0, shifted=False, whole_map=False, token_scale=False
        )
    if plan is not None:
        planned = family.supports("tokens")
        if not planned or (block.mixer != "attn" and not block.mlp) or block.conv_kernel:
            what = f"mixer {block.mixer!r}" if planned else f"family {arch.family!r}"
            raise UserError(f"{where}.tokens: {what} takes no token plan; leave this block out of it")
        plan.check(arch.tokens, arch.prefix_tokens, f"{where}.tokens")
        block = dataclasses.replace(block, tokens=plan.kept, merge=plan.form)
    return block


def replace_tensors(
    arch: Arch, old: Block, weights: Mapping[str, torch.Tensor], mixer: str | None, plan: TokenPlan | None
) -> dict[str, torch.Tensor]:
    """Make the tensors of one block, named within it, after ``replace_block``; none of an MLP that it does not have.

    Args:
        arch: the record of the model that the block is in.
        old: the block's record before.
        weights: the block's tensors before, by name within it.
        mixer: as for ``replace_block``.
        plan: as for ``replace_block``.
    """
    kept = dict(weights)
    if not old.mlp:
        for part in ("mlp.", "norm2.", "ls2."):
            kept = _without(kept, part)
    if mixer is not None:
        attention = {name: kept.pop(name) for name in weights if name.startswith("attn.")}
        if mixer.startswith("conv"):
            kept |= _convolution(arch, old, attention, 3 if mixer == "conv3x3" else 1)
            kept = _without(kept, "token_merge.")
        elif mixer == "none":
            for part in ("norm1.", "ls1.", "norm3.", "local_mp.", "ls3."):
                kept = _without(kept, part)
    if plan is not None:
        like = next(t for t in weights.values() if t.is_floating_point())
        kept = _without(kept, "token_merge.")
        kept |= {f"token_merge.{name}": tensor.to(like.device) for name, tensor in plan.tensors(like.dtype).items()}
    return kept


def _without(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _convolution(
    arch: Arch, block: Block, attention: Mapping[str, torch.Tensor], kernel: int
) -> dict[str, torch.Tensor]:
    """Make ``ConvMixer``'s tensors from attention's value and output weights, with equal shares of heads.

    Heads with fewer value channels than the widest count as zero in the others.
    """
    proj = attention["attn.proj.weight"]
    values = "attn.v_proj" if "attn.v_proj.weight" in attention else "attn.qkv"  # the last rows of either
    rows = attention[f"{values}.weight"][-block.total_v :]
    bias = attention.get(f"{values}.bias", rows.new_zeros(block.total_v))[-block.total_v :]
    sharing = family_of(arch).conv_sharing
    assert sharing is not None  # replace_block has refused other families
    width, widths = max(block.v_widths), block.v_widths
    place = torch.cat([h * width + torch.arange(v) for h, v in enumerate(widths)]).to(rows.device)
    size = len(widths) * width
    mixed = mix_conv(
        rows.new_zeros(len(widths), 9),
        rows.new_zeros(size, rows.shape[1]).index_copy(0, place, rows),
        bias.new_zeros(size).index_copy(0, place, bias),
        proj.new_zeros(proj.shape[0], size).index_copy(1, place, proj),
        attention.get("attn.proj.bias", proj.new_zeros(len(proj))),
        columns=sharing.columns(kernel).to(rows.device),
        alpha=sharing.alpha,
    )
    return {
        "attn.bconv.0.weight": mixed.weight.contiguous(),
        "attn.bconv.0.bias": mixed.bias,
        "attn.bconv.1.weight": rows.new_ones(width),
        "attn.bconv.1.bias": rows.new_zeros(width),
        "attn.bconv.1.running_mean": rows.new_zeros(width),
        "attn.bconv.1.running_var": rows.new_ones(width),
        "attn.bconv.1.num_batches_tracked": torch.zeros((), dtype=torch.long, device=rows.device),
        "attn.bconv.3.weight": mixed.out_weight.contiguous(),
        "attn.bconv.3.bias": mixed.out_bias.clone(),
    }
