"""Prune-and-Merge's models (arXiv 2503.23455): a ViT in timm's names, with full merge and recover matrices."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, agree, one_number_of_heads
from .vit import timm_attention, vit_arch

__all__ = ["read_pmvit"]


def read_pmvit(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of a Prune-and-Merge checkpoint; which blocks merge follows from their keys.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says; the number of heads is needed.

    Returns:
        The model in eval mode.

    Raises:
        UserError: a key or a shape does not fit, or the file's ``channels`` (tokens inside every block) contradict it.
    """
    heads = one_number_of_heads(given, tensors.shape("cls_token", 3)[2], tensors.layout)
    channels, depth = tensors.beside.get("channels"), tensors.count("blocks.")
    if channels is not None and (not isinstance(channels, list) or len(channels) != depth):
        raise UserError(f"the file's entry 'channels' is {channels!r}: must be {depth} numbers, one per block")

    def read_mixer(index: int, width: int, tokens: int) -> dict[str, Any]:
        merge = _read_merge(tensors, f"blocks.{index}", tokens)
        agree(f"channels[{index}]", channels and channels[index], merge.get("tokens", tokens))
        return {**timm_attention(tensors, f"blocks.{index}", width, heads), **merge}

    return tensors.finish(vit_arch(tensors, given, read_mixer))


def _read_merge(tensors: Tensors, where: str, tokens: int) -> dict[str, Any]:
    """Read the fields of a block's record that describe its token plan; none where it has no plan."""
    if f"{where}.attn.merge_matrix" not in tensors.left:
        return {}
    kept = tensors.shape(f"{where}.attn.merge_matrix", 2)[0]
    tensors.move(f"{where}.attn.merge_matrix", kept, tokens, to=f"{where}.token_merge.matrix")
    tensors.move(f"{where}.attn.recover_matrix", tokens, kept, to=f"{where}.token_merge.recover")
    tensors.built[f"{where}.token_merge.takes_part"] = tensors.flags(f"{where}.attn.token_mask", tokens)
    tensors.discard(rf"{where}\.attn\.bias")  # sizes of the merged tokens, which the attention does not use
    return {"tokens": kept, "merge": "dense"}
