from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

from prunesweep.models import Arch, Block, PositionBias, QueryPool, Rope, Stage, UserError, arch_of, build
from prunesweep.models.io.export import FORMATS, agreement, default_path, export
from prunesweep.models.io.standalone import open_standalone
from tests.generate import random_images, random_model


def attn(src: int, **changes: object) -> Block:
    return Block(**{"src": src, "heads": 2, "qk": 4, "v": 4, "scale": 0.5, "mlp": 8, **changes})  # type: ignore[arg-type]


def other(src: int, mixer: str, **changes: object) -> Block:
    return attn(src, mixer=mixer, heads=0, qk=0, scale=0.0, **changes)


VIT = Arch(
    family="vit",
    source="test",
    img_size=(6, 8),
    patch_size=(2, 2),
    in_chans=1,
    num_classes=3,
    dist_token=True,
    qk_norm=True,
    stages=(
        Stage(
            width=8,
            grid=(3, 4),
            blocks=(
                attn(0, v=(1, 3), tokens=6),
                other(1, "conv3x3", v=3, mlp=0),
                attn(2, token_scale=True),
                other(3, "none", v=0, norm_residual=True, tokens=5, merge="dense"),
                attn(4, mlp=0),
            ),
        ),
    ),
)
EVA = dataclasses.replace(
    VIT,
    family="eva",
    dist_token=False,
    qk_norm=False,
    k_bias=False,
    attn_norm=True,
    glu=True,
    mlp_norm=True,
    act="silu",
    rope=Rope(kind="axial", pairs=4, temperature=10.0),
    stages=(dataclasses.replace(VIT.stages[0], blocks=(attn(0, v=(1, 3), tokens=6), *VIT.stages[0].blocks[3:])),),
)
SWIN = Arch(
    family="swin",
    source="test",
    img_size=(10, 14),
    patch_size=(2, 2),
    in_chans=3,
    num_classes=3,
    class_token=False,
    pool="avg",
    stages=(
        Stage(width=6, grid=(5, 7), window=(2, 3), blocks=(attn(0, v=(2, 3), shifted=True), other(1, "none", v=0))),
        Stage(width=7, grid=(3, 4), window=(3, 2), blocks=(attn(2, scale=0.3), attn(3), other(4, "conv1x1", v=3))),
    ),
)
SWIN_V2 = dataclasses.replace(
    SWIN,
    family="swin_v2",
    k_bias=False,
    post_norm=True,
    stages=(
        dataclasses.replace(SWIN.stages[0], blocks=(attn(0, v=(2, 3), scale=1.0, shifted=True),)),
        Stage(width=7, grid=(3, 4), window=(3, 2), reference_window=(4, 4), blocks=(attn(1, scale=1.0),)),
    ),
)
HIERA = Arch(
    family="hiera",
    source="test",
    img_size=(16, 24),
    patch_size=(4, 4),
    in_chans=3,
    num_classes=3,
    class_token=False,
    pool="avg",
    head_norm="pooled",
    layer_scale=True,
    query_pool=QueryPool(width=6, heads=2),
    stages=(
        Stage(width=6, grid=(4, 6), window=(2, 2), blocks=(attn(0, v=(2, 3)), attn(1, whole_map=True))),
        Stage(width=8, grid=(2, 3), window=(2, 3), blocks=(other(2, "none", v=0), attn(3))),
    ),
)
PVT = Arch(
    family="pvt_v2",
    source="test",
    img_size=(18, 13),
    patch_size=(4, 4),
    in_chans=3,
    num_classes=3,
    class_token=False,
    pool="avg",
    stages=(
        Stage(width=8, grid=(5, 4), sr_ratio=2, blocks=(attn(0, v=(1, 2), sr=5),)),
        Stage(width=8, grid=(3, 2), blocks=(attn(1), other(2, "conv3x3", v=3))),
    ),
)
BEIT = dataclasses.replace(
    VIT,
    family="beit",
    dist_token=False,
    qk_norm=False,
    norm="rms",
    embed_norm=True,
    proj_bias=False,
    mlp_bias=False,
    position_bias=PositionBias(kind="mlp", hidden=5),
    stages=(dataclasses.replace(VIT.stages[0], blocks=(attn(0, v=(1, 3)), *VIT.stages[0].blocks[1::3])),),
)
ARCHS = {"vit": VIT, "eva": EVA, "beit": BEIT, "swin": SWIN, "swin_v2": SWIN_V2, "hiera": HIERA, "pvt_v2": PVT}
OPSETS = {"vit": 23, "eva": 20, "beit": 20, "swin": 20, "swin_v2": 20, "hiera": 20, "pvt_v2": 18}


# what torch.export makes of PVTv2 and Hiera is what the ONNX exporter starts from
@pytest.mark.parametrize(
    ("to", "family"),
    [(to, family) for to in FORMATS for family in ARCHS if to != "torch-export" or family not in ("hiera", "pvt_v2")],
)
def test_the_artefact_computes_the_same_for_any_batch(to: str, family: str, tmp_path: Path) -> None:
    arch = ARCHS[family]
    model = random_model(arch, 0, torch.float32)
    path = tmp_path / "made" / "small.pt2"
    error = export(model, path, to, opset=OPSETS[arch.family])
    assert error < 1e-5
    images = random_images(arch, 0, batch=5, dtype=torch.float32)
    with torch.no_grad():
        expected, logits = model(images), run(path, to, images, arch)
    assert logits.shape == (5, 3)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["small.pt2"]
    assert path.is_dir() or str(Path(timm.__file__).parents[1]).encode() not in path.read_bytes()  # nobody's own files


def run(path: Path, to: str, images: torch.Tensor, arch: Arch) -> torch.Tensor:
    """Logits of an artefact, loaded as its users do; its record and preprocessing must be the model's."""
    if to == "timm":
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        assert arch_of(model) == arch
        return model(images)
    if to == "torch-export":
        files = {"arch.json": "", "preprocessing.json": ""}
        program = torch.export.load(path, extra_files=files)
        record, preprocessing = files["arch.json"], files["preprocessing.json"]
        logits = program.module()(images)
    elif to == "standalone":
        return open_standalone(path)(images)
    else:
        session = onnxruntime.InferenceSession(str(path))
        facts = session.get_modelmeta().custom_metadata_map
        record, preprocessing = facts["arch"], facts["preprocessing"]
        assert session.get_inputs()[0].shape == ["batch", *images.shape[1:]]
        assert max(own.version for own in onnx.load(path).opset_import if not own.domain) in OPSETS.values()
        assert not [name for name in kinds_of_nodes(path) if name.startswith("Scatter")]
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    assert Arch.from_json(record) == arch
    assert json.loads(preprocessing)["input_size"] == list(images.shape[1:])
    return logits


@pytest.mark.parametrize("to", ["onnx", "standalone"])
def test_fused(to: str, tmp_path: Path) -> None:
    """The class token alone comes out of the last block; a merging plan of ONNX stays as it is."""
    arch = dataclasses.replace(
        VIT, dist_token=False, stages=(dataclasses.replace(VIT.stages[0], blocks=(attn(0, tokens=6), attn(1))),)
    )
    model = random_model(arch, 0, torch.float32)
    plain, fused = (tmp_path / f"{name}{FORMATS[to].suffix}" for name in ("plain", "fused"))
    export(model, plain, to)
    assert export(model, fused, to, fused=True) < 1e-4
    x = random_images(arch, 5, batch=2, dtype=torch.float32)
    torch.testing.assert_close(FORMATS[to].open(fused)(x), model(x), rtol=0, atol=1e-4)
    assert _operations(fused) != _operations(plain)


def _operations(path: Path) -> str:
    return str(onnx.load(path).graph.node) if path.suffix == ".onnx" else (path / "model.py").read_text()


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = random_model(VIT, 0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export(model, tmp_path / "m", "timm") < 1e-5
    assert model.training
    after = model.state_dict()
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in after.items()
    )


def test_an_artefact_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(VIT, 0, torch.float32)
    form = FORMATS["timm"]

    def open_another(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        run = form.open(path)
        return lambda images: run(images) + 0.5

    monkeypatch.setitem(FORMATS, "timm", form._replace(open=open_another))
    path = tmp_path / "new" / "m"
    with pytest.raises(UserError, match=r"computes something else: at batch 1 its logits are off by 0\.5"):
        export(model, path, "timm")
    assert list(tmp_path.iterdir()) == []
    assert export(model, path, "timm", tolerance=0.6) == pytest.approx(0.5, abs=1e-5)
    assert path.exists()


def test_logits_that_are_not_finite_cannot_be_compared(tmp_path: Path) -> None:
    model = random_model(VIT, 0)
    model.head.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        export(model, tmp_path / "m", "timm")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(build(VIT), tmp_path / "m", "timm")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        export(build(VIT), tmp_path / "file" / "m", "timm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m"]


def test_wrong_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = build(VIT), tmp_path / "m"
    with pytest.raises(
        UserError, match=r"to = 'onyx': must be one of torch-export, onnx, timm, standalone. did you mean 'onnx'"
    ):
        export(model, path, "onyx")
    with pytest.raises(UserError, match=r"opset = 17: must lie in 18\.\.23"):
        export(model, path, "onnx", opset=17)
    with pytest.raises(UserError, match="cannot be represented|represents timm's"):
        export(timm.create_model("resnet10t"), path, "timm")
    changed = build(VIT)
    changed.head = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="its record no longer fits"):
        export(changed, path, "timm")
    monkeypatch.setattr(sys.modules["prunesweep.models.io.export"], "ONNX_LIMIT", 100)
    with pytest.raises(UserError, match=r"an ONNX file holds 100; export to torch-export"):
        export(model, path, "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"package onnxscript .* pip install -e '\.\[export\]'"):
        export(model, path, "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_default_path_is_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model.v2"
    folder.mkdir()
    assert default_path(folder, "onnx") == tmp_path / "model.v2.onnx"
    assert default_path(folder, "torch-export") == tmp_path / "model.v2.pt2"
    monkeypatch.chdir(folder)
    assert default_path(".", "timm") == tmp_path / "model.v2-timm"


def kinds_of_nodes(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "bound", "kind"),
    [("float16", 0.02, "Cast"), ("int8-dynamic", 0.3, "MatMulInteger"), ("int8-static", 0.6, "QuantizeLinear")],
)
def test_an_onnx_file_in_fewer_bits(precision: str, bound: float, kind: str, tmp_path: Path) -> None:
    """The ViT has token plans, which neither half precision nor TensorRT takes where they are scattered."""
    model, path = random_model(VIT, 0, torch.float32), tmp_path / "small.onnx"
    batches = [random_images(VIT, seed, batch=16, dtype=torch.float32) for seed in range(4)]
    error = export(model, path, "onnx", precision=precision, calibration=batches if "static" in precision else None)
    assert 1e-5 < error < bound
    assert kind in kinds_of_nodes(path)
    assert not [name for name in kinds_of_nodes(path) if name.startswith("Scatter")]
    found = agreement(model, path, "onnx", batches)
    assert (found.images, 85 < found.same <= 100, 0 < found.kl < 0.01) == (64, True, True)
    images = batches[0][:5]
    assert torch.isfinite(run(path, "onnx", images, VIT)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]


def test_precisions_that_are_wrong(tmp_path: Path) -> None:
    model, path = build(VIT), tmp_path / "m"
    for to, precision, calibration, message in (
        ("onnx", "int4", None, "precision = 'int4': must be one of float32, float16, int8-dynamic, int8-static"),
        ("torch-export", "float16", None, "precision = 'float16': is for onnx"),
        ("onnx", "int8-static", None, r"needs images to measure activations on \(--data\)"),
        ("onnx", "int8-dynamic", [random_images(VIT, 0)], "measures no activations"),
    ):
        with pytest.raises(UserError, match=message):
            export(model, path, to, precision=precision, calibration=calibration)
    assert list(tmp_path.iterdir()) == []
