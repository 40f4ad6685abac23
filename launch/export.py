"""``prunesweep export`` and ``prunesweep push``: write a saved model for other runtimes, or upload it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .data_options import check_data

__all__ = ["export_model", "push_model"]

CALIBRATION_BATCH = 64
ModelArgument = Annotated[Path, typer.Argument(help="folder of a saved model", show_default=False)]


def export_model(
    model: Annotated[
        str,
        typer.Argument(help="folder of a saved model, or a timm name with its pretrained weights", show_default=False),
    ],
    to: Annotated[str, typer.Option(help="torch-export, onnx, timm or standalone", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="a new file or, for timm and standalone, folder (default: beside MODEL; of a timm name, here)",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="version of the ONNX operators, 18 to 23")] = 20,
    precision: Annotated[
        str, typer.Option(help="of an ONNX file: float32, float16, int8-dynamic or int8-static (needs --data)")
    ] = "float32",
    data: Annotated[
        str | None,
        typer.Option(
            help="data set: its training images give the ranges for int8-static, and answers are compared on its "
            "validation images",
            show_default=False,
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="training images for the ranges")] = 256,
    fused: Annotated[
        bool, typer.Option("--fused", help="leave out what the logits do not need; last digits may differ")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Write a saved model for another runtime, and compare the two."""
    import json

    from prunesweep.models import arch_of, load
    from prunesweep.models.io.export import agreement, check_export, default_path, export
    from prunesweep.models.io.lock import reserve
    from prunesweep.training import open_fitting
    from prunesweep.training.data.base import images_only
    from prunesweep.training.jobs.one_shot import check_source, open_source

    from .console import PlainConsole

    path = default_path(model, to) if out is None else out
    console, calibrated = PlainConsole(stderr=True), precision == "int8-static" and data is not None
    if data is not None:
        check_data(data, {})
    check_export(check_source(model), path, to, opset=opset, precision=precision, calibrated=calibrated, fused=fused)
    with reserve(path), console.status(f"writing {path} and comparing it with the model"):
        loaded = load(model) if Path(model).exists() else open_source(model)
        opened = None if data is None else open_fitting(data, loaded)
        ranges = None
        if opened is not None and calibrated:
            ranges = images_only(opened.calibration(images, CALIBRATION_BATCH, seed=0))
        error = export(loaded, path, to, opset=opset, precision=precision, calibration=ranges, fused=fused)
        found = None
        if opened is not None and not arch_of(loaded).headless:
            found = agreement(loaded, path, to, (x for x, _ in opened.val_loader(CALIBRATION_BATCH)))
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    if as_json:
        compared = {} if found is None else {"agreement": found.same, "kl": found.kl, "images": found.images}
        known = {} if precision == "float32" else {"precision": precision}
        print(json.dumps({"path": str(path), "to": to, "bytes": size, "max_error": error, **known, **compared}))
    else:
        outputs = "features" if arch_of(loaded).headless else "logits"
        text = f"{path}: {size:,} bytes; its {outputs} differ from the model's by at most {error:.1e}"
        if found is not None:
            text += f"; of {found.images:,} answers on {data}, {found.same:.2f} % are the same, KL {found.kl:.2g}"
        PlainConsole().print(text, highlight=False, markup=False, soft_wrap=True)


def push_model(
    model: ModelArgument,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
) -> None:
    """Upload a saved model to the Hugging Face Hub."""
    from prunesweep.models.io.hub import push

    print(push(model, repo_id, private=private))
