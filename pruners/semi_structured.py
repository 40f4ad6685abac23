"""2:4 sparsity: of every four consecutive weights along a linear layer's input, the two smallest are zero.

NVIDIA's sparse tensor cores (Ampere and later) run such layers at up to twice the rate, in half precision and with the
weights in the form of ``torch.sparse.to_sparse_semi_structured``, which can be neither trained nor saved. NViT (arXiv
2110.04869, section 4.2, "ASP") applies it to its pruned models after training, by magnitude; that is why its group
sizes keep dimensions divisible by 16. Nothing is retrained here: measure the accuracy afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Sparsity", "prune_2_4"]

MULTIPLE = 16  # of both dimensions of a layer, as the kernels need it


@dataclass(frozen=True)
class Sparsity:
    """The layers that have become 2:4 sparse, and those left as they were, with the reason."""

    pruned: tuple[str, ...]
    skipped: Mapping[str, str]
    params: int  # weights that were pruned, half of which are zero now


def prune_2_4(model: nn.Module) -> Sparsity:
    """Zero the two smallest of every four consecutive inputs, by magnitude and in place, in every linear layer.

    Layers whose number of inputs or outputs is not a multiple of 16 stay as they are. Of equal magnitudes the first
    ones stay.
    """
    pruned, skipped, params = [], {}, 0
    for name, layer in _linear_layers(model):
        if reason := _obstacle(layer):
            skipped[name] = reason
            continue
        with torch.no_grad():
            fours = layer.weight.abs().reshape(-1, 4)
            smallest = fours.sort(dim=1, descending=True, stable=True).indices[:, 2:]
            gone = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, smallest, True)
            layer.weight.masked_fill_(gone.view_as(layer.weight), 0)
        pruned.append(name)
        params += layer.weight.numel()
    return Sparsity(tuple(pruned), skipped, params)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _obstacle(layer: nn.Linear) -> str:
    """Return the reason why a layer cannot be 2:4; empty where it can."""
    odd = [
        f"{size} {what}"
        for what, size in (("inputs", layer.in_features), ("outputs", layer.out_features))
        if size % MULTIPLE
    ]
    return f"{' and '.join(odd)}: not a multiple of {MULTIPLE}" if odd else ""
