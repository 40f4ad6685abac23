"""What the JSON files of a run hold, and how they are read: every field is checked, and a file has its own digest."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError, model_validator

from prunesweep.models import UserError
from prunesweep.models.io import reading
from prunesweep.models.io.provenance import digest
from prunesweep.training import EvalMetrics

__all__ = [
    "EXACT",
    "FOLDER",
    "FORMAT",
    "Ending",
    "Result",
    "RunFacts",
    "Speed",
    "Speeds",
    "Task",
    "Validation",
    "place_of",
    "read_json",
    "read_sealed",
    "sealed",
    "task_id",
]

FOLDER = re.compile(r"r(\d+)-(\d{4,})")  # of a task
EXACT = ConfigDict(strict=True, extra="forbid")
FORMAT = 1  # of runs: from 1 on, every file that ``sealed`` writes must have its digest


def task_id(number: int, rung: int = 0) -> str:
    """Return the name of a task's folder.

    Args:
        number: of the candidate.
        rung: on which it is evaluated.
    """
    return f"r{rung}-{number:04d}"


def place_of(task_id: str) -> tuple[int, int]:
    """Return the rung and the number of a task, from its name. Raises ValueError for a name that is none."""
    found = FOLDER.fullmatch(task_id)
    if found is None:
        raise ValueError(f"{task_id!r} is not the name of a task")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Task:
    """One piece of work: (rung, candidate). It ends by itself and can be started again at any time."""

    __pydantic_config__: ClassVar = EXACT

    number: NonNegativeInt  # the Optuna trial
    point: dict[str, float | int | str]  # values of all variables, fixed ones too
    arch_hash: str
    key: str  # of the candidate
    seed: NonNegativeInt
    rung: NonNegativeInt = 0
    given: str | None = (
        None  # in the run's folder: the saved model or the decision in the place of what the point means
    )

    @property
    def id(self) -> str:
        return task_id(self.number, self.rung)


@dataclass(frozen=True)
class Result:
    """What a finished unit gave; ``top1`` in percent, after finetuning, and ``zero_shot``, of the model that
    training began with: cut, and recovered where that is on.

    Of a language model that is the accuracy of the next word, and there is its perplexity after finetuning, ``ppl``.
    ``loss`` is the mean cross-entropy, ``agreement`` with the source's answers is in percent, ``kl`` the divergence
    from them; ``images`` is the number of images (words) that all of them are of. The ``zero_shot`` of a search for
    agreement is an agreement; ``top1`` and ``loss`` are None where there are no labels. Runs of earlier versions lack
    what was not an objective.
    """

    __pydantic_config__: ClassVar = EXACT

    trial: NonNegativeInt
    top1: float | None
    zero_shot: float
    macs: PositiveInt
    params: PositiveInt
    arch_hash: str
    point: dict[str, float | int | str]
    seconds: float
    key: str = ""
    rung: NonNegativeInt = 0
    epochs: NonNegativeInt = 0  # of finetuning, on this rung and those below
    latency_ms: float | None = None  # predicted
    has_model: bool = True  # False on a rung that only screens
    training_seconds: float = 0.0  # of ``seconds``
    computing_seconds: float = 0.0  # of ``seconds``: making models without training, and measuring them
    ppl: float | None = None
    agreement: float | None = None
    kl: float | None = None
    loss: float | None = None
    images: int | None = None
    given: str | None = None  # as of the task
    balanced: float | None = None  # mean of the classes' recalls, in percent
    weights: str | None = None  # SHA-256 of the model's weights file; None where there is no model
    quality: float | None = None  # what search.quality measures
    error: float | None = None  # the same, where lower is better

    @property
    def id(self) -> str:
        return task_id(self.trial, self.rung)

    @property
    def figures(self) -> EvalMetrics:
        """The figures of the evaluation."""
        return EvalMetrics.of(vars(self))


class Ending(BaseModel):
    """What ``result.json`` says of a unit that has ended."""

    model_config = EXACT

    state: Literal["finished", "failed"]
    result: Result | None = None
    error: str | None = None

    @model_validator(mode="after")
    def _told(self) -> Self:
        told = "result" if self.state == "finished" else "error"
        if getattr(self, told) is None:
            raise ValueError(f"it has no {told}")
        return self


class Validation(BaseModel):
    """What ``validation.json`` says: what the model of a result gives on the validation split."""

    model_config = EXACT

    result: str  # digest of the result
    figures: dict[str, float]


@dataclass(frozen=True)
class Speed:
    """The latency of a front's member and of the source, measured side by side: medians, in ms per batch."""

    __pydantic_config__: ClassVar = EXACT

    unit: str
    arch_hash: str
    device: str
    device_name: str
    dtype: str
    threads: int | None  # of the CPU
    batch: PositiveInt
    median_ms: float
    source_ms: float


class Speeds(BaseModel):
    """What ``speed.json`` says."""

    model_config = EXACT

    rows: list[Speed]


class SourceFacts(BaseModel):
    """What ``run.json`` says of the source."""

    model_config = ConfigDict(strict=True)

    macs: PositiveInt
    params: PositiveInt
    name: str = ""
    weights: str = ""
    top1: float | None = None
    ppl: float | None = None
    agreement: float | None = None
    kl: float | None = None
    loss: float | None = None
    images: int | None = None
    balanced: float | None = None
    quality: float | None = None
    error: float | None = None
    latency_ms: float | None = None
    search: dict[str, float] = {}  # figures on the images by which candidates are compared


class RunFacts(BaseModel):
    """What ``run.json`` says; runs of earlier versions have no ``format``, no ``content`` and no ``settings``."""

    model_config = ConfigDict(strict=True)

    format: NonNegativeInt = 0
    source: SourceFacts
    scores: dict[str, str]  # names of files
    versions: dict[str, str | None]
    data: str = ""  # fingerprint
    content: dict[str, Any] = {}
    settings: dict[str, Any] = {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises UserError where it is damaged."""
    data = reading.read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: no JSON object")
    return data


def sealed(data: Mapping[str, Any]) -> str:
    """``data`` as JSON, with its own digest."""
    return json.dumps({**data, "digest": digest(data)}, indent=1)


def read_sealed(path: Path, form: type, *, unsealed: str | None = None) -> dict[str, Any]:
    """What ``sealed`` wrote.

    Args:
        path: the file.
        form: what the object must be; the object itself is returned.
        unsealed: the warning by which a file without a digest is believed; by default it is damaged.

    Raises:
        UserError: the file is damaged; the message names the field if one is wrong.
    """
    data = read_json(path)
    seal = data.pop("digest", None)
    try:
        _adapter(form).validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {_wrong(error.errors()[0])}") from error
    if seal is None and unsealed is None:
        raise UserError(f"{path} is damaged: it has no digest, which every file of this run was written with")
    if seal is None:
        warnings.warn(str(unsealed), stacklevel=1)  # from this line, so that it is shown once
    elif seal != digest(data):
        raise UserError(f"{path} is damaged: it has changed since it was written")
    return data


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def _wrong(problem: Any) -> str:
    name, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"it has no {name}"
    return f"{name} = {problem['input']!r}: {message}" if name else message
