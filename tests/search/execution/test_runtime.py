"""How many units fit: the arithmetic, without Ray."""

from __future__ import annotations

import pytest

from prunesweep.models import UserError
from prunesweep.search.config import ResourcesTable
from prunesweep.search.execution.runtime import max_concurrent

GPU_NODE, CPU_NODE = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 6.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        ({}, [CPU_NODE], 6),
        ({"cpus_per_trial": 4}, [CPU_NODE, CPU_NODE], 2),  # a worker lies within one node: not 12 // 4
        ({"cpus_per_trial": 4, "workers_per_trial": 2}, [CPU_NODE, CPU_NODE], 1),  # but a trial need not
        ({"cpus_per_trial": 3, "workers_per_trial": 3}, [CPU_NODE, CPU_NODE], 1),
        ({"gpus_per_trial": 1, "cpus_per_trial": 4}, [GPU_NODE, CPU_NODE], 4),
        ({"gpus_per_trial": 0.3}, [GPU_NODE], 12),  # three to a GPU, never one over two
        ({"gpus_per_trial": 3}, [GPU_NODE, GPU_NODE], 2),
        ({"gpus_per_trial": 1, "workers_per_trial": 8}, [GPU_NODE, GPU_NODE, CPU_NODE], 1),
    ],
)
def test_units_that_fit(resources: dict, nodes: list, expected: int) -> None:
    assert max_concurrent(ResourcesTable(**resources), nodes) == expected


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"gpus_per_trial": 5},
            "a trial needs 1 x .cpus_per_trial = 1, gpus_per_trial = 5., but the cluster's 2 nodes",
        ),
        ({"workers_per_trial": 30}, "room for 22 of 30 workers"),
    ],
)
def test_a_trial_that_can_never_fit_is_refused_with_the_arithmetic(resources: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        max_concurrent(ResourcesTable(**resources), [GPU_NODE, CPU_NODE])
