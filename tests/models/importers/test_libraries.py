"""Models of torchvision and transformers: the import computes what the original does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers as hf
from torch import nn

from prunesweep.models import UserError, arch_of, load, save
from prunesweep.models.importers import import_checkpoint

VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
BEIT = {
    "use_shared_relative_position_bias": True,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.0,
}
SWIN = {
    "image_size": 24,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": 4,
    "mlp_ratio": 2.0,
}


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation mode, with weights that hide nothing: libraries start with zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def images(model: Any) -> torch.Tensor:
    arch = arch_of(model)
    return torch.randn(3, arch.in_chans, *arch.img_size, generator=torch.Generator().manual_seed(1))


CASES: list[tuple[Any, Any, bool]] = [  # model, its answer of images, whether it gives features
    (hf.ViTForImageClassification(hf.ViTConfig(num_labels=5, **VIT)), lambda m, x: m(x).logits, False),
    (hf.ViTModel(hf.ViTConfig(qkv_bias=False, **VIT)), lambda m, x: m(x).last_hidden_state[:, 0], True),
    (
        hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(num_labels=5, **VIT)),
        lambda m, x: m(x).logits,
        False,
    ),
    (hf.Dinov2Model(hf.Dinov2Config(**DINO)), lambda m, x: m(x).pooler_output, True),
    (
        hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(num_register_tokens=2, **DINO)),
        lambda m, x: m(x).pooler_output,
        True,
    ),
    (hf.Dinov2Model(hf.Dinov2Config(use_swiglu_ffn=True, **DINO)), lambda m, x: m(x).pooler_output, True),
    (
        hf.BeitForImageClassification(hf.BeitConfig(num_labels=5, use_relative_position_bias=True, **VIT)),
        lambda m, x: m(x).logits,
        False,
    ),
    (hf.BeitModel(hf.BeitConfig(**BEIT, **VIT)), lambda m, x: m(x).pooler_output, True),
    (hf.SwinForImageClassification(hf.SwinConfig(num_labels=5, **SWIN)), lambda m, x: m(x).logits, False),
    (hf.SwinModel(hf.SwinConfig(**SWIN)), lambda m, x: m(x).pooler_output, True),
    (hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), lambda m, x: m(x).pooler_output, True),
    (
        hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(projection_dim=7, **VIT)),
        lambda m, x: m(x).image_embeds,
        True,
    ),
    (hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)), lambda m, x: m(x).pooler_output, True),
    (
        hf.SiglipModel(
            hf.SiglipConfig(
                vision_config=VIT,
                text_config={
                    "hidden_size": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 8,
                    "vocab_size": 9,
                },
            )
        ),
        lambda m, x: m.vision_model(x).pooler_output,
        True,
    ),
]


@pytest.mark.parametrize(("model", "answer", "headless"), CASES, ids=[type(model).__name__ for model, *_ in CASES])
def test_transformers(model: Any, answer: Any, headless: bool, tmp_path: Path) -> None:
    randomised(model).save_pretrained(tmp_path / "theirs")
    ours = import_checkpoint(tmp_path / "theirs", "transformers")
    assert arch_of(ours).headless == headless
    x = images(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), answer(model, x), rtol=1e-5, atol=1e-5)
        again = load(save(ours, tmp_path / "ours"))
        assert torch.equal(again(x), ours(x))


def vision(width: int, **options: Any) -> nn.Module:
    return torchvision.models.VisionTransformer(24, 8, 2, 3, width, 40, num_classes=5, **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (vision(24), {"heads": 3}),
        (
            torchvision.models.SwinTransformer([2, 2], 12, [2, 2], [2, 3], [4, 4], mlp_ratio=2.0, num_classes=5),
            {"img_size": 32},
        ),
    ],
)
def test_torchvision(model: nn.Module, options: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": randomised(model).state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    ours = import_checkpoint(tmp_path / "theirs.pth", "torchvision", **options)
    x = images(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)


def test_preprocessing_and_class_names_come_along(tmp_path: Path) -> None:
    config = hf.ViTConfig(num_labels=2, id2label={0: "cat", 1: "dog"}, **VIT)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path, max_shard_size="20KB")  # in several files
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**facts, **crop}))
    cfg = import_checkpoint(tmp_path, "transformers").pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic")
    assert (cfg["crop_pct"], cfg["label_names"]) == (0.75, ["cat", "dog"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type = 'bert': layout 'transformers' reads vit, deit"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu': must be one of gelu"),
        ({"hidden_size": 25}, "its widths do not fit together"),
        ({"hidden_size": "24"}, "config.json is not one of vit"),
        ({"num_hidden_layers": 3}, "the file lacks blocks.2.norm1.weight"),
        ({"num_hidden_layers": 1}, "tensors that layout 'transformers' does not know: blocks.1"),
        ({"intermediate_size": 48}, r"blocks.0.mlp.fc1.weight has shape \[40, 24\], expected \[48, 24\]"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf.ViTModel(hf.ViTConfig(**VIT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path, "transformers")


def test_other_forms_are_refused(tmp_path: Path) -> None:
    hf.Dinov2ForImageClassification(hf.Dinov2Config(num_labels=3, **DINO)).save_pretrained(tmp_path / "concat")
    hf.DeiTModel(hf.DeiTConfig(**VIT)).save_pretrained(tmp_path / "bare")
    for folder, message in (
        ("concat", "reads the class token and the mean of the patches"),
        ("bare", "not both classifiers"),
    ):
        with pytest.raises(UserError, match=message):
            import_checkpoint(tmp_path / folder, "transformers")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        import_checkpoint(tmp_path / "bare", "transformers")
    with pytest.raises(UserError, match="is not a file"):
        import_checkpoint(tmp_path / "bare", "nvit")
    torch.save(vision(24).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="give heads"):
        import_checkpoint(tmp_path / "theirs.pth", "torchvision")
    with pytest.raises(UserError, match="positions for 9 patches"):
        import_checkpoint(tmp_path / "theirs.pth", "torchvision", heads=3, img_size=32)
