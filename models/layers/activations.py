"""The activations of hidden units, by the names that records have for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from timm.layers import GELU, GELUTanh, QuickGELU
from torch import nn

__all__ = ["ACTIVATIONS", "activation_name"]

# x sigmoid(1.702 x) is QuickGELU, of OpenAI's CLIP; the names are timm's
ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "silu": nn.SiLU}
)


def activation_name(module: nn.Module) -> str | None:
    """Return the name in ``ACTIVATIONS`` of the function that a module computes; None where it is none of them."""
    if type(module) in (nn.GELU, GELU):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return next((name for name, kind in ACTIVATIONS.items() if type(module) is kind), None)
