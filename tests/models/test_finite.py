from __future__ import annotations

import pytest
import timm
import torch

from prunesweep.models import UserError
from prunesweep.models.finite import check_finite

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_tensor_that_is_no_number_is_named(value: float) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    check_finite(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[:2, 3] = value
    with pytest.raises(UserError, match=r"^mine: blocks.1.mlp.fc1.weight has 2 values that are NaN or infinite\. Its"):
        check_finite(model, "mine")
    with torch.no_grad():
        model.head.bias[0] = value
    with pytest.raises(UserError, match=r"blocks.1.mlp.fc1.weight has 2 values that are NaN or infinite, and 1 more"):
        check_finite(model)


def test_buffers_count_too() -> None:
    model = torch.nn.BatchNorm1d(3)
    model.running_var[1] = torch.nan
    with pytest.raises(UserError, match="running_var has 1 values"):
        check_finite(model)
