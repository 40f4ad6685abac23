"""Write a search as a batch script of SLURM: Ray on the nodes of one allocation, and a driver that resumes.

Before the time limit, and when a node is lost, the job is queued again (``--requeue``) and its driver continues from
the run's folder. Ray's token is made anew for every allocation, in a file that only its owner reads.
"""

from __future__ import annotations

import shlex

from prunesweep.models import UserError
from prunesweep.models.io.objects import joined
from prunesweep.search.config import ClusterTable, SearchConfig

from .package import CONFIG, ENV

__all__ = ["slurm"]

WARNING = 300  # seconds between the warning and the time limit, for running trials to save their state
TEMPLATE = """\
#!/bin/bash
{directives}
set -e
{setup}
set -uo pipefail
run={run}
mkdir -p "$(dirname "$run")"
config="$run.{config}"
cat > "$config" <<'END_OF_CONFIG'
{toml}END_OF_CONFIG

{exports}
# one token for every allocation; a file, because command lines and exported environments can be seen by others
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$run.token-$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
# this script runs on the first node; Ray wants an address and not a name, and none of the loopback's
head="$(getent ahostsv4 "${{nodes[0]}}" | awk '$1 !~ /^127/ {{print $1; exit}}')"
head="${{head:-$(hostname -I | awk '{{print $1}}')}}"
port=$((20000 + SLURM_JOB_ID % 20000))
temp="/tmp/ray-$SLURM_JOB_ID"

finish() {{
    kill "${{steps[@]}}" 2>/dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}}
steps=()
trap finish EXIT
export SRUN_CPUS_PER_TASK={cpus}  # srun does not take it from the allocation

srun --nodes=1 --ntasks=1 --nodelist="${{nodes[0]}}" \\
    ray start --head --block --node-ip-address="$head" --port="$port" --temp-dir="$temp" \\
    --dashboard-host=127.0.0.1 --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats &
steps+=($!)
for node in "${{nodes[@]:1}}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" \\
        ray start --block --address="$head:$port" --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats &
    steps+=($!)
done

python -m prunesweep.launch.cluster.wait_for_nodes --address "$head:$port" --nodes "${{#nodes[@]}}"

python -m prunesweep.launch.cluster.entrypoint "$config" "$run" --address "$head:$port" &
search=$!
again=no
# before the time limit: ask the driver to end, and end it {grace} seconds later
trap 'again=yes; kill -TERM "$search" 2>/dev/null; (sleep {grace} && kill -KILL "$search") & steps+=($!)' USR1
trap 'kill -TERM "$search" 2>/dev/null' TERM
while kill -0 "$search" 2>/dev/null; do
    wait "$search" || true  # a signal ends a wait, not the driver
done
code=0
wait "$search" || code=$?
# 3: Ray died; above 130: killed. A search that failed (1), or was given something wrong (2), would do so again
if [ "$code" -ne 0 ]; then
    if [ "$again" = yes ]; then
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$code" -eq 3 ] || [ "$code" -gt 130 ]; then
        [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ] || scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""


def slurm(config: SearchConfig) -> str:
    """Return the script for ``sbatch``.

    Raises:
        UserError: ``[cluster]`` names no storage.
    """
    cluster = config.cluster or ClusterTable()
    if cluster.storage is None:
        raise UserError(
            "cluster.storage is missing: a folder that all nodes see, for example /scratch/USER/runs, or a URL"
        )
    directives = {
        "job-name": config.name,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus,
        "mem": f"{cluster.memory_gib}G",
        "gpus-per-node": cluster.gpus or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "signal": f"B:USR1@{WARNING}",
        "open-mode": "append",
        "output": f"{config.name}-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    lines.append("#SBATCH --requeue")
    variables = {**ENV, **cluster.env}
    return TEMPLATE.format(
        directives="\n".join(lines),
        setup="\n".join(cluster.setup),
        run=shlex.quote(joined(cluster.storage, config.name)),
        config=CONFIG,
        toml=config.to_toml(),
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        cpus=cluster.cpus,
        gpus=cluster.gpus,
        grace=WARNING - 60,
        restarts=cluster.restarts,
    )
