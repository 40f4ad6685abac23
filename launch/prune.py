"""``prunesweep prune`` and ``prunesweep score``: apply one method to a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .data_options import (
    UNREADABLE,
    ClassesOption,
    ClassOrderOption,
    UnreadableOption,
    check_data,
    data_options,
)
from .protect import ProtectOption, check_protected

__all__ = ["prune", "score"]

Source = Annotated[str, typer.Argument(help="folder of a saved model, or a timm name", show_default=False)]
Method = Annotated[str, typer.Option(show_default=False)]  # its help comes from the table, see ``help``
DataName = Annotated[
    str,
    typer.Option(
        "--data", help="digits, glyphs, imagefolder:PATH, images:PATH, wds:PATH or hfds:NAME", show_default=False
    ),
]
Images = Annotated[int, typer.Option(min=1, help="calibration images, from the training split")]
BatchSize = Annotated[int, typer.Option(min=1, help="calibration images per batch")]
Seed = Annotated[int, typer.Option(min=0, help="of the choice of calibration images, and of training")]
Cache = Annotated[Path, typer.Option(help="folder of cached scores")]
CACHE = Path("runs/cache/scores")
RECOVER_IMAGES = 512


def prune(
    source: Source,
    method: Method,
    data: DataName,
    out: Annotated[
        Path | None, typer.Option(help="folder of the result, which must not exist yet", show_default=False)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="share of the source's cost (0.5), or a cost with K, M or G (1.2G); some methods that decide while "
            "they train serve several in one run (0.7,0.5)",
            show_default=False,
        ),
    ] = None,
    keep_rate: Annotated[
        float | None,
        typer.Option(help="token methods: share of patches kept, not a budget", show_default=False),
    ] = None,
    r: Annotated[int | None, typer.Option(min=0, help="tome: tokens merged per block", show_default=False)] = None,
    measure: Annotated[str, typer.Option(help="what the budget is counted in: macs, params or latency_ms")] = "macs",
    table: Annotated[
        Path | None, typer.Option(help="latency table of `prunesweep latency`, for latency_ms", show_default=False)
    ] = None,
    drop: Annotated[int, typer.Option(min=0, help="blocks to drop before, the least important ones")] = 0,
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            metavar="KIND=UNITS",
            help="units removed at a time, e.g. mlp=8, fewer where only that meets the budget; 0 keeps a kind whole",
        ),
    ] = None,
    floors: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            metavar="KIND=SHARE",
            help="share that stays, e.g. mlp=0.25; one unit of a kind always stays, so 0 is no floor",
        ),
    ] = None,
    protect: ProtectOption = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="scores of this model that `prunesweep score` wrote", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="a setting of the method, e.g. skip=111110, or a field of a recipe, recipe.epochs=5 or "
            "finetune.lr=1e-4, or a setting of the second stage, second_stage.alpha=0.5",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="of training while deciding  [default: the method's]", show_default=False)
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option(help="recipe of training afterwards, or none  [default: the method's]", show_default=False),
    ] = None,
    second_stage: Annotated[
        bool,
        typer.Option(
            "--second-stage",
            help="finetune in the method's own way: pmvit trains its matrices by settings of their own, spvit keeps "
            "convolutions mixed from their attention's weights",
        ),
    ] = False,
    recover: Annotated[
        bool | None,
        typer.Option(
            "--recover/--no-recover",
            help="refit what a cut leaves, in closed form, without labels and training  [default: where the source's "
            "family allows it]",
            show_default=False,
        ),
    ] = None,
    project: Annotated[
        bool,
        typer.Option("--project", help="the method decides how many channels stay, the best subspace decides what"),
    ] = False,
    recover_images: Annotated[
        int, typer.Option(min=2, help="images to refit on, from the training split; their labels are not read")
    ] = RECOVER_IMAGES,
    images: Images = 1024,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    cache: Cache = CACHE,
    workers: Annotated[int, typer.Option(min=1, help="processes that train together, on Ray Train where above 1")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each worker")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker")] = 0,
    address: Annotated[
        str | None, typer.Option(help="of a running Ray cluster; a Ray of its own by default", show_default=False)
    ] = None,
    class_order: ClassOrderOption = None,
    classes: ClassesOption = None,
    unreadable: UnreadableOption = UNREADABLE,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Make a model smaller by one method: cut it, plan its tokens, or search while it trains, and finetune."""
    from prunesweep.models import UserError
    from prunesweep.models.io.files import check_place
    from prunesweep.models.io.lock import reserve
    from prunesweep.training.jobs.placement import Placement
    from prunesweep.training.jobs.scoring import Calibration

    from .console import PlainConsole
    from .prune_kinds import find_method, means, runner_of
    from .prune_request import Request

    chosen = find_method(method)
    runner = runner_of(chosen)
    given = {
        "--budget": budget is not None,
        "--keep-rate": keep_rate is not None,
        "--r": r is not None,
        "--drop": drop > 0,
        "--group": bool(groups),
        "--floor": bool(floors),
        "--protect": bool(protect),
        "--scores": scores is not None,
        "--set": means(settings or [], runner),
        "--recipe": recipe is not None,
        "--measure": measure != "macs",
        "--second-stage": second_stage,
        "--recover": recover is True,
        "--project": project,
        "--recover-images": recover_images != RECOVER_IMAGES,
    }
    runner.check(chosen, given)
    if out is None and runner.saves(chosen):
        raise UserError("--out: give the folder of the result")
    if out is not None and out.exists():
        raise UserError(f"--out {out}: is there already; give a new folder")
    if measure not in ("macs", "params", "latency_ms"):
        raise UserError(f"--measure {measure}: must be one of macs, params, latency_ms")
    if (table is None) == (measure == "latency_ms"):
        raise UserError("--measure latency_ms and --table TABLE go together")
    request = Request(
        source=source,
        method=chosen,
        data=data,
        data_options=data_options(class_order, classes, unreadable),
        out=out,
        budgets=[_cost(part) for part in budget.split(",")] if budget is not None else [],
        keep_rate=keep_rate,
        r=r,
        measure=measure,
        table=table,
        drop=drop,
        groups=_pairs("--group", groups, int),
        floors=_pairs("--floor", floors, float),
        protect=check_protected(protect, source),
        scores=scores,
        settings=settings or [],
        recipe=recipe,
        finetune=finetune,
        second_stage=second_stage,
        calibration=Calibration(images, batch_size, seed),
        recover=recover,
        recover_images=recover_images,
        project=project,
        cache=cache,
        seed=seed,
        placement=Placement(workers, cpus=cpus, gpus=gpus, address=address),
        as_json=as_json,
        console=PlainConsole(stderr=as_json),
    )
    if scores is not None and not scores.is_file():
        raise UserError(f"--scores {scores}: there is no such file; prunesweep score writes one, and says where")
    request.check_names()
    if any(share == 0 for share in request.floors.values()):
        request.console.print("--floor KIND=0 is no floor: one unit of every kind always stays", highlight=False)
    check_data(data, request.data_options)
    request.check_stage()
    check_place(cache, "--cache", folder=True)
    with nullcontext() if out is None else reserve(out):
        runner.run(request)


def score(
    source: Source,
    method: Method,
    data: DataName,
    images: Images = 1024,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    cache: Cache = CACHE,
    class_order: ClassOrderOption = None,
    classes: ClassesOption = None,
    unreadable: UnreadableOption = UNREADABLE,
) -> None:
    """Score a model's units by one method and keep the scores; any later budget is then solved without scoring."""
    from prunesweep.models.io.files import check_place
    from prunesweep.pruners import ScoredMethod, TokenMethod, get_method
    from prunesweep.search.report.display import Display
    from prunesweep.training import open_fitting, warn_at_chance
    from prunesweep.training.jobs.one_shot import check_source, open_source
    from prunesweep.training.jobs.scoring import Calibration, cached_scores

    from .console import PlainConsole

    entry, options = get_method(method, ScoredMethod), data_options(class_order, classes, unreadable)
    check_place(cache, "--cache", folder=True)
    check_data(data, options)
    entry.check(check_source(source))
    model, console = open_source(source), PlainConsole()
    opened = open_fitting(data, model, **options)
    display = Display(console)
    display.data(opened.describe())
    warn_at_chance(source, model, opened)
    with display.progress() as progress:
        path = cached_scores(model, method, opened, Calibration(images, batch_size, seed), cache, progress)
    budget = "--keep-rate 0.5" if isinstance(entry, TokenMethod) else "--budget 0.5"
    console.print(str(path), highlight=False, soft_wrap=True)
    console.print(
        "used by the same options of prune, with this --cache and the same images, or anywhere by its name:\n"
        f"  prunesweep prune {source} --method {method} {budget} --data {data} --out DIR --scores {path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _cost(text: str) -> float:
    """Parse a number that may end in K, M or G, for 10^3, 10^6 and 10^9."""
    from prunesweep.models import UserError

    factors = {"K": 1e3, "M": 1e6, "G": 1e9}
    factor = factors.get(text[-1:].upper(), 1.0)
    try:
        return float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError as error:
        raise UserError(f"--budget {text}: must be a number such as 0.5, 300M or 1.2G") from error


def _pairs(option: str, given: list[str] | None, kind: Any) -> dict[str, Any]:
    """Parse options of the form KIND=VALUE to a dict."""
    from prunesweep.models import UserError
    from prunesweep.pruners import GROUP_SIZES

    found = {}
    for pair in given or ():
        name, _, value = pair.partition("=")
        try:
            found[name] = kind(value)
        except ValueError as error:
            raise UserError(f"{option} {pair}: must be KIND=VALUE with a number, for example mlp=8") from error
        if name not in GROUP_SIZES:
            raise UserError(f"{option} {pair}: unknown kind {name!r}; known: {', '.join(GROUP_SIZES)}")
    return found
