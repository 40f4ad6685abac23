"""``prunesweep manifest``: write the file with which Kubernetes, SLURM or ``ray up`` starts a search."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["manifest"]


class Kind(StrEnum):
    """The kinds of files that can be written."""

    kuberay = "kuberay"
    slurm = "slurm"
    ray_cluster = "ray-cluster"


HOW = {
    Kind.kuberay: "kubectl apply -f {file}",
    Kind.slurm: "sbatch {file}",
    Kind.ray_cluster: "ray up {file}, then prunesweep submit",
}


def manifest(
    config: Annotated[Path, typer.Argument(help="a TOML file with a [cluster] table", show_default=False)],
    kind: Annotated[
        Kind, typer.Option("--to", help="a KubeRay RayJob, a batch script, or YAML for ray up", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="file to write  [default: standard output]", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. cluster.nodes=4")
    ] = None,
) -> None:
    """Write the file that starts, and restarts, a search on Kubernetes, under SLURM or on machines of your own."""
    from prunesweep.launch.cluster.kuberay import kuberay
    from prunesweep.launch.cluster.package import on_cluster
    from prunesweep.launch.cluster.ray_launcher import ray_launcher
    from prunesweep.launch.cluster.slurm import slurm
    from prunesweep.models.io.files import check_place, make_folder, write_text
    from prunesweep.search.config import load_config

    make = {Kind.kuberay: kuberay, Kind.slurm: slurm, Kind.ray_cluster: ray_launcher}[kind]
    text = make(on_cluster(load_config(config, overrides or [])))
    if out is None:
        print(text, end="")
        return
    check_place(out)
    make_folder(out.absolute().parent)
    write_text(out, text)
    print(f"{out}: start with {HOW[kind].format(file=out)}")
