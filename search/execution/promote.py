"""The final stage: chosen models of a run's front, finetuned with a full recipe and measured.

promoted/r2-0007/   model/, promoted.json        figures of the search stay what they are, beside the new ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from prunesweep.models import UserError, load, load_provenance
from prunesweep.models.io.files import write_text
from prunesweep.models.io.lock import reserve
from prunesweep.models.io.objects import Objects, joined
from prunesweep.models.io.store import check_saved, saved_digest
from prunesweep.models.latency.timing import Setting, measure_all
from prunesweep.models.precision import to_float32
from prunesweep.search.store.promoting import CHECKPOINTS
from prunesweep.search.store.records import EXACT, sealed
from prunesweep.search.store.run import Run, task_id
from prunesweep.training import EVAL_BATCH, Epoch, Recipe
from prunesweep.training.jobs.finetune import Finetuning, finetune
from prunesweep.training.jobs.placement import Placement

from .cutting import measure_of
from .reopen import check_data, reopen

__all__ = ["Promoted", "choose", "promote", "promoted"]

COSTS = ("macs", "params", "latency_ms")


@dataclass(frozen=True)
class Promoted:
    """A front member after its full finetuning; ``top1`` values in percent, ``latency`` as measured here.

    ``ppl``, words' perplexity, is a language model's.
    """

    __pydantic_config__: ClassVar = EXACT

    unit: str
    top1: float | None
    searched_top1: float | None
    ppl: float | None
    searched_ppl: float | None
    macs: int
    params: int
    recipe: str
    latency: dict[str, Any] | None
    model: str  # relative to the run
    agreement: float | None = None  # with the source, where that was searched for
    searched_agreement: float | None = None
    weights: str | None = None  # SHA-256 of the model's weights file; None where an earlier version promoted it
    quality: float | None = None  # what search.quality gave, on the validation split
    searched_quality: float | None = None
    error: float | None = None  # the same, where lower is better
    searched_error: float | None = None


def choose(run: Run, *, top: int | None = None, at: Sequence[tuple[str, float]] = ()) -> list[dict[str, Any]]:
    """Members of a run's front, by what the search compared them by (``Ranking``), or by what they may cost.

    Args:
        run: with a front.
        top: the best ones.
        at: (cost, limit) pairs, a limit of at most 1 being a share of the source's: the best one within each.

    Raises:
        UserError: the front is empty, a model of it is gone or damaged, a cost is unknown, or a limit leaves nothing.
    """
    front, source = run.front(), run.metadata()["source"]
    if not front:
        raise UserError(run.why_empty() or f"{run.path}: the front is empty; search first")
    if lost := run.lost_models(run.current()):
        reasons = "\n".join(reason for _, reason in lost)
        raise UserError(f"{reasons}\nThe front lacks it: 'prunesweep resume {run.shown}' makes it again")
    if top is None and not at:
        return front
    known = {(r.trial, r.rung): run.ranking.goodness(r) for r in run.current()}
    best = sorted(front, key=lambda p: -known[p["trial"], p["rung"]])
    chosen = best[: top or 0]
    for name, limit in at:
        if name not in COSTS or (name not in front[0]):
            costs = ", ".join(c for c in COSTS if c in front[0])
            raise UserError(f"--at {name}={limit:g}: this front has {costs}")
        most = limit * source[name] if limit <= 1 else limit
        within = [p for p in best if p[name] <= most]
        if not within:
            least = min(p[name] for p in front)
            raise UserError(f"--at {name}={limit:g}: no model costs that little; the smallest has {least:,.6g}")
        chosen.append(within[0])
    seen: dict[str, dict[str, Any]] = {task_id(p["trial"], p["rung"]): p for p in chosen}
    return list(seen.values())


def promote(
    run: Run,
    point: dict[str, Any],
    recipe_name: str,
    recipe: Recipe,
    *,
    data: str | None = None,
    setting: Setting | None = None,
    placement: Placement = Placement(),  # noqa: B008 (frozen)
    url: str | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Promoted:
    """Finetune one member of the front with the source as teacher; goes on where it was stopped.

    Args:
        run, point: the run and an entry of its front.
        recipe_name, recipe: how it is trained.
        data: name of the run's data, if they were moved.
        setting: measure latency like this too.
        placement: where training runs.
        url: of the run on an object store, which ``run`` was brought from.
        on_step, on_epoch, on_note: as for ``training.fit``.

    Raises:
        UserError: the run's settings were edited, the data are not those that it was made on, or training failed.
    """
    unit = task_id(point["trial"], point["rung"])
    folder = run / "promoted" / unit
    config = reopen(run, () if data is None else [f"data.name={data}"], on_note=on_note)
    opened = check_data(run, config)
    further = measure_of(config, opened)
    job = Finetuning(
        model=run / point["model"],
        data=config.data.name,
        recipe=recipe,
        out=folder / "model",
        teacher=run / "source",
        seed=config.seed,
        data_options={**config.data.options, "search_split": 0.0},  # trained on all training images
    )
    if not job.out.exists():
        inputs = None
        if url is not None and placement.address is not None:  # nodes see the store, and not this folder
            from .elsewhere import Access, PromotedFiles  # which takes seconds to import

            inputs, place = PromotedFiles(Access(url, 0, ""), unit), joined(url, f"promoted/{unit}")
            placement = replace(placement, storage=joined(place, CHECKPOINTS))
        with reserve(job.out, "promoting"):
            finetune(job, placement, inputs=inputs, on_step=on_step, on_epoch=on_epoch, on_note=on_note)
        if inputs is not None:
            Objects(place).delete_folder(CHECKPOINTS)
    else:
        _check_promoted(job.out, recipe, _known_weights(run, folder))
    latency, facts = None, load_provenance(job.out)
    if setting is not None:
        latency = {**asdict(setting), **asdict(measure_all([load(job.out)], setting)[0])}
    own = {}
    if further is not None:
        own = further(to_float32(load(job.out)), opened.report.val_loader(EVAL_BATCH))
        own |= {f"searched_{name}": point[name] for name in own}
    found = Promoted(
        unit=unit,
        top1=facts.get("top1"),
        searched_top1=point.get("top1"),
        ppl=facts.get("ppl"),
        searched_ppl=point.get("ppl"),
        macs=point["macs"],
        params=point["params"],
        recipe=recipe_name,
        latency=latency,
        model=str(Path("promoted") / unit / "model"),
        agreement=facts.get("agreement"),
        searched_agreement=point.get("agreement"),
        weights=saved_digest(job.out),
        **own,
    )
    write_text(folder / "promoted.json", sealed(asdict(found)))
    return found


def _known_weights(run: Run, folder: Path) -> str | None:
    """The digest of the weights that were promoted to a folder before; None where its facts are lost or damaged."""
    file = folder / "promoted.json"
    try:
        return run.read(file, Promoted).get("weights") if file.is_file() else None
    except UserError:
        return None


def _check_promoted(model: Path, recipe: Recipe, weights: str | None) -> None:
    """Raise UserError where a model is damaged or is another one, or was promoted with another recipe."""
    try:
        check_saved(model, weights=weights)
    except UserError as error:
        raise UserError(f"{error}\nDelete {model}, and promote again") from error
    if not _promoted_by(model, recipe):
        raise UserError(f"{model}: was promoted with another recipe; delete it, or keep that recipe")


def _promoted_by(folder: Path, recipe: Recipe) -> bool:
    """Whether a model was promoted with a recipe; fields that came later have their defaults in older models."""
    try:
        return Recipe.model_validate(load_provenance(folder).get("recipe")) == recipe
    except ValidationError:
        return False


def promoted(run: Run) -> list[dict[str, Any]]:
    """What was promoted in a run, ascending MACs."""
    found = []
    for path in sorted((run / "promoted").glob("*/promoted.json")):
        try:
            found.append(asdict(Promoted(**run.read(path, Promoted))))
        except UserError as error:
            raise UserError(f"{error}. Delete it, and promote again") from error
    return sorted(found, key=lambda p: p["macs"])
