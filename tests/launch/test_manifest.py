"""Manifests: Kubernetes, SLURM and ``ray up``, as their own readers see them."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from prunesweep.launch.cluster.kuberay import kuberay
from prunesweep.launch.cluster.package import ENV, facts
from prunesweep.launch.cluster.ray_launcher import ray_launcher
from prunesweep.launch.cluster.slurm import slurm
from prunesweep.models import UserError
from prunesweep.search.config import SearchConfig, parse_config
from tests.launch.test_cli import call

EXAMPLE = Path(__file__).parents[2] / "examples" / "imagenet_deit_small.toml"
TABLE: dict[str, Any] = {
    "storage": "/mnt/runs",
    "storage_claim": "runs",
    "data": "/mnt/imagenet",
    "data_claim": "imagenet",
    "image": "registry/prunesweep:1",
    "nodes": 3,
    "cpus": 16,
    "gpus": 4,
    "memory_gib": 64,
    "restarts": 5,
    "env": {"NCCL_DEBUG": "IN FO"},
}


@pytest.fixture
def config(tiny: Callable[..., SearchConfig]) -> Callable[..., SearchConfig]:
    return lambda **changes: tiny(name="My_run.1", cluster={**TABLE, **changes})


def test_kuberay_has_nodes_gpus_storage_and_restarts(config: Callable[..., SearchConfig]) -> None:
    named = config().model_copy(update={"name": "my-run-1"})
    settings, job = yaml.safe_load_all(kuberay(named))
    assert (settings["apiVersion"], settings["kind"]) == ("v1", "ConfigMap")
    assert parse_config(tomllib.loads(settings["data"]["search.toml"]), "map") == named
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"] == settings["metadata"] == {"name": "my-run-1", "namespace": "default"}
    spec = job["spec"]
    assert (
        spec["entrypoint"]
        == "python -m prunesweep.launch.cluster.entrypoint /etc/prunesweep/search.toml /mnt/runs/my-run-1 --once"
    )
    known = spec["metadata"]  # by which 'prunesweep jobs', 'status' and 'fetch' find it
    assert (known["prunesweep"], known["run"], known["folder"]) == ("search", "my-run-1", "/mnt/runs/my-run-1")
    assert known == {**facts(named, "/mnt/runs/my-run-1"), "config": known["config"], "encoding": "base64"}
    assert tomllib.loads(base64.b64decode(known["config"]).decode())["name"] == "my-run-1"
    assert spec["backoffLimit"] == 5
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {**ENV, "NCCL_DEBUG": "IN FO"}}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # no trial runs beside the driver
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    [workers] = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    for template in (head["template"], workers["template"]):
        [container] = template["spec"]["containers"]
        assert container["image"] == "registry/prunesweep:1"
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        assert volumes[mounts["/mnt/runs"]["name"]]["persistentVolumeClaim"]["claimName"] == "runs"
        assert volumes[mounts["/mnt/imagenet"]["name"]]["persistentVolumeClaim"]["claimName"] == "imagenet"
        assert volumes[mounts["/etc/prunesweep"]["name"]]["configMap"]["name"] == "my-run-1"
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}


def check_fields(value: Any, fields: Any, where: str = "RayJob") -> None:
    """Whether a manifest has only fields that ``rayjob_fields.json`` knows, of its types; ``*`` stands for any name."""
    if isinstance(fields, dict):
        assert isinstance(value, dict), where
        for name, inner in value.items():
            assert name in fields or "*" in fields, f"{where}.{name}"
            check_fields(inner, fields.get(name, fields.get("*")), f"{where}.{name}")
    elif isinstance(fields, list):
        assert isinstance(value, list), where
        for i, inner in enumerate(value):
            check_fields(inner, fields[0], f"{where}[{i}]")
    else:
        types = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "quantity": str}
        assert isinstance(value, types[fields]), f"{where} = {value!r}: must be a {fields}"
        assert fields == "boolean" or not isinstance(value, bool), where


GROWS = {
    "max_nodes": 20,
    "node_selector": {"cloud.google.com/gke-spot": "true"},
    "tolerations": ["cloud.google.com/gke-spot=true:NoSchedule", "spot:NoExecute"],
}


@pytest.mark.parametrize("more", [{}, {"data_claim": None, "gpus": 0}, GROWS])
def test_kuberay_has_the_fields_of_a_rayjob(config: Callable[..., SearchConfig], more: dict[str, Any]) -> None:
    _, job = yaml.safe_load_all(kuberay(config(**more).model_copy(update={"name": "run"})))
    check_fields(job, json.loads((Path(__file__).parent / "rayjob_fields.json").read_text()))


def test_kuberay_brings_nodes_when_they_are_asked_for(config: Callable[..., SearchConfig]) -> None:
    """From none on, spot machines for the trials alone."""
    _, job = yaml.safe_load_all(kuberay(config(**GROWS).model_copy(update={"name": "run"})))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (0, 0, 20)
    pod = workers["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert pod["tolerations"] == [
        {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]
    assert not {"nodeSelector", "tolerations"} & set(cluster["headGroupSpec"]["template"]["spec"])
    _, fixed = yaml.safe_load_all(kuberay(config().model_copy(update={"name": "run"})))
    assert "enableInTreeAutoscaling" not in fixed["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(
    "table", [{"tolerations": ["spot"]}, {"tolerations": ["a b:NoSchedule"]}, {"node_selector": {"a\nb": "c"}}]
)
def test_labels_and_taints_are_those_of_kubernetes(config: Callable[..., SearchConfig], table: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cluster.(tolerations|node_selector)"):
        config(**table)


@pytest.mark.parametrize("name", ["a_b", "A..B", "7-fold", "b-", "x" * 48])
def test_kuberay_takes_no_name_that_it_would_have_to_change(config: Callable[..., SearchConfig], name: str) -> None:
    with pytest.raises(UserError, match="cannot name a RayJob") as refused:
        kuberay(config().model_copy(update={"name": name}))
    proposed = str(refused.value).rpartition("name=")[2]
    assert f"name: {proposed}\n" in kuberay(config().model_copy(update={"name": proposed}))


FIELDS = {
    "address": "http://head",
    "storage": "/runs",
    "data": "/data",
    "image": "registry/image:1",
    "namespace": "default",
    "storage_claim": "runs",
    "data_claim": "data",
    "ssh_user": "ubuntu",
    "partition": "gpu",
    "account": "team",
    "time": "1:00:00",
    "hosts": "10.0.0.1",
    "setup": "module load x",
    "env": "A",
}


@pytest.mark.parametrize("field", [*FIELDS, "name"])
def test_values_that_could_run_something_are_refused(config: Callable[..., SearchConfig], field: str) -> None:
    for bad in ("\ntouch PWNED", "\rx", "\x00", "$(touch PWNED)", "`touch PWNED`", '"; touch PWNED; "'):
        if field == "setup" and not set(bad) & set("\n\r\x00"):  # which are shell lines
            continue
        text = FIELDS.get(field, "run") + bad
        table = config().model_dump(mode="json", exclude_none=True)
        if field == "name":
            table["name"] = text
        else:
            table["cluster"][field] = {text: "x"} if field == "env" else [text] if field in ("hosts", "setup") else text
        with pytest.raises(UserError, match=field):
            parse_config(table, "there")


def test_values_that_a_shell_could_read_as_more_are_quoted(config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    odd = "/my runs'; touch PWNED; '&"
    found = config(storage=f"{tmp_path}{odd}", data=odd, env={"A": "$(touch PWNED); 'x'"}, hosts=["10.0.0.1"])
    ends = found.source.model_copy(update={"args": {"x": "\nEND_OF_CONFIG\ntouch PWNED\n"}})
    allocation = Allocation(tmp_path, driver=f'echo "$A" >> {tmp_path}/log')
    assert allocation.start(slurm(found.model_copy(update={"source": ends}))).wait(timeout=60) == 0
    assert allocation.lines()[-1] == "$(touch PWNED); 'x'"
    mounts = yaml.safe_load(ray_launcher(found))["docker"]["run_options"]
    assert shlex.split(mounts[-1]) == ["-v", f"{odd}:{odd}"]
    assert not list(tmp_path.rglob("PWNED"))
    assert not Path("PWNED").exists()


def test_a_batch_script_sets_up_before_it_insists_on_variables(
    config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    """Scripts of conda and of modules use variables that are not set."""
    allocation = Allocation(tmp_path, driver="exit 0")
    script = slurm(config(storage=str(tmp_path), setup=['echo "$NEVER_SET" > /dev/null']))
    assert allocation.start(script).wait(timeout=60) == 0
    failing = slurm(config(storage=str(tmp_path), setup=["false"]))
    assert allocation.start(failing).wait(timeout=60) == 1


@pytest.mark.parametrize("field", ["image", "storage", "storage_claim"])
def test_kuberay_needs(config: Callable[..., SearchConfig], field: str) -> None:
    with pytest.raises(UserError, match=f"cluster.{field} is missing"):
        kuberay(config(**{field: None}))


def test_ray_up_takes_its_file(config: Callable[..., SearchConfig]) -> None:
    found = yaml.safe_load(
        ray_launcher(config(hosts=["10.0.0.1", "10.0.0.2", "10.0.0.3"], setup=["source /e/activate"]))
    )
    validate_config(prepare_config(found))
    with pytest.raises(Exception, match="head_ipp"):  # the schema is one
        validate_config(prepare_config({**found, "head_ipp": 1}))
    assert found["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    head, worker = found["head_start_ray_commands"][-1], found["worker_start_ray_commands"][-1]
    for line in (head, worker):
        assert line.startswith("source /e/activate; export RAY_AUTH_MODE=token;")
        assert "export NCCL_DEBUG='IN FO';" in line
        subprocess.run(["bash", "-n", "-c", line], check=True)
    assert "--num-cpus=0 --num-gpus=0" in head
    assert "--num-cpus=16 --num-gpus=4" in worker
    assert "-v /mnt/runs:/mnt/runs" in found["docker"]["run_options"]
    with pytest.raises(UserError, match=r"cluster\.hosts is missing"):
        ray_launcher(config())


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Allocation:
    """SLURM's programs, as far as a script calls them: every step runs here, and everything is written down."""

    def __init__(self, folder: Path, *, driver: str) -> None:
        self.folder, bin_ = folder, folder / "bin"
        bin_.mkdir()
        self.log = folder / "log"
        say = f'echo "$(basename "$0") $*" >> {self.log}'
        executable(bin_ / "scontrol", f"{say}\n[ $1 = show ] && printf 'n1\\nn2\\nn3\\n' || true")
        executable(bin_ / "srun", f'{say}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"')
        executable(bin_ / "ray", f"{say}\ntrap 'exit 0' TERM\nwhile :; do sleep 0.1; done")
        executable(bin_ / "getent", "echo '127.0.1.1 STREAM n1'; echo '10.1.1.1 STREAM n1'")
        where = 'echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c < "$RAY_AUTH_TOKEN_PATH")"'
        started = f'while [ "$(grep -c "^ray start" {self.log})" -lt 3 ]; do sleep 0.05; done; exit 0'
        wait = f"{say}\n[[ $2 == *wait_for_nodes ]] && {{ {started}; }}"
        begin = f"{wait}\n{where} >> {self.log}\necho $$ > {folder}/driver\n"
        executable(bin_ / "python", begin + driver)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-3]",
        }

    def start(self, script: str, **more: str) -> subprocess.Popen[str]:
        path = self.folder / "script"
        path.write_text(script)
        subprocess.run(["bash", "-n", str(path)], check=True)
        return subprocess.Popen(["bash", str(path)], env={**self.environment, **more}, text=True)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_a_batch_script_starts_ray_and_the_driver(config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    script = slurm(config(storage=str(tmp_path / "runs"), setup=["export ACTIVE=yes"], partition="gpu"))
    directives = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.splitlines()
        if "SBATCH" in line and "=" in line
    )
    wanted = {"nodes": "3", "cpus-per-task": "16", "gpus-per-node": "4", "mem": "64G", "partition": "gpu"}
    assert wanted.items() <= directives.items()
    assert "#SBATCH --requeue" in script
    allocation = Allocation(tmp_path, driver=f'echo "$NCCL_DEBUG $ACTIVE" >> {tmp_path}/log')
    assert allocation.start(script).wait(timeout=60) == 0
    lines, run = allocation.lines(), tmp_path / "runs" / "My_run.1"
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 3
    assert sum("--head" in line and "--node-ip-address=10.1.1.1 --port=20077" in line for line in starts) == 1
    assert sum("--address=10.1.1.1:20077 --num-cpus=16 --num-gpus=4" in line for line in starts) == 2
    assert "python -m prunesweep.launch.cluster.wait_for_nodes --address 10.1.1.1:20077 --nodes 3" in lines
    assert f"python -m prunesweep.launch.cluster.entrypoint {run}.search.toml {run} --address 10.1.1.1:20077" in lines
    assert lines[-2:] == ["token 600 64", "IN FO yes"]
    assert parse_config(tomllib.loads(Path(f"{run}.search.toml").read_text()), "there").name == "My_run.1"
    assert [path.name for path in run.parent.iterdir()] == ["My_run.1.search.toml"]  # and no token


WAITS = "trap 'exit 130' TERM; while :; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("driver", "signal", "restarts", "code", "again"),
    [
        ("exit 1", None, 0, 1, False),  # failed, as it would again
        ("exit 2", None, 0, 2, False),
        ("exit 3", None, 0, 3, True),  # Ray died
        ("kill -KILL $$", None, 0, 137, True),
        ("exit 3", None, 5, 3, False),  # often enough
        (WAITS, "USR1", 9, 130, True),  # the time limit is near
        (WAITS, "TERM", 0, 130, False),  # scancel
    ],
)
def test_a_batch_script_queues_itself_again_where_that_helps(
    config: Callable[..., SearchConfig],
    tmp_path: Path,
    driver: str,
    signal: str | None,
    restarts: int,
    code: int,
    again: bool,
) -> None:
    allocation = Allocation(tmp_path, driver=driver)
    process = allocation.start(slurm(config(storage=str(tmp_path / "runs"))), SLURM_RESTART_COUNT=str(restarts))
    if signal is not None:
        while not (tmp_path / "driver").exists() or not (tmp_path / "driver").read_text():
            assert process.poll() is None
        subprocess.run(["kill", f"-{signal}", str(process.pid)], check=True)
    assert process.wait(timeout=60) == code
    assert ("scontrol requeue 77" in allocation.lines()) == again
    deadline = time.monotonic() + 5
    while (
        str(tmp_path / "script") in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    ):
        assert time.monotonic() < deadline, "what is left would kill another process of the driver's number later"


def test_manifest_writes_what_it_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "search.sbatch"
    code, text, _ = call(capsys, "manifest", EXAMPLE, "--to", "slurm", "--out", out, "--set", "cluster.nodes=2")
    assert (code, text) == (0, f"{out}: start with sbatch {out}\n")
    assert "#SBATCH --nodes=2" in out.read_text()
    code, text, _ = call(capsys, "manifest", EXAMPLE, "--to", "kuberay")
    assert [part["kind"] for part in yaml.safe_load_all(text)] == ["ConfigMap", "RayJob"]
    code, _, err = call(capsys, "manifest", EXAMPLE, "--to", "ray-cluster")
    assert code == 2
    assert "cluster.hosts is missing" in err
