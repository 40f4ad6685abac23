"""A PostgreSQL of the tests' own, from Debian's binaries, and a server that speaks Redis."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "very-secret-7319"
FAST = ("fsync=off", "full_page_writes=off", "max_connections=90", "shared_buffers=16MB")


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


class Postgres:
    """A server on a port of its own, which asks for a password."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._folder, self._binaries, self.port = folder, binaries, _free_port()
        self._user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:  # it does not run as root
            shutil.chown(folder, "postgres", "postgres")
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        options = [
            "-U",
            "searcher",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        command = [binaries / "initdb", "-D", folder / "data", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._user)  # type: ignore[call-overload]

    def url(self, database: str = "postgres", user: str = "searcher") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        further = [part for setting in FAST for part in ("-c", setting)]
        command = [self._binaries / "postgres", "-D", self._folder / "data", "-p", str(self.port), "-k", self._folder]
        self._process = subprocess.Popen(
            [*map(str, command), "-c", "listen_addresses=127.0.0.1", *further],
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "log").open("ab"),
            cwd=self._folder,
            **self._user,  # type: ignore[arg-type]
        )
        ready = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready).returncode:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: at once
            self._process.wait()
            self._process = None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Serve databases, to who has the password in its environment."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="prunesweep-postgres-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        server = Postgres(Path(folder), found[-1].parent)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def redis() -> Iterator[str]:
    """Serve a Redis that is only made believe, but by its protocol; yield its URL."""
    fake: Any = pytest.importorskip("fakeredis")
    pytest.importorskip("lupa")
    server = fake.TcpFakeServer(("127.0.0.1", _free_port()), server_type="redis")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()
