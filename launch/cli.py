"""The command line.

Exit codes: 0 done; 1 the search failed, or damage left nothing to show; 2 something given is wrong; 3 Ray died;
130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from .bench import bench
from .console import PlainConsole, say_interrupted
from .doctor import doctor
from .eval_model import evaluate
from .export import export_model, push_model
from .finetune import finetune
from .help import MethodCommand, PlainGroup, ScoringCommand
from .import_ import import_model
from .init import init
from .instant import instant, print_computed
from .jobs import fetch, jobs, logs, remote_status, stop
from .latency import latency
from .lists import config, methods, recipes
from .manifest import manifest
from .models import models
from .next_commands import after_search, after_stored, show_next
from .nothing_left import NothingLeft, check_begun, check_front
from .place import RunArgument, brought, place, shown
from .promote import promote
from .prune import prune, score
from .published import published
from .show import show
from .submit import resubmit, submit
from .verify import verify
from .watch import watch

if TYPE_CHECKING:
    from prunesweep.search import SearchResult

__all__ = ["app", "main"]

USER_ERROR, SEARCH_FAILED, NOTHING_LEFT, INTERRUPTED = 2, 1, 1, 130

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Architecture search for compressed vision transformers.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="a stable form for scripts")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="of a running Ray cluster, all of whose nodes see the run's folder; a Ray of its own by default",
        show_default=False,
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="show Ray's own log lines")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from prunesweep.models.io.provenance import versions

        found = versions()
        print(f"prunesweep {found.pop('prunesweep')} ({', '.join(map(' '.join, found.items()))})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="show the versions in use, and stop"),
    ] = False,
) -> None:
    pass


@app.command()
def search(
    config: Annotated[Path, typer.Argument(help="a TOML file, for example examples/digits.toml", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(parser=place, help="the run's folder, or its URL  [default: runs/NAME]", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. search.trials=48")
    ] = None,
    address: AddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the space, the plan and an estimate; make nothing")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Search for the Pareto front of accuracy against MACs."""
    from prunesweep.search import load_config, run_search

    settings, console = load_config(config, overrides or []), PlainConsole()
    options: dict[str, Any] = {"address": address, "dry_run": dry_run, "verbose": verbose}
    _drive(lambda: run_search(settings, out, console=console, **options), console)


@app.command()
def resume(
    run: RunArgument,
    trials: Annotated[int | None, typer.Option(min=1, help="a new number of trials, to go on searching")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="another value, e.g. resources.cpus=4")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="do the trials again that have failed")] = False,
    address: AddressOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Continue a search that was stopped or killed."""
    if address is not None and address.startswith(("http://", "https://")):
        resubmit(str(run), address, trials=trials, overrides=overrides or [], retry_failed=retry_failed)
        return
    from prunesweep.search import resume_search

    console = PlainConsole()
    options: dict[str, Any] = {"trials": trials, "overrides": overrides or [], "address": address, "verbose": verbose}
    options["retry_failed"] = retry_failed
    _drive(lambda: resume_search(run, console=console, **options), console)


def _drive(start: Callable[[], SearchResult | None], console: Console) -> None:
    """Run a search, report how it ended, and exit with the matching code."""
    from prunesweep.models.io.objects import is_url
    from prunesweep.search import Run, SearchFailed

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        result = start()
    except SearchFailed as failure:
        say(f"the search failed: {failure}")
        raise typer.Exit(SEARCH_FAILED) from failure
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from what is saved")
        raise typer.Exit(INTERRUPTED) from None
    if result is None:
        return
    run = Run(result.path)
    shown = run.shown
    if not result.finished:
        say(f"stopped; go on with: prunesweep resume {shown}")
        raise typer.Exit(INTERRUPTED)
    say(f"front: {shown}/front.json   report: {shown}/report.html")
    if is_url(shown):
        show_next(console, after_stored(shown))
        return
    links = (run / "front").is_dir()
    models = [
        f"{shown}/front/{place:02d}" if links else f"{shown}/{Path(point['model']).relative_to(run.path)}"
        for place, point in enumerate(result.front, 1)
    ]
    show_next(console, list(after_search(shown, models, links=links, text="ppl" in run.objectives)))


@app.command()
def status(
    run: RunArgument,
    address: Annotated[
        str | None,
        typer.Option(help="of a head that RUN was submitted to, by its name: http://HEAD:8265", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a search is."""
    from prunesweep.search import Run

    lost = None
    if address is None:
        run = brought(run, whole=False)
        found = Run.existing(run).status()
    else:
        found, lost = remote_status(str(run), address)
    if as_json:
        print(json.dumps(found))
    else:
        _show_status(found, Run(run).shown if address is None else str(run))
    if address is None:
        check_front(Run(run))
    elif lost:
        raise NothingLeft(lost)


def _show_status(found: dict[str, Any], run: str) -> None:
    import time

    from prunesweep.search.report.words import status_lines

    console = PlainConsole()
    for line in status_lines(found, run, time.time()):
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def front(
    run: RunArgument,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="comma-separated, with a header")] = False,
) -> None:
    """Show the front of a run or of `prunesweep instant`; each model is a folder that loads in one line."""
    from prunesweep.search.store.computed import ComputedFront

    run = brought(run, whole=False)
    if ComputedFront.is_one(run):
        print_computed(run, as_json=as_json, as_csv=as_csv)
        return
    from prunesweep.search import Run
    from prunesweep.search.execution.promote import promoted
    from prunesweep.search.report.display import print_front, print_promoted
    from prunesweep.search.store.front import cost_of
    from prunesweep.search.store.run import task_id

    from .spreadsheet import write_csv

    found = Run.existing(run)
    points = [{**p, "model": shown(run / p["model"])} for p in found.front()]
    check_front(found)
    further = {p["unit"]: p for p in promoted(found)}
    if as_json or as_csv:
        for point in points:
            again = further.get(task_id(point["trial"], point["rung"]))
            point["promoted_top1"] = again and again["top1"]
            point["promoted_model"] = again and shown(run / again["model"])
    if as_json:
        for point in points:
            unit = (task_id(point["trial"], point["rung"]), point["arch_hash"])
            point["speed"] = [asdict(row) for row in found.speed() if (row.unit, row.arch_hash) == unit]
        print(json.dumps(points))
    elif as_csv:
        columns = dict.fromkeys(name for point in points for name in point)  # not all may be validated yet
        write_csv(sys.stdout, list(columns) or ["trial"], points)
    else:
        if not points:
            check_begun(found)
        console, source = PlainConsole(), found.known_facts()["source"]
        cost = cost_of(found.objectives)
        print_front(console, points, source[cost], cost)
        if further:
            made = [{**p, "model": shown(run / p["model"])} for p in further.values()]
            print_promoted(console, made, source[cost], found.measure, cost)


@app.command()
def report(run: RunArgument) -> None:
    """Write the run's report.html again."""
    from prunesweep.models.io.objects import Objects
    from prunesweep.search import Run
    from prunesweep.search.report.page import write_report
    from prunesweep.search.store.mirror import belongs_to

    found = Run.existing(brought(run, whole=False))
    written = write_report(found)
    if (url := belongs_to(found.path)) is not None:
        Objects(url).put(written.name, written)
    print(shown(written))
    check_front(found)


app.command()(init)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(latency)
app.command("export")(export_model)
app.command("push")(push_model)
app.command("import")(import_model)
app.command(cls=MethodCommand)(prune)
app.command()(instant)
app.command()(finetune)
app.command()(promote)
app.command(cls=ScoringCommand)(score)
app.command()(show)
app.command()(verify)
app.command()(published)
app.command()(models)
app.command()(methods)
app.command()(recipes)
app.command()(config)
app.command()(submit)
app.command()(jobs)
app.command()(logs)
app.command()(stop)
app.command()(fetch)
app.command()(manifest)
app.command()(doctor)
app.command()(watch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: print a user's error as one message; anything else is a defect and keeps its traceback."""
    from prunesweep.models import UserError
    from prunesweep.models.io.files import write_refused
    from prunesweep.training.signals import handling

    # one that is ignored, as in a shell's background, stays so
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    warnings.showwarning = _warn
    with contextlib.suppress(AttributeError):  # characters that the locale has not are no reason to fail
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with handling(_interrupt, signal.SIGINT) if heeded else contextlib.nullcontext():
            app(arguments)
    except UserError as error:
        _fail(_with_notes(error))
    except NothingLeft as error:
        _fail(str(error), NOTHING_LEFT)
    except KeyboardInterrupt as error:  # before a command begins, or after it
        say_interrupted(error)
        sys.exit(INTERRUPTED)
    except Exception as error:
        _check_ray(error)
        if not (remedy := write_refused(error)):
            raise
        _fail(_with_notes(error, f": what was finished before is whole; {remedy}, and the same command goes on"))
    finally:
        if arguments is None:  # otherwise the process is a caller's, and goes on
            _end_quietly()


def _end_quietly() -> None:
    """Let Ctrl-C end the process without a traceback while the interpreter ends, when nothing can catch it any more."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def _check_ray(error: Exception) -> None:
    """End by what says that Ray died, where an error is that; Ray is not loaded unless it was used."""
    session = sys.modules.get("prunesweep.training.jobs.ray_session")
    if session is not None and isinstance(error, session.RayDied):
        _fail(_with_notes(error), session.RAY_DIED)


def _with_notes(error: Exception, more: str = "") -> str:
    """Return an error's message, what more there is to say, and the notes that it was given on its way, in one line."""
    return "; ".join([f"{error}{more}", *getattr(error, "__notes__", ())])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end at once while torch is being loaded, which turns it into other errors."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Show a warning to people as one line; those of libraries about their own use say where they arose."""
    line = f"warning: {message}" if category is UserWarning else warnings.formatwarning(message, category, *where)
    PlainConsole(stderr=True).print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _fail(message: str, code: int = USER_ERROR) -> NoReturn:
    PlainConsole(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
