"""NViT's one-shot saliency of residual, query/key and value channels, heads, MLP units and channels of reduced maps.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
eq. 6; which tensors enter, and the divisors, are those that its published models were made with:

    raw_u = sum over the unit's weights of w * dL/dw        s_u = mean over batches of (raw_u / D_kind)^2

    u        a unit, such as a head                s_u      its saliency
    w        a weight that belongs to u            L        mean loss of a batch, on plain labels, in eval mode
    D_kind   divisor of the unit's kind (``divisors``)

Only w * dL/dw of Q enters ``qk`` and that of V enters ``v``: K and the projection add the same amounts again, because
the loss does not change when Q is scaled up and K down. For the same reason the convolution that reduces a map
enters its channels (kind ``sr``, in PVTv2, which NViT does not have), and the keys and values that read it do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prunesweep.models import Arch, arch_of, block_views
from prunesweep.models.families import FamiliesWith
from prunesweep.models.families.stem import stream_layer
from prunesweep.models.families.views import LinearView
from prunesweep.models.layers.query_pooling import PooledEntrance
from prunesweep.pruners.drawn_targets import target_loss
from prunesweep.pruners.scores import Scores, kind_of, vector_sizes

__all__ = ["FAMILIES", "KINDS", "raw_saliency", "score"]

KINDS = ("embed", "heads", "qk", "v", "mlp", "sr")
FAMILIES = FamiliesWith("images", "width")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def divisors(arch: Arch) -> dict[str, float]:
    """Return D of every kind: number of blocks for the residual stream, 12 for heads, 2 for qk and v, 1 for the MLP."""
    return {"embed": arch.depth, "heads": 12, "qk": 2, "v": 2, "mlp": 1}


def score(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    loss: Loss = target_loss,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Compute the saliency of every unit of ``model`` by one forward and backward pass per batch.

    Args:
        model: one that ``Arch.from_timm`` accepts; left in the mode it came in, without gradients.
        batches: (images B·C·H·W, labels B); without labels, targets of ``pruners.drawn_targets``. The
            batch size matters: scores are means of squared batch sums.
        loss: mean loss of (logits, labels).
        progress: called with (batches done, batches in all).

    Raises:
        ValueError: there is no batch.
    """
    arch = arch_of(model)
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in vector_sizes(arch, KINDS).items()}
    by_kind = divisors(arch)
    if not batches:
        raise ValueError("no batches to score on")
    images = 0
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for done, (x, y) in enumerate(batches, 1):
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                torch.autograd.backward(loss(model(x.to(device)), y.to(device)))
            for name, raw in raw_saliency(model, arch).items():
                sums[name] += (raw.double().cpu() / by_kind.get(kind_of(name), 1)) ** 2
            images += len(x)
            if progress:
                progress(done, len(batches))
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
    return Scores(
        {name: total / len(batches) for name, total in sums.items()},
        {"method": "nvit", "arch": arch.hash, "batches": len(batches), "images": images},
    )


def raw_saliency(model: nn.Module, arch: Arch) -> dict[str, torch.Tensor]:
    """Compute the signed sum of w * dL/dw of every unit, from the gradients that ``model`` holds now.

    For Swin and PVTv2, every stage has residual channels of its own, and what leads into it enters as the patch
    embedding does. A convolution enters the residual channels as attention does, with its first weights' inputs and
    its last's outputs; of a separable one's channels the first weights enter, as for an MLP's units.

    Args:
        model: its parameters have gradients; a missing gradient counts as 0.
        arch: its record.

    Returns:
        One vector per name of ``vector_sizes(arch, KINDS)``; entries that are not finite are 0.
    """
    raw: dict[str, Any] = {}
    embed = [_embedding(model, s) for s in range(len(arch.stages))]
    for block in block_views(model, arch):
        i, s = block.index, block.stage
        if block.attention is not None:
            rows, columns = _sums(block.attention.inputs)
            if (reduction := block.attention.reduction) is not None:  # keys and values read its channels
                conv = _term(reduction.conv.weight)
                raw[f"blocks.{i}.sr"] = _with_bias(reduction.conv, _flat(conv))
                columns = {block.attention.q.name: columns[block.attention.q.name], "sr": conv.sum((0, 2, 3))}
            inputs = torch.stack(list(columns.values())).sum(0)
            q, k, v = block.attention.split(rows)
            q, k = block.attention.per_unit(q), block.attention.per_unit(k)
            v = v.view(block.record.heads, -1)
            raw[f"blocks.{i}.heads"] = q.sum(1) + k.sum(1) + v.sum(1)
            raw[f"blocks.{i}.qk"], raw[f"blocks.{i}.v"] = q.sum(0), v.sum(0)
            embed[s] = embed[s] + inputs + _rows_and_bias(block.attention.out)
        elif block.record.conv_kernel:
            part = _terms(block.module)
            inputs = part["attn.bconv.0.weight"].sum((0, 2, 3))
            embed[s] = embed[s] + inputs + _flat(part["attn.bconv.3.weight"]) + part["attn.bconv.3.bias"]
        elif block.record.mixer == "xca":  # a head enters with all of its channels
            attn: Any = block.module.get_submodule("attn")
            rows, columns = _sums([LinearView("attn.qkv", attn.qkv)])
            raw[f"blocks.{i}.heads"] = rows["attn.qkv"].view(3, block.record.heads, -1).sum((0, 2))
            embed[s] = embed[s] + columns["attn.qkv"] + _rows_and_bias(LinearView("attn.proj", attn.proj))
        elif block.record.mixer == "sepconv":
            part = {name: _term(own) for name, own in block.module.named_parameters()}
            first = part["attn.pwconv1.weight"]
            raw[f"blocks.{i}.v"] = first.sum(1)
            embed[s] = embed[s] + first.sum(0) + _flat(part["attn.pwconv2.weight"])
        if block.mlp is not None:
            rows, columns = _sums(block.mlp.inputs)
            raw[f"blocks.{i}.mlp"] = torch.stack([block.mlp.per_unit(own) for own in rows.values()]).sum(0)
            embed[s] = embed[s] + torch.stack(list(columns.values())).sum(0) + _rows_and_bias(block.mlp.out)
    raw |= {f"stages.{s}.embed": vector for s, vector in enumerate(embed)}
    return {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in raw.items()}


def _term(parameter: torch.Tensor) -> torch.Tensor:
    """Compute w * dL/dw of every entry; zeros where there is no gradient."""
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).detach()


def _sums(layers: Sequence[LinearView]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sum w * dL/dw over the rows of every layer, with their biases, and over its columns, each by the layer's name."""
    terms = {view.name: (view.layer, _term(view.layer.weight)) for view in layers}
    rows = {name: _with_bias(layer, term.sum(1)) for name, (layer, term) in terms.items()}
    return rows, {name: term.sum(0) for name, (_, term) in terms.items()}


def _terms(module: nn.Module) -> dict[str, torch.Tensor]:
    """Compute w * dL/dw of every parameter that has a gradient."""
    return {name: (p * p.grad).detach() for name, p in module.named_parameters() if p.grad is not None}


def _embedding(model: Any, s: int) -> torch.Tensor:
    """Sum what a stage's residual channels receive where they begin: patch embedding, or what is in front of it."""
    if not s:
        layers = [getattr(model.patch_embed, "conv", None) or stream_layer(model.patch_embed)]
    elif hasattr(model, "layers"):  # patch merging
        layers = [model.layers[s].downsample.reduction]
    elif hasattr(model, "transformers"):  # a convolution of single channels, and a layer for prefix tokens
        layers = [model.transformers[s].pool.conv, model.transformers[s].pool.fc]
    elif isinstance(entrance := model.stages[s].downsample, PooledEntrance):
        layers = entrance.writers
    else:  # a convolution of its own
        layers = [entrance.proj]
    return torch.stack([_with_bias(layer, _flat(_term(layer.weight))) for layer in layers]).sum(0)


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).sum(1)


def _rows_and_bias(view: LinearView) -> torch.Tensor:
    """Sum over the rows of a whole layer, with their biases."""
    return _with_bias(view.layer, _term(view.layer.weight).sum(1))


def _with_bias(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows if layer.bias is None else rows + _term(layer.bias)
