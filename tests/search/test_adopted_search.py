"""Searches of models whose weights are adopted, and of one behind a stem, three trials long, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import metaformer
from torch import nn

from prunesweep.models import Arch, Block, Stage, Stem, adopted, arch_of, cost, load, save
from prunesweep.models.io.export import export
from prunesweep.search.config import parse_config
from prunesweep.search.execution.driver import run_search
from tests.generate import random_model
from tests.search.in_process import without_ray

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16}
VIT = {"depth": 2, "num_heads": 2}
SWIN = {"depths": (1, 1), "num_heads": (2, 2), "window_size": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no better than chance")
@pytest.mark.parametrize(
    ("name", "shape", "recover"),
    [
        ("eva02_tiny_patch14_224", VIT, False),
        ("eva02_tiny_patch14_224", VIT, True),
        ("beit_base_patch16_224", VIT, True),
        ("swinv2_tiny_window8_256", SWIN, False),
    ],
)
def test_three_trials(
    name: str, shape: dict[str, Any], recover: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    torch.manual_seed(0)
    searched(adopted(timm.create_model(name, **SHAPE, **shape)), recover, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no better than chance")
def test_three_trials_behind_a_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    blocks = tuple(Block(src=i, heads=2, qk=8, v=8, scale=8**-0.5, mlp=32) for i in range(2))
    arch = Arch(
        family="vit",
        source="stemmed",
        stages=(Stage(width=16, grid=(4, 4), blocks=blocks),),
        stem=Stem(kind="convolutions", channels=(4,), strides=(2, 1)),
        **{"img_size": (8, 8), "patch_size": (2, 2), "in_chans": 1, "num_classes": 10},
    )
    for small in searched(random_model(arch, 0, torch.float32), True, tmp_path):
        assert arch_of(small).stem == arch.stem
    assert export(small, tmp_path / "alone", "standalone") < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no better than chance")
def test_three_trials_where_one_stage_has_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    torch.manual_seed(0)
    shape = {"in_chans": 1, "num_classes": 10, "dims": (12, 32), "depths": (2, 1), "res_scale_init_values": (None, 1.0)}
    mixers = {
        "token_mixers": [metaformer.SepConv, metaformer.Attention],
        "norm_layers": [metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias],
    }
    model = metaformer.MetaFormer(**shape, **mixers)
    model.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    for small in searched(adopted(model), False, tmp_path):
        assert {block.mixer for block in arch_of(small).blocks} == {"sepconv", "attn"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no better than chance", "ignore:.*images of any size")
def test_three_trials_of_windows_and_a_whole_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "num_heads": 2}
    windows = {"depth": 2, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8}
    model = timm.create_model("samvit_base_patch16_224", **shape, **windows)
    model.pretrained_cfg |= {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    for small in searched(adopted(model), True, tmp_path):
        assert (arch_of(small).neck, arch_of(small).stages[0].window) == (8, (3, 3))


def searched(model: nn.Module, recover: bool, folder: Path) -> list[nn.Module]:
    """The models of a search from a source, smaller and else alike."""
    source = save(model, folder / "source")
    table = {
        "name": "adopted",
        "data": {"name": "digits"},
        "source": {"model": f"local-dir:{source}"},
        "scores": {"method": "nvit", "images": 64},
        "space": {"budget": [0.4, 0.9], "groups": {"embed": 2, "qk": 1, "v": 2, "mlp": 4, "heads": 1}},
        "search": {"trials": 3, "recover": recover, "project": recover, "screen_images": 64},
        "finetune": {"epochs": 1, "batch_size": 256},
    }
    run_search(parse_config(table, "test"), folder / "run")
    whole = arch_of(load(source))
    found = [load(trial) for trial in (folder / "run" / "trials").glob("*/model")]
    assert found
    for arch in map(arch_of, found):
        assert (arch.family, arch.rope, arch.position_bias) == (whole.family, whole.rope, whole.position_bias)
        assert cost(arch).macs < cost(whole).macs
    return found
