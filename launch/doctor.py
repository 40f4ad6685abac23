"""``prunesweep doctor``: check that this machine and a cluster have what a search needs, and say how to fix it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["Finding", "doctor"]

State = Literal["ok", "warning", "wrong"]
EXTRAS = {
    "default": ("aiohttp", "opencensus", "grpc"),
    "train": ("pyarrow", "fsspec"),
    "tune": ("pandas", "tensorboardX"),
}
SKEW = 5.0  # seconds; another driver may take a run's lease after 60
FREE_GIB = 5
SAME = ("python", "ray", "torch", "timm", "optuna")  # packages whose versions must not differ between nodes


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``fix`` is what to do if the state is not ok."""

    what: str
    state: State
    found: str
    fix: str = ""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="a TOML file: its data are opened; cluster.storage and cluster.data are checked", show_default=False
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="http://HEAD:8265 from anywhere, HOST:PORT or auto on a node", show_default=False),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="folder that all nodes should share  [default: cluster.storage]", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="folder of the data on the nodes  [default: cluster.data]", show_default=False)
    ] = None,
) -> None:
    """Check what a search needs, here and on every node of a cluster; with a configuration, its data too."""
    from rich.markup import escape

    from prunesweep.search.config import ClusterTable, load_config

    from .console import PlainConsole

    settings = None if config is None else load_config(config)
    table = (settings and settings.cluster) or ClusterTable()
    findings = list(check_here())
    if settings is not None:
        findings.append(check_data(settings))
    if place := address or table.address:
        findings += check_cluster(place, table, storage or table.storage, data or table.data)
    signs = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "wrong": "[red]wrong  [/]"}
    console, gap = PlainConsole(markup=True), " " * 9
    for finding in findings:  # lines, of which none breaks a path or a command
        text = f"{finding.what}: {finding.found}" + (f"\nto do: {finding.fix}" if finding.fix else "")
        said = escape(text).replace("\n", f"\n{gap}")
        console.print(f"{signs[finding.state]}  {said}", highlight=False, soft_wrap=True)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


def check_here() -> Iterator[Finding]:
    """Check this machine: versions, Ray's extras, the token's file, GPUs, and disk space for runs."""
    from prunesweep.launch.cluster.inspect_node import versions

    found = versions()
    missing = [name for name, number in found.items() if number is None]
    yield Finding(
        "packages here",
        "wrong" if missing else "ok",
        ", ".join(f"{name} {number}" for name, number in found.items() if number),
        f"pip install -e . (missing: {', '.join(missing)})" if missing else "",
    )
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            yield Finding(f"ray[{extra}]", "wrong", f"no {', '.join(absent)}", f"pip install 'ray[{extra}]'")
    yield _token_file()
    if given := os.environ.get("RAY_ADDRESS"):
        yield Finding("RAY_ADDRESS", "ok", f"{given}, which commands take with --address auto alone")
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("GPUs here", "ok", ", ".join(names) or "none")
    yield _room(Path.cwd())


def check_data(config: Any) -> Finding:
    """Check that the data of a configuration can be opened here and fit its source; say what they are."""
    from prunesweep.models import UserError
    from prunesweep.models.errors import NotHere
    from prunesweep.search.execution.source import open_source_data

    try:
        return Finding("data here", "ok", "\n".join(open_source_data(config).describe()))
    except NotHere as error:
        return Finding("data here", "warning", str(error), "only a search elsewhere can run without them")
    except UserError as error:
        return Finding("data here", "wrong", str(error), "mend the data, or [data] and [source] of the configuration")


def _token_file() -> Finding:
    from prunesweep.launch.cluster.auth import find_token
    from prunesweep.models import UserError

    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    try:
        found = find_token()
    except UserError as error:
        return Finding("token", "wrong", str(error), "unset RAY_AUTH_TOKEN_PATH, or write the head's token there")
    if found is None:
        return Finding("token", "ok", f"none here; RAY_AUTH_MODE {mode}")
    where = found[1]
    if where != "RAY_AUTH_TOKEN" and stat.S_IMODE(Path(where).stat().st_mode) & 0o077:
        return Finding("token", "warning", f"{where} can be read by others", f"chmod 600 {where}")
    return Finding("token", "ok", f"from {where}; RAY_AUTH_MODE {mode}")


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("folder here", "warning", f"{folder}: {error.strerror}", "searches here need --out elsewhere")
    if free < FREE_GIB:
        return Finding("folder here", "warning", f"{folder}: {free:.1f} GiB free", "runs keep models: make room")
    return Finding("folder here", "ok", f"{folder}: writable, {free:.0f} GiB free")


def check_cluster(address: str, table: Any, storage: str | None, data: str | None) -> Iterator[Finding]:
    """Check that a cluster answers and accepts the token, then check each of its nodes.

    Args:
        address: address of the cluster; with ``http://`` its nodes are inspected by a job, otherwise from this process.
        table: the configuration's ``[cluster]``.
        storage: folder that all nodes should share; None if it is not known.
        data: folder of the data set on every node; None if it is not known.
    """
    from prunesweep.launch.cluster.inspect_node import inspect_nodes, versions
    from prunesweep.models import UserError
    from prunesweep.models.io.objects import is_url

    on_nodes = None if storage is not None and is_url(storage) else storage
    try:
        if address.startswith(("http://", "https://")):
            found = yield from _inspect_by_job(address, table, on_nodes, data)
        else:
            found = inspect_nodes(address, on_nodes, data)
    except (UserError, ConnectionError) as error:
        yield Finding("cluster", "wrong", str(error), "")
        return
    nodes = found["nodes"]
    yield Finding(
        "nodes", "ok", f"{len(nodes)}: " + ", ".join(sorted({n.get("host", n["address"]) for n in nodes})[:8])
    )
    yield from check_nodes(nodes, versions(), storage, data)


def _inspect_by_job(address: str, table: Any, storage: str | None, data: str | None) -> Any:
    from prunesweep.launch.cluster.client import Cluster, last_json
    from prunesweep.launch.cluster.package import environment, staged
    from prunesweep.models import UserError

    cluster = Cluster(address)
    with_token = "with a token" if cluster.head.headers else "without a token"
    yield Finding("cluster", "ok", f"{cluster.head.url} answers {with_token}: Ray {cluster.head.ray}")
    arguments = ["prunesweep.launch.cluster.inspect_node"]
    arguments += [part for name, path in (("--storage", storage), ("--data", data)) if path for part in (name, path)]
    with staged(exclude=table.exclude) as code:
        status, output = cluster.call("doctor", arguments, code, environment(table, pip=False), timeout=600)
    found = last_json(output)
    if status != 0 or not isinstance(found, dict):
        raise UserError(f"the nodes could not be asked:\n{output.strip()[-2000:]}")
    return found


def check_nodes(
    nodes: list[dict[str, Any]], here: dict[str, str | None], storage: str | None, data: str | None
) -> Iterator[Finding]:
    """Judge what ``prunesweep.launch.cluster.inspect_node`` reported of every node.

    Args:
        nodes: the reports, one per node.
        here: versions of packages on this machine, by name.
        storage: folder that all nodes should share; None if it is not known.
        data: folder of the data set on every node; None if it is not known.
    """
    from prunesweep.models.io.objects import is_url

    for node in nodes:
        if "error" in node:
            yield Finding(
                f"node {node['address']}", "wrong", node["error"], "see the node's Ray logs; restart Ray on it"
            )
    nodes = [node for node in nodes if "error" not in node]
    yield from _check_versions(nodes, here)
    yield from _check_gpus(nodes)
    yield from _check_sessions(nodes)
    apart = {node["host"]: max(abs(node["skew"]), abs(node.get("file_skew") or 0.0)) for node in nodes}
    skew = [node for node in nodes if apart[node["host"]] > SKEW]
    worst = max(apart.values(), default=0.0)
    if skew:
        yield Finding("clocks", "wrong", f"{_names(skew)}: {worst:.1f} s apart", "synchronise them (chrony, NTP)")
    else:
        yield Finding("clocks", "ok", f"within {worst:.2f} s")
    for what, path, key, fix in (
        ("storage", storage, "storage_problem", "mount the same writable storage on all nodes, at the same path"),
        ("data", data, "data_problem", "mount or copy the data to this path on all nodes"),
    ):
        if path is not None and is_url(path):
            yield _check_url(path)
            continue
        if path is None:
            hint = f"name it with --{what} or cluster.{what}" if what == "storage" else ""
            yield Finding(what, "warning" if hint else "ok", "not checked: no path given", hint)
            continue
        bad = [node for node in nodes if node[key]]
        for node in bad:
            yield Finding(what, "wrong", f"{node['host']}: {node[key]}", fix)
        if not bad:
            yield Finding(what, "ok", f"{path}, on {len(nodes)} nodes")


def _check_url(url: str) -> Finding:
    """Whether this machine may list what is at a URL; nodes find that out with the first trial."""
    from prunesweep.models import UserError
    from prunesweep.models.io.objects import Objects

    try:
        Objects(url).check()
    except UserError as error:
        return Finding("storage", "wrong", str(error), "nodes need credentials and endpoint in their own environment")
    return Finding("storage", "ok", f"{url}, from this machine")


def _check_versions(nodes: list[dict[str, Any]], here: dict[str, str | None]) -> Iterator[Finding]:
    for name in SAME:
        found: dict[str | None, list[dict[str, Any]]] = {}
        for node in nodes:
            found.setdefault(node["versions"][name], []).append(node)
        text = "; ".join(f"{number or 'missing'} on {_names(own)}" for number, own in found.items())
        if None in found:
            fix = "use an image that has it" if name in ("ray", "torch") else "submit with --pip, or install it"
            yield Finding(f"{name} there", "wrong", text, fix)
        elif len(found) > 1:
            yield Finding(f"{name} there", "wrong", text, "use the same environment on all nodes")
        elif name == "ray" and here[name] not in found:
            yield Finding("ray there", "warning", f"{text}; here {here[name]}", f"pip install ray=={next(iter(found))}")
        elif found:
            yield Finding(f"{name} there", "ok", str(next(iter(found))))


def _check_gpus(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    total = sum(node["ray_gpus"] for node in nodes)
    bad = [node for node in nodes if node["gpus"] is not None and node["gpus"] < node["ray_gpus"]]
    if bad:
        seen = "; ".join(f"{n['host']}: Ray has {n['ray_gpus']:g}, torch sees {n['gpus']}" for n in bad)
        yield Finding("GPUs there", "wrong", seen, "install a torch that fits the driver (nvidia-smi shows its CUDA)")
    else:
        yield Finding("GPUs there", "ok", f"{total:g} on {len(nodes)} nodes")


def _check_sessions(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    sharing = [node for node in nodes if node["sharing"] > 1]
    for folder in sorted({node["session"] for node in sharing}):
        own = [node for node in sharing if node["session"] == folder]
        yield Finding(
            "Ray's folder",
            "warning",
            f"{own[0]['sharing']} nodes, on {_names(own)}, share {folder}",
            "Ray deletes the folders of jobs that run there: start every node with a local --temp-dir of its own",
        )
    if not sharing:
        yield Finding("Ray's folder", "ok", "one for every node")


def _names(nodes: list[dict[str, Any]]) -> str:
    names = sorted({str(node["host"]) for node in nodes})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
