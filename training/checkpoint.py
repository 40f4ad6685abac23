"""Save training state as one safetensors file of tensors, numbers, strings, lists and dicts, without pickle.

The file carries a SHA-256 of all of it, so that damage is seen before any of it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunesweep.models import UserError
from prunesweep.models.io.digest import read_tensors, tensors_digest, write_tensors
from prunesweep.models.io.files import publish_file

__all__ = ["load_state", "save_state"]

FORMAT = "prunesweep/state/2"


def save_state(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, tensors, numbers, strings and None to a file, which is whole or absent.

    Args:
        path: the file.
        state: the tree. Tuples come back as lists.

    Raises:
        TypeError: the tree has anything else in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, tensors)
    with publish_file(path) as scratch:
        text = json.dumps(tree)
        facts = {"format": FORMAT, "tree": text, "sha256": tensors_digest(tensors, text)}
        write_tensors(tensors, scratch, facts)


def load_state(path: Path) -> Any | None:
    """Read what ``save_state`` wrote, to the CPU; return None if the file is missing, damaged or of another version."""
    try:
        tensors, metadata = read_tensors(path)
    except UserError:
        return None
    tree = metadata.get("tree", "")
    if metadata.get("format") != FORMAT or metadata.get("sha256") != tensors_digest(tensors, tree):
        return None
    return _restore(json.loads(tree), tensors)


def _flatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON form of ``node`` and move its tensors to ``tensors``.

    Dicts become lists of pairs, because their keys may be integers.
    """
    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):
        return {"dict": [[key, _flatten(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_flatten(value, tensors) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"a training state cannot hold a {type(node).__name__}")


def _restore(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_restore(value, tensors) for value in node]
    if isinstance(node, dict):
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _restore(value, tensors) for key, value in node["dict"]}
    return node
