"""Serve the page of a run to a browser on this machine, read-only, with data that are asked for again and again."""

from __future__ import annotations

import contextlib
import errno
import threading
import warnings
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prunesweep.models import UserError
from prunesweep.models.io.lock import Lock
from prunesweep.models.io.provenance import digest
from prunesweep.search.store.run import Run

from .page import as_script, render_run
from .page_data import page_data

__all__ = ["HOST", "PORT", "Feed", "page_server"]

HOST, PORT = "127.0.0.1", 8642
PORTS = 20  # that are tried from the first on


class Feed:
    """What the page of a run shows, read again where a file of the run has changed since the last time.

    Args:
        run: the run; it is not locked, and nothing in it is written.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen: Any = None
        self._text, self._tag = "", ""
        self._lock = threading.Lock()

    def read(self) -> tuple[str, str]:
        """Return the data as JSON, and a tag that differs where they do.

        Raises:
            UserError: a file that cannot be done without is damaged.
            OSError: one is gone.
        """
        with self._lock:
            seen = (Lock.holder(self.run.leases) is not None, *self._files())
            if seen != self._seen:
                self._text = as_script(page_data(Run(self.run.path)))  # a new one: a run keeps what it has read
                self._tag, self._seen = f'"{digest({"text": self._text})}"', seen
            return self._text, self._tag

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Names, times and sizes of the files that the page is made of."""
        for pattern in ("*.json", "*.toml", "trials/*/*.json*", "promoted/*/promoted.json"):
            for path in sorted(self.run.path.glob(pattern)):
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    yield str(path), facts.st_mtime_ns, facts.st_size


def page_server(run: Run, port: int | None = None) -> ThreadingHTTPServer:
    """Return a server of a run's page on 127.0.0.1, to be started by ``serve_forever``.

    ``/`` is the page, ``/data.json`` its data, with an ETag: what has not changed is not sent again.

    Args:
        run: the run.
        port: 0 takes a free one; by default the first free one from ``PORT`` on.

    Raises:
        UserError: the port is in use.
    """
    feed = Feed(run)

    class Handler(_Handler):
        pass

    Handler.feed = feed
    tried = range(PORT, PORT + PORTS) if port is None else (port,)
    for one in tried:
        try:
            server = ThreadingHTTPServer((HOST, one), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        server.daemon_threads = True
        return server
    raise UserError(
        f"--port {tried[0]}: {'no port up to ' + str(tried[-1]) + ' is' if port is None else 'is not'} free"
    )


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for two paths, and only under the names of this machine: no other site can read a run."""

    feed: Feed

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host", "") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "ask for 127.0.0.1\n")
            return
        path = self.path.partition("?")[0]
        if path not in ("/", "/data.json"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is / and /data.json\n")
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the page counts what is damaged
                text, tag = self.feed.read()
                if path == "/":
                    self._answer(HTTPStatus.OK, "text/html", render_run(self.feed.run, live=True))
                    return
        except (UserError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
            return
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "", tag)
        else:
            self._answer(HTTPStatus.OK, "application/json", text, tag)

    do_HEAD = do_GET  # noqa: N815 (the standard library's name)

    def _answer(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag is not None:
            self.send_header("ETag", tag)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: a page asks every other second."""
