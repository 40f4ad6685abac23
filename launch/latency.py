"""``prunesweep latency``: measure a table that predicts the latency of every compressed form of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .bench import CompileOption, DeviceOption, DtypeOption, ThreadsOption, open_model, progress_bar

if TYPE_CHECKING:
    from prunesweep.models import Arch
    from prunesweep.models.latency.table import LatencyTable
    from prunesweep.models.latency.timing import Setting

__all__ = ["latency"]


def latency(
    source: Annotated[
        str, typer.Argument(help="the model to be compressed: a saved folder or a timm name", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="the table's file, for example table.json", show_default=False)],
    points: Annotated[int, typer.Option(min=2, help="widths per axis")] = 3,
    tokens: Annotated[int, typer.Option(min=0, help="numbers of tokens, for token plans; 0: none")] = 0,
    least: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=WIDTH", help="smallest width of an axis, e.g. qk=4", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images per batch")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    compiled: CompileOption = False,
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to measure each block for")] = 0.3,
    check: Annotated[int, typer.Option(min=0, help="random models to measure the prediction's error on; 0: none")] = 20,
    from_nvit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="take NViT's latency_head.json in place of measuring; --batch and --dtype say how that was measured",
            show_default=False,
        ),
    ] = None,
    to_nvit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write the table of a ViT in NViT's form too", show_default=False),
    ] = None,
) -> None:
    """Measure a latency table of a model's blocks, and how well it predicts whole models."""
    import dataclasses
    import json

    from prunesweep.models import UserError, arch_of
    from prunesweep.models.io.files import check_place, write_text
    from prunesweep.models.latency.building import build_table
    from prunesweep.models.latency.nvit_format import to_nvit as write_nvit
    from prunesweep.models.latency.prediction import prediction_error
    from prunesweep.models.latency.timing import Setting

    from .console import PlainConsole

    for option, file in (("--out", out), ("--to-nvit", to_nvit)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{option} {file}: its folder does not exist")
        if file is not None:
            check_place(file, option)
    if check == 1:
        raise UserError("--check 1: a rank correlation needs at least 2 models; 0 for none")
    setting, smallest = (
        Setting(batch=batch, device=device, dtype=dtype, compiled=compiled, threads=threads),
        _widths(least or []),
    )
    if from_nvit is not None and not from_nvit.is_file():
        raise UserError(f"--from-nvit {from_nvit}: No such file")
    if from_nvit is None:
        setting.require_device()
    arch, console = arch_of(open_model(source)), PlainConsole()
    if from_nvit is not None:
        table = _read_nvit(from_nvit, arch, setting)
        table.save(out)
        console.print(f"{from_nvit} read; table saved as {out}", highlight=False, markup=False, soft_wrap=True)
        return
    with progress_bar(PlainConsole(stderr=True)) as bar:
        table = build_table(
            arch,
            setting,
            points=points,
            token_points=tokens,
            least=smallest,
            min_seconds=seconds,
            progress=bar("measuring blocks"),
        )
        table.save(out)
        if to_nvit is not None:
            write_text(to_nvit, json.dumps(write_nvit(table)))
        if check:
            error = prediction_error(table, n=check, min_seconds=3 * seconds, progress=bar("measuring whole models"))
            table = dataclasses.replace(table, check=error.to_dict())
            table.save(out)
    for line in _report(table, arch, out):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _read_nvit(file: Path, arch: Arch, setting: Setting) -> LatencyTable:
    """Read a table from NViT's file. Raises UserError if there is no file, or it has another form."""
    from prunesweep.models.io.reading import read_json
    from prunesweep.models.latency.nvit_format import from_nvit

    data = read_json(file, what="table of --from-nvit")
    return from_nvit(data, source=arch, setting=setting, device_name=setting.device)


def _report(table: LatencyTable, arch: Arch, out: Path) -> Iterator[str]:
    if found := table.check:
        yield (
            f"predicted against measured on {len(found['measured'])} random models: relative error "
            f"{found['median_error']:.1%} (median), {found['max_error']:.1%} (largest), bias {found['bias']:+.1%}; "
            f"Spearman {found['spearman']:.3f}, Kendall {found['kendall']:.3f}"
        )
    ms, batch = table.predict(arch), table.setting.batch
    yield f"{arch.source}: {ms:.2f} ms per batch of {batch} predicted; table saved as {out}"


def _widths(texts: Sequence[str]) -> Mapping[str, int]:
    from prunesweep.models import UserError

    pairs = [text.partition("=") for text in texts]
    for text, (_, _, width) in zip(texts, pairs, strict=True):
        if not width.isdecimal():
            raise UserError(f"--least {text}: must be AXIS=WIDTH, such as qk=4")
    return {axis: int(width) for axis, _, width in pairs}
