"""Attention pools of ViTs (timm's ``global_pool="map"``): their record and its checks, and their cost."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent, Mlp
from torch import nn

from prunesweep.models.arch import Arch, AttentionPool, Stage
from prunesweep.models.errors import UserError

from .block_costs import Cost
from .checks import check_at_least
from .reading import Require, activation_of

__all__ = ["check_pool", "pool_cost", "read_pool"]


def read_pool(pool: Any, act: str, require: Require) -> AttentionPool:
    """Read the record of timm's attention pool.

    Args:
        pool: the pool.
        act: the activation of the model's blocks, which must be the pool's, too.
        require: ``require`` with the model's name bound; raises UserError where the pool is of another form.
    """
    require(type(pool) is AttentionPoolLatent, f"its pool is a {type(pool).__name__}")
    usual = pool.pos_embed is None and pool.latent_len == 1 and pool.pool == "token"
    require(usual, "its attention pool has positions or more than one query")
    plain = isinstance(pool.q, nn.Linear) and isinstance(pool.q_norm, nn.Identity) and pool.kv.bias is not None
    require(plain, "its attention pool has no query projection, a q/k norm or no biases")
    whole = pool.mlp is not None and not isinstance(pool.norm, nn.Identity)
    require(whole and pool.out_features == pool.latent_dim, "its attention pool has no MLP, or another width behind it")
    own = activation_of(pool.mlp, Mlp, "its attention pool", require)
    require(own == act, f"its attention pool has activation {own}, its blocks have {act}")
    return AttentionPool(width=pool.out_features, heads=pool.num_heads, mlp=pool.mlp.fc1.out_features)


def check_pool(arch: Arch) -> None:
    """Raise UserError where the attention pool is impossible, or there is one without ``pool`` = 'map'."""
    pool = arch.attn_pool
    if (pool is None) == (arch.pool == "map"):
        needs = "needs attn_pool, the pool's widths" if pool is None else "leaves no room for attn_pool; use 'map'"
        raise UserError(f"pool = {arch.pool!r}: {needs}")
    if pool is None:
        return
    for name in ("width", "heads", "mlp"):
        check_at_least(f"attn_pool.{name}", getattr(pool, name), 1)
    if pool.width % pool.heads:
        raise UserError(f"attn_pool.width = {pool.width}: must be a multiple of attn_pool.heads = {pool.heads}")
    if arch.head_norm in ("pooled", "both"):
        raise UserError(f"head_norm = {arch.head_norm!r}: is not for pool = 'map'; use 'tokens' or 'none'")


def pool_cost(arch: Arch, stage: Stage) -> Cost:
    """Count an attention pool: N tokens of width D, width W, M hidden units, one query.

    MACs 2 W W for query and output, 2 N D W for keys and values, 2 N W for the products with them, 2 W M for the MLP.

    Args:
        arch: the record; without an attention pool it costs nothing.
        stage: the last stage.
    """
    if arch.attn_pool is None:
        return Cost(0, 0)
    width, hidden = arch.attn_pool.width, arch.attn_pool.mlp
    tokens = stage.grid[0] * stage.grid[1] + arch.prefix_tokens * arch.pool_prefix
    macs = 2 * width * (width + tokens * stage.width + tokens + hidden)
    params = width * (2 * (width + 1) + 2 * (stage.width + 1) + 3 + 2 * hidden + 1) + hidden
    return Cost(macs, params)
