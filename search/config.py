"""The configuration of a search: TOML into typed models, with errors that name the key and what is allowed."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from prunesweep.models import Arch, UserError
from prunesweep.models.errors import nearest, plainly, shown
from prunesweep.models.io.reading import parse_toml, read_toml
from prunesweep.models.settings_table import SettingsTable
from prunesweep.pruners import GROUP_SIZES, TrainedMethod, WidthMethod, get_method, method_names
from prunesweep.pruners.protection import Protection
from prunesweep.pruners.subspaces import can_recover
from prunesweep.search.space.axes import AXES
from prunesweep.search.store.front import OBJECTIVES, OWN, QUALITIES, TWO, RankBy, Ranking
from prunesweep.search.store.progress import REDUCTION_FACTOR
from prunesweep.search.store.study_url import JOURNAL, why_not
from prunesweep.training import Recipe, absolute_name, load_recipe
from prunesweep.training.data import ClassOrder, read_names
from prunesweep.training.metrics import NAMES as MEASURED

__all__ = [
    "BUDGETS",
    "SearchConfig",
    "SpaceTable",
    "StartTable",
    "follow_axes",
    "load_config",
    "load_run_config",
    "parse_config",
    "run_config",
]

Count = Annotated[int, Field(ge=1, le=10_000_000)]  # more is a slip, and would only wait for memory or time
Natural = Annotated[int, Field(ge=0, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's generators take

BUDGETS = (0.75, 0.5, 0.3)  # of the methods that a search starts from, as far as they lie in its window
DECIDING = 10  # epochs in which they decide, unless their recipe says otherwise


class Table(SettingsTable, BaseModel):  # ruff sees that it is one of pydantic's only by a name of pydantic's
    pass


def _absolute(name: str) -> str:
    """``kind:PATH`` with an absolute path: a run is read again in other processes and from other folders."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if kind == "local-dir" and path else absolute_name(name)


PathName = Annotated[str, AfterValidator(_absolute)]


class DataTable(Table):
    name: PathName = Field(
        description="What is trained and measured on: digits, glyphs, imagefolder:PATH, images:PATH, wds:PATH "
        "or wds:URL, hfds:NAME; texts: pydocs, wikitext:PATH.",
    )
    loader_workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Processes that read and prepare images beside each process that trains."
    )
    class_order: ClassOrder | None = Field(
        default=None,
        description="Order of class folders: timm's (natural) or torchvision's (codepoint); unset: by the "
        "model's class names, else natural.",
    )
    classes: list[str] | str | None = Field(
        default=None, description="Names of the classes by label, or a file with one per line."
    )
    unreadable: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.001, description="Share of a split's images that may be unreadable; 10 always may."
    )
    search_split: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.2, description="Share of the training images that is held out, to compare candidates by."
    )
    test: PathName | None = Field(
        default=None,
        description="Other data of the same classes, on whose validation split the front is measured too, at the end.",
    )

    @field_validator("classes")
    @classmethod
    def _names(cls, given: list[str] | str | None) -> list[str] | None:
        """The names themselves: a run is read again on machines that do not have the file, and after it has changed."""
        try:
            return None if given is None else list(read_names(given))
        except UserError as error:
            raise ValueError(str(error).partition(": ")[2]) from error

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``open_data``, JSON-ready."""
        return self.model_dump(exclude={"name", "test"})


class SourceTable(Table):
    """The dense model: a timm name, or ``local-dir:PATH`` of a saved one; ``train`` trains it here."""

    model: PathName = Field(description="The dense model: a timm name, or local-dir:PATH of a saved one.")
    args: dict[str, Any] = Field(
        default={}, description="Keyword arguments of timm.create_model, checkpoint_path among them."
    )
    pretrained: bool = Field(default=False, description="Take the pretrained weights of the timm name.")
    pos_embed_std: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Standard deviation of the position embedding before the source is trained."
    )
    train: Recipe | None = Field(
        default=None, description="The recipe that trains the source here, with the keys of [finetune]."
    )

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> Self:
        saved = self.model.startswith("local-dir:") or "checkpoint_path" in self.args
        if not (saved or self.pretrained or self.train):
            raise ValueError("has no weights: set pretrained = true or args.checkpoint_path, or add [source.train]")
        if self.train and any(term.teacher == "source" for term in self.train.distill):
            raise ValueError("train.distill: the source has no source to learn from; name another teacher, or drop it")
        return self


class ScoresTable(Table):
    method: str = Field(
        default="nvit", description="The width method that scores units; prunesweep methods lists them."
    )
    images: Count = Field(default=1024, description="Calibration images, from the training split.")
    batch_size: Count = Field(
        default=16,
        description="Calibration images per batch; saliency is a mean of squared batch sums, so this matters.",
    )
    seed: Seed = Field(default=0, description="Of the choice of calibration images.")

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        known = method_names(WidthMethod)
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}. {nearest(name, known)}".strip())
        return name


class SpaceTable(Table):
    """What is searched. Its keys are those below and those of the axes (``search.space.axes``): see ``follow_axes``.

    Every axis is a range [low, high]; low = high fixes it.
    """

    encoding: Literal["compact", "full"] = Field(
        default="compact", description="compact: a few numbers; full: a bit and a mixer for every block."
    )
    groups: dict[str, Natural] = Field(
        default=dict(GROUP_SIZES), description="Units removed at a time, by kind; 0 leaves a kind whole."
    )
    params: tuple[float, float] | None = Field(
        default=None, description="Window [low, high] of parameters; what lies outside is never built."
    )
    latency_ms: tuple[float, float] | None = Field(
        default=None, description="Window [low, high] of the predicted latency in ms."
    )
    latency_table: str | None = Field(
        default=None, description="File of prunesweep latency, by which latency is predicted."
    )
    protect: tuple[str, ...] = Field(
        default=(),
        description="What no candidate touches: blocks=0,11, or units of a kind, mlp=0,1 in some blocks, embed or "
        "heads everywhere.",
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The keys of the axes."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        ranges = [name for name in AXES if name in type(self).model_fields]
        for name in (*ranges, "params", "latency_ms"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: low must not exceed high")
        for name in ranges:
            low, high = getattr(self, name)
            limits = AXES[name].limits
            if limits is not None and not limits.allow(low, high):
                raise ValueError(f"{name} = [{low}, {high}]: {limits.text}")
        for axis in AXES.values():
            axis.check(self)
        if self.latency_ms is not None and self.latency_table is None:
            raise ValueError("latency_ms: needs latency_table, the file of `prunesweep latency`")
        try:
            Protection.parse(self.protect)
        except UserError as error:
            raise ValueError(str(error)) from error
        if unknown := sorted(set(self.groups) - set(GROUP_SIZES)):
            raise ValueError(f"groups.{unknown[0]}: unknown kind; known: {', '.join(GROUP_SIZES)}")
        return self

    @property
    def group_sizes(self) -> dict[str, int]:
        """``groups`` with the defaults of the kinds that are not named."""
        return {**GROUP_SIZES, **self.groups}


_OWN_FIELDS = dict(SpaceTable.model_fields)


def follow_axes() -> None:
    """Give ``SpaceTable`` the keys of the axes that are in ``AXES`` now, and none of others.

    Pydantic validates from a schema that is made with the class, so those of ``SpaceTable`` and of the configuration
    around it are made anew.
    """
    axes = {
        key: FieldInfo.from_annotated_attribute(annotation, default)
        for axis in AXES.values()
        for key, (annotation, default) in axis.fields().items()
    }
    for name in AXES.keys() & axes.keys():
        axes[name].description = axes[name].description or f"Range: {AXES[name].meaning}."
    SpaceTable.__pydantic_fields__.clear()
    SpaceTable.__pydantic_fields__.update({"encoding": _OWN_FIELDS["encoding"], **axes, **_OWN_FIELDS})
    for model in (SpaceTable, SearchConfig):
        model.model_rebuild(force=True)


class GatesTable(Table):
    """The UVC run whose gates order the blocks, where ``space.skip_order`` is learned: one, before the search."""

    recipe: Recipe = Field(
        default=Recipe(epochs=10, min_lr=1e-5), description="How the UVC run is trained, with the keys of [finetune]."
    )
    settings: dict[str, Any] = Field(
        default={}, description="Settings of method uvc; prunesweep methods uvc lists them."
    )

    @field_validator("settings")
    @classmethod
    def _allowed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            get_method("uvc", TrainedMethod).for_budgets([0.5], {k: v for k, v in settings.items() if k != "budgets"})
        except UserError as error:
            raise ValueError(str(error)) from error
        return settings


def _named_recipe(given: Any) -> Any:
    """Fill in the fields of a recipe that is named: ``"uvc_stage1"``, or a table with ``recipe`` among its keys.

    Without a name it is ``quick``, of ``DECIDING`` epochs.
    """
    if isinstance(given, str):
        given = {"recipe": given}
    if not isinstance(given, dict):
        return given
    fields = dict(given) if "recipe" in given else {"recipe": "quick", "epochs": DECIDING, **given}
    try:
        return load_recipe(str(fields.pop("recipe")), fields)
    except UserError as error:
        raise ValueError(str(error)) from error


class StartTable(Table):
    """How a method of ``search.start_methods`` decides, once, before the search: ``[start.uvc]``.

    Without ``budgets`` they are those of ``BUDGETS`` in the search's window; of a method that serves one budget in a
    run, the middle one of them. Several budgets of such a method are a run each. Settings that pace the method follow
    from the recipe's updates where they are left out.
    """

    recipe: Annotated[Recipe, BeforeValidator(_named_recipe)] = Field(
        default_factory=lambda: _named_recipe({}),
        description="How the model is trained while the method decides: a recipe's name, or keys of [finetune] "
        "and recipe; unset: quick, of 10 epochs.",
    )
    budgets: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(),
        description="Shares of the source's MACs that it decides for; unset: of 0.75, 0.5 and 0.3 those within "
        "space.budget.",
    )
    settings: dict[str, Any] = Field(
        default={}, description="Settings of the method; prunesweep methods NAME lists them."
    )

    def within(self, method: str, window: tuple[float, float]) -> StartTable:
        """Return the table with its budgets filled in.

        Args:
            method: whose table it is.
            window: smallest and largest budget of the search.
        """
        if self.budgets:
            return self
        low, high = window
        shares = [share for share in BUDGETS if low <= share <= high and share < 1] or [min((low + high) / 2, 0.99)]
        several = get_method(method, TrainedMethod).several
        return self.model_copy(update={"budgets": tuple(shares) if several else (shares[len(shares) // 2],)})

    @field_validator("budgets")
    @classmethod
    def _once(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError("names a budget twice")
        return budgets

    @field_validator("recipe")
    @classmethod
    def _trains(cls, recipe: Recipe) -> Recipe:
        if not recipe.epochs:
            raise ValueError("epochs = 0: the method decides while it trains, which takes at least one epoch")
        return recipe


class SearchTable(Table):
    """What is optimised, by which sampler, and how much is spent: ``trials`` candidates, the best of them further.

    ``rungs`` are epochs of finetuning. Every candidate starts on the first rung; one in ``reduction_factor`` goes on to
    the next, from the weights it has. A first rung of 0 epochs screens candidates untrained, on ``screen_images`` of
    the images that candidates are compared by (where ``data.search_split`` is 0, of the training split). Without rungs
    there is one, of ``finetune.epochs``.
    """

    trials: Count = Field(default=24, description="Candidates.")
    objectives: tuple[str, ...] = Field(
        default=TWO,
        description="One quality and one or more costs: top1, balanced, ppl, agreement or, with search.quality, "
        "quality, and macs, params or latency_ms.",
    )
    quality: str | None = Field(
        default=None,
        description="A measure of models in the place of the accuracy: python:MODULE:FUNCTION, a function of one's "
        "own; for sources without a head, knn or probe: top-1 of the nearest training images, or of a linear probe.",
    )
    rank_by: RankBy = Field(
        default="auto",
        description="What stands for the quality where candidates are compared; auto: loss, or KL to the source "
        "for untrained ones.",
    )
    study: str = Field(
        default=JOURNAL,
        description="Where Optuna's study is kept: journal, in the run's folder, or a database, "
        "postgresql://USER@HOST/DATABASE or redis://HOST:6379/0 (extra study).",
    )
    sampler: Literal["auto", "budget_gp", "tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = Field(
        default="auto", description="What proposes candidates; auto follows from the objectives."
    )
    rungs: Annotated[tuple[Natural, ...], Field(max_length=20)] = Field(
        default=(),
        description="Epochs of finetuning on each rung, the first of which may have 0; unset: one rung, of "
        "finetune.epochs.",
    )
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        default=REDUCTION_FACTOR, description="Candidates of a rung for each that goes on to the next one."
    )
    screen_images: Count = Field(
        default=1024, description="Images on which a first rung of 0 epochs compares candidates."
    )
    recover: bool = Field(
        default=True, description="Refit what a cut leaves, in closed form, where the source's family allows it."
    )
    project: bool = Field(
        default=True,
        description="Project widths: how many stay is decided as ever, the best subspace decides what; not for texts.",
    )
    recover_images: Annotated[int, Field(ge=2)] = Field(
        default=512, description="Images to refit on, from the training split; their labels are not read."
    )
    start: tuple[dict[str, float | int | str], ...] = Field(
        default=(), description="Points to begin with, each a table of variables."
    )
    start_from: Annotated[tuple[str, ...], BeforeValidator(lambda own: (own,) if isinstance(own, str) else own)] = (
        Field(default=(), description="Runs and folders of computed or saved models, whose fronts are begun with.")
    )
    start_neutral: Natural = Field(
        default=0,
        description="How many of the points to begin with lie over the budget's range, with all other axes neutral.",
    )
    start_published: bool = Field(
        default=False, description="Begin with what papers published for models of the source's family too."
    )
    start_methods: tuple[str, ...] = Field(
        default=(),
        description="Methods that decide while they train, whose decisions are begun with: uvc, spvit, nvit-iterative.",
    )
    measure_front: bool = Field(
        default=False, description="Measure at the end how fast the front is beside the source, at batch 1 and 64."
    )
    keep_models: Literal["front", "all"] = Field(
        default="front", description="Whether models that left the front are deleted (front) or kept (all)."
    )

    def recovers(self, arch: Arch) -> bool:
        """Whether candidates of a source are refitted."""
        return self.recover and can_recover(arch) is None

    def projects(self, arch: Arch) -> bool:
        """Whether candidates of a source are projected to the widths that are decided."""
        return self.project and self.recovers(arch) and arch.text is None

    @field_validator("start_methods")
    @classmethod
    def _decide(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                get_method(name, TrainedMethod)
            except UserError as error:
                raise ValueError(str(error)) from error
        if len(set(names)) < len(names):
            raise ValueError("names a method twice")
        return names

    @field_validator("sampler", mode="before")
    @classmethod
    def _renamed(cls, sampler: Any) -> Any:
        if sampler == "excess":
            raise ValueError("sampler = 'excess' is now called 'budget_gp'; change it in the file, it is the same one")
        return sampler

    @field_validator("quality")
    @classmethod
    def _named(cls, quality: str | None) -> str | None:
        if quality is not None and quality not in MEASURED and not re.fullmatch(r"python:[\w.]+:\w+", quality):
            raise ValueError(f"must be {', '.join(MEASURED)} or python:MODULE:FUNCTION")
        return quality

    @model_validator(mode="before")
    @classmethod
    def _with_quality(cls, given: Any) -> Any:
        """Where only a quality is named, it and MACs are the objectives."""
        if isinstance(given, dict) and given.get("quality") is not None and "objectives" not in given:
            return {**given, "objectives": (OWN[0], *(name for name in TWO if name not in QUALITIES))}
        return given

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = self.objectives
        if reason := why_not(self.study):  # here, because what is wrong with a key's own rule is shown as it is
            raise ValueError(reason)
        if (self.quality is None) == bool(set(OWN) & set(names)):
            raise ValueError(
                f"objectives = {list(names)}: "
                + (
                    "has quality, so search.quality must say what measures it: knn, probe or python:MODULE:FUNCTION"
                    if self.quality is None
                    else f"must have quality, which quality = {self.quality!r} measures, in the place of another one"
                )
            )
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives: {name!r} is none; known: {', '.join(OBJECTIVES)}")
        if len(set(QUALITIES) & set(names)) != 1 or len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(
                f"objectives = {list(names)}: must be top1, or agreement with the source, and one or more costs, each "
                "once; of texts, ppl and costs; balanced, the mean of the classes' recalls, may stand for top1"
            )
        if 0 in self.rungs[1:] or self.rungs == (0,):
            raise ValueError(f"rungs = {list(self.rungs)}: only the first of several may have 0 epochs")
        if self.rank_by == "loss" and "agreement" in names:
            raise ValueError("rank_by = 'loss': objectives has agreement, which needs no labels; take 'kl' or 'auto'")
        return self

    @property
    def ranking(self) -> Ranking:
        """What candidates are compared by."""
        return Ranking(self.objectives, self.rank_by)


class ResourcesTable(Table):
    """What runs side by side. A trial of several workers trains on Ray Train; they may lie on different nodes."""

    cpus: Count | None = Field(
        default=None, description="CPUs of this machine that are used; unset: all that this process may use."
    )
    workers_per_trial: Count = Field(
        default=1, description="Processes that train a candidate together; above 1 on Ray Train."
    )
    cpus_per_trial: Count = Field(default=1, description="CPUs of each of a trial's workers.")
    gpus_per_trial: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs of each of a trial's workers; a part of one is allowed."
    )


# what ends up in scripts and manifests of others: no line breaks, and nothing that a shell or SLURM reads as more
URL = r"^[a-z][a-z0-9+.-]+://[^\x00-\x20\x7f`\"\\]+$"
FOLDER = r"^/[^\x00-\x1f\x7f:$`\"\\]*$"  # a colon parts the two sides of a container's mount
ADDRESS = r"^https?://[^\x00-\x20\x7f$`\"'\\;]+$"
OBJECT = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
LABEL = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"  # of Kubernetes
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$"
TAINT = rf"{LABEL[:-1]}(={LABEL_VALUE[1:-1]})?:(NoSchedule|PreferNoSchedule|NoExecute)$"
SLURM_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.,@:+-]*$"
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]*$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OneLine = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$")]


class ClusterTable(Table):
    """Where and how the search runs on several machines: for ``submit``, ``manifest`` and ``doctor``.

    Nothing here changes a candidate or a figure. Secrets do not belong here: the table is kept in the run's folder and
    shown by Ray's dashboard.
    """

    address: Annotated[str | None, Field(pattern=ADDRESS, description="of the head's dashboard and job API")] = None
    storage: Annotated[
        str | None,
        Field(
            pattern=f"{FOLDER}|{URL}",
            description="folder that all nodes see and write to, or a URL as s3://BUCKET/runs; runs are kept in it",
        ),
    ] = None
    data: Annotated[
        str | None, Field(pattern=FOLDER, description="folder of the data on the nodes, instead of data.name's path")
    ] = None
    nodes: Annotated[int, Field(ge=1, le=1_000_000, description="machines that run trials")] = 1
    max_nodes: Annotated[
        int | None,
        Field(ge=1, le=1_000_000, description="of them that come when asked and go when idle; unset: nodes are fixed"),
    ] = None
    cpus: Annotated[int, Field(ge=1, le=1_000_000, description="of each of them")] = 8
    gpus: Annotated[int, Field(ge=0, le=1_000_000, description="of each of them")] = 0
    memory_gib: Annotated[int, Field(ge=1, le=1_000_000, description="of each of them, in GiB")] = 32
    env: Annotated[
        dict[VariableName, OneLine], Field(description="environment variables of driver and trials; no secrets")
    ] = {}
    exclude: Annotated[
        tuple[str, ...], Field(description="patterns of files of the packages that submit leaves behind, e.g. *.ipynb")
    ] = ()
    setup: Annotated[
        tuple[OneLine, ...], Field(description="shell lines before Ray starts, e.g. activating an environment")
    ] = ()
    image: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", description="container with Ray, torch and this package"),
    ] = None
    namespace: Annotated[str, Field(pattern=OBJECT, description="of Kubernetes")] = "default"
    storage_claim: Annotated[
        str | None, Field(pattern=OBJECT, description="PersistentVolumeClaim mounted at storage")
    ] = None
    data_claim: Annotated[
        str | None, Field(pattern=OBJECT, description="PersistentVolumeClaim mounted, read-only, at data")
    ] = None
    node_selector: Annotated[
        dict[Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]],
        Field(description="labels of the Kubernetes nodes that run trials, e.g. of a spot pool"),
    ] = {}
    tolerations: Annotated[
        tuple[Annotated[str, Field(pattern=TAINT)], ...],
        Field(description="taints of Kubernetes nodes that trials may run on, KEY[=VALUE]:EFFECT, e.g. of a spot pool"),
    ] = ()
    hosts: Annotated[tuple[HostName, ...], Field(description="addresses of machines for ray up, the head first")] = ()
    ssh_user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9._-]*$", description="who logs in to hosts")] = (
        "ubuntu"
    )
    partition: Annotated[str | None, Field(pattern=SLURM_NAME, description="of SLURM")] = None
    account: Annotated[str | None, Field(pattern=SLURM_NAME, description="of SLURM")] = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+:\d\d:\d\d$", description="SLURM's limit, [days-]h:mm:ss")] = (
        "24:00:00"
    )
    restarts: Annotated[int, Field(ge=0, description="times that a lost job is started again, to resume")] = 3

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if name.startswith("RAY_AUTH_") or name.upper().endswith(("TOKEN", "SECRET", "PASSWORD", "_KEY")):
                raise ValueError(f"{name} looks like a secret: set it in the nodes' own environment")
        return env


class LoggingTable(Table):
    """Tools that are told of the search beside its own files. One that does not answer is told no more; nothing fails.

    They are told by the driver. Nothing here changes a candidate or a figure.
    """

    mlflow: Annotated[
        str | None,
        Field(pattern=r"^[^\x00-\x20\x7f]+$", description="URI of MLflow's tracking server or store (extra mlflow)"),
    ] = None
    wandb: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9._-]+$", description="project of Weights & Biases (extra wandb)"),
    ] = None


class SearchConfig(Table):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="Of the run's folder, below runs/."
    )
    seed: Seed = Field(default=0, description="Of proposals, of training and of what is held out.")
    data: DataTable = Field(description="The data.")
    source: SourceTable = Field(description="The model that is compressed.")
    scores: ScoresTable = Field(default=ScoresTable(), description="How units are scored, once.")
    gates: GatesTable = Field(
        default=GatesTable(), description="The UVC run whose gates order the blocks, where space.skip_order is learned."
    )
    space: SpaceTable = Field(
        default_factory=lambda: SpaceTable(),
        description="What is searched: a range [low, high] for every axis; low = high fixes it.",
    )
    search: SearchTable = Field(default=SearchTable(), description="What is optimised, by what, and how much is spent.")
    start: Annotated[
        dict[str, StartTable],
        Field(validate_default=True, description="How the methods of search.start_methods decide, by their names."),
    ] = {}
    finetune: Recipe = Field(
        default=Recipe(),
        description="How candidates are trained; recipe = NAME takes a recipe's values where keys are left out.",
    )
    resources: ResourcesTable = Field(default=ResourcesTable(), description="What runs side by side.")
    logging: LoggingTable = Field(default=LoggingTable(), description="Tools that are told of the search.")
    cluster: ClusterTable | None = Field(
        default=None, description="Several machines: for submit, manifest and doctor; nothing here changes a result."
    )

    @field_validator("start")
    @classmethod
    def _of_start_methods(cls, tables: dict[str, StartTable], others: ValidationInfo) -> dict[str, StartTable]:
        """Check the settings of the methods that a search starts from."""
        search, space = others.data.get("search"), others.data.get("space")
        if search is None or space is None:  # which is told already
            return tables
        for name in tables:
            if name not in search.start_methods:
                raise ValueError(
                    f"{name}: is not in search.start_methods = {list(search.start_methods)}. "
                    f"{nearest(name, search.start_methods)}".rstrip()
                )
        filled = {name: tables.get(name, StartTable()) for name in search.start_methods}
        found = {name: table.within(name, space.budget) for name, table in filled.items()}
        for name, table in found.items():
            try:
                get_method(name, TrainedMethod).for_budgets(table.budgets[:1], table.settings)
            except UserError as error:
                raise ValueError(f"{name}.settings: {error}") from error
        return found

    @field_validator("finetune", mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        """Fill in the fields of a named recipe: ``recipe = "gentle"``."""
        if not isinstance(fields, dict) or "recipe" not in fields:
            return fields
        try:
            return load_recipe(str(fields["recipe"]), {name: v for name, v in fields.items() if name != "recipe"})
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("finetune")
    @classmethod
    def _one_rate(cls, recipe: Recipe, others: ValidationInfo) -> Recipe:
        searched = getattr(others.data.get("space"), "lr", None)
        if recipe.lr_by_share and searched and searched != AXES["lr"].default:
            raise ValueError(
                "lr_by_share makes the learning rate follow from what is removed, but there is space.lr = "
                f"{list(searched)}: drop that, or set finetune.lr_by_share = [] to search for the rate"
            )
        return recipe

    def to_toml(self) -> str:
        """The resolved configuration, defaults filled in; keys that are unset are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


follow_axes()


RENAMED = {"search.eta": "search.reduction_factor"}  # keys of earlier versions
# what runs did before a key was there; every run's file has all keys
BEFORE = {
    "search.recover": False,
    "search.project": False,
    "search.rank_by": "objective",
    "data.search_split": 0.0,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a TOML file and apply ``key.path=value`` overrides.

    Args:
        path: the file.
        overrides: ``key.path=value``, each value as TOML would have it; a bare word is a string.

    Raises:
        UserError: the file is missing or not TOML, or a key or value is not allowed; the message names the key, what
            was given, what is allowed and the nearest known key.
    """
    data = read_toml(Path(path), what="configuration")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, str(path))


def load_run_config(folder: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read the ``search.toml`` of a run, which may be of an earlier version with other names of keys.

    Args:
        folder: the run's folder.
        overrides: as for ``load_config``.

    Raises:
        UserError: as for ``load_config``.
    """
    path = Path(folder) / "search.toml"
    return run_config(read_toml(path, what="configuration"), str(path), overrides)


def run_config(data: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> SearchConfig:
    """Validate the configuration of a run, which may be of an earlier version with other names of keys.

    Args:
        data: the tables, as TOML gives them; changed in place.
        where: what error messages call it.
        overrides: as for ``load_config``.

    Raises:
        UserError: as for ``load_config``.
    """
    for old, new in RENAMED.items():
        table, _, key = old.partition(".")
        if key in data.get(table, {}):
            data[table][new.rpartition(".")[2]] = data[table].pop(key)
    for name, value in BEFORE.items():
        table, _, key = name.partition(".")
        data.setdefault(table, {}).setdefault(key, value)
    for override in overrides:
        _apply(data, override)
    return parse_config(data, where)


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
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a bare word is a string
    table = data
    for i, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[: i + 1])} is not a table")
    table[parts[-1]] = value


def parse_config(data: Mapping[str, Any], where: str) -> SearchConfig:
    """Validate a configuration.

    Args:
        data: the tables, as TOML gives them.
        where: what error messages call it, usually the file.

    Raises:
        UserError: lists everything that is wrong with it.
    """
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise UserError("\n".join([f"{where}:", *(f"  {problem}" for problem in problems)])) from error


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if key in RENAMED:
        return f"{key}: is called {RENAMED[key]} now"
    if problem["type"] == "extra_forbidden":
        table, word = ".".join(location[:-1]), location[-1]
        places = [name.rpartition(".") for name in _known(SearchConfig)]
        here = [leaf for place, _, leaf in places if fnmatchcase(table, place)]
        elsewhere = [f"{place}.{leaf}" for place, _, leaf in places if leaf == word]
        close = f"did you mean '{elsewhere[0]}'?" if elsewhere else nearest(word, here)
        return f"{key}: unknown key; known here: {', '.join(here)}. {close}".strip()
    if problem["type"] == "missing":
        return f"{key}: is missing"
    message, given = plainly(problem), problem["input"]
    if isinstance(given, Mapping):  # a table's own rule: its message names the key
        return f"{key}: {message}"
    return f"{key} = {shown(given)}: {message[0].lower()}{message[1:]}"


def _known(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys; ``*`` stands for the names of tables that a user chooses."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for option in _options(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                named = "*." if typing.get_origin(field.annotation) is dict else ""
                yield from _known(option, f"{prefix}{name}.{named}")


def _options(annotation: Any) -> tuple[Any, ...]:
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is dict
    return typing.get_args(annotation) if several else (annotation,)
