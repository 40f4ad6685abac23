"""What is saved computes what the module computes, or it is not saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import UserError, arch_of, load, save
from prunesweep.models.io.export import export
from tests.generate import FAMILIES, random_arch, random_images, random_model

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


class Doubled(nn.Linear):
    """A layer of the same tensors, and of another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def eps(model: Any) -> None:
    model.blocks[1].norm1.eps = 1e-3


def heads(model: Any) -> None:
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 4, 8


def scale(model: Any) -> None:
    model.blocks[0].attn.scale *= 1 + 1e-5


def activation(model: Any) -> None:
    model.blocks[1].mlp.act = nn.GELU("tanh")


def other_activation(model: Any) -> None:
    model.blocks[1].mlp.act = nn.ReLU()


def layer(model: Any) -> None:
    old = model.blocks[0].mlp.fc2
    model.blocks[0].mlp.fc2 = Doubled(old.in_features, old.out_features)
    model.blocks[0].mlp.fc2.load_state_dict(old.state_dict())


def hook(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, given, found: 2 * found)


def forward(model: Any) -> None:
    old = model.blocks[0].forward
    model.blocks[0].forward = lambda x: 2 * old(x)


def by_batch(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: old(x) if len(x) == 1 else 2 * old(x)


CHANGES: dict[Callable[[Any], None], str] = {
    eps: r"blocks\.1\.norm1\.eps = 0\.001, not 1e-06",
    heads: r"blocks\.0\.attn\.num_heads = 4, not 2",
    scale: r"blocks\.0\.attn\.scale = 0\.25000\d+, not 0\.25",
    activation: r"blocks\.1\.mlp\.act\.approximate = 'tanh', not 'none'",
    other_activation: r"blocks\.1\.mlp\.act is a ReLU, not a GELU",
    layer: r"blocks\.0\.mlp\.fc2 is a Doubled, not a Linear",
    hook: r"blocks\.0 has a forward hook",
    by_batch: r"the model has another forward function",
    forward: r"blocks\.0 has another forward function",
}


@pytest.fixture
def member(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    stock = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    for parameter in stock.parameters():  # timm's are so small that attention hardly matters
        nn.init.normal_(parameter, std=0.2)
    return load(save(stock, tmp_path / "member"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_module_that_was_changed_by_hand_is_not_saved(
    change: Callable[[Any], None], member: Any, tmp_path: Path
) -> None:
    change(member)
    for attempt in (
        lambda: save(member, tmp_path / "other"),
        lambda: export(member, tmp_path / "other", "torch-export"),
    ):
        with pytest.raises(UserError, match=f"changed by hand after it was built.*{CHANGES[change]}"):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member"]


def test_a_hook_that_only_looks_is_none_of_its_business(member: Any, tmp_path: Path) -> None:
    seen = list[torch.Tensor]()
    member.blocks[0].register_forward_hook(lambda module, given, found: seen.append(found))
    member.blocks[0].train()
    save(member, tmp_path / "other")
    assert seen
    assert [block.training for block in member.blocks] == [True, False]


def test_the_order_of_channels_in_memory_does_not_matter(member: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = member(x)
        save(member.to(memory_format=torch.channels_last), tmp_path / "other")
        torch.testing.assert_close(load(tmp_path / "other")(x), wanted)


def test_other_tensors_than_the_records_are_named(member: Any, tmp_path: Path) -> None:
    torch.nn.utils.parametrizations.weight_norm(member.head)
    with pytest.raises(UserError, match=r"(?s)its record no longer fits.*parametrizations"):
        save(member, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member"]


def test_a_model_that_cannot_be_run_is_not_saved(member: Any, tmp_path: Path) -> None:
    member.blocks[0].attn.num_heads = 7
    with pytest.raises(UserError, match="changed by hand after it was built, and cannot be run"):
        save(member, tmp_path / "other")


def test_a_stock_model_with_a_hook_is_not_saved(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    hook(model)
    with pytest.raises(UserError, match=r"blocks\.0 has a forward hook"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_the_same_ones(member: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        member.blocks[0].mlp.fc1.weight.fill_(float("nan"))
    save(member, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_stock_models_of_any_type_can_be_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {} if name.startswith("pvt") else {"img_size": 64}
    save(timm.create_model(name, num_classes=5, **sizes).to(dtype), tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_that_were_given_stay(family: str, tmp_path: Path) -> None:
    arch = random_arch(Random(1), family)
    model = random_model(arch, 1, torch.float32)
    save(model, tmp_path / "model")
    rates = {"drop_rate": 0.5, "drop_path_rate": 0.3}
    member = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, **rates)
    save(member, tmp_path / "again")
    other = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True, drop_rate=0.1)
    for again, drop in ((load(tmp_path / "again"), 0.5), (other, 0.1)):
        assert arch_of(again) == arch
        assert drop in {module.p for module in again.modules() if isinstance(module, nn.Dropout)}
        paths = [module.drop_prob for module in again.modules() if isinstance(module, timm.layers.DropPath)]
        assert paths == [module.drop_prob for module in member.modules() if isinstance(module, timm.layers.DropPath)]
        assert max(paths) == pytest.approx(0.3)
    x = random_images(arch, 0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(x), model.eval()(x))


def test_a_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path / "model")
    for name, rate in (("drop_rate", 1.5), ("drop_path_rate", "much")):
        with pytest.raises(UserError, match=f"{name} = {rate!r}: must be a number in 0..1"):
            timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, **{name: rate})
