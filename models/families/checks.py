"""Checks that records of several families share; every message names the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunesweep.models.arch import Arch
from prunesweep.models.errors import UserError, nearest

__all__ = ["PLAIN", "PYRAMID", "check_at_least", "check_fixed", "check_one_of"]

# fields of a block as ViT has it
PLAIN: Mapping[str, Any] = {
    "k_bias": True,
    "attn_norm": False,
    "glu": False,
    "mlp_norm": False,
    "rope": None,
    "differential": False,
    "parallel": False,
    "norm": "layer",
    "embed_norm": False,
    "post_norm": False,
    "proj_bias": True,
    "mlp_bias": True,
    "position_bias": None,
    "stem": None,
    "mlp_scale": True,
    "norm_bias": True,
    "head_mlp": 0,
    "mlp_entry_norm": False,
    "patch_factors": False,
    "pooled_map": 0,
    "class_attention": None,
    "query_pool": None,
    "neck": 0,
}
# fields of every model of several stages: no prefix tokens, the average over places
PYRAMID: Mapping[str, Any] = {
    **PLAIN,
    "pos_embed": True,
    "class_token": False,
    "dist_token": False,
    "reg_tokens": 0,
    "pool": "avg",
    "pool_prefix": False,
    "attn_pool": None,
    "head_norm": "tokens",
    "pre_norm": False,
    "qk_norm": False,
    "layer_scale": False,
}


def check_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UserError, with the nearest allowed value, where ``value`` is not allowed.

    Args:
        name: of the field, for the message.
        value: the field's value.
        allowed: the values that are allowed.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}. {hint}".strip())


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raise UserError where ``value`` is not a whole number of at least ``least``.

    Args:
        name: of the field, for the message.
        value: the field's value.
        least: the least value that is allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} = {value!r}: must be a whole number of at least {least}")


def check_fixed(arch: Arch, why: str, needed: Mapping[str, Any]) -> None:
    """Raise UserError where a field differs from its value in ``needed``.

    Args:
        arch: the record.
        why: the reason for these values, with which the message begins.
        needed: by field, the only value that it may have.
    """
    for name, value in needed.items():
        if getattr(arch, name) != value:
            raise UserError(f"{why}: needs {name} = {value!r}, got {getattr(arch, name)!r}")
