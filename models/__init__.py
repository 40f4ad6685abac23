"""Models: the record of a compressed transformer, its cost, its modules, cutting and storing.

Importing this package registers timm's entry point ``prunesweep``, so that
``timm.create_model("local-dir:PATH", pretrained=True)`` loads what ``save`` wrote, and the names of published
architectures, so that ``timm.create_model("spvit_deit_small")`` builds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunesweep.models.io.digest import weights_digest
    from prunesweep.models.io.export import export
    from prunesweep.models.io.hub import push
    from prunesweep.models.io.store import load, load_provenance, read_arch, save
    from prunesweep.models.latency.building import build_table
    from prunesweep.models.latency.table import LatencyTable
    from prunesweep.models.latency.timing import Setting, measure
    from prunesweep.models.published.comparison import PUBLISHED, published_arch, revit

    from .arch import (
        Arch,
        AttentionPool,
        Block,
        ClassAttention,
        PositionBias,
        QueryPool,
        Rope,
        Stage,
        Stem,
        Text,
    )
    from .builder import adopted, arch_of, blocks_of, build, num_params, preprocessing_of, resize
    from .counting import Cost, cost
    from .cutting import BlockCut, Cut, cut, cut_arch
    from .errors import UserError
    from .views import BlockView, block_views
else:
    from prunesweep.models.lazy import look_up

    __getattr__ = look_up(
        __name__,
        {
            "io.digest": ("weights_digest",),
            "io.export": ("export",),
            "io.hub": ("push",),
            "io.store": ("load", "load_provenance", "read_arch", "save"),
            "latency.building": ("build_table",),
            "latency.table": ("LatencyTable",),
            "latency.timing": ("Setting", "measure"),
            "published.comparison": ("PUBLISHED", "published_arch", "revit"),
            "arch": (
                "Arch",
                "AttentionPool",
                "Block",
                "ClassAttention",
                "PositionBias",
                "QueryPool",
                "Rope",
                "Stage",
                "Stem",
                "Text",
            ),
            "builder": ("adopted", "arch_of", "blocks_of", "build", "num_params", "preprocessing_of", "resize"),
            "counting": ("Cost", "cost"),
            "cutting": ("BlockCut", "Cut", "cut", "cut_arch"),
            "errors": ("UserError",),
            "views": ("BlockView", "block_views"),
        },
    )

__all__ = [
    "PUBLISHED",
    "Arch",
    "AttentionPool",
    "Block",
    "BlockCut",
    "BlockView",
    "ClassAttention",
    "Cost",
    "Cut",
    "LatencyTable",
    "PositionBias",
    "QueryPool",
    "Rope",
    "Setting",
    "Stage",
    "Stem",
    "Text",
    "UserError",
    "adopted",
    "arch_of",
    "block_views",
    "blocks_of",
    "build",
    "build_table",
    "cost",
    "cut",
    "cut_arch",
    "export",
    "load",
    "load_provenance",
    "measure",
    "num_params",
    "preprocessing_of",
    "published_arch",
    "push",
    "read_arch",
    "resize",
    "revit",
    "save",
    "weights_digest",
]
