"""``prunesweep jobs``, ``logs``, ``stop`` and ``fetch``: follow and control searches on a cluster from anywhere."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import without_controls
from .place import brought
from .submit import AddressOption, FollowOption, follow_job

__all__ = ["fetch", "jobs", "logs", "remote_page", "remote_status", "stop"]

NameArgument = Annotated[str, typer.Argument(help="the run's name, for example digits", show_default=False)]
PlaceArgument = Annotated[
    str, typer.Argument(help="the run's name, for example digits, or its URL", show_default=False)
]
MIB = 2**20
PAGE = 64 * MIB  # bytes of the data of a page, at most
PATIENCE = 600.0  # seconds for a short job, with the installation of its environment


def _cluster(address: str | None) -> Any:
    from prunesweep.launch.cluster.client import Cluster
    from prunesweep.models import UserError

    if not address:
        raise UserError("--address is missing: give the head's, for example http://HEAD:8265")
    return Cluster(address)


def jobs(
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """List the searches on a cluster, attempt by attempt."""
    from .console import PlainConsole

    attempts = _cluster(address).attempts()
    if as_json:
        fields = ("run", "job", "status", "folder", "started", "ended", "message")
        print(json.dumps([{name: getattr(a, name) for name in fields} for a in attempts]))
        return
    console = PlainConsole()
    for a in attempts:  # lines, of which none breaks a path
        started = "" if a.started is None else time.strftime(", since %Y-%m-%d %H:%M", time.localtime(a.started))
        took = "" if a.started is None else f", {_clock((a.ended or time.time()) - a.started)}"
        console.print(f"{a.run}: {a.job} {a.status.lower()}{started}{took}", highlight=False, soft_wrap=True)
        console.print(f"    {a.folder}", highlight=False, soft_wrap=True)
    if not attempts:
        console.print("no searches")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def logs(run: NameArgument, address: AddressOption = None, follow: FollowOption = False) -> None:
    """Show what the last attempt of a search has printed."""
    cluster = _cluster(address)
    job = cluster.latest(run).job
    if follow:
        follow_job(cluster, run, job)
    else:
        print(without_controls(cluster.logs(job)), end="")


def stop(run: PlaceArgument, address: AddressOption = None) -> None:
    """Stop a search; running trials save their state first, and 'prunesweep resume' continues it."""
    from prunesweep.models.io.objects import is_url
    from prunesweep.search.store.stored import ask_to_stop

    if is_url(run):
        asked = ask_to_stop(run)
        print(f"{run} ends once its trials have saved their state" if asked else f"{run}: no driver works on it")
        print(f"go on with: prunesweep resume {run}")
        return
    cluster = _cluster(address)
    last = cluster.latest(run)
    if last.over or not cluster.stop(last.job):
        print(f"{last.job} has ended already: {last.status.lower()}")
        return
    print(f"{last.job} ends once its trials have saved their state, after two minutes at the latest")
    print(f"go on with: prunesweep resume {run} --address {cluster.head.url}")


def remote_status(run: str, address: str) -> tuple[dict[str, Any], str | None]:
    """Return what ``prunesweep status`` prints for a run on a cluster, with ``job`` and ``state`` of its last attempt.

    Args:
        run: name of the run.
        address: address of the cluster's head.

    Returns:
        That, and where damage left nothing of the run's front, what is said of it there.

    Raises:
        UserError: the head does not know the run, or its folder is not there yet.
    """
    from prunesweep.launch.cluster.client import last_json
    from prunesweep.models import UserError

    cluster = _cluster(address)
    last = cluster.latest(run)
    code, output = _call(cluster, last, "status", ["prunesweep", "status", last.folder, "--json"])
    found = last_json(output)
    if code not in (0, 1) or not isinstance(found, dict):
        raise UserError(
            f"{last.job} is {last.status.lower()}; it has no run yet in {last.folder}: before that it opens the data, "
            f"trains or loads the source and scores it (prunesweep logs {run})\n{output.strip()}"
        )
    state = {**found, "job": last.job, "state": last.status.lower()}
    return state, _reason(output) if code == 1 else None


def remote_page(run: str, address: str) -> dict[str, Any]:
    """Return what the page of a run on a cluster shows, as ``page_data`` gives it.

    Args:
        run: name of the run.
        address: address of the cluster's head.

    Raises:
        UserError: the head does not know the run, its folder is not there yet, or what came back is damaged.
    """
    from prunesweep.launch.cluster.client import last_json
    from prunesweep.models import UserError

    cluster = _cluster(address)
    last = cluster.latest(run)
    code, output = _call(cluster, last, "watch", ["prunesweep.launch.cluster.page", last.folder])
    if code != 0:
        found = last_json(output)
        problem = found["error"] if isinstance(found, dict) and "error" in found else output.strip()
        raise UserError(f"{last.job} is {last.status.lower()}: {without_controls(str(problem))}")
    try:
        data = json.loads(_inflated(unpack(output)))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"what came back of {run} is no page's data: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise UserError(f"what came back of {run} is no page's data")
    return data


def _inflated(data: bytes) -> bytes:
    """Unpack gzip. Raises ValueError where it holds more than any page."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(PAGE + 1)
    if len(found) > PAGE:
        raise ValueError(f"it has more than {PAGE // MIB} MiB")
    return found


def _reason(output: str) -> str:
    """What the last line of a command says that begins with ``error: ``."""
    lines = [line.partition("error: ")[2] for line in output.splitlines() if "error: " in line]
    return without_controls(lines[-1]) if lines else without_controls(output.strip())


def _call(cluster: Any, last: Any, what: str, arguments: list[str]) -> tuple[int | None, str]:
    """Run a short job in the environment of a search."""
    import tomllib

    from prunesweep.launch.cluster.package import environment, staged
    from prunesweep.search.config import ClusterTable

    table = ClusterTable.model_validate(tomllib.loads(last.config).get("cluster", {}))
    with staged(exclude=table.exclude) as code:
        found: tuple[int | None, str] = cluster.call(
            what, arguments, code, environment(table, pip=last.pip), timeout=PATIENCE
        )
    return found


def fetch(
    context: typer.Context,
    run: PlaceArgument,
    address: AddressOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder here, which must not exist yet  [default: runs/NAME]", show_default=False),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=0, help="models: the most accurate of the front  [default: all of it]", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="largest archive, in MiB")] = 256,
) -> None:
    """Download a run's front, report, results and chosen models, running or finished."""
    from prunesweep.launch.cluster.client import last_json
    from prunesweep.launch.cluster.unpacking import unpack_archive
    from prunesweep.models import UserError
    from prunesweep.models.io.files import publish_folder
    from prunesweep.models.io.lock import reserve
    from prunesweep.models.io.objects import is_url

    target = out if out is not None else Path("runs") / run.partition("?")[0].rstrip("/").rpartition("/")[2]
    context.with_resource(reserve(target))
    if is_url(run):
        _copy(brought(run), target)
        return
    cluster = _cluster(address)
    last = cluster.latest(run)
    arguments = ["prunesweep.launch.cluster.pack", last.folder, "--limit", str(limit * MIB)]
    if top is not None:
        arguments += ["--top", str(top)]
    code, output = _call(cluster, last, "fetch", arguments)
    if code != 0:
        found = last_json(output)
        problem = found["error"] if isinstance(found, dict) and "error" in found else output.strip()
        raise UserError(
            f"{problem}; take fewer models with --top, allow more with --limit, or copy {last.folder} itself"
        )
    archive = unpack(output)
    with publish_folder(target.absolute(), replace=False) as folder:
        unpack_archive(archive, folder, limit * MIB)
        _link_front(folder)
    models = len(list(target.glob("*/*/model/config.json")))
    print(f"{target}: {models} models, {len(archive) / MIB:.1f} MiB; see 'prunesweep front {target}'")


def _copy(run: Path, target: Path) -> None:
    """Copy a run that was brought from an object store: all of it, with the links of its front."""
    from prunesweep.models.io.files import publish_folder
    from prunesweep.search import Run

    Run.existing(run)
    with publish_folder(target.absolute(), replace=False) as folder:
        shutil.copytree(run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".leases"))
        _link_front(folder)
    print(f"{target}: {len(list(target.glob('*/*/model/config.json')))} models; see 'prunesweep front {target}'")


def _link_front(folder: Path) -> None:
    """Make the links of a front's models, which no archive may have, from the trials and rungs that it names."""
    from prunesweep.search import Run
    from prunesweep.search.store.records import task_id

    run = Run(folder)
    listed = run.listed()
    if all(type(number) is int and number >= 0 for place in listed for number in place):
        run.link_front([task_id(*place) for place in listed])


def unpack(output: str) -> bytes:
    """Decode the archive that ``prunesweep.launch.cluster.pack`` printed.

    Raises:
        UserError: the output is torn or altered.
    """
    from prunesweep.launch.cluster.pack import BEGIN, END
    from prunesweep.models import UserError

    lines = iter(output.splitlines())
    head = next((line.split() for line in lines if line.startswith(BEGIN)), None)
    parts: list[bytes] = []
    try:
        for line in lines:
            if line == END:
                break
            parts.append(base64.b64decode(line, validate=True))
    except ValueError:
        parts = []
    archive = b"".join(parts)
    if head is None or len(archive) != int(head[1]) or hashlib.sha256(archive).hexdigest() != head[2]:
        raise UserError("what came back is not what was sent (length or checksum); try again")
    return archive
