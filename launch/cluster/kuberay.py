"""Write a search as a KubeRay RayJob: head, workers, storage, and a driver that resumes when it is restarted.

Fields are those of KubeRay 1.5 and newer (``ray.io/v1``, ``authOptions``). A lost driver or head costs a retry: KubeRay
builds a new cluster (``backoffLimit``), and its driver continues from the run's folder on the claim. KubeRay would do
that after every other failure; so a search that would fail again ends its job as succeeded, and says so (``--once``).
"""

from __future__ import annotations

import base64
import re
from importlib.metadata import version
from typing import Any

import yaml  # type: ignore[import-untyped]

from prunesweep.models import UserError
from prunesweep.models.io.objects import is_url, joined
from prunesweep.search.config import ClusterTable, SearchConfig

from .package import CONFIG, ENV, driver, facts

__all__ = ["kuberay"]

PLACE = "/etc/prunesweep"  # where the configuration is mounted
NAME_LIMIT = 47  # KubeRay's limit on the name of a RayJob, in characters
HEAD = {"cpus": 4, "memory_gib": 16}  # driver, Optuna, Ray's own servers; no trial runs there
IDLE = 120  # seconds until a worker without work goes; Ray's default of a minute is about what a new one takes to come
SHARED_MEMORY = "8Gi"  # loaders hand batches over in it; Kubernetes gives 64 MiB otherwise


def kuberay(config: SearchConfig) -> str:
    """Return the YAML of a ConfigMap and a RayJob, for ``kubectl apply -f``.

    Raises:
        UserError: ``[cluster]`` names no image, storage or claim, or the run's name cannot be a RayJob's.
    """
    cluster = config.cluster or ClusterTable()
    for field, why in (
        ("image", "a container with Ray, torch and this package, see docs/cluster.md"),
        ("storage", "where the claim is mounted, for example /runs, or a URL as s3://BUCKET/runs"),
        ("storage_claim", "a PersistentVolumeClaim that all nodes may write to (ReadWriteMany)"),
    ):
        if getattr(cluster, field) is None and not (field == "storage_claim" and is_url(str(cluster.storage))):
            raise UserError(f"cluster.{field} is missing: {why}")
    name = _object_name(config.name)
    where = {"name": name, "namespace": cluster.namespace}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": where,
        "data": {CONFIG: config.to_toml()},
    }
    folder = joined(str(cluster.storage), config.name)
    entrypoint = driver(f"{PLACE}/{CONFIG}", folder, again=True, once=True)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": where,
        "spec": {
            "entrypoint": entrypoint,
            "metadata": _metadata(config, folder),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {**ENV, **cluster.env}}, sort_keys=False),
            "submissionMode": "K8sJobMode",
            "backoffLimit": cluster.restarts,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _ray_cluster(cluster, name),
        },
    }
    return yaml.dump_all([settings, job], Dumper=_Dumper, sort_keys=False, width=1000)


def _object_name(run: str) -> str:
    """The name of a run as KubeRay takes it.

    Names that would have to be changed are refused: two runs could become one RayJob.
    """
    if re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run) and len(run) <= NAME_LIMIT:
        return run
    near = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:NAME_LIMIT].strip("-")
    near = near if near[:1].isalpha() else f"run-{near}"[:NAME_LIMIT].strip("-")
    raise UserError(
        f"name = {run!r} cannot name a RayJob: it takes a letter and then at most {NAME_LIMIT - 1} lower-case letters, "
        f"digits and hyphens, no hyphen at the end; for example --set name={near}"
    )


def _metadata(config: SearchConfig, folder: str) -> dict[str, str]:
    """What a job says of its search, with the configuration in a form that no shell on its way can change."""
    found = facts(config, folder)
    return {**found, "config": base64.b64encode(found["config"].encode()).decode(), "encoding": "base64"}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Represent text of several lines as a YAML literal block."""


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _ray_cluster(cluster: ClusterTable, name: str) -> dict[str, Any]:
    head = _container("ray-head", cluster, HEAD["cpus"], HEAD["memory_gib"], 0)
    head["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
    ]
    worker = _container("ray-worker", cluster, cluster.cpus, cluster.memory_gib, cluster.gpus)
    pod = _pod(cluster, name, worker)
    if cluster.node_selector:
        pod["spec"]["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        pod["spec"]["tolerations"] = [_toleration(taint) for taint in cluster.tolerations]
    grows = cluster.max_nodes is not None
    fewest, most = (0, cluster.max_nodes) if grows else (cluster.nodes, cluster.nodes)
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        **({"enableInTreeAutoscaling": True, "autoscalerOptions": {"idleTimeoutSeconds": IDLE}} if grows else {}),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(cluster, name, head),
        },
        "workerGroupSpecs": [
            {
                "groupName": "trials",
                "replicas": fewest,
                "minReplicas": fewest,
                "maxReplicas": most,
                "rayStartParams": {},
                "template": pod,
            }
        ],
    }


def _toleration(taint: str) -> dict[str, str]:
    """What lets a pod onto nodes with a taint ``KEY[=VALUE]:EFFECT``."""
    name, _, effect = taint.rpartition(":")
    key, equals, value = name.partition("=")
    if not equals:
        return {"key": key, "operator": "Exists", "effect": effect}
    return {"key": key, "operator": "Equal", "value": value, "effect": effect}


def _container(name: str, cluster: ClusterTable, cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    resources = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": PLACE, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if not is_url(str(cluster.storage)):
        mounts.append({"name": "storage", "mountPath": cluster.storage})
    if cluster.data_claim is not None:
        mounts.append({"name": "data", "mountPath": cluster.data, "readOnly": True})
    return {
        "name": name,
        "image": cluster.image,
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": mounts,
    }


def _pod(cluster: ClusterTable, name: str, container: dict[str, Any]) -> dict[str, Any]:
    if cluster.data_claim is not None and cluster.data is None:
        raise UserError("cluster.data_claim needs cluster.data, the folder where it is mounted")
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
    ]
    if not is_url(str(cluster.storage)):
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": cluster.storage_claim}})
    if cluster.data_claim is not None:
        claim = {"claimName": cluster.data_claim, "readOnly": True}
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
    return {"spec": {"containers": [container], "volumes": volumes}}
