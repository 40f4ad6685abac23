"""``prunesweep bench``: measure the latency and throughput of models side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from prunesweep.models import Arch
    from prunesweep.models.latency.timing import Setting, Timing

__all__ = ["bench", "numbers", "open_model", "progress_bar"]

NAME = 20  # characters of a model's name in the table, which has eighty in all

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
CompileOption = Annotated[bool, typer.Option("--compile", help="measure torch.compile'd models")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads  [default: torch's own number]", show_default=False)
]


def bench(
    names: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="folders of saved models, or timm names", show_default=False)
    ],
    source: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="what speed-ups refer to  [default: the first model]", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(help="batch sizes, with commas between them")] = "1,64",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    compiled: CompileOption = False,
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to measure each model for, at each batch size")] = 2.0,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="of `prunesweep latency`: show what it predicts beside what is measured, at its batch size",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the results here, too", show_default=False)
    ] = None,
) -> None:
    """Measure models side by side: latency, throughput, and the speed-up that their MACs promise."""
    import json

    from prunesweep.models import UserError, arch_of
    from prunesweep.models.io.files import check_place, write_text
    from prunesweep.models.latency.timing import Setting, measure_all
    from prunesweep.models.layers.mixers import with_heads_as_they_are

    from .console import PlainConsole

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: its folder does not exist")
    if json_file is not None:
        check_place(json_file, "--json")
    common: Any = {"device": device, "dtype": dtype, "compiled": compiled, "threads": threads}
    settings = [Setting(batch=size, **common) for size in numbers("--batch", batch)]
    settings[0].require_device()
    chosen = list(dict.fromkeys([*([] if source is None else [source]), *names]))
    predicted = _predictions(table, settings, chosen)
    loaded = [open_model(name) for name in chosen]
    unequal = [i for i, model in enumerate(loaded) if _unequal_heads(arch_of(model))]
    timed = [*loaded, *(with_heads_as_they_are(loaded[i]) for i in unequal)]
    console = PlainConsole()
    timings = []
    with progress_bar(PlainConsole(stderr=True)) as bar:
        for setting in settings:
            progress = bar(f"batch {setting.batch}")
            timings.append(measure_all(timed, setting, min_seconds=seconds, progress=progress))
    found = {**_header(settings[0]), "source": chosen[0], "models": _results(chosen, loaded, timings, predicted)}
    for place, i in enumerate(unequal, len(loaded)):
        for timing, own in zip(found["models"][i]["timings"], timings, strict=True):
            timing["unfilled_ms"] = own[place].median_ms
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1))
    console.print(_table(found))
    for number, model in enumerate(found["models"]):
        if not _fits(model["model"]):
            label = f"model {number}" if number else "source"
            console.print(f"{label}: {model['model']}", highlight=False, markup=False, soft_wrap=True)
    for number in unequal:
        console.print(_unfilled(number, found["models"][number]), highlight=False, markup=False, soft_wrap=True)


def _unequal_heads(arch: Arch) -> bool:
    """Whether a block's heads read queries of another width than values, which kernels may want filled with zeros."""
    return any(width != block.qk for block in arch.blocks if block.heads for width in block.v_widths)


def _unfilled(number: int, model: Mapping[str, Any]) -> str:
    name = f"model {number}" if number else "source"
    times = (
        f"{one['unfilled_ms']:.2f} for {one['latency_ms']:.2f} at batch {one['batch']}" for one in model["timings"]
    )
    return f"{name} has heads of unequal widths; ms if no zeros fill them up in memory: {', '.join(times)}"


def _predictions(file: Path | None, settings: Sequence[Setting], names: Sequence[str]) -> Mapping[int, Sequence[float]]:
    """Predict every model's latency by a table, by the batch size that it is of.

    Raises:
        UserError: a model is neither saved nor timm's, or the table is of other conditions or of other models.
    """
    from prunesweep.models import LatencyTable, UserError

    records = [_record(name) for name in names]
    if file is None:
        return {}
    found = LatencyTable.load(file)
    if found.setting not in settings:
        own, here = found.setting.to_dict(), settings[0].to_dict()
        differ = [key for key in own if key != "batch" and own[key] != here[key]]
        key = differ[0] if differ else "batch"
        raise UserError(
            f"--table {file}: was measured with {key} {own[key]}: give --{'compile' if key == 'compiled' else key} "
            f"accordingly, or measure another table by prunesweep latency"
        )
    return {found.setting.batch: [found.predict(record) for record in records]}


def _record(name: str) -> Arch:
    """The record of what ``open_model`` opens, without its weights."""
    from prunesweep.models import Arch, read_arch

    folder = _folder(name)
    return Arch.from_timm(name) if folder is None else read_arch(folder)


def _folder(name: str) -> Path | None:
    """The folder that a name is; None for a timm name."""
    folder = Path(name.removeprefix("local-dir:"))
    return folder if folder.exists() or ("/" in name and not name.startswith("hf-hub:")) else None


def open_model(name: str) -> nn.Module:
    """Load a saved model, or build a timm model with random weights.

    Raises:
        UserError: ``name`` is neither, or the architecture is not supported.
    """
    import timm

    from prunesweep.models import Arch, adopted, load

    if (folder := _folder(name)) is not None:
        return load(folder)
    Arch.from_timm(name)  # its errors say what is unknown or cannot be represented
    return adopted(timm.create_model(name))


def numbers(option: str, text: str) -> list[int]:
    """Parse positive whole numbers with commas between them; a number given twice counts once.

    Args:
        option: name of the option, for messages.
        text: the option's value.

    Raises:
        UserError: the text is anything else.
    """
    from prunesweep.models import UserError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text}: must be whole numbers of at least 1 with commas between them, such as 1,64")
    return list(dict.fromkeys(int(part) for part in parts))


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show progress for the time of a ``with`` block, as ``Display.progress`` does.

    Yields:
        A function that takes what is measured and returns a function (done, total) that is called as it goes on.
    """
    from prunesweep.search.report.display import Display

    with Display(console).progress() as report:
        yield lambda what: lambda done, total: report(what, done / total, "done" if done == total else "")


def _header(setting: Any) -> dict[str, Any]:
    """Return the measuring conditions that all batch sizes share."""
    import torch

    from prunesweep.models.latency.timing import device_name

    shared = {key: value for key, value in setting.to_dict().items() if key != "batch"}
    if setting.device == "cpu":
        shared["threads"] = setting.threads or torch.get_num_threads()
    return {**shared, "device_name": device_name(setting.device), "torch": torch.__version__}


def _results(
    names: Sequence[str],
    loaded: Sequence[nn.Module],
    timings: Sequence[Sequence[Timing]],
    predicted: Mapping[int, Sequence[float]],
) -> list[dict[str, Any]]:
    """Return each model's cost, and its timing per batch size; the first model is the source."""
    from prunesweep.models import arch_of, cost

    costs = [cost(arch_of(model)) for model in loaded]
    results = []
    for i, (name, spent) in enumerate(zip(names, costs, strict=True)):
        by_batch = []
        for own in timings:
            speed_up = own[0].median_ms / own[i].median_ms
            by_batch.append(
                {
                    "batch": own[i].batch,
                    "latency_ms": own[i].median_ms,
                    "iqr_ms": own[i].iqr_ms,
                    "calls": own[i].calls,
                    "throughput": own[i].throughput,
                    "speed_up": speed_up,
                    "speed_up_per_macs_ratio": speed_up * spent.macs / costs[0].macs,
                    **({"predicted_ms": predicted[own[i].batch][i]} if own[i].batch in predicted else {}),
                }
            )
        results.append({"model": name, "macs": spent.macs, "params": spent.params, "timings": by_batch})
    return results


def _table(found: Mapping[str, Any]) -> Table:
    """Build the table: one row per model, one line in it per batch size."""
    from rich.table import Table
    from rich.text import Text

    threads = f", CPU threads: {found['threads']}" if found["device"] == "cpu" else ""
    how = f"{found['dtype']}{', compiled' if found['compiled'] else ''}{threads}, torch {found['torch']}"
    caption = "/ MACs: speed-up / ratio of MACs; 1 where all saved MACs are saved time"
    table = Table(title=f"{found['device_name']}, {how}", caption=caption, show_lines=True)
    table.add_column("model")
    by_table = any("predicted_ms" in timing for model in found["models"] for timing in model["timings"])
    for name in ("batch", "ms (IQR)", *(["by table"] if by_table else []), "images/s", "speed-up", "/ MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    formats: tuple[str, ...] = (
        "{batch}",
        "{latency_ms:.2f} ({iqr_ms:.2f})",
        "{throughput:.1f}",
        "{speed_up:.2f}x",
        "{speed_up_per_macs_ratio:.2f}",
    )
    for number, model in enumerate(found["models"]):
        name = model["model"] if _fits(model["model"]) else "source" if number == 0 else f"model {number}"
        macs = f"{model['macs'] / 1e9:.3f} G" if model["macs"] >= 1e9 else f"{model['macs'] / 1e6:.2f} M"
        cost = f"{macs} MACs\n{model['params'] / 1e6:.2f} M params"
        lines = ["\n".join(form.format(**timing) for timing in model["timings"]) for form in formats]
        if by_table:
            lines.insert(2, "\n".join(map(_by_table, model["timings"])))
        table.add_row(Text(f"{name}\n{cost}"), *lines)
    return table


def _fits(name: str) -> bool:
    """Whether the name of a model has room in a column; one that is broken over lines cannot be copied."""
    return len(name) <= NAME


def _by_table(timing: Mapping[str, Any]) -> str:
    """What a table predicts, and how far that is from what was measured."""
    if "predicted_ms" not in timing:
        return ""
    return f"{timing['predicted_ms']:.2f} ({timing['predicted_ms'] / timing['latency_ms'] - 1:+.0%})"
