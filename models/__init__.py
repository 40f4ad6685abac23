"""What a compressed transformer is: the record, its cost, its modules, cutting and storing.

Importing this package registers timm's entry point ``prunesweep``, so that
``timm.create_model("local-dir:PATH", pretrained=True)`` loads what ``save`` wrote, and the names of published
architectures, so that ``timm.create_model("spvit_deit_small")`` builds them.
"""

from .arch import Arch, Block, Stage
from .build import arch_of, blocks_of, build, num_params
from .cost import Cost, cost
from .cut import BlockCut, Cut, cut, cut_arch
from .errors import UserError
from .published import PUBLISHED, published_arch, revit
from .store import load, load_provenance, read_arch, save

__all__ = [
    "PUBLISHED",
    "Arch",
    "Block",
    "BlockCut",
    "Cost",
    "Cut",
    "Stage",
    "UserError",
    "arch_of",
    "blocks_of",
    "build",
    "cost",
    "cut",
    "cut_arch",
    "load",
    "load_provenance",
    "num_params",
    "published_arch",
    "read_arch",
    "revit",
    "save",
]
