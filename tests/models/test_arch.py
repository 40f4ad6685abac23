from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from random import Random

import pytest
import timm
import torch

from prunesweep.models import Arch, Block, Stage, UserError, build
from tests.generate import FAMILIES, random_arch


def small() -> Arch:
    block = Block(src=0, heads=2, qk=4, v=4, scale=0.5, mlp=8)
    return Arch(
        family="vit",
        source="test",
        img_size=(4, 6),
        patch_size=(2, 2),
        in_chans=1,
        num_classes=3,
        stages=(Stage(width=8, grid=(2, 3), blocks=(block, dataclasses.replace(block, src=1, v=(3, 2)))),),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(30))
def test_json_round_trip(family: str, seed: int) -> None:
    arch = random_arch(Random(seed), family)
    assert Arch.from_json(arch.to_json()) == arch
    assert Arch.from_json(json.dumps(json.loads(arch.to_json()))).hash == arch.hash


def test_hash_is_for_ever() -> None:
    assert small().hash == "f93ea2f247de7140"


def test_hash_is_the_same_in_another_process() -> None:
    code = "from tests.models.test_arch import small; print(small().hash)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == small().hash


def test_hash_tells_records_apart() -> None:
    stage = small().stages[0]
    wider = dataclasses.replace(small(), stages=(dataclasses.replace(stage, width=9),))
    assert len({small().hash, wider.hash, dataclasses.replace(small(), qkv_bias=False).hash}) == 3


def test_tokens_and_depth() -> None:
    arch = dataclasses.replace(small(), reg_tokens=2)
    assert (arch.prefix_tokens, arch.tokens, arch.depth) == (3, 9, 2)


def edited(**changes: object) -> dict:
    return {**small().to_dict(), **changes}


def with_block(**changes: object) -> dict:
    data = small().to_dict()
    data["stages"][0]["blocks"][1] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited(widht=3), "unknown key 'widht'"),
        (edited(format="prunesweep/arch/9"), "this version reads 'prunesweep/arch/1'"),
        (edited(in_chans="1"), "arch.in_chans = '1': must be int"),
        (edited(in_chans=True), "arch.in_chans = True: must be int"),
        (edited(img_size=[4]), "arch.img_size = [4]: must be tuple[int, int]"),
        (edited(family="swim"), "family = 'swim': must be one of vit, eva, beit, diff, cait, xcit, swin"),
        (edited(pool="tokens"), "did you mean 'token'?"),
        (edited(class_token=False), "needs class_token = true"),
        (edited(img_size=[8, 6]), "stages[0].grid = [2, 3]: img_size / patch_size gives [4, 3]"),
        (edited(stages=[]), "exactly one stage, got 0"),
        (with_block(heads=0), "stages[0].blocks[1].heads = 0: must be a whole number of at least 1"),
        (with_block(v=[3, 2, 1]), "stages[0].blocks[1].v has 3 widths for 2 heads"),
        (with_block(v=[3, 0]), "stages[0].blocks[1].v[1] = 0"),
        (with_block(scale=-1.0), "stages[0].blocks[1].scale = -1.0"),
        (
            with_block(mixer="conv"),
            "stages[0].blocks[1].mixer = 'conv': must be one of attn, conv1x1, conv3x3, sepconv, pool, xca",
        ),
        (with_block(mixer="none"), "must be 0 where mixer is 'none'"),
        ([], "must be a JSON object"),
    ],
)
def test_errors_say_where_and_what(data: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        Arch.from_dict(data)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_missing_keys_are_named() -> None:
    data = small().to_dict()
    del data["in_chans"], data["source"]
    with pytest.raises(UserError, match="arch lacks source, in_chans"):
        Arch.from_dict(data)


def test_a_block_must_stay() -> None:
    data = small().to_dict()
    data["stages"][0]["blocks"] = []
    with pytest.raises(UserError, match="at least one block must be kept"):
        Arch.from_dict(data)


def test_not_json() -> None:
    with pytest.raises(UserError, match="must be JSON"):
        Arch.from_json("{")


NAMES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",  # layer scale, no position for the class token
    "vit_tiny_patch16_224",
    "vit_wee_patch16_reg1_gap_256",  # registers, average pooling
    "vit_base_patch32_clip_224",  # norm before the blocks
    "vit_small_patch16_36x1_224",  # many blocks
    "vit_medium_patch16_reg4_gap_256",
    "swin_tiny_patch4_window7_224",
    "swin_s3_tiny_224",  # a window size of its own in every stage
    "pvt_v2_b0",
    "pvt_v2_b2",
]


MAE = {"global_pool": "avg", "depth": 2}  # average pooling, norm behind it
NARROW = {"img_size": 192, "depths": (2, 1, 2, 2)}  # windows larger than the last grid, a stage of odd depth
VARIANTS = [("vit_base_patch16_224.mae", MAE), ("swin_base_patch4_window12_384", NARROW)]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), *VARIANTS])
def test_full_record_is_the_same_function(name: str, options: dict) -> None:
    model = timm.create_model(name, num_classes=11, **options).double().eval()
    arch = Arch.from_timm(model)
    assert bool(options) or arch == dataclasses.replace(Arch.from_timm(name), num_classes=11)
    assert Arch.from_json(arch.to_json()) == arch
    ours = build(arch).double().eval()
    assert list(ours.state_dict()) == list(model.state_dict())
    ours.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, arch.in_chans, *arch.img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mvitv2_tiny", "is a MultiScaleVit: this version represents timm's VisionTransformer,"),
        ("vit_small_patch16_18x2_224", "block 0 is a ParallelThingsBlock"),
        ("vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'?"),
    ],
)
def test_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        Arch.from_timm(name)
    assert reason in str(error.value)


def edited_block(name: str, **changes: object) -> dict:
    """The record of a timm model with its first block changed, as JSON data."""
    data = Arch.from_timm(name).to_dict()
    data["stages"][0]["blocks"][0] |= changes
    return data


CONV = {"mixer": "conv3x3", "heads": 0, "qk": 0, "v": 64, "scale": 0.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deit_tiny_patch16_224", {"tokens": 250}, ".tokens = 250: must lie in 2..197 (196 patches + 1 prefix token)"),
        ("deit_tiny_patch16_224", {"tokens": 9, **CONV}, "mixer 'conv3x3' needs the whole grid of patches"),
        ("deit_tiny_patch16_224", {"tokens": 9, "merge": "dens"}, "must be one of sparse, dense"),
        ("deit_tiny_patch16_224", {"sr": 4}, ".sr = 4: must be 0 without attention on a spatially reduced map"),
        (
            "deit_tiny_patch16_224",
            {"shifted": True},
            ".shifted: is for attention in the windows of families 'swin'",
        ),
        ("deit_tiny_patch16_224", {"norm_residual": True}, ".norm_residual: is for mixer 'none' only"),
        ("deit_tiny_patch16_224", {**CONV, "heads": 3}, "heads, qk and scale must be 0 where mixer is 'conv3x3'"),
        ("deit_tiny_patch16_224", {**CONV, "v": 0}, ".v = 0: must be a whole number of at least 1"),
        ("swin_tiny_patch4_window7_224", {"tokens": 9}, "family 'swin' needs the whole grid"),
        ("swin_tiny_patch4_window7_224", {"token_scale": True}, ".token_scale: is for attention over all tokens"),
        ("pvt_v2_b0", {"sr": 0}, ".sr = 0: must be a whole number of at least 1"),
    ],
)
def test_fields_of_one_family_or_mixer(name: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Arch.from_dict(edited_block(name, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "stage", "changes", "message"),
    [
        ("swin_tiny_patch4_window7_224", {"window": [7, 57]}, {}, "stages[0].window[1] = 57: must lie in 1..56"),
        ("pvt_v2_b0", {"sr_ratio": 57}, {}, "stages[0].sr_ratio = 57: must not exceed the grid [56, 56]"),
        ("pvt_v2_b0", {"window": [7, 7]}, {}, "is for families 'swin', 'swin_v2', 'hiera', 'sam' only"),
        ("pvt_v2_b0", {"grid": [55, 56]}, {}, "stages[0].grid = [55, 56]: img_size / patch_size gives [56, 56]"),
        ("pvt_v2_b0", {}, {"patch_size": [8, 8]}, "the patch embedding of pvt_v2 has stride [4, 4]"),
        ("pvt_v2_b0", {}, {"class_token": True}, "needs class_token = False"),
        ("swin_tiny_patch4_window7_224", {}, {"qk_norm": True}, "family = 'swin': needs qk_norm = False"),
    ],
)
def test_stages_of_one_family(name: str, stage: dict, changes: dict, message: str) -> None:
    data = Arch.from_timm(name).to_dict() | changes
    data["stages"][0] |= stage
    with pytest.raises(UserError) as error:
        Arch.from_dict(data)
    assert message in str(error.value)


def test_image_size_of_a_model_that_takes_any() -> None:
    assert Arch.from_timm("pvt_v2_b0", img_size=96).stages[0].grid == (24, 24)
    with pytest.raises(UserError, match="is built for 224x224 images"):
        Arch.from_timm("deit_tiny_patch16_224", img_size=96)
