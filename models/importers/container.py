"""Reading foreign files: checkpoints of ``torch.save`` without running code from them, and run configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from prunesweep.models.errors import UserError

__all__ = ["read_checkpoint", "read_config"]

# What training scripts keep beside the weights; ``dim`` (NViT), ``channels`` (Prune-and-Merge) and, in trusted files,
# ``args`` (fairseq) describe the model.
TRAINING = re.compile(
    r"(optimizer|lr_scheduler|scheduler|scaler|loss_scaler|amp|best|max|train|test|rng|ema)(\d*|_\w+)"
    r"|model_ema|state_dict_ema|epoch|epochs|iteration|step|global_step|metric|args|config|cfg|version"
    r"|extra_state|last_optimizer_state|saver"
)
DESCRIBING = ("dim", "channels", "args", "arch")
WEIGHTS = {
    "model": "model_ema",
    "state_dict": "state_dict_ema",
}  # entry of the weights and of averaged ones, timm's too
# of data-parallel training, of torch.compile, of weight averaging
PREFIXES = ("module.", "_orig_mod.", "model.")
REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")


def read_checkpoint(
    path: Path, *, trust: bool, ema: bool, harmless: Sequence[type] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors of a checkpoint by name, on the CPU, and what else the file holds that describes the model.

    The weights may be the whole file or its entry ``model`` or ``state_dict``, with or without the prefixes of
    data-parallel training, compiled models and weight averages (``PREFIXES``).

    Args:
        path: a file of ``torch.save``.
        trust: run the code that the file names where reading needs it; otherwise such a file is refused.
        ema: take the averaged weights of the entry ``model_ema`` or ``state_dict_ema`` instead.
        harmless: classes that may be in the file though they are no weights, because making one runs no code.

    Returns:
        (weights by name, describing entries by name).

    Raises:
        UserError: the file cannot be read, needs ``trust``, or has entries that are not known.
    """
    with torch.serialization.safe_globals(list(harmless)):
        content = _load(path, trust)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}: a checkpoint is a dictionary of named tensors")
    entry = next((name for name in WEIGHTS if isinstance(content.get(name), Mapping)), None)
    averaged = next((name for name in WEIGHTS.values() if isinstance(content.get(name), Mapping)), None)
    if ema and averaged is None:
        raise UserError(f"{path} has no averaged weights (entry {WEIGHTS[entry or 'model']}); leave out ema (--ema)")
    if wanted := averaged if ema else entry:
        weights = dict(content[wanted])
        beside = {key: value for key, value in content.items() if key not in (*WEIGHTS, *WEIGHTS.values())}
    else:
        weights = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        beside = {key: value for key, value in content.items() if key not in weights}
    weights = {str(key): value for key, value in weights.items()}
    unknown = [str(key) for key in beside if key not in DESCRIBING and not TRAINING.fullmatch(str(key))]
    unknown += [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if unknown:
        raise UserError(f"{path} has entries of unknown meaning: {', '.join(unknown)}; nothing was imported")
    if not weights:
        raise UserError(f"{path} holds no tensors: {', '.join(map(str, content)) or 'it is empty'}")
    while prefix := next((own for own in PREFIXES if all(key.startswith(own) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    # copies, because a file may hold one tensor under several names
    tensors = {key: value.detach().clone() for key, value in weights.items()}
    return tensors, {key: beside[key] for key in DESCRIBING if key in beside}


def _load(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint written by torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a file that is not a checkpoint
        refused = REFUSED.search(str(error))
        if refused is None:
            raise _damaged(path, error) from error
        if not trust:
            raise UserError(
                f"{path} holds more than weights: a {refused[1]} object. Reading it runs code that the file names, and "
                "a file made for that purpose could do anything in your name, so it is refused. If you trust whoever "
                "made the file, read it all the same with trust=True (--trust)"
            ) from error
    return _load_trusted(path, refused[1])


def _load_trusted(path: Path, refused: str) -> Any:
    """Read everything in the file, whatever code it names."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"{path} holds a {refused} object, whose package cannot be loaded here ({error}). Install that package "
            "beside prunesweep, or save the weights alone again where it is installed"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
    return UserError(f"{path} cannot be read as a checkpoint written by torch.save; it may be cut off: {reason}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's configuration, JSON or YAML by its suffix. Raises UserError where it cannot be read."""
    readers = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix not in readers:
        raise UserError(f"config = {path}: must be a file with suffix {', '.join(readers)}")
    try:
        content = readers[path.suffix](path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: a configuration is a mapping of names to values")
    return content
