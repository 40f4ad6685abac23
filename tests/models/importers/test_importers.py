from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from prunesweep.models import UserError, arch_of, load, save
from prunesweep.models.importers import LAYOUTS, container, import_checkpoint

DATA = Path(__file__).parents[2] / "golden" / "data" / "import"
CONFIG = {"deit": DATA / "spvit_deit_mixed_dev_config.json", "swin": DATA / "spvit_swin_mixed_dev_config.yaml"}
NEEDS: dict[str, dict[str, Any]] = {  # what the files do not say
    "nvit_dev": {},
    "upvit_bare_dev": {"heads": 3},
    "upvit_pvt_dev": {"heads": (1, 2, 5, 8), "img_size": 32},
    "uvc_stage1_dev": {"heads": 3},
    "spvit_deit_mixed_dev": {"config": CONFIG["deit"]},
    "spvit_deit_frozen_dev": {"config": CONFIG["deit"]},
    "spvit_swin_mixed_dev": {"config": CONFIG["swin"]},
    "spvit_swin_frozen_dev": {"config": CONFIG["swin"]},
    "pmvit_dev": {"heads": 3},
}
Content = dict[str, Any]


def content_of(name: str) -> Content:
    return torch.load(DATA / f"{name}.pth", map_location="cpu", weights_only=True)


def read(tmp_path: Path, name: str, content: Any, **options: Any) -> torch.nn.Module:
    """Import ``content`` as the layout of case ``name``, with what that case needs."""
    path = tmp_path / "file.pth"
    torch.save(content, path)
    return import_checkpoint(path, name.split("_")[0], **{**NEEDS[name], **options})


def tensors_of(content: Content) -> Content:
    return content.get("model", content)


def resize(key: str, *shape: int) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        tensors_of(content)[key] = torch.ones(shape)

    return change


def drop(key: str) -> Callable[[Content], None]:
    return lambda content: tensors_of(content).pop(key)


def put(key: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content.update({key: value})


def in_dim(key: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content["dim"].update({key: value})


@pytest.mark.parametrize("name", NEEDS)
def test_a_key_that_is_unknown_missing_or_misshapen_is_named(name: str, tmp_path: Path) -> None:
    whole = content_of(name)
    key = next(k for k in tensors_of(whole) if k.endswith("fc2.bias"))  # every layout has it
    for change, message in (
        (resize("blocks.0.attn.strange", 3), r"does not know: (module\.)?blocks.0.attn.strange; nothing was imported"),
        (drop(key), f"has no key '{key.removeprefix('module.')}', which layout"),
        (resize(key, 5), r"has shape \[5\], expected \["),
        (resize(key, 1, 1), r"has shape \[1, 1\]: layout '\w+' needs 1 axes"),
    ):
        content = {**whole, "model": dict(whole["model"])} if "model" in whole else dict(whole)
        change(content)
        if "module." + key.removeprefix("module.") in whole:
            content = {k if k.startswith("module.") else f"module.{k}": v for k, v in content.items()}
        with pytest.raises(UserError, match=message):
            read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nvit_dev", drop("blocks.1.norm1.weight"), "has no key 'blocks.1.norm1.weight'"),
        ("nvit_dev", lambda c: c.pop("dim"), r"entry 'dim' \(EMB, head, QK, V, MLP\): it is missing"),
        ("nvit_dev", put("dim", {"EMB": 40}), r"\(EMB, head, QK, V, MLP\): got {'EMB': 40}"),
        ("nvit_dev", in_dim("head", [2, 3]), r"dim\['head'\] = \[2, 3\]: must be 3 positive whole numbers"),
        ("nvit_dev", in_dim("V", [8, 0, 6]), r"dim\['V'\] = \[8, 0, 6\]: must be 3 positive"),
        (
            "nvit_dev",
            in_dim("QK", [8, 4, 6]),
            r"Q.weight has shape \[12, 40\], expected \[6, 40\] \('dim' says 1 heads",
        ),
        ("nvit_dev", in_dim("MLP", [64, 41, 96]), r"dim\['MLP'\]\[1\] = 41: the file's tensors say 40"),
        ("nvit_dev", in_dim("EMB", 41), r"dim\['EMB'\] = 41: the file's tensors say 40"),
        ("nvit_dev", resize("patch_embed.proj.weight", 40, 191, 1, 1), "191 inputs: layout 'nvit' has square patches"),
        ("nvit_dev", resize("pos_embed", 1, 17, 40), "15 patches, which are no square: give img_size"),
        ("upvit_bare_dev", resize("head.weight", 0, 48), r"head.weight has shape \[0, 48\]"),
        ("upvit_bare_dev", drop("cls_token"), "has no key 'cls_token'"),
        ("upvit_bare_dev", resize("blocks.4.norm1.weight", 48), r"has no keys blocks\.3\.\*"),
        ("upvit_bare_dev", put("notes", "mine"), "entries of unknown meaning: notes; nothing was imported"),
        ("upvit_pvt_dev", drop("module.block3.0.norm1.weight"), "has no key 'block3.0.norm1.weight'"),
        ("uvc_stage1_dev", drop("block_skip_gating"), "has no key 'block_skip_gating'"),
        ("uvc_stage1_dev", drop("blocks.0.attn.proj.mask"), "has no key 'blocks.0.attn.proj.mask'"),
        ("uvc_stage1_dev", resize("block_skip_gating", 4), r"block_skip_gating has shape \[4\]"),
        ("uvc_stage1_dev", lambda c: c["norm.mask"].fill_(0.5), "norm.mask is a mask: it must hold 0 and 1 only"),
        ("uvc_stage1_dev", lambda c: c["block_skip_gating"].fill_(0), "at least one block must be kept"),
        ("pmvit_dev", put("channels", [13, 8, 7]), "'channels' is .*: must be 4 numbers, one per block"),
        ("pmvit_dev", put("channels", [13, 9, 7, 12]), r"channels\[1\] = 9: the file's tensors say 8"),
        ("pmvit_dev", drop("blocks.2.attn.recover_matrix"), "has no key 'blocks.2.attn.recover_matrix'"),
        ("spvit_deit_mixed_dev", drop("blocks.0.attn.bn_1x1.running_var"), "'blocks.0.attn.bn_1x1.running_var'"),
        ("spvit_deit_mixed_dev", drop("blocks.2.attn.v.bias"), "has no key 'blocks.2.attn.v.bias'"),
        (
            "spvit_deit_mixed_dev",
            resize("blocks.3.attn.v.bias", 48),
            "blocks.3.attn has keys, but none of qk., bn_1x1.",
        ),
        ("spvit_swin_mixed_dev", drop("layers.1.blocks.1.attn_mask"), "has no key 'layers.1.blocks.1.attn_mask'"),
        ("spvit_swin_mixed_dev", drop("layers.0.downsample.norm.bias"), "'layers.0.downsample.norm.bias'"),
    ],
)
def test_a_damaged_file_is_refused(name: str, change: Callable[[Content], Any], message: str, tmp_path: Path) -> None:
    content = content_of(name)
    change(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nvit_dev", {"heads": 3}, r"heads = \[3\]: the file's entry 'dim' says \[2, 3, 1\]; leave heads out"),
        ("nvit_dev", {"img_size": 40}, "number of patches = 25: the file's tensors say 16"),
        ("nvit_dev", {"config": CONFIG["deit"]}, "layout 'nvit' has no configuration"),
        ("nvit_dev", {"ema": True}, r"has no averaged weights \(entry model_ema\); leave out ema \(--ema\)"),
        ("upvit_bare_dev", {"heads": None}, "how many heads the attention has: give heads"),
        ("upvit_bare_dev", {"heads": 5}, "heads = 5: must divide the width of the attention, 48"),
        ("upvit_bare_dev", {"heads": 0}, r"heads = \(0,\): must be positive whole numbers"),
        ("upvit_bare_dev", {"heads": "3"}, "heads = '3': must be positive whole numbers"),
        ("upvit_bare_dev", {"heads": (3, 3)}, "one number of heads for all blocks"),
        ("upvit_bare_dev", {"img_size": -32}, r"img_size = \(-32, -32\): must be positive whole numbers"),
        ("upvit_pvt_dev", {"heads": None}, "give heads for 4 stages, one each"),
        ("upvit_pvt_dev", {"heads": 3}, r"give heads for 4 stages, one each .* got \[3\]"),
        ("upvit_pvt_dev", {"heads": (1, 2, 5, 7)}, r"heads\[3\] = 7: must divide the width of the attention, 64"),
        ("upvit_pvt_dev", {"img_size": 16}, r"stages\[0\]\.sr_ratio = 8: must not exceed the grid \[4, 4\]"),
        ("uvc_stage1_dev", {"heads": None}, "how many heads the attention has: give heads"),
        ("uvc_stage1_dev", {"heads": 7}, "heads = 7: must divide the width of the attention, 36"),
        ("pmvit_dev", {"heads": 7}, "heads = 7: must divide the width of the attention, 48"),
        ("spvit_deit_mixed_dev", {"config": None}, "layout 'spvit' needs the run's configuration"),
        ("spvit_deit_mixed_dev", {"config": CONFIG["swin"]}, "has no assigned_indicators; is it the configuration"),
        ("spvit_swin_mixed_dev", {"config": CONFIG["deit"]}, "has no EXTRA.assigned_indicators"),
        ("spvit_deit_mixed_dev", {"heads": 6}, r"heads = \[6\]: the configuration says num_heads = \[3\]"),
        ("spvit_deit_mixed_dev", {"img_size": 64}, "the configuration says input_size = 32"),
        ("spvit_deit_mixed_dev", {"config": "absent.json"}, "cannot read the configuration absent.json"),
        ("spvit_deit_mixed_dev", {"config": "config.txt"}, "must be a file with suffix .json, .yaml, .yml"),
    ],
)
def test_what_is_given_must_fit(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, content_of(name), **options)


def deit_config(**changes: Any) -> dict[str, Any]:
    return {**json.loads(CONFIG["deit"].read_text()), **changes}


def swin_config(**changes: Any) -> dict[str, Any]:
    """The Swin run's configuration with values replaced by dotted name, dots written as ``__``."""
    config = yaml.safe_load(CONFIG["swin"].read_text())
    for name, value in changes.items():
        *tables, key = name.split("__")
        table = config
        for part in tables:
            table = table[part]
        table[key] = value
    return config


MSA, SKIP, CONV1, CONV3 = [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "spvit_deit_mixed_dev",
            deit_config(assigned_indicators=[CONV1, CONV3, CONV3, SKIP]),
            "the configuration's choice for blocks.2 = conv3x3: the file's tensors say attn",
        ),
        (
            "spvit_deit_mixed_dev",
            deit_config(assigned_indicators=[CONV1]),
            "number of blocks = 1: the file's tensors say 4",
        ),
        ("spvit_deit_mixed_dev", deit_config(assigned_indicators=[[0, 1, 0]]), r"\[0\] = \[0, 1, 0\]: must be one of"),
        ("spvit_deit_mixed_dev", deit_config(assigned_indicators=3), "assigned_indicators = 3: must be lists"),
        (
            "spvit_deit_mixed_dev",
            deit_config(num_heads=4),
            r"head_probs has shape \[3, 9\], expected \[4, 9\] \(4 heads\)",
        ),
        ("spvit_deit_frozen_dev", deit_config(num_heads=4), r"bconv.0.weight has shape .* \(4 heads in 48 channels\)"),
        ("spvit_deit_mixed_dev", deit_config(num_heads=7), "num_heads = 7: must divide the width of the attention, 48"),
        ("spvit_deit_mixed_dev", deit_config(num_heads=2.5), "num_heads = 2.5: must be a whole number of at least 1"),
        ("spvit_deit_mixed_dev", deit_config(num_heads=None), "the configuration has no num_heads: give heads"),
        (
            "spvit_deit_mixed_dev",
            deit_config(patch_size=16),
            r"patch_size = \(16, 16\): the file's tensors say \(8, 8\)",
        ),
        ("spvit_deit_mixed_dev", deit_config(input_size=64), "number of patches = 64: the file's tensors say 16"),
        ("spvit_deit_mixed_dev", [1, 2], "holds a list: a configuration is a mapping"),
        ("spvit_swin_mixed_dev", swin_config(EXTRA__alpha="hot"), "EXTRA.alpha = 'hot': must be a number"),
        ("spvit_swin_mixed_dev", swin_config(EXTRA__alpha=0), "EXTRA.alpha = 0.0: must be positive"),
        ("spvit_swin_mixed_dev", swin_config(EXTRA=3), "configuration: EXTRA must be a mapping, got 3"),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__DEPTHS=[2, 4]), r"MODEL.SWIN.DEPTHS = \(2, 4\): .* \(2, 2\)"),
        (
            "spvit_swin_mixed_dev",
            swin_config(MODEL__SWIN__NUM_HEADS=[3]),
            "entries in MODEL.SWIN.NUM_HEADS = 1: .* say 2",
        ),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__NUM_HEADS=[3, 12]), r"\[49, 6\], expected \[49, 12\]"),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__NUM_HEADS=[5, 6]), r"NUM_HEADS\[0\] = 5: must divide .* 24"),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__NUM_HEADS=3), "NUM_HEADS = 3: must be a list of positive"),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__WINDOW_SIZE=8), r"attn_mask has shape .* \(windows of 8 on"),
        (
            "spvit_swin_mixed_dev",
            swin_config(MODEL__SWIN__WINDOW_SIZE=5),
            "windows of MODEL.SWIN.WINDOW_SIZE = 5 do not",
        ),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__PATCH_SIZE=4), "PATCH_SIZE = 4: the file's tensors say 2"),
        ("spvit_swin_mixed_dev", swin_config(MODEL__SWIN__EMBED_DIM=96), "EMBED_DIM = 96: the file's tensors say 24"),
        ("spvit_swin_mixed_dev", swin_config(DATA__IMG_SIZE=64), r"attn_mask has shape .* on images of 64 x 64"),
        (
            "spvit_swin_frozen_dev",
            swin_config(EXTRA__assigned_indicators=[[CONV1, CONV3], [MSA, MSA]]),
            "choice for layers.1.blocks.1 = attn: the file's tensors say none",
        ),
    ],
)
def test_a_configuration_must_fit(name: str, config: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        import_checkpoint(DATA / f"{name}.pth", "spvit", config=path)


def test_a_published_name_stands_for_its_heads(tmp_path: Path) -> None:
    config = deit_config(num_heads=None, model="spvit_deit_tiny_patch16_224")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    model = read(tmp_path, "spvit_deit_mixed_dev", content_of("spvit_deit_mixed_dev"), config=tmp_path / "config.yml")
    assert {b.heads for b in arch_of(model).blocks if b.mixer == "attn"} == {3}


@pytest.mark.parametrize("name", sorted(NEEDS.keys() - {"upvit_bare_dev"}))
def test_another_layout_is_named(name: str) -> None:
    own = name.split("_")[0]
    for layout in LAYOUTS.keys() - {own}:
        options = {"config": CONFIG["deit"]} if layout == "spvit" else {"heads": 3}
        with pytest.raises(UserError, match=f"of layout '{own}' .* not '{layout}'"):
            import_checkpoint(DATA / f"{name}.pth", layout, **options)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("nvit", "layout 'nvit' reads its widths from the file's entry 'dim'"),
        ("uvc", "no key 'block_skip_gating', which layout 'uvc' needs"),
        ("spvit", "blocks.0.attn has keys, but none of"),
    ],
)
def test_the_names_of_timm_are_no_other_layout(layout: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(deit_config(assigned_indicators=[MSA] * 3)))
    options = {"config": config} if layout == "spvit" else {"heads": 3}
    with pytest.raises(UserError, match=message):
        import_checkpoint(DATA / "upvit_bare_dev.pth", layout, **options)


def test_an_unknown_layout_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="must be one of nvit, .*fairseq, timm, .* did you mean"):
        import_checkpoint(DATA / "upvit_dev.pth", "upvits")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    whole = (DATA / "upvit_dev.pth").read_bytes()
    for content, message in (
        (b"", "cannot be read as a checkpoint"),
        (b"hello there", "cannot be read as a checkpoint"),
        (whole[: len(whole) // 2], "cannot be read as a checkpoint"),
    ):
        path.write_bytes(content)
        for trust in (False, True):
            with pytest.raises(UserError, match=message):
                import_checkpoint(path, "upvit", heads=3, trust=trust)
    for found in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match="is not a file"):
            import_checkpoint(found, "upvit", heads=3)
    for content, message in (
        ([torch.ones(2)], "holds a list: a checkpoint is a dictionary"),
        ({"epoch": 3}, "holds no tensors: epoch"),
        ({}, "holds no tensors: it is empty"),
        ({"model": {"cls_token": torch.ones(1), "name": "x"}}, "entries of unknown meaning: name"),
        ({3: torch.ones(1)}, "has no key 'cls_token'"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            import_checkpoint(path, "upvit", heads=3)


def test_only_a_trusted_file_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"model": content_of("upvit_bare_dev"), "args": argparse.Namespace(lr=1.0), "epoch": 3}
    with pytest.raises(UserError, match="argparse.Namespace object. Reading it runs code"):
        read(tmp_path, "upvit_bare_dev", content)
    assert arch_of(read(tmp_path, "upvit_bare_dev", content, trust=True)).depth == 3
    package = ModuleType("vanished")
    package.Settings = type("Settings", (), {"__module__": "vanished"})
    monkeypatch.setitem(__import__("sys").modules, "vanished", package)
    torch.save({**content, "args": package.Settings()}, tmp_path / "foreign.pth")
    monkeypatch.delitem(__import__("sys").modules, "vanished")
    with pytest.raises(UserError, match="holds a vanished.Settings object, whose package cannot be loaded here"):
        import_checkpoint(tmp_path / "foreign.pth", "upvit", heads=3, trust=True)


@pytest.mark.parametrize("wrap", [dict, lambda sd: {"model": sd, "epoch": 1, "optimizer1": {}, "max_accuracy": 0.5}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers_do_not_matter(wrap: Callable[[Content], Content], prefix: str, tmp_path: Path) -> None:
    weights = content_of("upvit_bare_dev")
    want = read(tmp_path, "upvit_bare_dev", weights).state_dict()
    content = wrap({prefix + key: value for key, value in weights.items()})
    got = read(tmp_path, "upvit_bare_dev", content).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_averaged_weights_are_others(tmp_path: Path) -> None:
    weights = content_of("upvit_bare_dev")
    content = {"model": weights, "model_ema": {key: value + 1 for key, value in weights.items()}}
    plain, averaged = (read(tmp_path, "upvit_bare_dev", content, ema=ema).state_dict() for ema in (False, True))
    assert all(torch.equal(averaged[key], plain[key] + 1) for key in plain)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    model = read(tmp_path, "upvit_bare_dev", content_of("upvit_bare_dev"), img_size=(16, 64))
    assert arch_of(model).stages[0].grid == (2, 8)
    assert model(torch.zeros(1, 3, 16, 64)).shape == (1, 10)
    assert arch_of(read(tmp_path, "upvit_pvt_dev", content_of("upvit_pvt_dev"), img_size=None)).img_size == (224, 224)


def test_images_may_have_a_margin_that_no_patch_covers(tmp_path: Path) -> None:
    model = read(tmp_path, "upvit_bare_dev", content_of("upvit_bare_dev"), img_size=35)
    assert arch_of(model).img_size == (35, 35)
    assert model(torch.zeros(1, 3, 35, 35)).shape == (1, 10)


def test_a_block_runs_if_its_gate_for_running_is_the_greater(tmp_path: Path) -> None:
    content = content_of("uvc_stage1_dev")
    content["block_skip_gating"] = torch.tensor([[0.9, 0.1], [-2.0, -1.0], [0.5, 0.5], [-1.0, 1.0]])
    assert [b.src for b in arch_of(read(tmp_path, "uvc_stage1_dev", content)).blocks] == [1, 3]


def test_a_window_over_the_whole_map_is_not_shifted(tmp_path: Path) -> None:
    content, config = content_of("spvit_swin_mixed_dev"), tmp_path / "config.json"
    config.write_text(
        json.dumps(swin_config(MODEL__SWIN__WINDOW_SIZE=16, EXTRA__assigned_indicators=[[CONV1, CONV3], [MSA, MSA]]))
    )
    weights = content["model"]
    for key in [key for key in weights if key.endswith("attn_mask")]:
        del weights[key]
    weights["layers.1.blocks.0.attn.relative_position_bias_table"] = torch.zeros(15**2, 6)
    weights["layers.1.blocks.0.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.int64)
    for key in [key for key in weights if key.startswith("layers.1.blocks.0.attn.")]:
        weights[key.replace("blocks.0", "blocks.1")] = weights[key]
    stages = arch_of(read(tmp_path, "spvit_swin_mixed_dev", content, config=config)).stages
    assert [stage.window for stage in stages] == [(16, 16), (8, 8)]
    assert [(b.mixer, b.shifted) for b in stages[1].blocks] == [("attn", False), ("attn", False)]


def test_the_temperature_is_the_configurations(tmp_path: Path) -> None:
    kernels = []
    for alpha in ("1e2", 100, None, 1.0):  # YAML reads 1e2 as text
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(swin_config(EXTRA__alpha=alpha)))
        model = import_checkpoint(DATA / "spvit_swin_mixed_dev.pth", "spvit", config=config)
        kernels.append(model.layers[0].blocks[1].attn.bconv[0].weight)
    assert torch.equal(kernels[0], kernels[1])
    assert torch.equal(kernels[0], kernels[2])
    assert not torch.allclose(kernels[0], kernels[3])


def test_attention_and_mlp_that_are_masked_whole_keep_their_function(tmp_path: Path) -> None:
    content = content_of("uvc_stage1_dev")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    content["blocks.1.attn.proj.mask"].zero_()
    content["blocks.1.mlp.fc2.mask"].zero_()
    model = read(tmp_path, "uvc_stage1_dev", content, dtype=torch.float64)
    block = arch_of(model).blocks[1]
    assert (block.heads, block.v, block.mlp) == (1, 1, 1)
    with torch.no_grad():
        z = model.blocks[0](torch.randn(2, 17, 36, dtype=torch.float64))
        want = z + content["blocks.1.attn.proj.bias"].double() + content["blocks.1.mlp.fc2.bias"].double()
        torch.testing.assert_close(model.blocks[1](z), want, rtol=0, atol=1e-12)
        assert model(x).isfinite().all()


def test_a_tensor_under_two_names_can_be_saved(tmp_path: Path) -> None:
    content = content_of("upvit_bare_dev")
    content["blocks.0.norm1.weight"] = content["blocks.0.norm2.weight"]
    model = read(tmp_path, "upvit_bare_dev", content)
    again = load(save(model, tmp_path / "model"))
    assert torch.equal(again.blocks[0].norm1.weight, content["blocks.0.norm2.weight"])
    assert model.blocks[0].norm1.weight.data_ptr() != model.blocks[0].norm2.weight.data_ptr()


def test_an_older_file_that_names_too_many_tensors_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "many.pth"
    content = {f"blocks.{i}.weight": torch.zeros(1) for i in range(60)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    assert len(container.read_checkpoint(file, trust=False, ema=False)[0]) == 60
    monkeypatch.setattr(container, "MOST_PARTS", 50)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match="names more than 50 tensors"):
        container.read_checkpoint(file, trust=False, ema=False)
