"""Whether a module still is what its record says, or was changed by hand since it was built."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, PatchDropout
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import arch_of, example_input
from prunesweep.models.errors import UserError

__all__ = ["check_unchanged"]

WORDS = 16  # of a text that is compared
# by which outputs may differ, of the largest one: a stock timm model is other code of the same function
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DROPS = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # act in training alone, and are no part of a record
TRAINING = ("training", "momentum", "drop_rate")  # attributes, likewise


def check_unchanged(model: nn.Module, built: nn.Module) -> None:
    """Check that a model computes what the module built from its record computes with the same weights.

    It costs two forward passes of one image, or of 16 words. What outputs hardly show is compared module by module:
    types, and numbers such as the epsilon of a norm. Both are compared in evaluation mode; modes stay as they are.

    Args:
        model: the model, ours or timm's.
        built: what was built from its record, holding its weights.

    Raises:
        UserError: they differ; the message names the first module that does.
    """
    ours = isinstance(getattr(model, "arch", None), Arch)  # others are read from their modules, which are checked there
    found = _replaced(model) or (_difference(model, built, (float,)) if ours else None)
    if found is None and not _same_outputs(model, built):
        found = _hooked(model) or (ours and _difference(model, built, (bool, int, float, str, tuple))) or None
        found = found or "its outputs differ from those of the model that its record describes"
    if found is not None:
        raise UserError(
            f"the model was changed by hand after it was built, which its record cannot hold: {found}. As it would be "
            "saved, it computes something else: undo the change, or keep the model with torch.save"
        )


@torch.no_grad()
def _same_outputs(model: nn.Module, built: nn.Module) -> bool:
    like, arch = next(model.parameters()), arch_of(built)
    x = example_input(arch, 1, seed=0).to(like.device)
    x = x.to(like.dtype) if x.is_floating_point() else x[:, :WORDS]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        wanted = model(x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the model was changed by hand after it was built, and cannot be run: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = built.eval()(x)
    if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape:
        return False
    known = wanted[torch.isfinite(wanted)]
    size = float(known.abs().max()) if known.numel() else 0.0
    allowed = TOLERANCE.get(like.dtype, 0.0) * size
    return torch.allclose(found, wanted.to(found.dtype), rtol=0.0, atol=allowed, equal_nan=True)


def _difference(model: nn.Module, built: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """Name the first module whose type differs, or an attribute of one of these kinds."""
    own = dict(model.named_modules())
    for name, wanted in built.named_modules():
        found, where = own.get(name), name or "the model"
        if type(found) in DROPS and type(wanted) in DROPS:
            continue
        if type(found) is not type(wanted):
            return f"{where} is a {type(found).__name__}, not a {type(wanted).__name__}"
        for key, value in vars(wanted).items():
            given: Any = vars(found).get(key, value)
            if type(value) in kinds and given != value and key not in TRAINING:
                return f"{where}.{key} = {given!r}, not {value!r}"
    return None


def _replaced(model: nn.Module) -> str | None:
    """Name the first module with a function in place of its own; one image would not show all that it does."""
    for name, module in model.named_modules():
        if "forward" in vars(module):
            return f"{name or 'the model'} has another forward function"
    return None


def _hooked(model: nn.Module) -> str | None:
    """Name the first module with a hook that may change its outputs; many hooks only look."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook"
    return None
