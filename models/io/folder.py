"""The files of a saved model, read and checked without building it: nothing here loads torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunesweep.models.errors import UserError

from .provenance import digest
from .reading import read_json

__all__ = [
    "CONFIG",
    "DIGEST",
    "ENTRY_POINT",
    "SEAL",
    "WEIGHTS",
    "check_files",
    "check_seal",
    "check_weights",
    "load_provenance",
    "read_config",
    "sha256_of",
]

ENTRY_POINT = "prunesweep"  # the one architecture name that timm knows us by (models.entry_points registers it)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DIGEST, SEAL = "weights_sha256", "config_digest"  # absent from folders that older versions wrote
OBJECTS = ("model_args", "pretrained_cfg", "provenance")  # entries of config.json that are JSON objects


def sha256_of(path: Path) -> str:
    """Return SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the configuration of a saved model. Raises UserError where the folder is not one, or the file is damaged."""
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a saved model: {name} is missing{_inside(folder)}")
    try:
        config: dict[str, Any] = read_json(folder / CONFIG)
        architecture, _ = config["architecture"], config["pretrained_cfg"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error!r}") from error
    if architecture != ENTRY_POINT:
        raise UserError(f"{folder} holds a {architecture!r}, not a {ENTRY_POINT!r} model; load it with timm")
    for name in OBJECTS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{folder / CONFIG} is damaged: {name} = {config[name]!r}: must be a JSON object")
    return config


def _inside(folder: Path) -> str:
    """Name a model that a folder of several has: that of a search's run or of a computed front; nothing without one."""
    for pattern in (f"front/*/{CONFIG}", f"*/{CONFIG}"):
        if found := sorted(folder.glob(pattern)):
            return f". It has models inside; give one of them, for example {found[0].parent}"
    return ""


def load_provenance(path: str | Path) -> dict[str, Any]:
    """Read the facts about the weights' origin that ``save`` was given.

    Raises UserError where the folder is not a saved model, or its configuration has changed since it was saved.
    """
    config = read_config(path)
    check_seal(config, Path(path))
    return dict(config.get("provenance", {}))


def check_weights(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where a saved model's weights are not those of which its configuration has the digest."""
    if DIGEST in config and (found := sha256_of(folder / WEIGHTS)) != config[DIGEST]:
        raise UserError(
            f"{folder / WEIGHTS} is damaged: its SHA-256 is {found}, but {folder / CONFIG} says {config[DIGEST]}. "
            "One of the two was cut short or changed after they were saved; copy the folder or save the model again"
        )


def check_seal(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where the configuration of a saved model has changed since it was saved."""
    if SEAL in config and config[SEAL] != digest({name: value for name, value in config.items() if name != SEAL}):
        raise UserError(
            f"{folder / CONFIG} is damaged: it has changed since it was saved. Copy the folder or save the model "
            f"again; where that was on purpose, remove its entry {SEAL!r}"
        )


def check_files(path: str | Path, *, weights: str | None = None) -> None:
    """Check that a folder holds a model as it was saved; its record is not read where a digest says that it is whole.

    Args:
        path: its folder.
        weights: SHA-256 of the weights file of the model that it should be, if that is known.

    Raises:
        UserError: the folder is not a saved model, a file of it is damaged, or it holds another model.
    """
    config, folder = read_config(path), Path(path)
    check_weights(config, folder)
    check_seal(config, folder)
    if weights is not None and config.get(DIGEST) != weights:
        raise UserError(f"{path} holds another model: its weights are not those that it was measured with")
    if SEAL not in config:  # an earlier version saved it: only its record can say that it is whole
        from .store import read_arch

        read_arch(folder)
