from __future__ import annotations

import pytest
import timm
import torch

from prunesweep.models.without_values import without_values


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_names_shapes_and_types_are_those_of_a_model_with_values(name: str) -> None:
    with without_values():
        found = timm.create_model(name)
    wanted = timm.create_model(name)
    assert all(tensor.is_meta for tensor in found.state_dict().values())
    assert [(key, t.shape, t.dtype) for key, t in found.state_dict().items()] == [
        (key, t.shape, t.dtype) for key, t in wanted.state_dict().items()
    ]
    assert {key for key, p in found.named_parameters() if p.requires_grad} == dict(wanted.named_parameters()).keys()


def test_tensors_with_memory_are_filled_as_ever() -> None:
    with without_values():
        found = torch.zeros(3, device="cpu").fill_(2.0).mul_(3).clamp_(max=5)
        assert torch.empty(3).fill_(2.0).is_meta
    assert found.tolist() == [5.0, 5.0, 5.0]
