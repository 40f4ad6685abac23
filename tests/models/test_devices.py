"""No device is taken for granted: models run where their weights are, in fake tensors of a GPU that is not there."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunesweep.training import Distill, Recipe
from prunesweep.training.task import make_task
from tests.generate import FAMILIES, random_arch, random_images, random_model


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """Replace what a model holds by fake tensors of the same shapes on a GPU; operations with others then fail."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(elsewhere(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = elsewhere(buffer)
    return model


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "lm"])
def test_models_run_where_their_weights_are(family: str, training: bool) -> None:
    for seed in range(8):
        arch = random_arch(Random(seed), family)
        model, images = random_model(arch, 0, torch.float32), random_images(arch, 0, dtype=torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
            assert on_fake_gpu(model).train(training)(elsewhere(images)).device.type == "cuda"


def test_a_model_that_makes_a_tensor_elsewhere_is_found() -> None:
    class Careless(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) + torch.ones(4)

    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        model = on_fake_gpu(Careless(4, 4))
        with pytest.raises(RuntimeError, match="found two different devices|Expected all tensors"):
            model(torch.empty(2, 4, device="cuda"))


def test_losses_are_where_their_model_is() -> None:
    arch = random_arch(Random(3), "vit", extras=False)
    kinds = [Distill(kind="soft"), Distill(kind="hard"), Distill(kind="feature")]
    for recipe in (Recipe(label_smoothing=0.1), Recipe(distill=tuple(kinds))):
        model, teacher = random_model(arch, 0, torch.float32), random_model(arch, 1, torch.float32)
        task = make_task(model, recipe, teacher if recipe.distill else None)
        images = random_images(arch, 0, dtype=torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
            on_fake_gpu(task)
            labels = torch.zeros(len(images), dtype=torch.int64, device="cuda")
            assert task.train()(elsewhere(images), labels)["loss"].device.type == "cuda"
