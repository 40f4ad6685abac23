"""``prunesweep watch``: the page of a run in a browser, fed while the search goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["watch"]


def watch(
    run: Annotated[Path, typer.Argument(help="the run's folder, for example runs/digits", show_default=False)],
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="on 127.0.0.1; 0 takes a free one  [default: the first free one from 8642 on]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the run's page to a browser on this machine, up to date every 2 seconds; Ctrl-C ends it.

    Nothing of the run is written or locked, so it can be watched while a search goes on, and after.
    """
    import contextlib

    from prunesweep.search import Run
    from prunesweep.search.report.server import HOST, page_server

    found = Run.existing(run)
    found.metadata()
    with page_server(found, port) as server:
        print(f"{found.shown}: http://{HOST}:{server.server_address[1]}/   (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
