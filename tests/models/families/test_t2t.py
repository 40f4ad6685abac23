"""T2T-ViT: its checkpoints are read, its tokens-to-token module stays whole, and methods work behind it."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models import Arch, BlockCut, Cut, Stem, UserError, arch_of, build, cost, cut, load, save
from prunesweep.models.builder import create
from prunesweep.models.families.stem import stem_cost
from prunesweep.models.importers import import_checkpoint
from prunesweep.models.io.export import export
from prunesweep.pruners.nvit.hook import NViTPruning
from prunesweep.pruners.uvc.resource import paper_macs
from tests.generate import random_images, random_model
from tests.oracle import masked
from tests.pruners.nvit.test_hook import GROUPS, ladder, train
from tests.pruners.nvit.test_schedule import vit
from tests.pruners.uvc.test_hook import step, wrapped


def layer(*sizes: int) -> nn.Module:
    return nn.LayerNorm(sizes[0]) if len(sizes) == 1 else nn.Linear(*sizes)


class Named(nn.Module):
    """Modules by name, and nothing else."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Original(nn.Module):
    """T2T-ViT from its equations (arXiv 2101.11986, Performers 2009.14794), with the names of its checkpoints."""

    def __init__(self, performer: bool, side: int, width: int, heads: int, narrow: int, mlp: int, classes: int) -> None:
        super().__init__()
        self.performer, self.heads, self.places = performer, heads, (side // 16) ** 2
        sizes = {"attention1": 3 * 49, "attention2": narrow * 9}
        parts = {name: self.tokens(size, narrow) for name, size in sizes.items()}
        self.tokens_to_token = Named(**parts, project=layer(narrow * 9, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(self.table(self.places + 1, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Named(
                norm1=layer(width),
                attn=Named(qkv=nn.Linear(width, 3 * width, bias=False), proj=layer(width, width)),
                norm2=layer(width),
                mlp=Named(fc1=layer(width, mlp), fc2=layer(mlp, width)),
            )
            for _ in range(2)
        )
        self.norm, self.head = layer(width), layer(width, classes)

    def tokens(self, size: int, narrow: int) -> nn.Module:
        if self.performer:
            mlp = nn.Sequential(layer(narrow, narrow), nn.GELU(), layer(narrow, narrow))
            own = Named(kqv=layer(size, 3 * narrow), proj=layer(narrow, narrow), mlp=mlp)
            own.register_parameter("w", nn.Parameter(torch.randn(narrow // 2, narrow), requires_grad=False))
        else:
            attn = Named(qkv=nn.Linear(size, 3 * narrow, bias=False), proj=layer(narrow, narrow))
            own = Named(attn=attn, mlp=Named(fc1=layer(narrow, narrow), fc2=layer(narrow, narrow)))
        own.norm1, own.norm2 = layer(size), layer(narrow)
        return own

    @staticmethod
    def table(places: int, width: int) -> torch.Tensor:
        angles = [[p / np.power(10000, 2 * (c // 2) / width) for c in range(width)] for p in range(places)]
        found = np.array(angles)
        found[:, 0::2], found[:, 1::2] = np.sin(found[:, 0::2]), np.cos(found[:, 1::2])
        return torch.tensor(found, dtype=torch.float32)[None]

    def attend(self, own: Any, x: torch.Tensor) -> torch.Tensor:
        x = own.norm1(x)
        if self.performer:
            k, q, v = own.kqv(x).chunk(3, -1)
            m = len(own.w)

            def phi(t: torch.Tensor) -> torch.Tensor:
                wt = torch.einsum("bti,mi->btm", t, own.w)
                return torch.exp(wt - (t * t).sum(-1, keepdim=True) / 2) / math.sqrt(m)

            kernels = torch.einsum("btm,bsm->bts", phi(q), phi(k))
            x = v + own.proj(kernels @ v / (kernels.sum(-1, keepdim=True) + 1e-8))
            return x + own.mlp(own.norm2(x))
        q, k, v = own.attn.qkv(x).chunk(3, -1)
        x = v + own.attn.proj((q @ k.mT * x.shape[-1] ** -0.5).softmax(-1) @ v)
        return x + own.mlp.fc2(F.gelu(own.mlp.fc1(own.norm2(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t2t: Any = self.tokens_to_token
        for k, s, p, own in ((7, 4, 2, t2t.attention1), (3, 2, 1, t2t.attention2), (3, 2, 1, None)):
            side = x.shape[-1] // s
            x = F.unfold(x, k, stride=s, padding=p).transpose(1, 2)
            if own is not None:
                x = self.attend(own, x).transpose(1, 2).unflatten(2, (side, side))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), t2t.project(x)], 1) + self.pos_embed
        for block in self.blocks:
            own = block
            q, k, v = own.attn.qkv(own.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + own.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + own.mlp.fc2(F.gelu(own.mlp.fc1(own.norm2(x))))
        return self.head(self.norm(x)[:, 0])


def original(performer: bool) -> Original:
    torch.manual_seed(0)
    model = Original(performer, side=32, width=12, heads=3, narrow=6, mlp=20, classes=4)
    for name, parameter in model.named_parameters():
        if not name.endswith((".w", "pos_embed")):
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def written(model: nn.Module, folder: Path) -> Path:
    torch.save({"state_dict_ema": OrderedDict(model.state_dict())}, folder / "t2t.pth.tar")
    return folder / "t2t.pth.tar"


@pytest.mark.parametrize("performer", [True, False])
def test_a_checkpoint_is_the_same_function(performer: bool, tmp_path: Path) -> None:
    theirs = original(performer)
    ours: Any = import_checkpoint(written(theirs, tmp_path), "t2t", heads=3, ema=True)
    arch = arch_of(ours)
    kind = "t2t_performer" if performer else "t2t_transformer"
    assert arch.stem == Stem(kind=kind, channels=(6, 6), strides=(4, 2, 2))
    assert (arch.stages[0].grid, arch.qkv_bias, arch.norm_eps, arch.blocks[0].mlp) == ((2, 2), False, 1e-5, 20)
    x = random_images(arch, 1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double()), rtol=0, atol=1e-12)
        again = load(save(ours.float(), tmp_path / "ours"))
        assert torch.equal(again(x), ours(x))
    assert ours.pretrained_cfg["crop_pct"] == 0.9
    assert not any(p.requires_grad for name, p in ours.named_parameters() if name == "pos_embed")
    assert torch.equal(build(arch).state_dict()["pos_embed"], theirs.float().pos_embed)
    trained = sum(p.numel() for name, p in theirs.named_parameters() if not name.endswith(".w"))
    assert cost(arch).params == trained


@pytest.mark.parametrize(
    ("edit", "given", "message"),
    [
        (lambda _: None, {}, "give heads"),
        (lambda _: None, {"heads": 5}, "heads = 5: must divide the width of the attention, 12"),
        (lambda _: None, {"heads": 3, "ema": False}, r"averaged weights alone .*: give ema"),
        (lambda w: w.pop("blocks.1.mlp.fc2.weight"), {"heads": 3}, "the file lacks blocks.1.mlp.fc2.weight"),
        (lambda w: w.update({"patch_gating": torch.ones(4)}), {"heads": 3}, "does not know: patch_gating"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 7, 12)}), {"heads": 3}, "number of patches = 4"),
        (
            lambda w: w.update({"tokens_to_token.attention1.norm1.weight": torch.ones(148)}),
            {"heads": 3},
            "148 channels: no patches of 49 pixels",
        ),
    ],
)
def test_other_files_are_refused(edit: Any, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = OrderedDict(original(True).state_dict())
    edit(weights)
    torch.save({"state_dict_ema": weights}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "file.pth", "t2t", **{"ema": True, **given})


def small(kind: str = "t2t_performer", **fields: Any) -> Arch:
    """Three blocks on 2 x 3 patches, behind two unfoldings of few channels."""
    arch = vit(depth=3, width=16, heads=2, head=8, mlp=32)
    (stage,) = arch.stages
    own = {"stem": Stem(kind=kind, channels=(6,), strides=(2, 2)), "patch_size": (4, 4), "img_size": (8, 12)}
    stages = (dataclasses.replace(stage, grid=(2, 3)),)
    return dataclasses.replace(arch, **{**own, "stages": stages, "qkv_bias": False, **fields})


def published() -> Arch:
    """T2T-ViT-14."""
    arch = vit(depth=14, width=384, heads=6, head=64, mlp=1152)
    stem = Stem(kind="t2t_performer", channels=(64, 64), strides=(4, 2, 2))
    stages = (dataclasses.replace(arch.stages[0], grid=(14, 14)),)
    sizes = {"img_size": (224, 224), "patch_size": (16, 16), "in_chans": 3, "num_classes": 1000}
    return dataclasses.replace(arch, stages=stages, stem=stem, qkv_bias=False, norm_eps=1e-5, **sizes)


def test_macs_of_the_published_model() -> None:
    """Counted by hand from the equations, without the classifier: UVC's constant cost, and all."""
    arch = published()
    arch.validate()
    assert stem_cost(arch).macs == paper_macs(arch)[0] == 298_973_696
    assert cost(arch).macs - 384_000 == 4_783_084_544


@pytest.mark.parametrize("kind", ["t2t_performer", "t2t_transformer"])
def test_uvc_cuts_blocks_alone(kind: str) -> None:
    arch = small(kind)
    model, own, optimizer = wrapped(arch, budgets=(0.55,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for t in range(55):
        step(model, own, optimizer, t)
    assert torch.equal(model.state_dict()["pos_embed"], before["pos_embed"])
    (snapshot,) = own.finish()
    assert snapshot.cost == cost(arch_of(snapshot.model)).macs <= 0.55 * cost(arch).macs
    assert arch_of(snapshot.model).stem == arch.stem
    x = random_images(arch, 1000)
    with torch.no_grad(), masked(model.eval(), snapshot.cut):
        torch.testing.assert_close(snapshot.model(x), model(x), rtol=0, atol=1e-10)


def test_norms_of_the_stem_stay_whole_while_a_model_is_pruned() -> None:
    arch = small()
    model = random_model(arch, 0)
    hook = NViTPruning(ladder(arch, 0.5), groups=GROUPS, interval=2, groups_per_step=4, exact=False)
    hook.wrap(model)
    for _ in train(model, hook):
        pass
    (snapshot,) = hook.snapshots
    narrow = arch_of(snapshot.model)
    assert (narrow.stem, narrow.stages[0].width < 16) == (arch.stem, True)
    assert snapshot.model.pos_embed.shape == (1, 7, narrow.stages[0].width)
    assert not snapshot.model.pos_embed.requires_grad


def test_another_number_of_channels_or_size() -> None:
    model: Any = build(small())
    with pytest.raises(UserError, match="in_chans = 2: test reads images of 1 by no convolution"):
        create(model.arch, pretrained=False, pretrained_cfg=None, in_chans=2)
    model.set_input_size((12, 12))
    assert arch_of(model).stages[0].grid == (3, 3)
    assert not model.pos_embed.requires_grad
    assert model(torch.randn(1, 1, 12, 12)).shape == (1, arch_of(model).num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["standalone", "onnx"])
def test_what_is_exported_computes_the_same(to: str, tmp_path: Path) -> None:
    model = random_model(small(), 0, torch.float32).eval()
    narrow = cut(model, Cut(embed=(tuple(range(0, 16, 2)),), blocks=(BlockCut(mlp=(0, 3)), BlockCut(), BlockCut())))
    assert export(narrow, tmp_path / f"small.{to}", to) < 1e-5
