"""``prunesweep watch``: the page of a run in a browser, fed while the search goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from .place import RunArgument, brought

__all__ = ["watch"]


def watch(
    run: RunArgument,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="on 127.0.0.1; 0 takes a free one  [default: the first free one from 8642 on]",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="of a head that RUN was submitted to, by its name: http://HEAD:8265", show_default=False),
    ] = None,
) -> None:
    """Serve the run's page to a browser on this machine, up to date every 2 seconds; Ctrl-C ends it.

    Nothing of the run is written or locked, so it can be watched while a search goes on, and after. Of a cluster it is
    asked for by a short job, every half minute while somebody looks.
    """
    import contextlib
    from functools import partial

    from prunesweep.search import Run
    from prunesweep.search.report.server import HOST, Feed, RemoteFeed, Source, page_server

    feed: Source
    if address is None:
        found = Run.existing(brought(run, whole=False))
        found.metadata()
        feed, shown = Feed(found, partial(brought, run, whole=False)), found.shown
    else:
        from .jobs import remote_page

        shown = str(run)
        feed = RemoteFeed(lambda: remote_page(shown, address))
    with page_server(feed, port) as server:
        print(f"{shown}: http://{HOST}:{server.server_address[1]}/   (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
