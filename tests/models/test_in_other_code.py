"""What people's own code does with models, for every kind of block: it works, or is refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from torch import nn

from prunesweep.models import Arch, Block, Stage, UserError, arch_of, load, save
from tests.generate import random_images, random_lm, random_metaformer, random_model
from tests.models.io.test_export import BEIT, HIERA, PVT, SWIN, SWIN_V2, VIT, attn, other


def vit(*blocks: Block, **changes: Any) -> Arch:
    shape: dict[str, Any] = {"img_size": (6, 8), "patch_size": (2, 2), "in_chans": 3, "num_classes": 3}
    return Arch(
        family="vit", source="test", stages=(Stage(width=8, grid=(3, 4), blocks=blocks),), **{**shape, **changes}
    )


KINDS = {
    "attention": vit(attn(0), attn(1)),
    "ragged": vit(attn(0), attn(1, v=(1, 3))),
    "token_scale": vit(attn(0), attn(1, token_scale=True)),
    "conv1x1": vit(attn(0), other(1, "conv1x1", v=3)),
    "conv3x3": vit(attn(0), other(1, "conv3x3", v=3)),
    "skipped": vit(attn(0), attn(1, mlp=0), other(2, "none", v=0)),
    "norm_residual": vit(attn(0), other(1, "none", v=0, norm_residual=True)),
    "sparse": vit(attn(0), attn(1, tokens=6)),
    "dense": vit(attn(0), attn(1, tokens=6, merge="dense")),
    "distilled": vit(attn(0), attn(1), dist_token=True),
    "beit": dataclasses.replace(BEIT, in_chans=3),
    "swin": SWIN,
    "swin_v2": SWIN_V2,
    "hiera": HIERA,
    "pvt_v2": PVT,
    "metaformer": dataclasses.replace(random_metaformer(Random(5), True, True, True), in_chans=3, num_classes=3),
    "lm": random_lm(Random(1), True, False, True),
}
IMAGES = [kind for kind in KINDS if kind != "lm"]
BOUND = ("token_scale", "sparse", "dense")  # to one grid of patches
every_kind = pytest.mark.parametrize("kind", KINDS)
images_only = pytest.mark.parametrize("kind", IMAGES)


def inputs(arch: Arch, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return random_images(arch, seed, batch, dtype=torch.float32)


def made(kind: str, seed: int = 3) -> tuple[Any, Arch]:
    return random_model(KINDS[kind], seed, torch.float32), KINDS[kind]


def member(kind: str, folder: Path, **options: Any) -> Any:
    """What timm makes of a saved model."""
    path = folder / "model"
    if not path.exists():
        save(made(kind)[0], path)
    return timm.create_model(f"local-dir:{path}", pretrained=True, **options).eval()


def by_torch_save(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copied: nn.Module = torch.load(stream, weights_only=False)
    return copied


def by_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@every_kind
@pytest.mark.parametrize("copying", [copy.deepcopy, by_pickle, by_torch_save])
@torch.no_grad()
def test_copies(copying: Callable[[nn.Module], nn.Module], kind: str, tmp_path: Path) -> None:
    model, arch = made(kind)
    copied = copying(model)
    assert torch.equal(copied(inputs(arch)), model(inputs(arch)))
    save(copied, tmp_path / "copy")
    assert arch_of(load(tmp_path / "copy")) == arch


@every_kind
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_trace_takes_any_batch(kind: str) -> None:
    model, arch = made(kind)
    traced = torch.jit.trace(model, (inputs(arch, 1),), check_trace=False)  # type: ignore[no-untyped-call]
    stream = io.BytesIO()
    torch.jit.save(traced, stream)  # type: ignore[no-untyped-call]
    stream.seek(0)
    again = torch.jit.load(stream)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(again(inputs(arch, 5)), model(inputs(arch, 5)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [VIT, BEIT, SWIN, SWIN_V2, HIERA, PVT, KINDS["metaformer"], KINDS["lm"]],
    ids=["vit", "beit", "swin", "swin_v2", "hiera", "pvt_v2", "metaformer", "lm"],
)
@torch.no_grad()
def test_compiled_without_a_break_in_the_graph(arch: Arch) -> None:
    """The ViT has every kind of block."""
    model = random_model(arch, 3, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in (3, 5):
        torch.testing.assert_close(compiled(inputs(arch, batch)), model(inputs(arch, batch)))


@every_kind
@torch.no_grad()
def test_vmap_over_inputs_and_over_weights(kind: str) -> None:
    (model, arch), (second, _) = made(kind), made(kind, 7)
    x = torch.stack([inputs(arch, 2, seed) for seed in range(3)])
    torch.testing.assert_close(torch.func.vmap(model)(x), torch.stack([model(one) for one in x]))
    parameters, buffers = torch.func.stack_module_state([model, second])  # type: ignore[no-untyped-call]
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x[0],)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x[0]), second(x[0])]))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model, arch = made(kind)
    x, half = inputs(arch), copy.deepcopy(model).to(dtype)
    narrow = x.to(dtype) if x.is_floating_point() else x
    found = half(narrow)
    torch.testing.assert_close(found.float(), model(x), rtol=0.1, atol=0.1)
    save(half, tmp_path / "half")
    assert torch.equal(load(tmp_path / "half")(narrow), found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x).float()
    torch.testing.assert_close(mixed, model(x), rtol=0.1, atol=0.1)


@every_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    arch, gradients, runs = KINDS[kind], [], []
    for checkpointing in (False, True):
        model = made(kind)[0].train()
        model.set_grad_checkpointing(checkpointing)
        counted: list[int] = []
        first = next(module for name, module in model.named_modules() if name.endswith("norm1"))  # in a block
        first.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        model(inputs(arch)).square().mean().backward()
        gradients.append([torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()])
        runs.append(len(counted))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert runs[1] == runs[0] + 1, "blocks are to be computed again in the backward pass"


@images_only
@torch.no_grad()
def test_features_only(kind: str, tmp_path: Path) -> None:
    """Maps of widths that differ, on the whole grid whatever a token plan merges: what dense heads are built on."""
    arch, whole = KINDS[kind], made(kind)[0]
    part = member(kind, tmp_path, features_only=True)
    maps = part(inputs(arch))
    wanted = whole.forward_intermediates(inputs(arch), intermediates_only=True)
    assert part.feature_info.channels() == [one.shape[1] for one in maps]
    for i, (ours, theirs) in enumerate(zip(maps, wanted[-len(maps) :], strict=True)):
        assert torch.equal(ours, theirs)
        stage = arch.stages[min(i, len(arch.stages) - 1)]
        assert ours.shape[1:] == (stage.width, *stage.grid)
    last = member(kind, tmp_path, features_only=True, out_indices=(-1,))(inputs(arch))
    assert len(last) == 1
    assert torch.equal(last[0], maps[-1])


@images_only
@torch.no_grad()
def test_another_classifier(kind: str, tmp_path: Path) -> None:
    arch = KINDS[kind]
    model = member(kind, tmp_path)
    model.reset_classifier(7)
    for changed, classes in ((model, 7), (member(kind, tmp_path, num_classes=5), 5)):
        save(changed, tmp_path / "changed")
        again = load(tmp_path / "changed")
        assert arch_of(again) == dataclasses.replace(arch, num_classes=classes)
        assert torch.equal(again(inputs(arch)), changed(inputs(arch)))
    assert member(kind, tmp_path, num_classes=0)(inputs(arch)).shape == (3, arch.stages[-1].width)


@images_only
def test_dropout_rates(kind: str, tmp_path: Path) -> None:
    arch = KINDS[kind]
    model = member(kind, tmp_path, drop_rate=0.3, drop_path_rate=0.2)
    with torch.no_grad():
        assert torch.equal(model(inputs(arch)), made(kind)[0](inputs(arch)))
        model.train()
        assert not torch.equal(model(inputs(arch)), model(inputs(arch)))


@images_only
def test_patches_are_dropped_where_attention_takes_any(kind: str, tmp_path: Path) -> None:
    arch = KINDS[kind]
    if kind in ("conv1x1", "conv3x3", *BOUND, "beit", "swin", "swin_v2", "hiera", "pvt_v2", "metaformer"):
        with pytest.raises(UserError, match=r"patch_drop_rate = 0\.5: (block 1 of test|the maps of|test has biases)"):
            member(kind, tmp_path, patch_drop_rate=0.5)
        return
    model = member(kind, tmp_path, patch_drop_rate=0.5)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
    with torch.no_grad():
        assert torch.equal(model(inputs(arch)), made(kind)[0](inputs(arch)))
        model.train()(inputs(arch))
    assert seen == [arch.tokens, arch.prefix_tokens + 6]
    model.blocks[0]._forward_hooks.clear()
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").patch_drop.prob == 0.5  # type: ignore[union-attr]


@images_only
@torch.no_grad()
def test_images_of_any_size(kind: str, tmp_path: Path) -> None:
    arch = KINDS[kind]
    if kind in ("conv1x1", "conv3x3", *BOUND, "beit", "swin", "swin_v2", "hiera"):
        reason = "block 1 of test|models of family '(swin|hiera)|test has position biases"
        with pytest.raises(UserError, match=f"dynamic_img_size = True: ({reason})"):
            member(kind, tmp_path, dynamic_img_size=True)
        return
    model, size = member(kind, tmp_path, dynamic_img_size=True), (12, 16)
    torch.testing.assert_close(model(inputs(arch)), made(kind)[0](inputs(arch)))
    x = torch.randn(2, arch.in_chans, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), member(kind, tmp_path, img_size=size)(x))


@images_only
@torch.no_grad()
def test_another_image_size(kind: str, tmp_path: Path) -> None:
    """Position embeddings are resampled, and the record follows: what is finetuned there is saved like any other."""
    arch, size = KINDS[kind], (12, 16)
    if kind in BOUND:
        with pytest.raises(UserError, match="merges or scales tokens by a plan for 6x8 images; set the size of the"):
            member(kind, tmp_path, img_size=size)
        with pytest.raises(UserError, match="merges or scales tokens by a plan for 6x8 images; set the size of the"):
            made(kind)[0].set_input_size(size)
        return
    if kind == "hiera":
        with pytest.raises(UserError, match="position embeddings of test repeat from window to window"):
            member(kind, tmp_path, img_size=size)
        return
    model = member(kind, tmp_path, img_size=size)
    x = torch.randn(2, arch.in_chans, *size, generator=torch.Generator().manual_seed(0))
    save(model, tmp_path / "larger")
    again: Any = load(tmp_path / "larger")
    assert arch_of(again).img_size == again.pretrained_cfg["input_size"][1:] == size
    torch.testing.assert_close(again(x), model(x))
    if kind not in ("pvt_v2", "metaformer"):  # which have no such function: they take any size
        by_hand = member(kind, tmp_path)
        by_hand.set_input_size(size)
        assert torch.equal(by_hand(x), model(x))
    assert member(kind, tmp_path, img_size=size, features_only=True)(x)[0].shape[2:] == arch_of(again).stages[0].grid


@images_only
@torch.no_grad()
def test_images_of_other_channels(kind: str, tmp_path: Path) -> None:
    """A grey image is one whose three channels are equal."""
    arch = KINDS[kind]
    model, grey = member(kind, tmp_path, in_chans=1), inputs(dataclasses.replace(arch, in_chans=1))
    torch.testing.assert_close(model(grey), made(kind)[0](grey.expand(-1, 3, -1, -1)))
    save(model, tmp_path / "grey")
    again: Any = load(tmp_path / "grey")
    assert arch_of(again).in_chans == again.pretrained_cfg["input_size"][0] == len(again.pretrained_cfg["mean"]) == 1
    assert torch.equal(again(grey), model(grey))


@images_only
@torch.no_grad()
def test_another_pooling(kind: str, tmp_path: Path) -> None:
    arch = KINDS[kind]
    other_pool = "avg" if arch.pool == "token" else "token"
    if kind in ("distilled", "swin", "swin_v2", "hiera", "pvt_v2", "metaformer"):
        with pytest.raises(UserError, match=f"needs pool = '{arch.pool}', got '{other_pool}'"):
            member(kind, tmp_path, global_pool=other_pool)
        return
    model = member(kind, tmp_path, global_pool="avg")
    assert not torch.allclose(model(inputs(arch)), made(kind)[0](inputs(arch)))
    save(model, tmp_path / "pooled")
    assert arch_of(load(tmp_path / "pooled")).pool == "avg"


def test_what_is_no_image_has_no_options_of_images(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "img_size": 32,
        "in_chans": 3,
        "global_pool": "avg",
        "drop_rate": 0.1,
        "patch_drop_rate": 0.1,
        "dynamic_img_size": True,
        "features_only": True,
    }
    for name, value in options.items():
        with pytest.raises(UserError, match=rf"{name} = .*: is for models of images, random is of family 'lm'"):
            member("lm", tmp_path, **{name: value})
    with pytest.raises(UserError, match="the classes of a language model are its vocabulary"):
        made("lm")[0].reset_classifier(3)


def test_options_that_are_wrong(tmp_path: Path) -> None:
    for name, value in (("img_size", 0), ("img_size", "big"), ("img_size", (8, 8, 8)), ("in_chans", True)):
        with pytest.raises(UserError, match=rf"{name} = .*: must be a positive whole number"):
            member("attention", tmp_path, **{name: value})
    with pytest.raises(UserError, match=r"patch_drop_rate = 1: must be a number in 0\.\.1"):
        member("attention", tmp_path, patch_drop_rate=1)
    with pytest.raises(UserError, match="unknown model argument attn_drop_rate: the record alone"):
        member("attention", tmp_path, attn_drop_rate=0.1)
    with pytest.raises(UserError, match=r"\[1, 8\]"):
        member("attention", tmp_path, img_size=(1, 8))
