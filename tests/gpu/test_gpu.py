"""Everything that has a device, on a GPU: ``PRUNESWEEP_GPU=required pytest -n 0 -m gpu``."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunesweep.launch.doctor import check_here
from prunesweep.models import arch_of, build, cost, cut, load, save
from prunesweep.models.fuse import for_inference
from prunesweep.models.io.export import export
from prunesweep.models.latency.timing import measure
from prunesweep.models.layers.mixers import attend
from prunesweep.pruners import METHODS, Scores, WidthMethod, get_method
from prunesweep.pruners.subspaces import Widths, compress, instant, recover
from prunesweep.search import run_search
from prunesweep.search.config import SearchConfig
from prunesweep.training import EVAL_BATCH, Distill, Recipe, evaluate, fit, open_data
from tests.contract_pruner import labelled, source
from tests.generate import FAMILIES, random_arch, random_cut, random_images, random_model
from tests.launch.test_cli import call
from tests.training.test_ddp import ARCH, Noise
from tests.training.test_loop import make

WIDTHS = {name: method for name, method in METHODS.items() if isinstance(method, WidthMethod) and name != "random"}
PAIRS = [(name, family) for name, method in WIDTHS.items() for family in method.families]


@pytest.fixture(scope="module")
def data() -> Any:
    return open_data("digits")


@pytest.fixture
def deterministic(device: torch.device) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, "lm"])
def test_models_and_their_cuts_compute_what_they_do_on_a_cpu(device: torch.device, family: str) -> None:
    for seed in range(12):
        random = Random(seed)
        arch = random_arch(random, family)
        model, images = random_model(arch, seed), random_images(arch, seed)
        decision = random_cut(random, arch)
        on_device = copy.deepcopy(model).to(device)
        close(on_device(images.to(device)), model(images))
        small = cut(on_device, decision)
        assert {p.device.type for p in small.parameters()} == {device.type}
        close(small(images.to(device)), cut(model, decision)(images))


@pytest.mark.parametrize(("qk", "v"), [(40, 24), (20, 12), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_of_unequal_widths_take_any_kernel(device: torch.device, dtype: torch.dtype, qk: int, v: int) -> None:
    """Whether zeros fill them up in memory or not."""
    (q, k), values = torch.randn(2, 2, 3, 9, qk, dtype=torch.float64), torch.randn(2, 9, 3 * v, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = attend(q, k, values, (v,) * 3, qk**-0.5)
    with torch.no_grad():
        found = attend(*(x.to(device, dtype) for x in (q, k, values)), (v,) * 3, qk**-0.5)
    assert found.dtype == dtype
    close(found.double(), wanted, 2e-5 if dtype == torch.float32 else 0.05)


def test_models_for_inference(device: torch.device) -> None:
    for seed in range(6):
        arch = random_arch(Random(seed))
        model, images = random_model(arch, seed).to(device), random_images(arch, seed).to(device)
        close(for_inference(model)(images), model(images))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_methods_score_as_on_a_cpu(device: torch.device, name: str, family: str) -> None:
    method, model = get_method(name, WidthMethod), source(family, 7)
    batches = labelled(arch_of(model), 1)
    wanted: Scores = method.score(copy.deepcopy(model), batches)
    found: Scores = method.score(model.to(device), [(x.to(device), y.to(device)) for x, y in batches])
    for key, vector in wanted.vectors.items():
        close(torch.as_tensor(found.vectors[key]), torch.as_tensor(vector), 1e-6)


def test_models_are_computed_as_on_a_cpu(device: torch.device, data: Any) -> None:
    model = make(dim=32)
    batches = [x for x, _ in data.val_loader(64)][:4]
    arch = arch_of(model)
    widths = Widths.uniform(arch, embed=20, qk=8, v=8, mlp=48)
    on_device = copy.deepcopy(model).to(device)
    small = compress(on_device, widths, batches)
    assert next(small.parameters()).device.type == device.type
    x = batches[0]
    with torch.no_grad():
        close(small(x.to(device)), compress(model, widths, batches)(x), 1e-2)
        decision = random_cut(Random(1), arch)
        close(recover(on_device, decision, batches)(x.to(device)), recover(model, decision, batches)(x), 1e-2)
    points = instant(on_device, batches, budgets=(0.6, 0.3))
    assert [next(p.model.parameters()).device.type for p in points] == [device.type] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"channels_last": True},
        {"compile": True},
        {"ema": 0.9, "accumulate": 2},
        {"mixup": 0.8, "cutmix": 1.0},
        {"distill": (Distill(temperature=2.0),)},
        {"distill": (Distill(cache_teacher=True),), "fixed_view": True},
        {"distill": (Distill(kind="feature"),), "amp": "bf16"},
    ],
    ids=str,
)
def test_an_epoch_of_training(device: torch.device, data: Any, fields: dict[str, Any]) -> None:
    model, epochs = make(dim=32).to(device), list[Any]()
    teacher = make(seed=5, dim=32) if "distill" in fields else None
    recipe = Recipe(**{"epochs": 1, "batch_size": 128, "lr": 2e-3, **fields})
    assert fit(model, data, recipe, teacher=teacher, on_epoch=epochs.append)
    assert next(model.parameters()).device.type == device.type
    assert np.isfinite(epochs[0].loss)
    found = evaluate(model, data.val_loader(EVAL_BATCH))
    assert abs(found["top1"] - evaluate(model.cpu(), data.val_loader(EVAL_BATCH))["top1"]) < 1


@pytest.mark.usefixtures("deterministic")
def test_a_run_that_was_stopped_goes_on_bit_equal(device: torch.device, data: Any, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch_size=128, lr=2e-3, drop_path=0.1, distill=(Distill(),))
    teacher, state = make(seed=5), tmp_path / "state.safetensors"
    whole, cut_off, resumed = make().to(device), make().to(device), make(seed=9).to(device)
    assert fit(whole, data, recipe, teacher=teacher, seed=4)
    assert not fit(cut_off, data, recipe, teacher=teacher, seed=4, state=state, should_stop=lambda: True)
    assert fit(resumed, data, recipe, teacher=teacher, seed=4, state=state)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_batch_that_does_not_fit_is_halved(cuda: torch.device) -> None:
    """A real lack of memory: the process may take what a quarter of the batch needs."""
    torch.manual_seed(0)
    model, notes = build(ARCH).to(cuda), list[str]()

    class Hungry(nn.Module):
        """Takes a tenth of the GPU's memory for every image, for the time of a forward and backward pass."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = torch.cuda.get_device_properties(x.device).total_memory // 10
            ballast = torch.empty(len(x) * size, dtype=torch.uint8, device=x.device)
            return x + ballast[:1].float().detach() * 0

    model.norm_pre = Hungry()
    fit(model.double(), Noise(), Recipe(epochs=1, batch_size=12, lr=1e-3), on_note=notes.append)
    assert any("out of memory with 12 images at a time: going on with 6" in note for note in notes)


@pytest.mark.parametrize("fields", [{}, {"amp": "bf16", "distill": (Distill(),)}], ids=str)
def test_no_update_waits_for_the_gpu(cuda: torch.device, data: Any, fields: dict[str, Any]) -> None:
    """However many updates an epoch has, the host waits as often: reading the loss now and then, and at the end."""

    def waits(batch_size: int) -> int:
        recipe = Recipe(epochs=1, batch_size=batch_size, fixed_view=True, **fields)
        teacher = make(seed=5).to(cuda) if fields else None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                fit(make().to(cuda), data, recipe, teacher=teacher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in found)

    assert waits(80) == waits(128)  # 16 and 10 updates; losses are read every 20


def test_latency_is_measured_and_foretold(device: torch.device, tmp_path: Path, capsys: Any) -> None:
    save(make(dim=32), tmp_path / "model")
    where, table = device.type, tmp_path / "table.json"
    few = ["--device", where, "--batch", "32"]
    code, out, err = call(capsys, "latency", tmp_path / "model", "--out", table, "--check", "3", *few)
    assert code == 0, out + err
    assert json.loads(table.read_text())
    assert measure(make(dim=32), batch=8, device=where, min_seconds=0.01).median_ms > 0


def test_a_model_that_was_trained_here_runs_elsewhere(device: torch.device, data: Any, tmp_path: Path) -> None:
    model = make(dim=32).to(device)
    fit(model, data, Recipe(epochs=1, batch_size=128))
    images = next(iter(data.val_loader(8)))[0]
    wanted = model(images.to(device)).detach().cpu()
    close(load(save(model, tmp_path / "model"))(images), wanted, 1e-4)
    export(model, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    close(torch.from_numpy(found), wanted, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_search(device: torch.device, tiny: Callable[..., SearchConfig], tmp_path: Path, share: float) -> None:
    """One trial on the GPU, and two that share it."""
    gpus = share if device.type == "cuda" else 0
    config = tiny(search={"trials": 4}, resources={"cpus": 2, "gpus_per_trial": gpus})
    found = run_search(config, tmp_path / "run")
    assert found is not None
    assert found.front
    assert all(cost(arch_of(load(tmp_path / "run" / one.model))).macs for one in found.front if one.model)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ray_train(device: torch.device, tmp_path: Path, workers: str, capsys: Any) -> None:
    """One worker with NCCL; two on one GPU, where NCCL refuses and gloo is taken."""
    save(make(dim=32), tmp_path / "model")
    gpus = str(1 / int(workers)) if device.type == "cuda" else "0"
    given = ["--data", "digits", "--recipe", "quick", "--epochs", "1", "--teacher", tmp_path / "model"]
    options = ["--workers", workers, "--gpus", gpus, "--out", tmp_path / "trained"]
    code, out, err = call(capsys, "finetune", tmp_path / "model", *given, *options)
    assert code == 0, out + err
    assert load(tmp_path / "trained")


def test_doctor_names_the_gpu(cuda: torch.device) -> None:
    [found] = [one for one in check_here() if one.what == "GPUs here"]
    assert torch.cuda.get_device_name(0) in found.found
