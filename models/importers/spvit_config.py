"""The run configurations of SPViT's released code: flat JSON for DeiT, nested YAML (or its JSON mirror) for Swin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunesweep.models.errors import UserError
from prunesweep.models.families.swin import SWIN
from prunesweep.models.families.vit import VIT
from prunesweep.models.layers.conv_mixing import ConvSharing

from .tensors import Given

__all__ = ["Settings", "read_settings"]

CHOICES = {(0, 0, 0): "none", (1, 0, 0): "conv1x1", (1, 1, 0): "conv3x3", (1, 1, 1): "attn"}
PUBLISHED = re.compile(r"spvit_deit_(tiny|small|base)_patch\d+_\d+")  # names that stand for a number of heads
PUBLISHED_HEADS = {"tiny": 3, "small": 6, "base": 12}
IMG_SIZE, WINDOW_SIZE = 224, 7  # of the released code, where a configuration leaves them out


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The contents of a run configuration.

    ``heads`` and ``depths`` are per stage, ``choices`` the mixers of all blocks.
    """

    choices: tuple[str, ...]
    heads: tuple[int, ...]
    img_size: tuple[int, int]
    patch_size: int | None
    sharing: ConvSharing
    window: int = 0
    depths: tuple[int, ...] | None = None
    width: int | None = None


def read_settings(given: Given, family: str) -> Settings:
    """Read the settings of an SPViT run.

    Args:
        given: what the user says; its ``config`` is the run's configuration, which is needed.
        family: ``vit`` for a DeiT run, ``swin`` for a Swin run.

    Raises:
        UserError: a setting is missing, wrong or contradictory.
    """
    if given.config is None:
        raise UserError(
            "layout 'spvit' needs the run's configuration (--config FILE, .json or .yaml): it holds the choice for "
            "every block, the heads and the size of the images"
        )
    return (_deit if family == "vit" else _swin)(given.config, given)


def _deit(config: Mapping[str, Any], given: Given) -> Settings:
    heads = _whole(config, "num_heads")
    if heads is None and (match := PUBLISHED.fullmatch(str(config.get("model")))):
        heads = PUBLISHED_HEADS[match[1]]
    return Settings(
        choices=_choices(config, "assigned_indicators"),
        heads=_heads("num_heads", None if heads is None else (heads,), given),
        img_size=_img_size(config, "input_size", given),
        patch_size=_whole(config, "patch_size"),
        sharing=VIT.conv_sharing,
    )


def _swin(config: Mapping[str, Any], given: Given) -> Settings:
    alpha = _number(config, "EXTRA.alpha")
    if alpha is not None and not alpha > 0:
        raise UserError(f"EXTRA.alpha = {alpha}: must be positive")
    return Settings(
        choices=_choices(config, "EXTRA.assigned_indicators"),
        heads=_heads("MODEL.SWIN.NUM_HEADS", _wholes(config, "MODEL.SWIN.NUM_HEADS"), given),
        img_size=_img_size(config, "DATA.IMG_SIZE", given),
        patch_size=_whole(config, "MODEL.SWIN.PATCH_SIZE"),
        sharing=SWIN.conv_sharing if alpha is None else dataclasses.replace(SWIN.conv_sharing, alpha=alpha),
        window=_whole(config, "MODEL.SWIN.WINDOW_SIZE") or WINDOW_SIZE,
        depths=_wholes(config, "MODEL.SWIN.DEPTHS"),
        width=_whole(config, "MODEL.SWIN.EMBED_DIM"),
    )


def _look_up(config: Any, name: str) -> Any:
    """Return the value at a dotted name, None where it is absent."""
    for i, part in enumerate(name.split(".")):
        if not isinstance(config, Mapping):
            raise UserError(f"configuration: {'.'.join(name.split('.')[:i])} must be a mapping, got {config!r}")
        config = config.get(part)
        if config is None:
            return None
    return config


def _number(config: Mapping[str, Any], name: str) -> float | None:
    """Return a number; YAML 1.1 reads ``1e2`` as text, which is taken as the number that was meant."""
    value = _look_up(config, name)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"configuration: {name} = {value!r}: must be a number") from error


def _whole(config: Mapping[str, Any], name: str) -> int | None:
    value = _number(config, name)
    if value is not None and (value < 1 or not value.is_integer()):
        raise UserError(f"configuration: {name} = {value}: must be a whole number of at least 1")
    return None if value is None else int(value)


def _wholes(config: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    value = _look_up(config, name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
        raise UserError(f"configuration: {name} = {value!r}: must be a list of positive whole numbers, one per stage")
    return tuple(value)


def _heads(name: str, said: tuple[int, ...] | None, given: Given) -> tuple[int, ...]:
    if said is not None and given.heads not in (None, said):
        raise UserError(f"heads = {list(given.heads or ())}: the configuration says {name} = {list(said)}")
    heads = said or given.heads
    if heads is None:
        raise UserError(f"the configuration has no {name}: give heads (--heads N)")
    return heads


def _img_size(config: Mapping[str, Any], name: str, given: Given) -> tuple[int, int]:
    side = _whole(config, name)
    if side is not None and given.img_size not in (None, (side, side)):
        raise UserError(f"img_size = {given.img_size}: the configuration says {name} = {side}")
    return given.img_size or (side or IMG_SIZE, side or IMG_SIZE)


def _choices(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Read the mixers of all blocks from nested lists of three indicators, each 0 or 1."""
    value = _look_up(config, name)
    if value is None:
        raise UserError(f"the configuration has no {name}; is it the configuration of a finetuning run of this family?")
    return tuple(_flat_choices(value, name))


def _flat_choices(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"configuration: {name} = {value!r}: must be lists of three indicators")
    if any(isinstance(item, list) for item in value):
        return [choice for i, item in enumerate(value) for choice in _flat_choices(item, f"{name}[{i}]")]
    if tuple(value) not in CHOICES:
        raise UserError(f"configuration: {name} = {value}: must be one of {', '.join(str(list(c)) for c in CHOICES)}")
    return [CHOICES[tuple(value)]]
