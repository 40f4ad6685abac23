"""NViT's one-shot saliency of residual channels, heads, query/key channels, value channels and MLP units.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023 (arXiv 2110.04869),
eq. 6; which tensors enter, and the divisors, are those that its published models were made with:

    raw_u = sum over the unit's weights of w * dL/dw        s_u = mean over batches of (raw_u / D_kind)^2

Only w * dL/dw of Q enters ``qk`` and that of V enters ``v``: K and the projection add the same amounts again, because
the loss does not change when Q is scaled up and K down. The gradient is the loss's on plain labels, in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import Arch, arch_of, blocks_of
from prunesweep.pruners.scores import Scores, kind_of, vector_sizes

__all__ = ["FAMILIES", "KINDS", "raw_saliency", "score"]

KINDS = ("embed", "heads", "qk", "v", "mlp")
FAMILIES = ("vit", "swin")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def divisors(arch: Arch) -> dict[str, float]:
    """D of every kind: the number of blocks for the residual stream, 12 for heads, 2 for qk and v, 1 for the MLP."""
    return {"embed": arch.depth, "heads": 12, "qk": 2, "v": 2, "mlp": 1}


def score(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    loss: Loss = F.cross_entropy,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Saliency of every unit of ``model``; one forward and backward pass per batch.

    Args:
        model: a ViT or Swin that ``Arch.from_timm`` accepts; left in the mode it came in, without gradients.
        batches: (images B·C·H·W, labels B). The batch size matters: scores are means of squared batch sums.
        loss: mean loss of (logits, labels).
        progress: called with (batches done, batches in all).
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
                sums[name] += (raw.double().cpu() / by_kind[kind_of(name)]) ** 2
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
    """Signed sum of w * dL/dw of every unit, from the gradients that ``model`` holds now.

    For Swin, every stage has residual channels of its own, and patch merging enters as the patch embedding does. A
    convolution enters the residual channels as attention does, with its first weights' inputs and its last's outputs.
    """
    raw: dict[str, Any] = {}
    embed = [_embedding(model, s) for s in range(len(arch.stages))]
    stage_of = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
    for i, (module, block) in enumerate(zip(blocks_of(model), arch.blocks, strict=True)):
        part, s = _terms(module), stage_of[i]
        if block.mixer == "attn":
            rows = part["attn.qkv.weight"].sum(1) + part.get("attn.qkv.bias", 0)
            width = block.heads * block.qk
            q, k, v = torch.split(rows, [width, width, block.total_v])
            q, k, v = (r.view(block.heads, -1) for r in (q, k, v))  # heads x channels
            raw[f"blocks.{i}.heads"] = q.sum(1) + k.sum(1) + v.sum(1)
            raw[f"blocks.{i}.qk"], raw[f"blocks.{i}.v"] = q.sum(0), v.sum(0)
            embed[s] = embed[s] + part["attn.qkv.weight"].sum(0) + _rows_and_bias(part, "attn.proj")
        elif block.conv_kernel:
            inputs = part["attn.bconv.0.weight"].sum((0, 2, 3))
            embed[s] = embed[s] + inputs + _flat(part["attn.bconv.3.weight"]) + part["attn.bconv.3.bias"]
        if block.mlp:
            raw[f"blocks.{i}.mlp"] = _rows_and_bias(part, "mlp.fc1")
            embed[s] = embed[s] + part["mlp.fc1.weight"].sum(0) + _rows_and_bias(part, "mlp.fc2")
    raw |= {f"stages.{s}.embed": vector for s, vector in enumerate(embed)}
    return {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in raw.items()}


def _terms(module: nn.Module) -> dict[str, torch.Tensor]:
    """w * dL/dw of every parameter that has a gradient."""
    return {name: (p * p.grad).detach() for name, p in module.named_parameters() if p.grad is not None}


def _embedding(model: Any, s: int) -> torch.Tensor:
    """What a stage's residual channels receive where they begin: patch embedding, or Swin's patch merging."""
    if s:
        return _flat(_terms(model.layers[s].downsample)["reduction.weight"])
    terms = _terms(model.patch_embed.proj)
    return _flat(terms["weight"]) + terms.get("bias", 0)


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).sum(1)


def _rows_and_bias(part: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    return part[f"{layer}.weight"].sum(1) + part[f"{layer}.bias"]
