"""``-m prunesweep.launch.cluster.wait_for_nodes``: wait for all nodes; exit with 1 after the time limit."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

__all__ = ["wait_for_nodes"]

POLL = 2.0  # seconds


def wait_for_nodes(address: str, nodes: int, timeout: float) -> int:
    """Wait until a cluster has enough living nodes.

    Args:
        address: address of the cluster.
        nodes: number of nodes to wait for.
        timeout: seconds to wait at most.

    Returns:
        The number of living nodes.
    """
    import ray

    deadline, alive = time.monotonic() + timeout, 0
    while alive < nodes and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, RuntimeError):  # the head is not up yet
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            alive = sum(node["Alive"] for node in ray.nodes())
        if alive < nodes:
            time.sleep(POLL)
    ray.shutdown()
    return alive


def main() -> int:
    """Wait as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=600.0)
    arguments = parser.parse_args()
    alive = wait_for_nodes(arguments.address, arguments.nodes, arguments.timeout)
    print(f"{alive} of {arguments.nodes} nodes are there", flush=True)
    return 0 if alive >= arguments.nodes else 1


if __name__ == "__main__":
    sys.exit(main())
