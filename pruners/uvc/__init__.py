"""UVC: heads, value channels, MLP units and blocks under one budget by primal-dual training (ICLR 2022)."""

from .hook import FAMILIES, UVC, UVCSettings

__all__ = ["FAMILIES", "UVC", "UVCSettings"]
