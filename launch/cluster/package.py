"""Package what is sent to a cluster: this package's code, a configuration, and the command that runs them."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import prunesweep
from prunesweep.models import UserError
from prunesweep.models.io.scratch import scratch_folder
from prunesweep.search.config import ClusterTable, SearchConfig

__all__ = ["CONFIG", "ENV", "driver", "environment", "facts", "on_cluster", "requirements", "staged"]

PACKAGES = ("models", "pruners", "training", "search", "launch")  # links in the checkout, folders when installed
LIMIT = 100 * 2**20  # bytes that the dashboard of a head accepts (DASHBOARD_CLIENT_MAX_SIZE)
LARGEST = 5  # number of files to name if the limit is exceeded
CONFIG, SOURCE, TABLE = "search.toml", "source", "latency_table.json"
CLUSTERS_OWN = ("ray", "torch", "torchvision")  # Ray must be the head's, torch must fit the nodes' drivers

# Tune and Train read these in every process of a job; see training/jobs/ray_workers.py for the first three
ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",  # loading torch and CUDA from shared storage takes its time
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": "120",  # for running trials to save their state, before they are killed
    "PYTHONUNBUFFERED": "1",
}


def on_cluster(config: SearchConfig) -> SearchConfig:
    """Return the configuration with the paths of the nodes: their data, and shipped files in the job's own folder."""
    changes: dict[str, Any] = {}
    cluster = config.cluster or ClusterTable()
    kind, _, path = config.data.name.partition(":")
    if cluster.data is not None and path:
        changes["data"] = config.data.model_copy(update={"name": f"{kind}:{cluster.data}"})
    if local_source(config) is not None:
        changes["source"] = config.source.model_copy(update={"model": f"local-dir:{SOURCE}"})
    if local_table(config) is not None:
        changes["space"] = config.space.model_copy(update={"latency_table": TABLE})
    return config.model_copy(update=changes)


def local_source(config: SearchConfig) -> Path | None:
    """Return the folder of the source model if it lies on this machine, otherwise None."""
    kind, _, path = config.source.model.partition(":")
    return Path(path) if kind == "local-dir" and Path(path).is_dir() else None


def local_table(config: SearchConfig) -> Path | None:
    """Return the path of the latency table if it lies on this machine, otherwise None."""
    path = config.space.latency_table
    return Path(path) if path is not None and Path(path).is_file() else None


@contextlib.contextmanager
def staged(config: SearchConfig | None = None, exclude: Sequence[str] = ()) -> Iterator[Path]:
    """Copy everything that is sent to a temporary folder, which exists for the time of a ``with`` block.

    This is the package, ``config``, a local source model and a local latency table.

    Args:
        config: configuration of the search; None sends the package alone.
        exclude: patterns of paths or file names that are left out.

    Raises:
        UserError: it is larger than a cluster accepts; the message names the largest files.
    """
    root = Path(prunesweep.__file__).parent
    with scratch_folder() as scratch:
        folder = scratch / "code"
        for place in (root.glob("*"), *((root / package).rglob("*") for package in PACKAGES)):
            for path in sorted(place):
                name = "prunesweep" / path.relative_to(root)
                unwanted = any(fnmatch(str(name), pattern) or fnmatch(name.name, pattern) for pattern in exclude)
                if path.is_file() and "__pycache__" not in name.parts and not unwanted:
                    _copy(path, folder / name)
        own = distribution("prunesweep")  # so that provenance finds the version where nothing is installed
        facts = folder / f"prunesweep-{own.version}.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(str(own.read_text("METADATA") or own.read_text("PKG-INFO")), encoding="utf-8")
        if config is not None:
            source = local_source(config)
            if source is not None:
                shutil.copytree(source, folder / SOURCE)
            table = local_table(config)
            if table is not None:
                _copy(table, folder / TABLE)
            (folder / CONFIG).write_text(on_cluster(config).to_toml(), encoding="utf-8")
        _check_size(folder)
        yield folder


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file in a folder, the largest first."""
    found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _check_size(folder: Path) -> None:
    found = sizes(folder)
    total = sum(found.values())
    if total > LIMIT:
        large = "\n".join(f"  {size / 2**20:8.1f} MiB  {name}" for name, size in list(found.items())[:LARGEST])
        raise UserError(
            f"{total / 2**20:.1f} MiB would be shipped, a head takes {LIMIT / 2**20:.0f} MiB; the largest "
            f"files:\n{large}\nleave files out with cluster.exclude; put a source model on the cluster's storage "
            "and name it source.model = local-dir:PATH with its path there"
        )


def requirements() -> list[str]:
    """Return what pip installs on the nodes: this package's dependencies without those that the cluster provides."""
    found = [text for text in distribution("prunesweep").requires or [] if "extra ==" not in text]
    return [text for text in found if re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0] not in CLUSTERS_OWN]


def environment(cluster: ClusterTable, *, pip: bool) -> dict[str, Any]:
    """Return Ray's runtime environment of a job, without its working directory.

    Args:
        cluster: the configuration's ``[cluster]``.
        pip: install the requirements on the nodes.
    """
    found: dict[str, Any] = {"env_vars": {**ENV, **cluster.env}}
    if pip:
        found["pip"] = requirements()
    return found


def facts(config: SearchConfig, folder: str, *, pip: bool = False) -> dict[str, str]:
    """Return the metadata of a search's job, by which other machines find the run and go on with it.

    Args:
        config: of the search, on the machine that sends it.
        folder: of the run, on the cluster.
        pip: the nodes install the requirements.
    """
    return {
        "prunesweep": "search",
        "run": config.name,
        "folder": folder,
        "config": on_cluster(config).to_toml(),
        "pip": "yes" if pip else "",
    }


def driver(
    config: str,
    folder: str,
    *,
    again: bool,
    once: bool = False,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
) -> str:
    """Return the command line of a search's driver, quoted for a shell.

    Args:
        config: file of the configuration, on the cluster.
        folder: folder of the run, on the cluster.
        again: continue the run if it exists; without it, an existing run is an error.
        once: end with code 0 where a failure would come again; only used with ``again``.
        trials: as for ``prunesweep resume``; only used with ``again``.
        overrides: as for ``prunesweep resume``; only used with ``again``.
        retry_failed: as for ``prunesweep resume``; only used with ``again``.
    """
    if not again:
        return shlex.join(["python", "-m", "prunesweep", "search", config, "--out", folder, "--address", "auto"])
    more = ["--once"] if once else []
    more += [] if trials is None else ["--trials", str(trials)]
    more += ["--retry-failed"] if retry_failed else []
    more += [part for text in overrides for part in ("--set", text)]
    return shlex.join(["python", "-m", "prunesweep.launch.cluster.entrypoint", config, folder, *more])
