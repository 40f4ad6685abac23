"""What the page of a run shows, read from the run's files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prunesweep.models import Arch, UserError, cut_arch, read_arch
from prunesweep.search.execution.promote import promoted
from prunesweep.search.report.display import front_notes
from prunesweep.search.store.front import cost_of, hypervolume, quality_of
from prunesweep.search.store.run import Result, Run

from .activity import activity, growth, own_epochs
from .headline import headline
from .importance import importance
from .published_rows import published_rows
from .savings import CAUSES, picture, savings
from .spectra import spectra

__all__ = ["page_data"]


def page_data(run: Run) -> dict[str, Any]:
    """Return all that the page of a run shows, JSON-ready.

    Candidates are listed with their latest result, those whose result is no number only counted. ``rungs`` of a
    candidate has its figures on every rung that it reached; ``zero_shot`` is of its model before any training: as cut,
    and recovered where ``start`` says so.

    Raises:
        UserError: a file of the run that cannot be done without is damaged.
    """
    facts, outcomes = run.known_facts(), run.outcomes()
    results, current = outcomes.results, outcomes.current
    points = run.front()
    front = {(point["trial"], point["rung"]): point for point in points}
    further = {entry["unit"]: entry for entry in promoted(run)}
    source, searched = read_arch(run / "source"), run.searched_source()
    settings, quality = facts.get("settings", {}), quality_of(run.objectives)
    cost = cost_of(run.objectives)
    shown = [r for r in current if _measured(r, run.objectives)]
    epochs, stations = own_epochs(results), dict[int, list[Result]]()
    for result in results:  # ascending in the rung
        stations.setdefault(result.trial, []).append(result)
    macs = {(r.id, r.arch_hash): r.macs for r in current}
    members = [r for r in shown if (r.trial, r.rung) in front]
    return {
        "name": run.path.name,
        "path": run.shown,
        "links": (run / "front").is_dir(),
        "objectives": run.objectives,
        "measure": run.measure,
        "rank_by": sorted({run.ranking.names(r.epochs)[run.objectives.index(quality)] for r in members}),
        "family": source.family,
        "source": {**facts["source"], "searched": searched, "arch": picture(source, source)},
        "start": _start(settings.get("search", {})),
        "headline": headline(points, facts["source"], searched, quality, cost),
        "hypervolume": hypervolume(members, searched, run.objectives),
        "spent": {
            "epochs": sum(epochs.values()),
            "seconds": sum(r.seconds for r in results if math.isfinite(r.seconds)),
            "tasks": len(results),
        },
        "notes": front_notes(points),
        "advice": run.advice(),
        "causes": [*CAUSES, "kept"],
        "trials": [_trial(run, r, stations[r.trial], source, front, further) for r in shown],
        "diverged": len(current) - len(shown),
        "damaged": sorted(outcomes.damaged),
        "activity": activity(run, results, outcomes.failures),
        "importance": importance(results, run.ranking),
        "speed": [
            {**asdict(row), "promised": facts["source"]["macs"] / macs[row.unit, row.arch_hash]}
            for row in run.speed()
            if (row.unit, row.arch_hash) in macs
        ],
        "published": published_rows(source, run.objectives),
        "growth": growth(run, results, run.ranking, searched),
        "spectra": spectra(run, facts["scores"], source),
        "data": settings.get("data", {}),
        "seed": settings.get("seed"),
        "settings": {name: settings[name] for name in ("space", "search", "finetune", "scores") if name in settings},
        "versions": facts["versions"],
    }


def _measured(result: Result, objectives: Sequence[str]) -> bool:
    return all(math.isfinite(math.nan if (v := getattr(result, name)) is None else v) for name in objectives)


def _start(search: Mapping[str, Any]) -> str:
    """What is done to a candidate before any training."""
    if not search.get("recover", False):
        return "as cut"
    return "cut, projected and refitted" if search.get("project", False) else "cut and refitted"


def _trial(
    run: Run,
    result: Result,
    stations: Sequence[Result],
    source: Arch,
    front: Mapping[tuple[int, int], Mapping[str, Any]],
    further: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    place, arch = (result.trial, result.rung), _record(run, result, source)
    model = run.model(result)
    return {
        "unit": result.id,
        "trial": result.trial,
        "rung": result.rung,
        "epochs": result.epochs,
        **result.figures._asdict(),
        "interval": result.figures.interval,
        "validation": _validation(run, result) if place in front else None,
        "test": {k.removeprefix("test_"): v for k, v in front.get(place, {}).items() if k.startswith("test")} or None,
        "zero_shot": result.zero_shot if math.isfinite(result.zero_shot) else None,
        "rungs": [
            {"unit": r.id, "rung": r.rung, "epochs": r.epochs, **r.figures.as_dict(), "interval": r.figures.interval}
            for r in stations
        ],
        "macs": result.macs,
        "params": result.params,
        "latency_ms": result.latency_ms,
        "point": result.point,
        "given": None if result.given is None else [result.given, run.made_by(result.given)],
        "seconds": result.seconds,
        "arch_hash": result.arch_hash,
        "front": place in front,
        "model": model.is_dir(),
        "promoted": further.get(result.id),
        "saved": [round(share, 5) for share in savings(arch, source)],
        "arch": picture(arch, source),
    }


def _validation(run: Run, result: Result) -> dict[str, Any] | None:
    found = run.validation(result)
    return None if found is None else {**found._asdict(), "interval": found.interval}


def _record(run: Run, result: Result, source: Arch) -> Arch:
    """The record of a candidate; made again from its decision, or the model it was given, where its file is damaged."""
    path = run.trial(result.id) / "arch.json"
    try:
        found = Arch.from_json(path.read_text(encoding="utf-8"))
        if found.hash != result.arch_hash:
            raise UserError(f"it is the record of {found.hash}, not of {result.arch_hash}")
    except (OSError, ValueError, RecursionError) as error:
        if result.given is not None:
            return read_arch(run / result.given)
        decision = run.read_cut(result.trial)
        if decision is None:
            raise UserError(f"{path} is damaged or missing, and so is the decision (cut.json): {error}") from error
        return cut_arch(source, decision)
    return found
