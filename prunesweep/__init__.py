"""Compressed vision transformers, found by search: one package over models, pruners, training, search and launch.

The subpackages are the folders of these names at the top of the repository. ``prunesweep/`` holds links to them, so
that there is one import name and nothing of ours collides with a user's own ``models`` or ``training``.

    import prunesweep, timm
    model = timm.create_model("local-dir:PATH", pretrained=True)    # what prunesweep saved

Importing the package is quick: torch, Ray and Optuna are loaded when a name that needs them is first used. timm learns
our entry points as soon as both are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunesweep.models import Arch, UserError, load, save
    from prunesweep.pruners.subspaces import instant
    from prunesweep.search import resume_search, run_search

_HOME = {
    "Arch": "prunesweep.models",
    "UserError": "prunesweep.models",
    "instant": "prunesweep.pruners.subspaces",
    "load": "prunesweep.models",
    "resume_search": "prunesweep.search",
    "run_search": "prunesweep.search",
    "save": "prunesweep.models",
}

__all__ = ["Arch", "UserError", "instant", "load", "resume_search", "run_search", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunesweep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _RegisterWithTimm:
    """Import ``prunesweep.models.entry_points``, which registers them, right after timm's own first import.

    timm has no plug-in mechanism; importing it here would make every command and every short job on a cluster load
    torch.
    """

    searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm" or self.searching:
            return None
        self.searching = True  # the other finders are asked, through the same door
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                sys.meta_path.remove(self)  # type: ignore[arg-type]  # a finder need not inherit
                importlib.import_module("prunesweep.models.entry_points")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("prunesweep.models.entry_points")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())  # type: ignore[arg-type]
