from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from random import Random

import pytest
import timm
import torch

from models import Arch, Block, Stage, UserError, build
from tests.generate import random_arch


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


@pytest.mark.parametrize("seed", range(30))
def test_json_round_trip(seed: int) -> None:
    arch = random_arch(Random(seed))
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
        (edited(family="swim"), "family = 'swim': must be one of vit"),
        (edited(pool="tokens"), "did you mean 'token'?"),
        (edited(class_token=False), "needs class_token = true"),
        (edited(img_size=[8, 6]), "stages[0].grid = [2, 3]: img_size / patch_size gives [4, 3]"),
        (edited(stages=[]), "exactly one stage, got 0"),
        (with_block(heads=0), "stages[0].blocks[1].heads = 0: must be a whole number of at least 1"),
        (with_block(v=[3, 2, 1]), "stages[0].blocks[1].v has 3 widths for 2 heads"),
        (with_block(v=[3, 0]), "stages[0].blocks[1].v[1] = 0"),
        (with_block(scale=-1.0), "stages[0].blocks[1].scale = -1.0"),
        (with_block(mixer="conv"), "stages[0].blocks[1].mixer = 'conv': must be one of attn, none"),
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
]


@pytest.mark.parametrize("name", NAMES)
def test_full_record_is_the_same_function(name: str) -> None:
    model = timm.create_model(name, num_classes=11).double().eval()
    arch = Arch.from_timm(model)
    assert arch == dataclasses.replace(Arch.from_timm(name), num_classes=11)
    ours = build(arch).double().eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, arch.in_chans, *arch.img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer"),
        ("vit_base_patch16_rpn_224", "block 0 is a ResPostBlock"),
        ("vit_base_patch16_siglip_224", "attention pool"),
        ("vit_small_patch14_dinov2", "no classifier"),
        ("vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'?"),
    ],
)
def test_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        Arch.from_timm(name)
    assert reason in str(error.value)
