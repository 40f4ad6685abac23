"""Models of other libraries whose blocks are timm's under other names: keys are renamed, and all must be known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import build_with
from prunesweep.models.errors import UserError
from prunesweep.models.families import family_of
from prunesweep.models.families.base import tensor_shapes
from prunesweep.models.without_values import without_values

__all__ = ["join_rows", "model_of", "record_of", "renamed", "split_rows"]

Rules = Sequence[tuple[str, str]]
SHOWN = 6  # keys that a message lists


def renamed(weights: Mapping[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """Rename tensors by regular expressions, each applied in its turn; those named "" are left out.

    Args:
        weights: by the other library's names.
        rules: (pattern, replacement) as for ``re.sub``; patterns match from the start of a key.
    """
    found = {}
    for key, tensor in weights.items():
        name = key
        for pattern, to in rules:
            name = re.sub(rf"^{pattern}", to, name)
        if name:
            found[name] = tensor
    return found


def join_rows(weights: dict[str, torch.Tensor], parts: Sequence[str], to: str) -> None:
    """Put layers ``X.PART`` side by side into one layer ``X.TO``, in place; layers without all parts stay as they are.

    Args:
        weights: by name.
        parts: names of the layers, in the order of their rows.
        to: name of the joint layer.
    """
    first = re.compile(rf"(.*\.){re.escape(parts[0])}\.(weight|bias)")
    for match in [match for key in weights if (match := first.fullmatch(key))]:
        names = [f"{match[1]}{part}.{match[2]}" for part in parts]
        if all(name in weights for name in names):
            weights[f"{match[1]}{to}.{match[2]}"] = torch.cat([weights.pop(name) for name in names])


def split_rows(weights: dict[str, torch.Tensor], key: str, names: Sequence[tuple[str, int]]) -> None:
    """Take a tensor apart by its rows, in place, where it is there.

    Args:
        weights: by name.
        key: of the tensor.
        names: of the parts, and how many shares of the rows each has.
    """
    if key in weights:
        tensor, shares = weights.pop(key), sum(count for _, count in names)
        begin = 0
        for name, count in names:
            rows = len(tensor) * count // shares
            weights[name], begin = tensor[begin : begin + rows].clone(), begin + rows


def record_of(make: Callable[[], Any], source: str) -> Arch:
    """Read the record of a timm model that is made without weights.

    Args:
        make: makes it.
        source: what to call it.

    Raises:
        UserError: timm cannot make it, or a record cannot express it.
    """
    try:
        with without_values():
            model = make()
    except (AssertionError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: its widths do not fit together: {error}") from error
    return dataclasses.replace(Arch.from_timm(model), source=source)


def model_of(
    arch: Arch, weights: Mapping[str, torch.Tensor], layout: str, pretrained_cfg: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the model of a record, in evaluation mode, with all of the renamed tensors.

    Args:
        arch: the record.
        weights: by timm's names.
        layout: name of the layout, for messages.
        pretrained_cfg: timm's description of the preprocessing.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    wanted = tensor_shapes(family_of(arch), arch)
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise UserError(f"the file lacks {_listed(missing)}, which layout {layout!r} needs; is it another layout?")
    unknown = [name for name in weights if name not in wanted]
    if unknown:
        raise UserError(f"the file has tensors that layout {layout!r} does not know: {_listed(unknown)}")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}")
    kept = {name: weights[name].contiguous() for name in wanted}
    return build_with(arch, kept, pretrained_cfg=pretrained_cfg).eval()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
