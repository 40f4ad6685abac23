"""Serve the page of a run to a browser on this machine, read-only, with data that are asked for again and again."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from prunesweep.models import UserError
from prunesweep.models.io.lock import Lock
from prunesweep.models.io.provenance import digest
from prunesweep.search.store.run import Run

from .page import as_script, render_data, render_run
from .page_data import page_data

__all__ = ["HOST", "PORT", "Feed", "RemoteFeed", "page_server"]

HOST, PORT = "127.0.0.1", 8642
PORTS = 20  # that are tried from the first on
BRING = 10.0  # seconds between two looks at a run that lies elsewhere
PAUSE = 30.0  # seconds after an answer from afar until the next is asked for


class Source(Protocol):
    """Where the server has the data of a page from."""

    def read(self) -> tuple[str, str]:
        """Return the data as JSON, and a tag that differs where they do. Raises UserError or OSError."""

    def page(self) -> str:
        """Return the page with them."""


class Feed:
    """What the page of a run shows, read again where a file of the run has changed since the last time.

    Args:
        run: the run; it is not locked, and nothing in it is written.
        bring: called before it is looked at, at most every ``BRING`` seconds: brings what has changed, from elsewhere.
    """

    def __init__(self, run: Run, bring: Callable[[], object] = lambda: None) -> None:
        self.run, self._bring, self._due = run, bring, 0.0
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
            if time.monotonic() >= self._due:
                self._bring()
                self._due = time.monotonic() + BRING
            seen = (Lock.holder(self.run.leases) is not None, *self._files())
            if seen != self._seen:
                self._text = as_script(page_data(Run(self.run.path)))  # a new one: a run keeps what it has read
                self._tag, self._seen = f'"{digest({"text": self._text})}"', seen
            return self._text, self._tag

    def page(self) -> str:
        """Return the page with the data as they are now."""
        return render_run(self.run, live=True)

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Names, times and sizes of the files that the page is made of."""
        for pattern in ("*.json", "*.toml", "trials/*/*.json*", "promoted/*/promoted.json"):
            for path in sorted(self.run.path.glob(pattern)):
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    yield str(path), facts.st_mtime_ns, facts.st_size


class RemoteFeed:
    """What the page of a run far away shows; it is asked for again while somebody looks, not more often than ``PAUSE``.

    Args:
        ask: returns ``page_data`` of the run, which may take seconds; called once at once. Its data are not trusted:
            they are shown as text.

    Raises:
        UserError: as ``ask``.
    """

    def __init__(self, ask: Callable[[], Mapping[str, Any]]) -> None:
        self._ask, self._lock, self._asking = ask, threading.Lock(), False
        self._error: UserError | None = None
        self._take(ask())

    def _take(self, data: Mapping[str, Any]) -> None:
        self._data, text = data, as_script(data)
        self._text, self._tag = text, f'"{digest({"text": text})}"'
        self._due = time.monotonic() + PAUSE

    def _again(self) -> None:
        try:
            data = self._ask()
            with self._lock:
                self._take(data)
                self._error = None
        except Exception as error:  # whatever a client of a cluster raises; the next question may be answered
            with self._lock:
                self._error, self._due = UserError(str(error)), time.monotonic() + PAUSE
        finally:
            self._asking = False

    def read(self) -> tuple[str, str]:
        """Return the latest data as JSON, and a tag that differs where they do; ask for newer ones where that is due.

        Raises:
            UserError: the last question was not answered.
        """
        with self._lock:
            if time.monotonic() >= self._due and not self._asking:
                self._asking = True
                threading.Thread(target=self._again, daemon=True, name="page").start()
            if self._error is not None:
                raise self._error
            return self._text, self._tag

    def page(self) -> str:
        """Return the page with the latest data."""
        return render_data(self._data, live=True)


def page_server(feed: Source, port: int | None = None) -> ThreadingHTTPServer:
    """Return a server of a run's page on 127.0.0.1, to be started by ``serve_forever``.

    ``/`` is the page, ``/data.json`` its data, with an ETag: what has not changed is not sent again.

    Args:
        feed: where its data are from.
        port: 0 takes a free one; by default the first free one from ``PORT`` on.

    Raises:
        UserError: the port is in use.
    """

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

    feed: Source

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
                    self._answer(HTTPStatus.OK, "text/html", self.feed.page())
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
