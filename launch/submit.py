"""``prunesweep submit``: start a search as a job of a Ray cluster, over HTTP to its head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prunesweep.launch.cluster.client import Cluster
    from prunesweep.search.config import SearchConfig

from .console import without_controls
from .place import place

__all__ = ["AddressOption", "FollowOption", "follow_job", "resubmit", "submit"]

GIVEN_WRONG, INTERRUPTED = 2, 130  # exit codes

AddressOption = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="of the head's dashboard, for example http://HEAD:8265  [default: cluster.address]",
        show_default=False,
    ),
]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="show what it prints, until it ends")]


def submit(
    config: Annotated[Path, typer.Argument(help="a TOML file, for example examples/digits.toml", show_default=False)],
    address: AddressOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            help="the run's folder on the cluster, or its URL  [default: cluster.storage/NAME]",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. name=second")
    ] = None,
    pip: Annotated[
        bool, typer.Option("--pip", help="install this package's dependencies, but for Ray and torch")
    ] = False,
    again: Annotated[bool, typer.Option("--resume", help="go on with the run's folder where it is there")] = False,
    follow: FollowOption = False,
) -> None:
    """Start a search on a cluster and return; it does not need this machine afterwards.

    Beyond `ray job submit`: ships this package, source and latency table, sets what the table cluster says, and
    gives running trials time to save their state when the search is stopped.
    """
    from prunesweep.launch.cluster.client import Cluster
    from prunesweep.models import UserError
    from prunesweep.search.config import load_config
    from prunesweep.search.execution.checks import check_not_in_vain

    found = load_config(config, overrides or [])
    check_not_in_vain(found)
    folder = _folder(found, out)
    url = address or (found.cluster and found.cluster.address)
    if not url:
        raise UserError("--address is missing: give the head's, for example http://HEAD:8265, or set cluster.address")
    cluster = Cluster(url)
    earlier = cluster.attempts(found.name)
    if earlier and not again:
        raise UserError(
            f"{cluster.head.url} has a search {found.name} already ({earlier[-1].status.lower()}): go on with "
            f"'prunesweep resume {found.name} --address {url}', or give this one a name of its own with --set name=NAME"
        )
    job = _start(cluster, found, folder, attempt=_next(cluster, found.name), again=again, pip=pip)
    _watch(cluster, found.name, job, follow=follow)


def _folder(config: SearchConfig, out: Path | None) -> str:
    from prunesweep.models import UserError
    from prunesweep.models.io.objects import is_url, joined

    storage = config.cluster and config.cluster.storage
    if out is None and storage is None:
        raise UserError(
            "where is the run to lie? Give a folder that all nodes see, or a URL, with --out, or set cluster.storage, "
            f"whose subfolder {config.name} it then is"
        )
    folder = str(out) if out is not None else joined(str(storage), config.name)
    if not folder.startswith("/") and not is_url(folder):
        raise UserError(f"--out {folder}: must be an absolute path on the cluster, or a URL as s3://BUCKET/NAME")
    return folder


def _next(cluster: Cluster, run: str) -> int:
    """Return the next attempt's number. Raises UserError where one is still running."""
    from prunesweep.models import UserError

    attempts = cluster.attempts(run)
    for attempt in attempts:
        if not attempt.over:
            raise UserError(
                f"{attempt.job} is {attempt.status.lower()}: watch it with 'prunesweep logs {run} -f', or end it with "
                f"'prunesweep stop {run}'"
            )
    return max((a.number for a in attempts), default=0) + 1


def _start(
    cluster: Cluster,
    config: SearchConfig,
    folder: str,
    *,
    attempt: int,
    again: bool,
    pip: bool = False,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
) -> str:
    """Upload code and configuration, start the driver on the cluster, and return the job's name."""
    from prunesweep.launch.cluster.package import CONFIG, driver, environment, facts, sizes, staged
    from prunesweep.search.config import ClusterTable

    table, job = config.cluster or ClusterTable(), f"{config.name}-a{attempt}"
    more: dict[str, Any] = {"trials": trials, "overrides": overrides, "retry_failed": retry_failed}
    command = driver(CONFIG, folder, again=again, **more)
    with staged(config, table.exclude) as code:
        shipped = sizes(code)
        print(f"ships {len(shipped)} files, {sum(shipped.values()) / 2**20:.1f} MiB")
        cluster.submit(job, command, code, environment(table, pip=pip), facts(config, folder, pip=pip))
    return job


def resubmit(
    run: str,
    address: str,
    *,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    follow: bool = False,
) -> None:
    """Start the next attempt of a search that this head knows: ``prunesweep resume RUN --address http://...``.

    Args:
        run: name of the run.
        address: address of the cluster's head.
        trials: new number of trials, if it changes.
        overrides: settings to change, ``NAME=VALUE``.
        retry_failed: do candidates that failed again.
        follow: show the job's output until it ends, and exit with its code.

    Raises:
        UserError: the head does not know the run, or an attempt is still running.
    """
    import tomllib

    from prunesweep.launch.cluster.client import Cluster
    from prunesweep.search.config import parse_config

    cluster = Cluster(address)
    last = cluster.latest(run)
    config = parse_config(tomllib.loads(last.config), f"the configuration of {last.job}")
    more: dict[str, Any] = {"trials": trials, "overrides": overrides, "retry_failed": retry_failed, "pip": last.pip}
    job = _start(cluster, config, last.folder, attempt=_next(cluster, run), again=True, **more)
    _watch(cluster, run, job, follow=follow)


def _watch(cluster: Cluster, run: str, job: str, *, follow: bool) -> None:
    """Print what was started; with ``--follow`` show its output and exit with the search's own code."""
    url = cluster.head.url
    print(f"run {run}, job {job} on {url}")
    if not follow:
        for command, purpose in (("logs -f", "what it prints"), ("status", "how far it is"), ("fetch", "its front")):
            name, _, option = command.partition(" ")
            line = f"prunesweep {name} {run} --address {url} {option}".rstrip()
            print(f"  {line:<70} {purpose}")
        return
    follow_job(cluster, run, job)


def follow_job(cluster: Cluster, run: str, job: str) -> None:
    """Show what a job prints until it ends; exit with its code unless that is 0.

    Args:
        cluster: the cluster's job API.
        run: name of the run, for messages.
        job: name of the job.

    Raises:
        typer.Exit: the job did not succeed (code 130 where it was stopped), or Ctrl-C was pressed (130, too; the job
            itself goes on).
    """

    def write(text: str) -> None:
        print(without_controls(text), end="", flush=True)

    try:
        status = cluster.follow(job, write)
    except KeyboardInterrupt:
        print(f"\n{run} goes on without this terminal: prunesweep logs {run} -f --address {cluster.head.url}")
        raise typer.Exit(INTERRUPTED) from None
    code = cluster.exit_code(job)
    print(f"{job}: {status.lower()}" + (f", exit code {code}" if code else ""))
    if status != "SUCCEEDED":
        if code != GIVEN_WRONG:
            print(f"go on with: prunesweep resume {run} --address {cluster.head.url}")
        raise typer.Exit(INTERRUPTED if status == "STOPPED" else code if code and 0 < code <= INTERRUPTED else 1)
