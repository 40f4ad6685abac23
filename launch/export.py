"""``prunesweep export`` and ``prunesweep push``: write a saved model for other runtimes, or upload it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export_model", "push_model"]

ModelArgument = Annotated[Path, typer.Argument(help="folder of a saved model", show_default=False)]


def export_model(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="torch-export, onnx or timm", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="a new file or, for timm, folder (default: beside MODEL)", show_default=False),
    ] = None,
    opset: Annotated[int, typer.Option(help="version of the ONNX operators, 18 to 23")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Write a saved model for another runtime, and compare the two."""
    import json

    from prunesweep.models import arch_of, load
    from prunesweep.models.io.export import default_path, export
    from prunesweep.models.io.lock import reserve

    from .console import PlainConsole

    path = default_path(model, to) if out is None else out
    console = PlainConsole(stderr=True)
    with reserve(path), console.status(f"writing {path} and comparing it with the model"):
        loaded = load(model)
        error = export(loaded, path, to, opset=opset)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    if as_json:
        print(json.dumps({"path": str(path), "to": to, "bytes": size, "max_error": error}))
    else:
        outputs = "features" if arch_of(loaded).headless else "logits"
        text = f"{path}: {size:,} bytes; its {outputs} differ from the model's by at most {error:.1e}"
        PlainConsole().print(text, highlight=False, markup=False, soft_wrap=True)


def push_model(
    model: ModelArgument,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
) -> None:
    """Upload a saved model to the Hugging Face Hub."""
    from prunesweep.models.io.hub import push

    print(push(model, repo_id, private=private))
