"""``prunesweep import``: convert another project's checkpoint to a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from prunesweep.models import Arch

__all__ = ["import_model"]


def import_model(
    file: Annotated[
        Path, typer.Argument(help="a checkpoint written by torch.save, or a folder of transformers", show_default=False)
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="LAYOUT",
            help="nvit, upvit, uvc, spvit, pmvit, t2t, fairseq, timm, torchvision or transformers",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder of the model, which must not exist yet", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(help="the run's configuration, .json or .yaml (spvit)", show_default=False)
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="attention heads, where the file does not tell: 3, or 1,2,5,8 by stage", show_default=False),
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="side of the images, where the file does not tell", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="layout timm: name of the architecture, or a saved model of it, where the file does not tell",
            show_default=False,
        ),
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="run the code that the file names")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="take the averaged weights (model_ema, state_dict_ema)")] = False,
) -> None:
    """Convert a checkpoint of another project to a saved model."""
    from prunesweep.models import UserError, arch_of, cost, save
    from prunesweep.models.importers import check_layout, import_checkpoint
    from prunesweep.models.io.lock import reserve
    from prunesweep.search.report.display import Display

    from .console import PlainConsole

    if out.exists():
        raise UserError(f"--out {out}: is there already; give a new folder")
    numbers = None if heads is None else _numbers(heads)
    check_layout(layout, config=config, model=model)
    if not file.exists():
        raise UserError(f"{file} is not a file: give a checkpoint written by torch.save, or a folder of transformers")
    if config is not None and not config.exists():
        raise UserError(f"--config {config}: No such file")
    with reserve(out), Display(PlainConsole()).working(f"reading {file.name}"):
        imported = import_checkpoint(
            file, layout, config=config, heads=numbers, img_size=img_size, trust=trust, ema=ema, model=model
        )
        digest = _digest(file)
        save(imported, out, {"method": "import", "layout": layout, "file": file.name, "sha256": digest, "ema": ema})
    arch, console = arch_of(imported), PlainConsole()
    spent = cost(arch)
    console.print(_table(arch))
    console.print(f"{spent.macs:,} MACs, {spent.params:,} params; saved as {out}", highlight=False, soft_wrap=True)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weights, file after file."""
    import hashlib

    found = hashlib.sha256()
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with part.open("rb") as stream:
            while piece := stream.read(2**20):
                found.update(piece)
    return found.hexdigest()


def _numbers(text: str) -> tuple[int, ...]:
    from prunesweep.models import UserError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--heads {text}: must be a whole number, or several with commas between them") from error


def _table(arch: Arch) -> Table:
    """Build the table of an imported model's blocks."""
    from rich.table import Table

    rows, columns = arch.img_size
    widths = ", ".join(str(stage.width) for stage in arch.stages)
    table = Table(title=f"{arch.family}: images of {rows} x {columns}, width {widths}, {arch.num_classes} classes")
    if arch.text is not None:
        bands = ", ".join(f"{len(band):,}" for band in arch.bands)
        tails = ", ".join(map(str, arch.text.tails))
        table.title = f"lm: texts of {columns} words, width {widths}; {bands} words by band, tails {tails} wide"
    for name in ("block", "mixer", "heads", "qk", "v", "mlp", "tokens"):
        table.add_column(name, justify="left" if name == "mixer" else "right")
    for stage in arch.stages:
        for block in stage.blocks:
            v = "-".join(str(n) for n in sorted({min(block.v_widths), max(block.v_widths)})) if block.heads else block.v
            cells = (block.src, block.mixer, block.heads or "", block.qk or "", v or "", block.mlp, block.tokens or "")
            table.add_row(*map(str, cells))
    return table
