"""``prunesweep prune`` and ``prunesweep score``: one method, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["prune", "score"]

Source = Annotated[str, typer.Argument(help="folder of a saved model, or a timm name", show_default=False)]
Method = Annotated[str, typer.Option(help="nvit, upvit, isomorphic, taylor, magnitude or random", show_default=False)]
DataName = Annotated[
    str, typer.Option("--data", help="digits, imagefolder:PATH, wds:PATH or hfds:NAME", show_default=False)
]
Images = Annotated[int, typer.Option(min=1, help="calibration images, from the training split")]
BatchSize = Annotated[int, typer.Option(min=1, help="calibration images per batch")]
Seed = Annotated[int, typer.Option(min=0, help="of the choice of calibration images")]
Cache = Annotated[Path, typer.Option(help="folder of cached scores")]
CACHE = Path("runs/cache/scores")


def prune(
    source: Source,
    method: Method,
    budget: Annotated[
        str, typer.Option(help="share of the source's cost (0.5), or a cost with K, M or G (1.2G)", show_default=False)
    ],
    data: DataName,
    out: Annotated[Path, typer.Option(help="folder of the cut model, which must not exist yet", show_default=False)],
    measure: Annotated[str, typer.Option(help="what the budget is counted in: macs, params or latency_ms")] = "macs",
    table: Annotated[
        Path | None, typer.Option(help="latency table of `prunesweep latency`, for latency_ms", show_default=False)
    ] = None,
    drop: Annotated[int, typer.Option(min=0, help="blocks to drop before, the least important ones")] = 0,
    groups: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="KIND=UNITS", help="units removed at a time, e.g. mlp=8; 0 keeps a kind whole"),
    ] = None,
    floors: Annotated[
        list[str] | None, typer.Option("--floor", metavar="KIND=SHARE", help="share that stays, e.g. mlp=0.25")
    ] = None,
    images: Images = 1024,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    cache: Cache = CACHE,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Cut a model to a budget by one method, without training it."""
    from rich.console import Console

    from models import LatencyTable, UserError, arch_of
    from pruners import MACS, PARAMS, latency
    from search.display import Display
    from search.prune import Budget, open_source, prune_once, save_pruned
    from search.scoring import Calibration

    measures = {"macs": MACS, "params": PARAMS}
    if measure not in (*measures, "latency_ms"):
        raise UserError(f"--measure {measure}: must be one of {', '.join(measures)}, latency_ms")
    if (table is None) == (measure == "latency_ms"):
        raise UserError("--measure latency_ms and --table TABLE go together")
    if out.exists():
        raise UserError(f"--out {out}: is there already; give a new folder")
    units, shares = _pairs("--group", groups, int), _pairs("--floor", floors, float)
    console = Console(stderr=as_json)
    model = open_source(source)
    if table is not None:
        measures["latency_ms"] = latency(LatencyTable.load(table), arch_of(model))
    wanted = Budget(_cost(budget), measures[measure])
    with Display(console).progress() as progress:
        pruned = prune_once(
            model,
            data,
            method,
            wanted,
            drop=drop,
            groups=units,
            floors=shares,
            calibration=Calibration(images, batch_size, seed),
            cache=cache,
            progress=progress,
        )
    save_pruned(pruned, out)
    before, after = pruned.source_cost, pruned.cost
    if as_json:
        facts = {"top1": pruned.top1, "source_top1": pruned.source_top1, "macs": after.macs, "params": after.params}
        print(json.dumps({**facts, "model": str(out)}))
        return
    console.print(
        f"{after.macs:,} MACs ({after.macs / before.macs:.3f} of the source's), "
        f"{after.params:,} params ({after.params / before.params:.3f})\n"
        f"top-1 without training {pruned.top1:.2f} % (source {pruned.source_top1:.2f} %); saved as {out}",
        highlight=False,
        soft_wrap=True,
    )


def score(
    source: Source,
    method: Method,
    data: DataName,
    images: Images = 1024,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    cache: Cache = CACHE,
) -> None:
    """Score a model's units by one method and keep the scores; any later budget is then solved without scoring."""
    from rich.console import Console

    from search.display import Display
    from search.prune import open_source
    from search.scoring import Calibration, cached_scores
    from training import open_data

    model, console = open_source(source), Console()
    opened = open_data(data, model.pretrained_cfg)
    with Display(console).progress() as progress:
        path = cached_scores(model, method, opened, Calibration(images, batch_size, seed), cache, progress)
    console.print(str(path), highlight=False, soft_wrap=True)


def _cost(text: str) -> float:
    """A number, with K, M or G behind it for thousands, millions, thousand millions."""
    from models import UserError

    factors = {"K": 1e3, "M": 1e6, "G": 1e9}
    factor = factors.get(text[-1:].upper(), 1.0)
    try:
        return float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError as error:
        raise UserError(f"--budget {text}: must be a number such as 0.5, 300M or 1.2G") from error


def _pairs(option: str, given: list[str] | None, kind: Any) -> dict[str, Any]:
    """KIND=VALUE options as a dict."""
    from models import UserError
    from pruners import GROUP_SIZES

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
