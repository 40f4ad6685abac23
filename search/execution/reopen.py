"""Open a run again: with the settings, and on the data, that it was made with."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunesweep.models import LatencyTable, UserError, arch_of, cost, load, load_provenance, read_arch, weights_digest
from prunesweep.models.io.files import write_text
from prunesweep.models.io.reading import parse_toml, read_json, read_toml
from prunesweep.models.io.store import check_saved
from prunesweep.models.precision import to_float32
from prunesweep.search.config import SearchConfig, load_run_config, run_config
from prunesweep.search.space.space import Space, read_scores, score_names
from prunesweep.search.space.variables import MODEL
from prunesweep.search.store.mirror import belongs_to
from prunesweep.search.store.records import FORMAT, RunFacts, sealed
from prunesweep.search.store.run import Run, set_aside
from prunesweep.search.store.study import Study
from prunesweep.search.store.study_places import Database, Owner
from prunesweep.search.store.study_url import JOURNAL
from prunesweep.training import EvalMetrics
from prunesweep.training.data import Data, content_changes, content_of, open_data
from prunesweep.training.jobs.proposal import Proposal, is_proposal

from .cutting import own_figures

__all__ = [
    "HARMLESS",
    "check_data",
    "check_given",
    "check_settings",
    "check_study",
    "open_study",
    "own_table",
    "reopen",
    "settings_of",
    "space_of",
    "study_of",
    "write_config",
]

# keys that change no candidate and no figure; data are compared by their content
DATA = ("data.name", "data.loader_workers", "data.class_order", "data.classes", "data.unreadable", "data.test")
HARMLESS = (
    "search.trials",
    "search.study",
    "search.keep_models",
    "search.measure_front",
    "resources.",
    "logging.",
    "cluster.",
    *DATA,
)

SEAL = "# sha256 of the lines above: "  # begins the last line of a run's search.toml
MOVED = "resume --set data.name=..., promote --data ..., eval RUN --data ..."


def settings_of(config: SearchConfig) -> dict[str, Any]:
    """The settings that ``run.json`` keeps: what ``search.toml`` says when the run is made."""
    return parse_toml(config.to_toml())


def write_config(folder: Path, config: SearchConfig) -> None:
    """Write the ``search.toml`` of a run, whose last line says whether it was changed since."""
    text = config.to_toml()
    write_text(folder / "search.toml", f"{text}{SEAL}{_sha256(text)}\n")


def _is_as_written(file: Path) -> bool:
    text, _, seal = file.read_text(encoding="utf-8").rpartition(SEAL)
    return seal.strip() == _sha256(text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reopen(run: Run, overrides: Sequence[str] = (), *, on_note: Callable[[str], None] | None = None) -> SearchConfig:
    """Return the configuration of a run, as its ``search.toml`` says it now.

    A ``search.toml`` that is lost or torn is written again from ``run.json``; a ``run.json`` that is, from the source's
    folder, the names of the scores and a ``search.toml`` that is as it was written.

    Args:
        run: the run.
        overrides: ``key.path=value``, of keys that change neither a candidate nor a figure (``HARMLESS``).
        on_note: is told in a line for people what was written again, and which of these keys were edited.

    Raises:
        UserError: ``search.toml`` was edited, or an override would change the search.
    """
    _mend_facts(run, on_note)
    file, made = run / "search.toml", _made(run)
    if made is not None and not _whole(file):
        kept = f"kept as {set_aside(file).name}, and " if file.exists() else ""
        write_config(run.path, made)
        if on_note:
            on_note(f"{file} was torn or lost: {kept}written again as it was when the run was made")
    found, wanted = load_run_config(run.path), load_run_config(run.path, overrides)
    if changed := _changes(found, wanted):
        raise UserError(
            f"{run.path} was made with other settings, so its results would not compare:\n{changed}\n"
            "start a new search (search.start_from takes over this one's front), or leave these keys as they are"
        )
    _check_unedited(run, made, found)
    if made is not None and on_note and not _is_as_written(file) and (edited := _changes(made, found, harmless=True)):
        on_note(f"{file} was edited, or is of an earlier version; it differs from when the run was made:\n{edited}")
    return own_table(run, wanted)


def _mend_facts(run: Run, on_note: Callable[[str], None] | None) -> None:
    """Write ``run.json`` again where it is damaged and all that it says is known; else leave that to who reads it."""
    file = run / "run.json"
    try:
        run.read(file, RunFacts)
        return
    except UserError as error:
        reason = error
    try:
        facts = _facts_again(run)
    except NotMeasured as error:
        raise UserError(
            f"{reason}: all that it said is known, but for search.quality of the source, which has to be measured: "
            f"{error}. See to that and give the command again, or put the file back from a copy of the run"
        ) from error
    except (UserError, OSError):
        return
    if facts is None:
        return
    kept = f"kept as {set_aside(file).name}, and " if file.exists() else ""
    write_text(file, sealed(facts))
    if on_note:
        on_note(f"{reason}: {kept}written again from source/, scores/ and search.toml, which are as they were")


class NotMeasured(UserError):
    """The source of a run cannot be measured again."""


def _facts_again(run: Run) -> dict[str, Any] | None:
    """What ``run.json`` said; None where something of it is not known. Raises UserError where a file is damaged."""
    if not _whole(run / "search.toml") or not _is_as_written(run / "search.toml"):
        return None
    config, folder = load_run_config(run.path), run / "source"
    check_saved(folder)
    source, told = to_float32(load(folder)), load_provenance(folder)
    figures = EvalMetrics.of(told)
    scores = {name: _score_file(run, name) for name in score_names(config.space, config.scores.method)}
    if None in scores.values() or not figures.as_dict() or "data" not in told:
        return None
    agreement = 100.0 if "agreement" in config.search.objectives else None
    further = _further(config, source, told["data"])
    own, searched = (
        one._replace(kl=None, agreement=agreement, **more).as_dict()
        for one, more in zip((figures, EvalMetrics.of(told.get("search", told))), further, strict=True)
    )
    arch = arch_of(source)
    spent, costs = cost(arch), dict[str, float]()
    if run.latency_table.exists():
        costs["latency_ms"] = LatencyTable.load(run.latency_table).predict(arch)
    name = {"name": arch.source, "weights": weights_digest(source)}
    return {
        "format": FORMAT,
        "source": {**name, **own, "search": searched, "macs": spent.macs, "params": spent.params, **costs},
        "data": told["data"],
        "content": {},
        "scores": scores,
        "versions": told.get("versions", {}),
        "settings": settings_of(config),
    }


def _further(config: SearchConfig, source: Any, fingerprint: str) -> list[dict[str, Any]]:
    """What ``search.quality`` says of the source, which its folder does not. Raises NotMeasured."""
    if config.search.quality is None:
        return [{}, {}]
    try:
        data = open_data(config.data.name, source.pretrained_cfg, **config.data.options)
        if data.info.fingerprint != fingerprint:
            raise UserError(f"data.name = {config.data.name!r} is not what the run was made on")
        return own_figures(config, source, data, lambda *_: None)
    except UserError as error:
        raise NotMeasured(str(error)) from error


def _score_file(run: Run, name: str) -> str | None:
    """The name of the only file of some scores; None where there is none, or are several."""
    found = [p.name for p in (run / "scores").iterdir() if re.fullmatch(rf"{name}-[0-9a-f]+\.safetensors", p.name)]
    return found[0] if len(found) == 1 else None


def check_settings(run: Run) -> SearchConfig:
    """Return the configuration of a run; write nothing. Raises UserError where it is torn, lost or edited."""
    if not _whole(file := run / "search.toml"):
        raise UserError(f"{file} is torn or lost")
    found = load_run_config(run.path)
    _check_unedited(run, _made(run), found)
    return own_table(run, found)


def _made(run: Run) -> SearchConfig | None:
    """The configuration that a run was made with; None in runs of earlier versions, which do not keep it."""
    settings = run.metadata().get("settings")
    return None if settings is None else run_config(settings, str(run / "run.json"))


def _check_unedited(run: Run, made: SearchConfig | None, found: SearchConfig) -> None:
    if made is not None and (changed := _changes(own_table(run, made), own_table(run, found))):
        raise UserError(
            f"{run / 'search.toml'} was edited since the run was made, so its results would not compare:\n{changed}\n"
            "start a new search (search.start_from takes over this one's front), or set these keys back (without the "
            "file, 'prunesweep resume' writes it again as it was)"
        )


def open_study(run: Run, config: SearchConfig, space: Space, where: Path | Database) -> Study:
    """Open the study of a run.

    Args:
        run: the run.
        config: its configuration.
        space: its space.
        where: ``study_of`` the run, or a copy of its journal.

    Raises:
        UserError: a database cannot be used, or its study is another run's.
    """
    return Study(
        where,
        space.distributions,
        config.seed,
        objectives=config.search.objectives,
        rank_by=config.search.rank_by,
        rungs=config.search.rungs,
        sampler=config.search.sampler,
        trials=config.search.trials,
        start=config.search.start,
        name=config.name,
        fit=space.fitted,
        place=space.placed,
        idle=space.idle,
    )


def study_of(run: Run, config: SearchConfig) -> Path | Database:
    """Where the study of a run is kept.

    Args:
        run: the run, which this process drives.
        config: its configuration.

    Raises:
        UserError: the package that a database takes is not installed.
    """
    if config.search.study == JOURNAL:
        return run / "study.journal"
    file = run / "study.json"  # by it the study is known again where the run was moved
    try:
        identity = str(read_json(file)["identity"])
    except (UserError, KeyError, TypeError):
        identity = uuid.uuid4().hex
        write_text(file, json.dumps({"identity": identity}))
    return Database(config.search.study, config.name, Owner(identity, owner_of(run.path)))


def check_study(config: SearchConfig, path: Path) -> None:
    """Check the database that ``search.study`` names, before a run is made.

    Args:
        config: the search's configuration.
        path: the run's folder.

    Raises:
        UserError: it cannot be used, or has a study of this name that is another run's.
    """
    if config.search.study != JOURNAL:
        Database(config.search.study, config.name, Owner(None, owner_of(path))).look()


def owner_of(path: Path) -> str:
    """The place of a run by which its studies in a database are known: its URL, or its machine and folder."""
    return belongs_to(path) or f"{socket.gethostname()}:{path}"


def check_given(run: Run, config: SearchConfig) -> None:
    """Check the run's copies of the models and decisions that it starts from. Raises UserError where one is damaged."""
    for point in config.search.start:
        if MODEL not in point:
            continue
        given = run / str(point[MODEL])
        try:
            if is_proposal(given):
                Proposal.load(given)
            else:
                check_saved(given)
        except UserError as error:
            raise UserError(
                f"{error}\nThe search starts from it: copy it again to {given}, or start a new search"
            ) from error


def _whole(file: Path) -> bool:
    """Whether a configuration is there, and is not torn; it may well be wrong."""
    try:
        return {"name", "data", "source"} <= read_toml(file).keys()
    except UserError:
        return False


def _changes(before: SearchConfig, after: SearchConfig, *, harmless: bool = False) -> str:
    """The keys that differ, but for those that may, or these alone, in a line each."""
    old, new = (dict(_leaves(config.model_dump(mode="json"))) for config in (before, after))
    changed = [key for key in old | new if old.get(key) != new.get(key) and key.startswith(HARMLESS) == harmless]
    return "\n".join(f"  {key}: {old.get(key)!r}, now {new.get(key)!r}" for key in changed)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def own_table(run: Run, config: SearchConfig) -> SearchConfig:
    """The configuration with the run's own copy of the latency table, wherever the run was moved to."""
    if not run.latency_table.exists():
        return config
    space = config.space.model_copy(update={"latency_table": str(run.latency_table)})
    return config.model_copy(update={"space": space})


def space_of(run: Run, config: SearchConfig) -> Space:
    """Return the space of a run, by its source's record and its scores.

    Args:
        run: the run.
        config: its configuration.

    Raises:
        UserError: the source's record, a score or the latency table is lost or damaged.
    """
    files = run.metadata()["scores"]
    if lost := [name for name in score_names(config.space, config.scores.method) if name not in files]:
        raise run.unusable(f"{run / 'run.json'} is damaged: scores does not name the file of {', '.join(lost)}")
    source = read_arch(run / "source")
    return Space(config.space, source, read_scores(run / "scores", files), projected=config.search.projects(source))


def check_data(run: Run, config: SearchConfig, source: Any = None) -> Data:
    """Open the data of a run, and compare them with those that it was made on.

    Args:
        run: the run.
        config: its configuration; ``data.name`` may be a new place of the same data.
        source: the run's source, if it is loaded already.

    Returns:
        The data as the run's source expects them.

    Raises:
        UserError: the data are not there, or have changed; the message says what can be told of it. Or the source is
            another one than that of the run.
    """
    source = to_float32(load(run / "source")) if source is None else source
    facts = run.metadata()
    if weights_digest(source) != facts["source"]["weights"]:
        raise UserError(
            f"{run / 'source'} holds another model than the one that the run was made with, so results would not "
            "compare: put that one back (the cache beside the run may have it, in sources/), or start a new search"
        )
    try:
        data = open_data(config.data.name, source.pretrained_cfg, **config.data.options)
    except UserError as error:
        raise UserError(f"{error}\nIf they were moved, give their new place: {MOVED}") from error
    if data.info.fingerprint == facts.get("data"):
        return data
    if before := facts.get("content"):
        lines = content_changes(before, content_of(data))
    else:  # a run of an earlier version
        lines = [f"fingerprint {facts.get('data')}, now {data.info.fingerprint}"]
    raise UserError(
        f"{config.data.name} is not what {run.path} was made on, so its results would not compare:\n"
        + "\n".join(f"  {line}" for line in lines)
        + f"\nput the data back as they were, say where those are ({MOVED}), or start a new search"
    )
