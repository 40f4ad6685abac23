"""Digests of tensors, which identify a model's weights and show whether a file holds what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from prunesweep.models.errors import UserError
from prunesweep.models.precision import stored_dtype

__all__ = ["read_tensors", "tensors_digest", "weights_digest", "write_tensors"]


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; equal tensors and metadata give equal files.

    Args:
        tensors: by name, contiguous, on the CPU.
        path: the file.
        metadata: kept in its head. safetensors writes them in an order that changes from file to file, so they are put
            into that of their names.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # escapes may be written in two ways; such a head stays as it is
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, to the CPU, and its metadata.

    Raises UserError where the file is missing or cannot be read. Whether it holds what was written, a digest among the
    metadata says (``tensors_digest``).
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{path} is damaged: it is no file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error  # the others: types that torch lacks, or no UTF-8


def tensors_digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """Return SHA-256, in hex digits, of names, shapes, dtypes and bytes, in the order of the names.

    Args:
        tensors: by name, on any device.
        text: what else counts.
    """
    content = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits that identify a model's weights.

    They are a hash of the state dict's names, shapes, dtypes and bytes, in the type that the weights are saved in.
    """
    dtype = stored_dtype(model)
    weights = model.state_dict()
    return tensors_digest({n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()})[:16]
