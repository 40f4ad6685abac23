"""``prunesweep init``: write an example configuration to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["init"]


def init(
    name: Annotated[
        str | None,
        typer.Argument(help="of an example, such as digits; without one they are listed", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write, which must not exist  [default: NAME.toml]", show_default=False)
    ] = None,
) -> None:
    """Write an example configuration, every line of which is explained, into the working directory."""
    from importlib.resources import files

    from prunesweep.models import UserError
    from prunesweep.models.errors import nearest
    from prunesweep.models.io.files import check_place, write_text

    from .console import PlainConsole

    found = (file for file in files("prunesweep").joinpath("examples").iterdir() if file.name.endswith(".toml"))
    texts = {file.name.removesuffix(".toml"): file.read_text(encoding="utf-8") for file in found}
    console = PlainConsole()
    if name is None:
        if out is not None:
            raise UserError(f"--out {out}: name the example too; there are {', '.join(sorted(texts))}")
        lines = [f"{own}: {texts[own].partition(chr(10))[0].removeprefix('# ').rstrip(':.,')}" for own in sorted(texts)]
        console.print("\n".join([*lines, "", "Write one here: prunesweep init NAME"]), highlight=False, soft_wrap=True)
        return
    name = name.removesuffix(".toml")
    if name not in texts:
        raise UserError(f"{name}: must be one of {', '.join(sorted(texts))}. {nearest(name, texts)}".rstrip())
    path = out or Path(f"{name}.toml")
    check_place(path)
    if path.exists():
        raise UserError(f"{path} is there already: give another file with --out, or search with it as it is")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: its folder does not exist")
    write_text(path, texts[name].replace(f"examples/{name}.toml", str(path)))
    commands = (line[1:].strip() for line in texts[name].splitlines() if line.startswith("#     prunesweep"))
    first = next(commands, f"prunesweep search examples/{name}.toml").replace(f"examples/{name}.toml", str(path))
    said = f"{path} is written; every line says what it does, prunesweep config --explain KEY too. Next:\n  {first}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
