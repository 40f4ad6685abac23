"""Saving and loading: a model is one folder that timm understands.

    import prunesweep, timm
    model = timm.create_model("local-dir:runs/digits/trials/r0-0007/model", pretrained=True)

``config.json`` is timm's, with the record as ``model_args.arch``, with ``provenance``, with ``weights_sha256``, the
SHA-256 of ``model.safetensors``, and with ``config_digest``, a digest of all the rest. No pickle is written or read. A
model that was loaded carries its provenance as ``model.provenance``, and keeps it when it is saved again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prunesweep.models.arch import Arch
from prunesweep.models.builder import (
    DROP_RATES,
    adopted,
    arch_of,
    build_with,
    drop_rates_of,
    preprocessing_of,
    set_label_names,
)
from prunesweep.models.errors import UserError
from prunesweep.models.precision import stored_dtype

from .digest import weights_digest, write_tensors
from .files import publish_folder
from .folder import CONFIG, DIGEST, SEAL, WEIGHTS, check_seal, check_weights, load_provenance, read_config, sha256_of
from .provenance import digest
from .reading import parse_json
from .unchanged import check_unchanged

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "check_saved",
    "load",
    "load_provenance",
    "read_arch",
    "rebuilt",
    "remember",
    "save",
    "saved_digest",
]

# of provenance: what the weights achieve
FIGURES = frozenset(
    {"top1", "top5", "balanced", "loss", "ppl", "kl", "agreement", "cosine", "relative_error", "images"}
)
IMPOSSIBLE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EINVAL)


def rebuilt(model: nn.Module) -> nn.Module:
    """Build a new module of the model's record that holds the model's own weights, and check that it computes the same.

    Raises:
        UserError: the model cannot be represented, was changed after it was built, or has no plain numbers as weights.
    """
    model = adopted(model)
    arch = arch_of(model)
    _check_plain(model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}  # files have no channels_last
    try:
        built = build_with(arch, weights, pretrained_cfg=preprocessing_of(model), drop_rates=drop_rates_of(model))
    except RuntimeError as error:
        raise UserError(f"the model was changed after it was built; its record no longer fits: {error}") from error
    check_unchanged(model, built)
    return built


def _check_plain(model: nn.Module) -> None:
    """Raise UserError where a file cannot hold what a model has as weights."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.is_quantized or is_traceable_wrapper_subclass(value):
            raise UserError(
                f"the model is quantised or sharded: {name} is a {_kind(value)}, and a saved model has plain tensors. "
                "Save it before that, and quantise or shard it again once it is loaded"
            )
        if value.is_meta:
            raise UserError(
                f"{name} is on the meta device and has no values, so there is nothing to save: give the model its "
                "weights first (to_empty, then load_state_dict), or build it on a device that has memory"
            )


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor" if type(value) is torch.Tensor else type(value).__name__


@contextlib.contextmanager
def _possible(path: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be made where one is asked for; a full disk, or missing rights, stay."""
    shown = str(path)
    if path.name in ("", "..") or "\0" in shown or (os.path.exists(path) and not os.path.isdir(path)):
        raise UserError(f"{shown!r}: a model is saved as a folder of its own: give the name of one, not of a file")
    try:
        yield
    except OSError as error:
        if error.errno not in IMPOSSIBLE:
            raise
        raise UserError(f"{shown!r}: no folder can be made there: {error.strerror}") from error


def save(
    model: nn.Module,
    path: str | Path,
    provenance: Mapping[str, Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write ``model`` (ours, or a timm model that ``Arch.from_timm`` accepts) as a folder, whole or not at all.

    What is built from its record must compute what the model does (``models.io.unchanged``), which costs two forward
    passes of one image. Rates of dropout and stochastic depth are kept where timm's ``create_model`` was given them for
    a saved model; others are settings of training, and are not.

    Args:
        model: the model; what ``torch.compile`` made of one is saved as the model that it is. Weights are stored as
            they are; those of a model that was cast to float32 for work (``models.precision``), in the type that they
            had.
        path: the folder; one that is there is replaced.
        provenance: JSON-ready facts about where the weights come from; ``load_provenance`` gives them back. By default
            those of the model's own ``provenance``, which it has if it was loaded, without accuracies where its weights
            were changed since. Any key may be used. By convention, each where it applies: ``method`` (the pruner's
            name, ``source``, ``import``), ``source`` (facts about the dense model), ``scores`` (the cached scores' file
            names), ``point`` (the search's parameters), ``data`` (fingerprint of the data set), ``seed``, ``top1`` (per
            cent) and ``versions`` (package to version).
        classes: names of the classes by label, stored as timm's ``label_names``, by which data are matched with the
            model. By default those that the model has already.

    Raises:
        UserError: the model cannot be represented or was changed after it was built, is quantised or on the meta
            device, ``classes`` are not as many different names as it has classes, or there can be no folder at
            ``path``.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)  # of torch.compile, which shares its weights
    ours = rebuilt(model)
    arch = arch_of(ours)
    if classes is not None:
        set_label_names(ours, _class_names(classes, arch.num_classes))
    if provenance is None:
        provenance = _carried(model)
    record, dtype = arch.to_dict(), stored_dtype(model)
    with _possible(path), publish_folder(path) as folder:
        timm.models.save_for_hf(
            ours,
            str(folder),
            model_config={"provenance": dict(provenance)},
            model_args={"arch": record, **drop_rates_of(model)},
            safe_serialization=True,
        )
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in ours.state_dict().items()}
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        write_tensors(weights, folder / WEIGHTS, {"format": "pt", "arch": json.dumps(record)})
        config = json.loads((folder / CONFIG).read_text())
        config[DIGEST] = sha256_of(folder / WEIGHTS)
        config[SEAL] = digest(config)
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
    return path


def _class_names(classes: Sequence[str], count: int) -> list[str]:
    if isinstance(classes, (str, Set)):
        raise UserError(f"classes: a {type(classes).__name__} has no order of names; give a list of them, by label")
    names = list(map(str, classes))
    if len(names) != count:
        raise UserError(f"classes: {len(names)} names, the model has {count} classes")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"classes: {twice[0]!r} is there {names.count(twice[0])} times; every class needs a name of its own"
        )
    return names


def read_arch(path: str | Path) -> Arch:
    """Read the record of a saved model, without its weights.

    Raises UserError where the folder is not a saved model, or is damaged.
    """
    record = read_config(path).get("model_args", {}).get("arch")
    try:
        with safe_open(Path(path) / WEIGHTS, "pt") as file:
            beside_weights = parse_json((file.metadata() or {}).get("arch", "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{Path(path) / WEIGHTS} is damaged: {error}") from error
    try:
        arch = Arch.from_dict(record)
    except UserError as error:
        raise UserError(f"{Path(path) / CONFIG}: {error}") from error
    if record != beside_weights:
        raise UserError(f"{path}: {CONFIG} and {WEIGHTS} hold different records; one of them was changed")
    return arch


def saved_digest(path: str | Path) -> str | None:
    """Return the SHA-256 of a saved model's weights file, as ``save`` wrote it down; None where an older version did.

    Raises UserError where the folder is not a saved model.
    """
    found = read_config(path).get(DIGEST)
    return None if found is None else str(found)


def check_saved(path: str | Path, *, weights: str | None = None) -> Arch:
    """Check that the files of a saved model hold what was written, without building it; return its record.

    Args:
        path: its folder.
        weights: ``saved_digest`` of the model that it should be, if that is known.

    Raises:
        UserError: the folder is not a saved model, a file is damaged, or the weights are not those saved, or not those
            of the model that it should be.
    """
    config = read_config(path)
    check_weights(config, Path(path))
    arch = read_arch(path)
    check_seal(config, Path(path))
    if weights is not None and config.get(DIGEST) != weights:
        raise UserError(f"{path} holds another model: its weights are not those that it was measured with")
    return arch


def load(path: str | Path) -> nn.Module:
    """Load a saved model on the CPU, in eval mode, in the type that its weights have; it carries its ``provenance``.

    Raises:
        UserError: the folder is not a saved model, a file is damaged, or the weights are not those that were saved.
    """
    config, weights_file = read_config(path), Path(path) / WEIGHTS
    check_weights(config, Path(path))
    arch = read_arch(path)
    names = config["pretrained_cfg"].get("label_names")
    if isinstance(names, list) and len(names) != arch.num_classes:
        raise UserError(
            f"{Path(path) / CONFIG}: pretrained_cfg.label_names has {len(names)} names, the model {arch.num_classes} "
            "classes: give one name per class, or none"
        )
    try:
        # copied: safetensors maps the file, and at its odd addresses kernels round differently
        weights = {name: tensor.clone() for name, tensor in load_file(weights_file).items()}
        rates = {name: rate for name, rate in config["model_args"].items() if name in DROP_RATES}
        model = build_with(arch, weights, pretrained_cfg=config["pretrained_cfg"], drop_rates=rates)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{weights_file} does not fit its record: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    check_seal(config, Path(path))  # last: what is wrong with a value is said more exactly
    remember(model, dict(config.get("provenance", {})))
    return model.eval()


def remember(model: Any, provenance: dict[str, Any]) -> None:
    """Let a model carry its provenance, and what its weights are if that says what they achieve."""
    model.provenance = provenance
    model.measured_weights = weights_digest(model) if FIGURES & provenance.keys() else None


def _carried(model: Any) -> dict[str, Any]:
    """Return the provenance that a model carries, without figures of weights that it no longer has."""
    found: dict[str, Any] = getattr(model, "provenance", {})
    if FIGURES & found.keys() and weights_digest(model) != model.measured_weights:
        return {key: value for key, value in found.items() if key not in FIGURES}
    return found
