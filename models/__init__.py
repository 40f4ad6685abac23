"""What a compressed transformer is: the record, its cost, its modules, cutting and storing.

Importing this package registers the timm entry point ``prunesweep``, so that
``timm.create_model("local-dir:PATH", pretrained=True)`` loads what ``save`` wrote.
"""

from .arch import Arch, Block, Stage
from .build import arch_of, blocks_of, build, num_params
from .cost import Cost, cost
from .cut import BlockCut, Cut, cut, cut_arch
from .errors import UserError
from .store import load, load_provenance, read_arch, save

__all__ = [
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
    "read_arch",
    "save",
]
