"""Cache scores: compute them once for the same model (weights and record), method, data and settings."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunesweep.models import UserError, arch_of, weights_digest
from prunesweep.models.errors import NotHere
from prunesweep.models.io.files import make_folder, publish_file
from prunesweep.models.io.provenance import digest
from prunesweep.models.precision import in_float32
from prunesweep.pruners import ScoredMethod, Scores, WidthMethod, get_method, score_depth
from prunesweep.pruners.drawn_targets import with_drawn_features, with_drawn_labels
from prunesweep.pruners.scores import DEPTH, FORMAT, LEARNED, check_scores_finite, unit_counts
from prunesweep.pruners.uvc.hook import UVC
from prunesweep.pruners.uvc.settings import UVCSettings
from prunesweep.pruners.zeros import zero_notes
from prunesweep.training import Data, Recipe, fit

__all__ = ["Calibration", "Progress", "cached_gates", "cached_scores", "given_scores"]

Progress = Callable[[str, float, str], None]  # what is being done, the share of it done in [0, 1], a note


@dataclass(frozen=True)
class Calibration:
    """The images that scores are computed on: their number, the batch size, and the seed that draws them.

    The batch size matters: saliency is a mean of squared batch sums.
    """

    images: int = 1024
    batch_size: int = 16
    seed: int = 0


def cached_scores(
    model: nn.Module,
    method: str,
    data: Data,
    calibration: Calibration,
    cache: Path,
    progress: Progress,
    *,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
    compute: bool = True,
) -> Path:
    """Return the file of a method's scores of ``model``; compute them if the cache does not have it.

    Where the data have no labels, a method that reads some gets labels drawn from the model's own answers; of a
    backbone without a head, features (``pruners.drawn_targets``).

    Args:
        model: the scored model, on its device.
        method: name in ``pruners.METHODS`` of a method that scores, or ``depth_kl`` for the importance of whole blocks.
        data: data set; the calibration images are from its training split.
        calibration: the choice of images.
        cache: folder of scores; a file is named by the hash of everything that it depends on, which it
            also carries inside; it is made again if that differs, or if it is damaged.
        progress: called with (what is being done, share done, note).
        weights: ``weights_digest(model)``, if it is known already.
        options: settings of the method's scoring; those left out have their defaults.
        compute: compute what the cache does not have.

    Raises:
        UserError: the method is unknown, or cannot serve the model, or scores are not finite.
        NotHere: the cache does not have them, and ``compute`` is false.
    """
    entry = None if method == DEPTH else get_method(method, ScoredMethod)
    if entry is not None:
        entry.check(arch_of(model))
    weights, model = weights or weights_digest(model), in_float32(model)
    settings = asdict(calibration)
    metadata: dict[str, Any] = {**_facts(model, method, data, weights), **settings}
    if options:
        metadata["settings"] = dict(options)
    headless = arch_of(model).headless
    if drawn := entry is not None and entry.labels and (headless or not data.info.labelled):
        metadata["labels"] = "drawn"
    path = cache / f"{method}-{digest(metadata)}.safetensors"
    if _holds(path, metadata):
        progress("scores from the cache", 1.0, str(path))
    else:
        if not compute:
            raise NotHere(f"scores of {method} are not in the cache: they take {calibration.images} images")
        what = "measuring blocks" if entry is None else entry.progress
        batches = data.calibration(calibration.images, calibration.batch_size, calibration.seed)
        if drawn:
            batches = (with_drawn_features if headless else with_drawn_labels)(model, batches, calibration.seed)

        def on_batch(done: int, total: int) -> None:
            progress(what, done / total, f"{done}/{total}")

        if entry is None:
            scores = score_depth(model, batches, progress=on_batch)
        else:
            seed = {"seed": calibration.seed} if entry.seeded else {}
            scores = entry.score(model, batches, progress=on_batch, **seed, **(options or {}))
        check_scores_finite(scores, method)
        make_folder(path.parent)
        with publish_file(path) as scratch:
            Scores(scores.vectors, {**scores.provenance, **metadata}).save(scratch)
    for note in zero_notes(model, Scores.load(path)):
        warnings.warn(f"{method}: {note}", stacklevel=2)
    return path


def given_scores(path: Path, model: nn.Module, method: str, options: Mapping[str, Any] | None = None) -> Scores:
    """Read scores that were made elsewhere, and check that they are of a model by a method.

    Args:
        path: the file.
        model: the model that is decided about.
        method: name of the method that decides.
        options: settings of its scoring that are given.

    Raises:
        UserError: the file is not there or damaged, or it says that it is of another model, method or settings.
    """
    if not path.is_file():
        raise UserError(f"--scores {path}: there is no such file; prunesweep score writes one, and says where")
    found = Scores.load(path, "give a file that prunesweep score wrote")
    facts = found.provenance
    wanted = {"method": method, "arch": arch_of(model).hash, "weights": weights_digest(model)}
    for name, value in wanted.items():
        if (own := facts.get(name, value)) != value:
            what = f"by method {own!r}, not {method!r}" if name == "method" else f"of a model with other {name}"
            what = what.replace("other arch", "another architecture")
            raise UserError(f"--scores {path}: is {what}: score this model with prunesweep score --method {method}")
    if (own := facts.get("settings", {})) != dict(options or {}):
        raise UserError(f"--scores {path}: was made with settings {own}, --set gives {dict(options or {})}")
    counts = unit_counts(arch_of(model))
    for name, vector in found.vectors.items():
        if name in counts and vector.shape != (counts[name],):
            raise UserError(f"--scores {path}: {name} has {vector.numel()} entries, the model needs {counts[name]}")
        if name not in counts and isinstance(get_method(method, ScoredMethod), WidthMethod):
            raise UserError(f"--scores {path}: {name} is no vector of {arch_of(model).source}")
    check_scores_finite(found, method)
    return found


def cached_gates(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    settings: Mapping[str, Any],
    seed: int,
    cache: Path,
    progress: Progress,
    *,
    weights: str | None = None,
    compute: bool = True,
) -> Path:
    """Return the file of block scores from the gates of one UVC run; train them if the cache does not have it.

    A block's score is its keep logit minus its skip logit, as learned. An interrupted run is resumed.

    Args:
        model: the source, on its device; also the teacher.
        data: data set of the run.
        recipe: recipe of the run.
        settings: settings of the run, those of ``pruners.uvc.UVCSettings``.
        seed: seed of the run.
        cache: as for ``cached_scores``.
        progress: as for ``cached_scores``.
        weights, compute: as for ``cached_scores``.

    Raises:
        NotHere: as for ``cached_scores``.
        UserError: UVC cannot serve the model, a setting does not fit, or training failed.
    """
    weights, model = weights or weights_digest(model), in_float32(model)
    run = {"recipe": recipe.model_dump(mode="json"), "settings": dict(settings), "seed": seed}
    metadata = {**_facts(model, LEARNED, data, weights), **run}
    path = cache / f"{LEARNED}-{digest(metadata)}.safetensors"
    if _holds(path, metadata):
        progress("scores from the cache", 1.0, str(path))
        return path
    if not compute:
        raise NotHere(f"learned gates are not in the cache: they are trained for {recipe.epochs} epochs")
    make_folder(path.parent)
    hook, trained, state = UVC(UVCSettings.model_validate(settings)), copy.deepcopy(model), path.with_suffix(".state")

    def on_step(done: int, total: int, loss: float) -> None:
        progress("learning gates", done / total, f"loss {loss:.3f}  {hook.facts.get('skip', '')}")

    fit(trained, data, recipe, teacher=model, hook=hook, seed=seed, state=state, on_step=on_step)
    margin = hook.machine.gates[:, 1] - hook.machine.gates[:, 0]
    with publish_file(path) as scratch:
        Scores({"depth": margin.double().cpu()}, metadata).save(scratch)
    state.unlink(missing_ok=True)
    return path


def _facts(model: nn.Module, method: str, data: Data, weights: str) -> dict[str, Any]:
    """What all scores depend on; models of equal weights may have other heads, pooling or an epsilon of their own."""
    of_model = {"weights": weights, "arch": arch_of(model).hash}
    return {"method": method, **of_model, "data": data.info.fingerprint, "format": FORMAT}


def _holds(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether a file is there, is sound, and says that it was made of just this."""
    if not path.exists():
        return False
    try:
        found = Scores.load(path).provenance
    except UserError:
        return False
    return all(found.get(key) == value for key, value in json.loads(json.dumps(metadata)).items())
