"""What reading a timm model has in common for all families: the reasons for refusing one, and shared parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from prunesweep.models.arch import Arch, Stage
from prunesweep.models.errors import UserError

__all__ = ["Require", "activation_of", "layer_norms", "pyramid_record", "require", "shared_eps"]

Require = Callable[[bool, str], None]  # ``require`` with the name given


def require(name: str, met: bool, reason: str) -> None:
    """Raise UserError with the reason where a model called ``name`` is not what the record can express."""
    if not met:
        raise UserError(f"{name} cannot be represented: {reason}")


def layer_norms(model: nn.Module, require: Require) -> list[Any]:
    """All normalisation layers; each must be a LayerNorm with weight and bias."""
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    require(all(type(m) in (LayerNorm, nn.LayerNorm) for m in norms), "it has a normalisation that is not LayerNorm")
    require(all(isinstance(m, nn.LayerNorm) and m.bias is not None for m in norms), "it has a LayerNorm without bias")
    return norms


def shared_eps(norms: list[Any], require: Require) -> float:
    """The eps that all of ``norms`` have."""
    eps = {m.eps for m in norms}
    require(len(eps) == 1, f"its LayerNorms have different eps: {sorted(eps)}")
    return float(eps.pop())


def activation_of(
    mlp: Any, kind: type[nn.Module], known: Mapping[str, type[nn.Module]], where: str, require: Require
) -> str:
    """The record's name of an MLP's activation; the MLP must be exactly of type ``kind``."""
    require(type(mlp) is kind, f"{where} has a {type(mlp).__name__} instead of an {kind.__name__}")
    act = next((key for key, cls in known.items() if type(mlp.act) is cls), None)
    require(act is not None, f"{where} has activation {type(mlp.act).__name__}; known: {', '.join(known)}")
    require(getattr(mlp.act, "approximate", "none") == "none", f"{where} approximates GELU")
    return str(act)


def pyramid_record(model: Any, family: str, name: str, stages: list[Stage], biases: set[bool], **fields: Any) -> Arch:
    """The record of a model of several stages, which has no prefix tokens and averages over places."""
    require(name, len(biases) == 1, "its blocks differ in the bias of queries, keys and values")
    return Arch(
        family=family,
        source=name,
        num_classes=model.num_classes,
        stages=tuple(stages),
        class_token=False,
        pool="avg",
        qkv_bias=biases.pop(),
        **fields,
    )
