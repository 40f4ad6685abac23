"""timm's own training of our models, as its ``train.py`` and ``validate.py`` do it, and the way back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from prunesweep.models import UserError, arch_of, load, save
from prunesweep.models.importers import import_checkpoint
from tests.generate import random_images, random_model
from tests.launch.test_cli import call
from tests.models.test_in_other_code import KINDS

KIND = "skipped"  # blocks without attention or MLP, whose weights stay out of every gradient
ARCH = KINDS[KIND]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(ARCH, 0, torch.float32), tmp_path / "model")


def images(batch: int = 4) -> torch.Tensor:
    return random_images(ARCH, 0, batch, dtype=torch.float32)


def trained(folder: Path, out: Path, *, compiled: bool = False) -> tuple[Any, Any]:
    """Two updates by timm's parts; it writes ``last.pth.tar`` as its script does."""
    name = f"local-dir:{folder}"
    model = timm.create_model(
        name, pretrained=True, num_classes=7, drop_rate=0.1, drop_path_rate=0.1, scriptable=False, global_pool="token"
    )
    average = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2)
    for step in range(2):
        loss = torch.nn.functional.cross_entropy(model.train()(images()), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        scheduler.step(step + 1)
    args = argparse.Namespace(model=name, epochs=2)
    whole = torch.compile(model) if compiled else model  # only wrapped: it is not run
    out.mkdir()
    saver = CheckpointSaver(
        whole, optimizer, args=args, model_ema=average, checkpoint_dir=str(out), recovery_dir=str(out)
    )
    saver.save_checkpoint(1, metric=50.0)
    return model.eval(), average.module.eval()


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_what_timm_trained_comes_back(folder: Path, tmp_path: Path, compiled: bool) -> None:
    with torch.enable_grad():
        model, average = trained(folder, tmp_path / "out", compiled=compiled)
    file = tmp_path / "out" / "model_best.pth.tar"
    for ema, wanted in ((False, model), (True, average)):
        again = import_checkpoint(file, "timm", ema=ema, model=folder)
        assert arch_of(again) == arch_of(model)
        assert torch.equal(again(images()), wanted(images()))
    validated = timm.create_model(f"local-dir:{folder}", num_classes=7, checkpoint_path=str(file)).eval()
    kept = average if not compiled else validated  # validate.py takes averaged weights where there are any
    assert validated(images()).shape == kept(images()).shape == (4, 7)


@torch.no_grad()
def test_prefixes_of_wrapped_models(folder: Path, tmp_path: Path) -> None:
    weights, wanted = load(folder).state_dict(), load(folder)(images())
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({"state_dict": {f"{prefix}{key}": value for key, value in weights.items()}}, tmp_path / "file.pth")
        assert torch.equal(import_checkpoint(tmp_path / "file.pth", "timm", model=folder)(images()), wanted)


def test_a_stock_model_of_other_classes_and_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = {"num_classes": 5, "in_chans": 1, "img_size": 32, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    weights = {"arch": "vit_tiny_patch16_224", "epoch": 3, "state_dict": model.state_dict()}
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"the file lacks: blocks\.1\.norm1\.weight, .* and \d+ more; is it of another"):
        import_checkpoint(tmp_path / "file.pth", "timm", img_size=32)
    save(model, tmp_path / "model")
    command = (
        "import",
        tmp_path / "file.pth",
        "--as",
        "timm",
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
    )
    assert call(capsys, *command)[0] == 0
    again = load(tmp_path / "out")
    assert (arch_of(again).num_classes, arch_of(again).in_chans) == (5, 1)
    with torch.no_grad():
        x = torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(again(x), model.eval()(x))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, r"name it \(--model NAME or FOLDER\)"),
        ({}, {"model": "vit_tny_patch16_224"}, "timm makes no model 'vit_tny_patch16_224'"),
        ({"arch": "vit_tiny_patch16_224"}, {}, "the file lacks: "),
        ({"extra.weight": torch.ones(2)}, {"model": "{folder}"}, "the file has unknown keys: extra.weight"),
        ({"norm.weight": torch.ones(2)}, {"model": "{folder}"}, r"norm\.weight has shape \[2\], .* has \[8\]"),
        ({}, {"model": "{folder}", "heads": 3}, r"heads = \[3\]: the architecture says how many"),
        ({}, {"model": "{folder}", "ema": True}, r"no averaged weights \(entry state_dict_ema\)"),
    ],
)
def test_what_does_not_fit(
    content: dict[str, Any], options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    weights = {**load(folder).state_dict(), **{k: v for k, v in content.items() if isinstance(v, torch.Tensor)}}
    beside = {k: v for k, v in content.items() if isinstance(v, str)}
    torch.save({**beside, "state_dict": weights}, tmp_path / "file.pth")
    given = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "file.pth", "timm", **given)


def test_a_model_is_named_for_this_layout_alone(folder: Path, tmp_path: Path) -> None:
    torch.save(load(folder).state_dict(), tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"model = .*: layout 'uvc' says itself"):
        import_checkpoint(tmp_path / "file.pth", "uvc", model="vit_tiny_patch16_224")
