"""fairseq's language models with adaptive input and softmax: ``transformer_lm_wiki103`` and its like.

The names are those of fairseq 0.10.2; older ones have query, key and value in one ``in_proj``, which is taken too. What
is shared between input and softmax stands in the file twice; it is compared and kept once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage, Text
from prunesweep.models.errors import UserError

from .tensors import Given, Tensors, check_heads

__all__ = ["read_fairseq"]

LENGTH = 512  # words of a training text (tokens_per_sample) of transformer_lm_wiki103
FIRST_POSITION = 2  # behind the padding's, whose word number is 1 in fairseq's dictionaries
# counters and placeholders
NO_WEIGHTS = (
    r"decoder\.(version|embed_positions\.\w+|embed_tokens\._float_tensor|adaptive_softmax\.(version|head\._\w+))"
)
# options of the run that make another function than is built here
NEEDED = {"decoder_normalize_before": True, "no_decoder_final_norm": True, "decoder_learned_pos": False}


def read_fairseq(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of a fairseq language model's checkpoint.

    Args:
        tensors: the checkpoint's tensors; all of them are taken.
        given: what the user says, such as the number of heads.

    Returns:
        The model in eval mode.

    Raises:
        UserError: a key, a shape, an option or ``given`` does not fit.
    """
    if given.img_size is not None:
        raise UserError(f"img_size = {list(given.img_size)}: layout {tensors.layout!r} is of texts; leave it out")
    options = _options(tensors.beside)
    width = tensors.shape("decoder.embed_tokens.embeddings.0.0.weight", 2)[1]
    heads = _heads(given, width, options)
    tensors.discard(NO_WEIGHTS)
    sizes, tails = _input(tensors, width)
    tied = _softmax(tensors, width, sizes, tails)
    qk = width // heads
    blocks = []
    for i in range(tensors.count("decoder.layers.")):
        hidden = _block(tensors, f"decoder.layers.{i}", f"blocks.{i}", width)
        blocks.append(Block(src=i, heads=heads, qk=qk, v=qk, scale=qk**-0.5, mlp=hidden))
    tensors.built["columns"] = torch.arange(width)
    length = int(options.get("tokens_per_sample") or LENGTH)
    arch = Arch(
        family="lm",
        source=tensors.layout,
        img_size=(1, length),
        patch_size=(1, 1),
        in_chans=1,
        num_classes=sum(sizes),
        stages=(Stage(width=width, grid=(1, length), blocks=tuple(blocks)),),
        class_token=False,
        pool="none",
        head_norm="none",
        norm_eps=1e-5,
        act=str(options.get("activation_fn", "relu")),
        text=Text(
            cutoffs=tuple(sum(sizes[: b + 1]) for b in range(len(tails))),
            tails=tails,
            tied=tied,
            embed_scale=1.0 if options.get("no_scale_embedding") else width**0.5,
            positions=width,
            first_position=FIRST_POSITION,
        ),
    )
    return tensors.finish(arch)


def _options(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Check and return the run's options, where the file has them and is trusted.

    Raises UserError for another kind of model.
    """
    options = vars(beside["args"]) if hasattr(beside.get("args"), "__dict__") else {}
    for name, needed in NEEDED.items():
        if options.get(name, needed) != needed:
            raise UserError(f"the file's option {name} is {options[name]!r}: only models with {needed!r} can be built")
    return options


def _heads(given: Given, width: int, options: Mapping[str, Any]) -> int:
    said = options.get("decoder_attention_heads")
    if given.heads is None and said is None:
        raise UserError(
            "the file does not say how many heads the attention has: give heads (transformer_lm_wiki103's: --heads 8)"
        )
    if given.heads is not None:
        if len(given.heads) != 1:
            raise UserError(f"heads = {list(given.heads)}: a language model has one number of heads for all blocks")
        if said is not None and said != given.heads[0]:
            raise UserError(f"heads = {given.heads[0]}: the file's options say {said}")
    return check_heads("heads", int(said or given.heads[0]), width)  # type: ignore[index]  # one of them is there


def _input(tensors: Tensors, width: int) -> tuple[list[int], tuple[int, ...]]:
    """Move tables and projections of the input; return the words of every band and the width of every tail."""
    prefix, sizes, widths = "decoder.embed_tokens.embeddings.", [], []
    for b in range(tensors.count(prefix)):
        size, own = tensors.shape(f"{prefix}{b}.0.weight", 2)
        tensors.move(f"{prefix}{b}.0.weight", size, own, to=f"words.tables.{b}.weight")
        tensors.move(f"{prefix}{b}.1.weight", width, own, to=f"words.projections.{b}.weight")
        sizes.append(size)
        widths.append(own)
    return sizes, tuple(widths[1:])


def _softmax(tensors: Tensors, width: int, sizes: list[int], tails: tuple[int, ...]) -> str:
    """Move what the softmax has of its own; return what it shares with the input (``Text.tied``).

    A shared projection is used transposed and has the input's shape, one of its own is an ordinary linear layer's.
    """
    prefix = "decoder.adaptive_softmax."
    tensors.move(f"{prefix}head.class_proj.weight", len(tails), width, to="clusters.weight")
    tables = [tensors.take(f"{prefix}head.word_proj.weight", sizes[0], width)]
    projections: dict[int, torch.Tensor] = {}
    shared = []
    for j, (size, own) in enumerate(zip(sizes[1:], tails, strict=True)):
        tables.append(tensors.take(f"{prefix}tail.{j}.2.weight", size, own))
        found = tensors.left.get(f"{prefix}tail.{j}.0.weight")
        shared.append(found is not None and torch.equal(found, tensors.built[f"words.projections.{j + 1}.weight"]))
        shape = (width, own) if shared[-1] else (own, width)
        projection = tensors.take(f"{prefix}tail.{j}.0.weight", *shape, why="shared with the input or not")
        projections[j + 1] = projection if shared[-1] else projection.T.contiguous()
    same = [torch.equal(table, tensors.built[f"words.tables.{b}.weight"]) for b, table in enumerate(tables)]
    for what, found_same in (("tables", same), ("projections", shared)):
        if len(set(found_same)) > 1:
            raise UserError(f"the softmax shares some {what} with the input and others not; the file may be damaged")
    if same[0] and shared[0]:
        return "all"
    tensors.built |= {f"softmax.projections.{b}.weight": tensor for b, tensor in projections.items()}
    if same[0]:
        return "tables"
    tensors.built |= {f"softmax.tables.{b}.weight": table for b, table in enumerate(tables)}
    return "none"


def _block(tensors: Tensors, theirs: str, ours: str, width: int) -> int:
    """Move one block's tensors; return its hidden width."""
    attn = f"{theirs}.self_attn"
    if f"{attn}.in_proj_weight" in tensors.left:
        tensors.move(f"{attn}.in_proj_weight", 3 * width, width, to=f"{ours}.attn.qkv.weight")
        tensors.move(f"{attn}.in_proj_bias", 3 * width, to=f"{ours}.attn.qkv.bias")
    else:
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            parts = [tensors.take(f"{attn}.{part}_proj.{kind}", *shape) for part in "qkv"]
            tensors.built[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
    hidden = tensors.shape(f"{theirs}.fc1.weight", 2)[0]
    tensors.layer(f"{attn}.out_proj", width, width, to=f"{ours}.attn.proj")
    tensors.layer(f"{theirs}.self_attn_layer_norm", width, to=f"{ours}.norm1")
    tensors.layer(f"{theirs}.final_layer_norm", width, to=f"{ours}.norm2")
    tensors.layer(f"{theirs}.fc1", hidden, width, to=f"{ours}.mlp.fc1")
    tensors.layer(f"{theirs}.fc2", width, hidden, to=f"{ours}.mlp.fc2")
    return hidden
