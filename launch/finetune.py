"""``prunesweep finetune``: train a saved model by a recipe, in this process or on Ray Train's workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .data_options import UNREADABLE, ClassesOption, ClassOrderOption, UnreadableOption, data_options

__all__ = ["finetune", "reports"]


def finetune(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="folder of a saved model", show_default=False)],
    data: Annotated[
        str,
        typer.Option(help="digits, glyphs, imagefolder:PATH, images:PATH, wds:PATH or hfds:NAME", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(help="folder of the trained model, which must not exist yet", show_default=False)
    ],
    recipe: Annotated[str, typer.Option(help="a named recipe, or a .toml file")] = "quick",
    teacher: Annotated[
        Path | None, typer.Option(help="saved model that distillation calls the source", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="instead of the recipe's", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a field of the recipe, e.g. lr=1e-4"),
    ] = None,
    second_stage: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="finetune in this method's own way, with settings as --set second_stage.NAME=VALUE: pmvit trains its "
            "matrices by settings of their own, spvit keeps convolutions mixed from their attention's weights (the "
            "teacher is then the model that was cut)",
            show_default=False,
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="side of the images to train at, where it is another than the model's: position embeddings are "
            "resampled, the teacher's too; token plans are for one size",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|MIN-MAX",
            help="processes that train together, on Ray Train where above 1; 2-4 goes on with as few as 2 where nodes "
            "are lost, with the same batches",
        ),
    ] = "1",
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each worker")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker")] = 0,
    address: Annotated[
        str | None, typer.Option(help="of a running Ray cluster; a Ray of its own by default", show_default=False)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="path or URI that all nodes can write to  [default: beside --out]", show_default=False),
    ] = None,
    loader_workers: Annotated[int, typer.Option(min=0, help="processes per worker that load images")] = 0,
    class_order: ClassOrderOption = None,
    classes: ClassesOption = None,
    unreadable: UnreadableOption = UNREADABLE,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Train a saved model; the same command continues a run that was stopped."""
    from prunesweep.models import UserError, cost, load_provenance, read_arch
    from prunesweep.models.io.lock import reserve
    from prunesweep.models.precision import to_float32
    from prunesweep.search.config import read_overrides
    from prunesweep.search.report.display import Display
    from prunesweep.training import EvalMetrics, load_recipe, warn_at_chance
    from prunesweep.training.jobs.finetune import Finetuning
    from prunesweep.training.jobs.finetune import finetune as train
    from prunesweep.training.jobs.placement import Placement, worker_range
    from prunesweep.training.jobs.training_job import load_sized
    from prunesweep.training.second_stage import SecondStageJob

    from .console import PlainConsole
    from .next_commands import after_model, show_next

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first:
        context.with_resource(reserve(out))
    fields: dict[str, Any] = read_overrides(overrides or [])
    if isinstance(own := fields.get("recipe"), dict):  # as `prune` names them
        fields = {**{name: value for name, value in fields.items() if name != "recipe"}, **own}
    if epochs is not None:
        fields["epochs"] = epochs
    stage = fields.pop("second_stage", {})
    if not isinstance(stage, dict) or (stage and second_stage is None):
        raise UserError("--set second_stage...: give --second-stage METHOD, and second_stage.NAME=VALUE")
    least, most = worker_range(workers)
    before = read_arch(model)
    if img_size is not None and second_stage is not None:
        raise UserError(f"--img-size: --second-stage {second_stage} trains what was cut, at its own size; drop one")
    job = Finetuning(
        model=model.absolute(),
        data=data,
        recipe=load_recipe(recipe, fields),
        out=out.absolute(),
        teacher=None if teacher is None else teacher.absolute(),
        seed=seed,
        data_options={**data_options(class_order, classes, unreadable), "loader_workers": loader_workers},
        second_stage=None if second_stage is None else SecondStageJob(second_stage, stage),
        img_size=None if img_size is None or before.img_size == (img_size, img_size) else (img_size, img_size),
    )
    placement = Placement(most, least if least < most else None, cpus, gpus, address, storage)
    console = PlainConsole(stderr=as_json)
    display = Display(console)
    opened = job.check()
    display.data(opened.describe())
    if job.img_size is not None:
        now = job.record(job.model)
        was, own = ("{} x {}".format(*arch.img_size) for arch in (before, now))
        display.note(f"images of {own} instead of {was}: {cost(now).macs:,} MACs, before {cost(before).macs:,}")
    if first:
        start = job.teacher or job.model
        warn_at_chance(
            str(teacher or model), to_float32(load_sized(start, job.img_size)), opened, untrained=teacher is None
        )
    with display.progress() as progress:
        train(job, placement, **reports(display, progress, job.recipe.batch_size))
    if not out.exists():  # a worker of torchrun's that is not the first one
        return
    spent, found = cost(read_arch(out)), EvalMetrics.of(load_provenance(out))
    if as_json:
        print(json.dumps({**found.as_dict(), "macs": spent.macs, "params": spent.params, "model": str(out)}))
    else:
        console.print(f"{found}, {spent.macs:,} MACs; saved as {out}", highlight=False, soft_wrap=True)
        show_next(console, list(after_model(str(out), str(teacher or model))))


def reports(
    display: Any, progress: Callable[[str, float, str], None], batch_size: int, *, what: str = "finetuning"
) -> dict[str, Any]:
    """Return callables for ``fit`` that show progress: a bar with loss, speed and accuracy, or one line per epoch.

    The lines are for output that is not a terminal.

    Args:
        display: the ``Display`` to draw on.
        progress: called with (what is being done, share done, note).
        batch_size: images per update, for the speed.
        what: label of the bar.

    Returns:
        ``on_step``, ``on_epoch`` and ``on_note``, by name.
    """
    from prunesweep.search.report.display import clock
    from prunesweep.training.jobs.metrics_log import StepRate

    rate, note, eta = StepRate(batch_size), "", ""
    begun: tuple[float, int] | None = None  # time and number of updates at the first step

    def on_step(done: int, total: int, loss: float) -> None:
        nonlocal begun, eta
        begun = begun or (time.monotonic(), done)
        if done > begun[1]:
            eta = f"  ETA {clock((time.monotonic() - begun[0]) / (done - begun[1]) * (total - done))}"
        speed = rate.step(done)
        now = f"  {speed[0]:,.0f} images/s  {speed[1]:.2f} updates/s" if speed else ""
        progress(what, done / total, f"loss {loss:.3f}{now}{note}")

    def on_epoch(epoch: Any) -> None:
        nonlocal note
        rate.pause()
        facts = "".join(f"  {name} {f if isinstance(f, str) else f'{f:.4g}'}" for name, f in epoch.facts.items())
        quality = "" if epoch.ppl is None else f"  ppl {epoch.ppl:.2f}"
        if epoch.cosine is not None:
            quality += f"  cosine {epoch.cosine:.4f}  relative error {epoch.relative_error:.4g}"
        elif epoch.top1 is None:
            quality += f"  agreement {epoch.agreement:.2f} %  KL {epoch.kl:.4g}"
        else:
            quality += f"  top-1 {epoch.top1:.2f} %" + ("" if epoch.top5 is None else f"  top-5 {epoch.top5:.2f} %")
        note = f"{quality}{facts}"
        line = f"loss {epoch.loss:.3f}{note}  {epoch.images_per_s:,.0f} images/s"
        progress(what, epoch.epoch / epoch.epochs, line)
        if not display.console.is_terminal and epoch.epoch < epoch.epochs:
            display.note(f"epoch {epoch.epoch}/{epoch.epochs}: {line}{eta}")

    return {"on_step": on_step, "on_epoch": on_epoch, "on_note": display.note}
