"""Read the checkpoints of timm's ``train.py``, or any state dict in timm's names, of a named architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from prunesweep.models.errors import UserError
from prunesweep.models.io.store import read_arch, rebuilt

from .tensors import SHOWN, Given, Tensors

__all__ = ["read_timm"]


def read_timm(tensors: Tensors, given: Given) -> nn.Module:
    """Put the tensors of a checkpoint into the timm model of its architecture.

    The number of classes and of the images' channels are those of the tensors.

    Args:
        tensors: the checkpoint's tensors.
        given: ``model``, a timm name or the folder of a saved model, by default what timm has written beside the
            weights (``arch``); ``img_size``, where it is not the architecture's own.

    Raises:
        UserError: no architecture is named or timm knows none of that name, a tensor is missing, left over or has
            another shape, or the model cannot be represented.
    """
    if given.heads is not None:
        raise UserError(f"heads = {list(given.heads)}: the architecture says how many; leave it out (--heads)")
    name = given.model or tensors.beside.get("arch")
    if not isinstance(name, str):
        raise UserError("the file does not say what architecture its weights are of: name it (--model NAME or FOLDER)")
    options: dict[str, Any] = {} if given.img_size is None else {"img_size": given.img_size}
    if (Path(name) / "config.json").is_file():
        name = f"local-dir:{name}"
    if name.startswith("local-dir:"):
        read_arch(name.removeprefix("local-dir:"))
    weights = tensors.left
    model = _created(name, options)
    options |= _shape_of(model, weights)
    model = _created(name, options)
    own = model.state_dict()
    missing, left = [key for key in own if key not in weights], [key for key in weights if key not in own]
    other = [key for key, value in weights.items() if key in own and value.shape != own[key].shape]
    for what, keys in (("lacks", missing), ("has unknown keys", left)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise UserError(f"the file {what}: {', '.join(keys[:SHOWN])}{more}; is it of another model than {name}?")
    if other:
        found, wanted = list(weights[other[0]].shape), list(own[other[0]].shape)
        size = "" if given.img_size or "pos_embed" not in other[0] else " (give --img-size)"
        raise UserError(f"{other[0]} has shape {found}, {name} has {wanted}{size}")
    kind = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    model = model.to(kind)
    model.load_state_dict(weights)
    return rebuilt(model).eval()


def _created(name: str, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=False, **options)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # whatever timm says of names and options
        raise UserError(f"timm makes no model {name!r} with {options}: {error}") from error


def _shape_of(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of classes, and of the images' channels, where the tensors have other ones than the model."""
    cfg, found = model.pretrained_cfg, {}
    for option, key, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        names = cfg.get(key) or ()
        layer = names if isinstance(names, str) else next(iter(names), "")
        tensor, own = weights.get(f"{layer}.weight"), dict(model.named_parameters()).get(f"{layer}.weight")
        if tensor is None and option == "num_classes" and own is not None:
            found[option] = 0
        elif tensor is not None and own is not None and tensor.ndim > axis and tensor.shape[axis] != own.shape[axis]:
            found[option] = tensor.shape[axis]
    return found
