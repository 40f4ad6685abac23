"""An S3 server on loopback, moto's, that can be told to fail."""

from __future__ import annotations

import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "bucket"


class Store:
    """Where it is, and how it fails.

    Attributes:
        fails: whether a request, by its method and path, gets the error 500, or the error that it gets.
        requests: methods and paths of all requests.
    """

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool | int] = lambda *_: False
        self.requests = list[tuple[str, str]]()
        self.endpoint = ""

    def environment(self) -> dict[str, str]:
        """Variables by which pyarrow finds it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"


@contextmanager
def serving() -> Iterator[Store]:
    """Serve a bucket, to this process and those that it starts with this environment."""
    server_of = pytest.importorskip("moto.server")
    werkzeug = pytest.importorskip("werkzeug.serving")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store, moto = Store(), server_of.DomainDispatcherApplication(server_of.create_backend_app)

    def application(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = (environment["REQUEST_METHOD"], environment["PATH_INFO"])
        store.requests.append(asked)
        if code := store.fails(*asked):
            environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
            code, name = (403, "AccessDenied") if code == 403 else (500, "InternalError")
            text = f"<Error><Code>{name}</Code><Message>{name}</Message></Error>".encode()
            start(f"{code} {name}", [("Content-Length", str(len(text))), ("Content-Type", "application/xml")])
            return [text]
        return moto(environment, start)

    server = werkzeug.make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    before = dict(os.environ)
    os.environ.update(store.environment())
    try:
        request = urllib.request.Request(f"{store.endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield store
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.shutdown()
        server.server_close()
