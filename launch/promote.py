"""``prunesweep promote``: finetune chosen members of a run's front with a full recipe, and measure them."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from .data_options import check_data
from .place import RunArgument, shown

__all__ = ["promote"]


def promote(
    run: RunArgument,
    recipe: Annotated[str, typer.Option(help="a named recipe, or a .toml file", show_default=False)],
    top: Annotated[int | None, typer.Option(min=1, help="the most accurate ones", show_default=False)] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COST=LIMIT",
            help="the most accurate one within a limit, e.g. macs=0.5 (a share of the source's), params=5000000",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a field of the recipe")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="the run's data, if they were moved, e.g. imagefolder:PATH", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images per batch when latency is measured")] = 1,
    device: Annotated[str, typer.Option(help="where latency is measured: cpu, cuda or cuda:N")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="processes that train together, on Ray Train where above 1")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each worker")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker")] = 0,
    address: Annotated[
        str | None, typer.Option(help="of a running Ray cluster; a Ray of its own by default", show_default=False)
    ] = None,
) -> None:
    """Finetune chosen models of the front with a full recipe, and measure their latency; all of them by default."""
    from prunesweep.models import UserError
    from prunesweep.models.latency.timing import Setting
    from prunesweep.search import Run
    from prunesweep.search.config import read_overrides
    from prunesweep.search.execution.promote import choose, promoted
    from prunesweep.search.execution.promote import promote as promote_one
    from prunesweep.search.report.display import Display, print_promoted
    from prunesweep.search.report.page import write_report
    from prunesweep.search.store.front import cost_of
    from prunesweep.search.store.promoting import Promotions
    from prunesweep.search.store.records import task_id
    from prunesweep.training import EvalMetrics, load_recipe
    from prunesweep.training.jobs.placement import Placement

    from .console import PlainConsole
    from .finetune import reports
    from .next_commands import after_model, show_next

    fields = load_recipe(recipe, read_overrides(overrides or []))
    setting = Setting(batch=batch, device=device)
    setting.require_device()
    if data is not None:
        check_data(data, {})
    promotions = Promotions(run)
    found = Run.existing(promotions.path)
    limits = []
    for text in at or []:
        name, _, value = text.partition("=")
        try:
            limits.append((name, float(value)))
        except ValueError as error:
            raise UserError(f"--at {text}: must be COST=LIMIT with a number, for example macs=0.5") from error
    chosen = choose(found, top=top, at=limits)
    console = PlainConsole()
    display, placement = Display(console), Placement(workers, cpus=cpus, gpus=gpus, address=address)
    for number, point in enumerate(chosen, 1):
        display.note(f"{number}/{len(chosen)}: trial {point['trial']}, {EvalMetrics.of(point)} before")
        with promotions.making(task_id(point["trial"], point["rung"])), display.progress() as progress:
            say = reports(display, progress, fields.batch_size)
            say |= {"data": data, "placement": placement, "url": promotions.url}
            promote_one(found, point, recipe, fields, setting=setting, **say)
    write_report(found)
    promotions.publish_report()
    cost = cost_of(found.objectives)
    here = found.path if promotions.url is not None else run
    made = [{**p, "model": shown(here / p["model"])} for p in promoted(found)]
    print_promoted(console, made, found.metadata()["source"][cost], found.measure, cost)
    if promotions.url is not None:
        show_next(console, [("bring it here", f"prunesweep fetch {shlex.quote(promotions.url)}")])
        return
    last = run / "promoted" / task_id(chosen[0]["trial"], chosen[0]["rung"]) / "model"
    show_next(console, list(after_model(str(last), str(run / "source"))))
