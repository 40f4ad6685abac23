"""``prunesweep show``: describe a saved model or one of timm's, and draw which tokens its blocks work on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["show"]


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="folder of a saved model or of `prunesweep instant`, or a timm name, of which no weights are needed",
            show_default=False,
        ),
    ],
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="draw kept, merged and passing patches on this image", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="of the picture  [default: MODEL-tokens.png]")] = None,
) -> None:
    """Print a model's blocks and cost; with --tokens, draw what becomes of an image's patches, block by block.

    Of a folder of `prunesweep instant`, print its front.
    """
    from PIL import Image, UnidentifiedImageError
    from rich import box
    from rich.table import Table

    from prunesweep.models import UserError, cost, load, load_provenance
    from prunesweep.models.counting import block_cost
    from prunesweep.models.io.files import check_place, make_folder
    from prunesweep.models.precision import to_float32
    from prunesweep.search.report.token_picture import draw_tokens
    from prunesweep.search.store.computed import ComputedFront
    from prunesweep.training.jobs.one_shot import check_source

    from .console import PlainConsole
    from .instant import print_computed

    model = Path(name)
    if tokens is not None and not model.exists():
        raise UserError(f"--tokens: a token plan is a saved model's; {name} is no folder")
    if ComputedFront.is_one(model):
        if tokens is not None:
            raise UserError(f"--tokens: {model} is a front of several models; name one, such as {model}/0.5")
        print_computed(model)
        return

    arch, console = check_source(name), PlainConsole()
    spent = cost(arch)
    table = Table(box=box.SIMPLE)
    for name in ("block", "of the source", "mixer", "heads", "qk", "v", "mlp", "tokens", "MACs (M)"):
        table.add_column(name, justify="right")
    number = 0
    for s, stage in enumerate(arch.stages):
        table.add_section()
        for block in stage.blocks:
            widths = str(block.v) if isinstance(block.v, int) else " ".join(map(str, block.v))
            attends = block.mixer in ("attn", "xca")
            table.add_row(
                f"{s}.{number}" if len(arch.stages) > 1 else str(number),
                str(block.src),
                block.mixer,
                str(block.heads) if attends else "",
                str(block.qk) if attends else "",
                widths if block.mixer != "none" else "",
                str(block.mlp),
                "all" if block.tokens is None else str(block.tokens),
                f"{block_cost(arch, stage, block).macs / 1e6:.2f}",
            )
            number += 1
    widths = ", ".join(str(stage.width) for stage in arch.stages)
    console.print(
        f"{arch.source}, family {arch.family}, width {widths}, {arch.img_size[0]}x{arch.img_size[1]} images\n"
        f"{spent.macs:,} MACs, {spent.params:,} params",
        highlight=False,
    )
    console.print(table)
    facts = load_provenance(model) if model.exists() else {}
    if "given" in facts:
        console.print(f"began in a search as {facts['given']}, by method {facts['method']}", highlight=False)
    if tokens is None:
        return
    picture = out or model.with_name(f"{model.name}-tokens.png")
    check_place(picture)
    try:
        image = Image.open(tokens)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--tokens {tokens}: is no image that can be read: {error}") from error
    make_folder(picture.absolute().parent)
    draw_tokens(to_float32(load(model)), image, picture)
    console.print(f"drawn: {picture}", highlight=False, soft_wrap=True)
