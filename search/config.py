"""The configuration of a search: TOML into typed models, with errors that name the key and what is allowed."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models import UserError
from models.errors import nearest
from pruners import GROUP_SIZES, PRUNERS
from training import Recipe

__all__ = ["SearchConfig", "load_config", "parse_config"]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _absolute(name: str) -> str:
    """``kind:PATH`` with an absolute path: a run is read again in other processes and from other folders."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if kind in ("imagefolder", "local-dir") and path else name


PathName = Annotated[str, AfterValidator(_absolute)]


class DataTable(Table):
    name: PathName  # digits | imagefolder:PATH
    loader_workers: Natural = 0


class SourceTable(Table):
    """The dense model: a timm name, or ``local-dir:PATH`` of a saved one; ``train`` trains it here."""

    model: PathName
    args: dict[str, Any] = {}  # timm.create_model's keyword arguments, checkpoint_path among them
    pretrained: bool = False
    pos_embed_std: Annotated[float, Field(gt=0)] | None = None  # of the position embedding before training
    train: Recipe | None = None

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> Self:
        saved = self.model.startswith("local-dir:") or "checkpoint_path" in self.args
        if not (saved or self.pretrained or self.train):
            raise ValueError("has no weights: set pretrained = true or args.checkpoint_path, or add [source.train]")
        if self.train and any(term.teacher == "source" for term in self.train.distill):
            raise ValueError("train.distill: the source has no source to learn from; name another teacher, or drop it")
        return self


class ScoresTable(Table):
    method: str = "nvit"  # the width method, a name in pruners.PRUNERS
    images: Count = 1024  # calibration images, from the training split
    batch_size: Count = 16  # saliency is a mean of squared batch sums, so this matters
    seed: Natural = 0

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in PRUNERS:
            raise ValueError(f"must be one of {', '.join(PRUNERS)}. {nearest(name, PRUNERS)}".strip())
        return name


class SpaceTable(Table):
    """Every variable is a range [low, high]; low = high fixes it."""

    budget: tuple[float, float] = (0.25, 0.9)  # MACs of the result over MACs of the source
    skip: tuple[int, int] = (0, 0)  # blocks dropped, least important first
    lr: tuple[float, float] = (5e-4, 5e-4)  # of finetuning, searched on a logarithmic scale
    groups: dict[str, Natural] = dict(GROUP_SIZES)  # units removed at a time; 0 leaves a kind whole

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("budget", "skip", "lr"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: low must not exceed high")
        if not 0 < self.budget[0] <= self.budget[1] <= 1:
            raise ValueError(f"budget = {list(self.budget)}: must lie in (0, 1]")
        if self.skip[0] < 0:
            raise ValueError(f"skip = {list(self.skip)}: must be at least 0")
        if self.lr[0] <= 0:
            raise ValueError(f"lr = {list(self.lr)}: must be above 0")
        if unknown := sorted(set(self.groups) - set(GROUP_SIZES)):
            raise ValueError(f"groups.{unknown[0]}: unknown kind; known: {', '.join(GROUP_SIZES)}")
        return self

    @property
    def group_sizes(self) -> dict[str, int]:
        """``groups`` with the defaults of the kinds that are not named."""
        return {**GROUP_SIZES, **self.groups}


class SearchTable(Table):
    """How much is spent: ``trials`` candidates are finetuned and evaluated."""

    trials: Count = 24


class ResourcesTable(Table):
    cpus: Count | None = None  # of this machine; all by default
    cpus_per_trial: Count = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0


class SearchConfig(Table):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of the run's folder
    seed: Natural = 0
    data: DataTable
    source: SourceTable
    scores: ScoresTable = ScoresTable()
    space: SpaceTable = SpaceTable()
    search: SearchTable = SearchTable()
    finetune: Recipe = Recipe()
    resources: ResourcesTable = ResourcesTable()

    def to_toml(self) -> str:
        """The resolved configuration, defaults filled in; keys that are unset are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a TOML file and apply ``key.path=value`` overrides.

    Raises:
        UserError: the file is missing or not TOML, or a key or value is not allowed; the message names the key, what
            was given, what is allowed and the nearest known key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _apply(data, override)
    return parse_config(data, str(path))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key.path=value`` options as nested tables. Raises UserError for one that has no key or no value."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply(data, override)
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override!r}: must be key=value, for example --set search.trials=48")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = data
    for i, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[: i + 1])} is not a table")
    table[parts[-1]] = value


def parse_config(data: Mapping[str, Any], where: str) -> SearchConfig:
    """Validate a configuration; UserError lists everything that is wrong with it, ``where`` it was found."""
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise UserError("\n".join([f"{where}:", *(f"  {problem}" for problem in problems)])) from error


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        table, word = ".".join(location[:-1]), location[-1]
        places = [name.rpartition(".") for name in _known(SearchConfig)]
        here = [leaf for place, _, leaf in places if place == table]
        elsewhere = [f"{place}.{leaf}" for place, _, leaf in places if leaf == word]
        close = f"did you mean '{elsewhere[0]}'?" if elsewhere else nearest(word, here)
        return f"{key}: unknown key; known here: {', '.join(here)}. {close}".strip()
    if problem["type"] == "missing":
        return f"{key}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    if isinstance(given, Mapping):  # a table's own rule: its message names the key
        return f"{key}: {message}"
    return f"{key} = {given!r}: {message[0].lower()}{message[1:]}"


def _known(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for option in _options(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _known(option, f"{prefix}{name}.")


def _options(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
