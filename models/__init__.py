"""What a compressed transformer is: the record, its cost, its modules, cutting and storing.

Importing this package registers timm's entry point ``prunesweep``, so that
``timm.create_model("local-dir:PATH", pretrained=True)`` loads what ``save`` wrote, and the names of published
architectures, so that ``timm.create_model("spvit_deit_small")`` builds them.
"""

from .arch import Arch, Block, Stage, Text
from .build import arch_of, blocks_of, build, num_params
from .cost import Cost, cost
from .cut import BlockCut, Cut, cut, cut_arch
from .digest import weights_digest
from .errors import UserError
from .export import export
from .hub import push
from .latency import Setting, measure
from .latency_build import build_table
from .latency_table import LatencyTable
from .published import PUBLISHED, published_arch, revit
from .store import load, load_provenance, read_arch, save

__all__ = [
    "PUBLISHED",
    "Arch",
    "Block",
    "BlockCut",
    "Cost",
    "Cut",
    "LatencyTable",
    "Setting",
    "Stage",
    "Text",
    "UserError",
    "arch_of",
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
    "published_arch",
    "push",
    "read_arch",
    "revit",
    "save",
    "weights_digest",
]
