"""Write a cluster file for ``ray up``: existing machines, reached by SSH; ``submit`` starts searches on it."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml  # type: ignore[import-untyped]

from prunesweep.models import UserError
from prunesweep.models.io.objects import is_url
from prunesweep.search.config import ClusterTable, SearchConfig

from .package import ENV

__all__ = ["ray_launcher"]


def ray_launcher(config: SearchConfig) -> str:
    """Return the YAML for ``ray up``.

    Raises:
        UserError: ``[cluster]`` names no hosts.
    """
    cluster = config.cluster or ClusterTable()
    if not cluster.hosts:
        raise UserError("cluster.hosts is missing: addresses of the machines, the head first")
    head, *workers = cluster.hosts
    stop, limit = "ray stop", "ulimit -n 65536"
    offer = f"--num-cpus={cluster.cpus} --num-gpus={cluster.gpus}"
    # a head with workers runs none of the trials, but the driver
    own = "--num-cpus=0 --num-gpus=0" if workers else offer
    setup = list(cluster.setup)
    prefix = "".join(f"{line}; " for line in setup)
    tokens = "export RAY_AUTH_MODE=token"  # ~/.ray/auth_token, which ray up copies below
    variables = "".join(f"export {name}={shlex.quote(value)}; " for name, value in {**ENV, **cluster.env}.items())
    found: dict[str, Any] = {
        "cluster_name": re.sub(r"[^A-Za-z0-9-]+", "-", config.name),
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": {"ssh_user": cluster.ssh_user},
        "min_workers": len(workers),
        "max_workers": len(workers),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "initialization_commands": ["mkdir -p -m 700 ~/.ray"],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f"{prefix}{stop}",
            f"{prefix}{tokens}; {variables}{limit}; ray start --head --port=6379 --dashboard-host=127.0.0.1 {own} "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"{prefix}{stop}",
            f"{prefix}{tokens}; {variables}{limit}; ray start --address=$RAY_HEAD_IP:6379 {offer}",
        ],
    }
    if cluster.image is not None:
        options = ["--gpus all"] if cluster.gpus else []
        folders = [path for path in (cluster.storage, cluster.data) if path is not None and not is_url(path)]
        options += [f"-v {shlex.quote(f'{path}:{path}')}" for path in folders]
        found["docker"] = {
            "image": cluster.image,
            "container_name": "prunesweep",
            "run_options": ["--ulimit nofile=65536:65536", "--shm-size=8g", *options],
        }
    return yaml.safe_dump(found, sort_keys=False, width=1000)
