"""First-order Taylor importance summed over coupled weights, as Isomorphic Pruning ranks units by it.

Source: Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024 (arXiv 2407.04616), with the group importance
that its published models were made with:

    G = sum over batches of d(mean cross-entropy)/dW        T = |W * G|        raw_u = sum of T over u's coupled weights

Signs cancel between batches before the absolute value is taken. Of a unit's weights those of convolutions, linear
layers and LayerNorms count; biases, tokens, position embeddings and layer scales are cut with it but do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunesweep.models import BlockView, UserError, arch_of
from prunesweep.models.families import FamiliesWith

from .coupled import KINDS, coupled_sums
from .drawn_targets import target_loss
from .scores import Scores

__all__ = ["FAMILIES", "KINDS", "attention_pairs", "score", "summed_gradients", "taylor_terms"]

FAMILIES = FamiliesWith("images", "width")
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[int, int], None]


def score(model: nn.Module, batches: Batches, *, progress: Progress | None = None) -> Scores:
    """Compute raw coupled Taylor sums of every unit, by one forward and backward pass per batch.

    Args:
        model: a ViT, Swin or PVTv2 that ``Arch.from_timm`` accepts; left in the mode it came in, without gradients.
        batches: (images B·C·H·W, labels B); without labels, targets of ``pruners.drawn_targets``.
        progress: called with (batches done, batches in all).

    Raises:
        UserError: a block's heads have unequal or different query/key and value widths.
    """
    arch = arch_of(model)
    vectors = coupled_sums(arch, taylor_terms(model, summed_gradients(model, batches, progress=progress)))
    images = sum(len(x) for x, _ in batches)
    return Scores(vectors, {"method": "taylor", "arch": arch.hash, "batches": len(batches), "images": images})


def summed_gradients(
    model: nn.Module, batches: Batches, *, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Sum the gradient of the mean cross-entropy with respect to every parameter over batches, in eval mode.

    Args:
        model: left in the mode it came in, without gradients.
        batches: (images B·C·H·W, labels B).
        progress: called with (batches done, batches in all).

    Returns:
        Gradients by parameter name; parameters without one are left out.

    Raises:
        ValueError: there is no batch.
    """
    if not batches:
        raise ValueError("no batches to score on")
    device, training = next(model.parameters()).device, model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    try:
        for done, (x, y) in enumerate(batches, 1):
            with torch.enable_grad():
                torch.autograd.backward(target_loss(model(x.to(device)), y.to(device)))
            if progress:
                progress(done, len(batches))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def taylor_terms(model: nn.Module, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute |w * gradient| of every weight that counts.

    Args:
        model: the model.
        gradients: by parameter name, as ``summed_gradients`` returns them.

    Returns:
        A tensor of the weight's shape for every weight with a gradient; biases, tokens and the like are left out.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if name.endswith(".weight")}
    return {name: (w * gradients[name]).abs() for name, w in weights.items() if name in gradients}


def attention_pairs(terms: dict[str, torch.Tensor], block: BlockView) -> torch.Tensor:
    """Arrange a block's terms by (attention channel, residual channel): what is lost when either goes.

    Isomorphic Pruning's own class ranks head channels by these, over the residual channels that stay.

    Args:
        terms: of the model's weights by name, see ``taylor_terms``.
        block: one of ``models.block_views``, whose attention reads keys and values from the residual stream.

    Returns:
        (H·E, D); a row for every unit of ``attn``.

    Raises:
        UserError: the block has no attention, or keys and values from a reduced map.
    """
    attention = block.attention
    if attention is None or attention.reduction is not None:
        raise UserError(f"{block.name} has no attention whose queries, keys and values all read the residual stream")
    rows = {layer.name: terms[f"{block.name}.{layer.weight_name}"] for layer in attention.inputs}
    q, k, v = attention.split(rows)
    v = v + terms[f"{block.name}.{attention.out.weight_name}"].T
    both = attention.per_unit(q) + attention.per_unit(k)  # (H, E, D)
    return both.flatten(0, 1) + v.view(both.shape[0] * both.shape[1], -1, v.shape[1]).sum(1)
