"""Reading foreign files: checkpoints of ``torch.save`` without running code from them, and run configurations."""

from __future__ import annotations

import contextlib
import itertools
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from prunesweep.models.errors import UserError
from prunesweep.models.io.reading import parse_json

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
MOST_PARTS = 20_000  # of a file; the largest models have a few thousand tensors
OLDER = 4  # pickles of the older format: a number, its version, facts of the system, and what was saved
EXPANSION = 4  # how much more memory than bytes in the file tensors may take: some are there under several names
BLOCKED = re.compile(r"unsupported GLOBAL (\S+) whose module \S+ is blocked")
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
    if averaged is not None and entry is None and not ema:
        raise UserError(f"{path} has averaged weights alone (entry {averaged}): give ema (--ema)")
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
    _check_tensors(path, weights)
    # copies, because a file may hold one tensor under several names
    tensors = {key: value.detach().clone() for key, value in weights.items()}
    return tensors, {key: beside[key] for key in DESCRIBING if key in beside}


def _load(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint written by torch.save")
    _check_contents(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a file that is not a checkpoint
        if blocked := BLOCKED.search(str(error)):
            raise UserError(
                f"{path} would run code: reading it calls {blocked[1]}, which no checkpoint needs. Nothing of it was "
                "run; do not use the file"
            ) from error
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


def _check_contents(path: Path) -> None:
    """Raise UserError for an archive of more parts than a model has, or of more bytes than the file has itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        _check_older(path)
        return
    if len(parts) > MOST_PARTS:
        raise UserError(f"{path} holds {len(parts):,} parts: a checkpoint of a model has at most {MOST_PARTS:,}")
    if (whole := sum(part.file_size for part in parts)) > path.stat().st_size:
        raise UserError(
            f"{path} would expand to {whole:,} bytes, it has {path.stat().st_size:,}: torch.save does not compress, so "
            "it is no checkpoint, or was packed again; unpack it with the tool that packed it"
        )


def _check_older(path: Path) -> None:
    """Raise UserError for a file of the format before archives that names more tensors than a model has.

    torch.load takes a millisecond for each, in Python, and does not say before how many there are.
    """
    named = 0
    with contextlib.suppress(ValueError, OSError, OverflowError), path.open("rb") as stream:  # torch.load says what
        names = (code.name for _ in range(OLDER) for code, _, _ in pickletools.genops(stream))
        named = sum(1 for _ in itertools.islice((name for name in names if name == "BINPERSID"), MOST_PARTS + 1))
    if named > MOST_PARTS:
        raise UserError(f"{path} names more than {MOST_PARTS:,} tensors: a checkpoint of a model has fewer")


def _check_tensors(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError for tensors that are not plain numbers, or take more memory than what the file could hold."""
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
            plain = f"{value.layout}, {value.dtype}".replace("torch.", "")
            kind = "quantized" if value.is_quantized else "without values" if value.is_meta else plain
            raise UserError(f"{path}: {key} is no plain tensor of numbers ({kind}); save the model's float weights")
    whole, size = sum(value.numel() * value.element_size() for value in weights.values()), path.stat().st_size
    if whole > EXPANSION * size + 2**20:
        raise UserError(
            f"{path} would take {whole:,} bytes of memory, {whole // max(size, 1):,} times what it has: its tensors "
            "are views that repeat a few numbers; save copies of them (tensor.clone())"
        )


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
    advice = "Check the documentation"  # of torch.load, for whoever calls it
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(advice)]
    reason = "it is empty" if not path.stat().st_size else lines[-1] if lines else type(error).__name__
    return UserError(f"{path} cannot be read as a checkpoint written by torch.save; it may be cut off: {reason}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's configuration, JSON or YAML by its suffix. Raises UserError where it cannot be read."""
    readers = {".json": parse_json, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix not in readers:
        raise UserError(f"config = {path}: must be a file with suffix {', '.join(readers)}")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: a configuration is a mapping of names to values")
    return content
