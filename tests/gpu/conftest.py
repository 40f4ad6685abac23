"""What tests on a GPU share. ``PRUNESWEEP_GPU`` says what happens where there is none:

not set      they are skipped, and say so
required     they fail: for a machine that should have one
rehearse     they run on the CPU, but for those that are about a GPU alone: is the code of the tests right?
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# read when CUDA starts: deterministic matrix products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MODE = os.environ.get("PRUNESWEEP_GPU", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.xdist_group("gpu"))  # one process has the GPU's memory


@pytest.fixture
def device() -> torch.device:
    """Where a test runs."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if MODE == "rehearse":
        return torch.device("cpu")
    reason = "no GPU: torch.cuda.is_available() is False"
    if MODE == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For tests that mean nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("about a GPU alone")
    return device
