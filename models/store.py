"""One model is one folder that timm understands: ``config.json`` and ``model.safetensors``, with the record in both.

    import models, timm
    model = timm.create_model("local-dir:runs/digits/trials/r0-0007/model", pretrained=True)

No pickle is written or read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .arch import Arch
from .build import ENTRY_POINT, arch_of, build_with, create
from .errors import UserError
from .files import publish_folder

__all__ = ["load", "load_provenance", "read_arch", "save"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@timm.models.register_model
def prunesweep(pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's entry point: ``arch`` is a record, or the JSON form of one."""
    arch = options.pop("arch", None)
    if arch is None:
        raise UserError(f"timm model {ENTRY_POINT!r} needs arch=...: a record or its JSON object")
    if not isinstance(arch, Arch):
        arch = Arch.from_dict(arch)
    return create(
        arch,
        pretrained=pretrained,
        pretrained_cfg=options.pop("pretrained_cfg", None),
        drop_path=options.pop("drop_path_rate", 0.0),
        **options,
    )


def save(model: nn.Module, path: str | Path, provenance: Mapping[str, Any] | None = None) -> Path:
    """Write ``model`` (ours, or a timm model that ``Arch.from_timm`` accepts) as a folder, whole or not at all.

    Args:
        model: the model; its weights are stored as they are.
        path: the folder; one that is there is replaced.
        provenance: JSON-ready facts about where the weights come from (source, method, seed, data, versions).
    """
    path, arch = Path(path), arch_of(model)
    try:
        ours = build_with(arch, model.state_dict(), pretrained_cfg=getattr(model, "pretrained_cfg", None))
    except RuntimeError as error:
        raise UserError(f"the model was changed after it was built; its record no longer fits: {error}") from error
    config = {"provenance": dict(provenance or {})}
    with publish_folder(path) as folder:
        timm.models.save_for_hf(
            ours, str(folder), model_config=config, model_args={"arch": arch.to_dict()}, safe_serialization=True
        )
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in ours.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt", "arch": json.dumps(arch.to_dict())})
    return path


def _config(path: str | Path) -> dict[str, Any]:
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a saved model: {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text())
        architecture = config["architecture"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error!r}") from error
    if architecture != ENTRY_POINT:
        raise UserError(f"{folder} holds a {architecture!r}, not a {ENTRY_POINT!r} model; load it with timm")
    return config


def read_arch(path: str | Path) -> Arch:
    """The record of a saved model, without its weights. Raises UserError where the folder is not one, or is damaged."""
    record = _config(path).get("model_args", {}).get("arch")
    try:
        with safe_open(Path(path) / WEIGHTS, "pt") as file:
            beside_weights = json.loads((file.metadata() or {}).get("arch", "null"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{Path(path) / WEIGHTS} is damaged: {error}") from error
    if record != beside_weights:
        raise UserError(f"{path}: {CONFIG} and {WEIGHTS} hold different records; one of them was changed")
    return Arch.from_dict(record)


def load_provenance(path: str | Path) -> dict[str, Any]:
    """What ``save`` was told about where the weights come from."""
    return dict(_config(path).get("provenance", {}))


def load(path: str | Path) -> nn.Module:
    """The saved model on the CPU, in eval mode. Raises UserError where the folder is not one, or is damaged."""
    arch = read_arch(path)
    try:
        weights = load_file(Path(path) / WEIGHTS)
        model = build_with(arch, weights, pretrained_cfg=_config(path)["pretrained_cfg"])
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{Path(path) / WEIGHTS} does not fit its record: {error}") from error
    return model.eval()
