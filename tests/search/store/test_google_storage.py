"""A run on Google's object storage, as fake-gcs-server plays it where that is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.models.io.objects import Objects, joined
from prunesweep.search.store.lease import Lease
from prunesweep.search.store.mirror import JOURNAL
from prunesweep.search.store.stored import WORKERS, view
from tests.search.store.test_objects import begin, finish, lost, machine, new_run

__all__ = ["machine"]  # a fixture


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket, of which ``PLACE`` is to be replaced."""
    program = shutil.which("fake-gcs-server")
    if program is None:
        pytest.skip("no fake-gcs-server in PATH")
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{own.getsockname()[1]}"
    options = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", host.partition(":")[2]]
    server = subprocess.Popen([program, *options, "-public-host", host, "-log-level", "error"])
    try:
        body, deadline = json.dumps({"name": "bucket"}).encode(), time.monotonic() + 20
        while True:
            try:
                request = urllib.request.Request(
                    f"http://{host}/storage/v1/b", body, {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"gs://anonymous@bucket/PLACE?scheme=http&endpoint_override={host}&retry_limit_seconds=5"
    finally:
        server.kill()
        server.wait()


def test_a_run_goes_on_elsewhere(bucket: str, machine: object) -> None:
    url = bucket.replace("PLACE", "runs/moves")
    objects = Objects(url)
    objects.check()
    with pytest.raises(UserError, match=r"there is no such bucket; make it first \(nowhere\)"):
        Objects(bucket.replace("bucket/PLACE", "nowhere/run")).check()
    run = new_run(url)
    finish(run, "r0-0000")
    run.publish()
    with pytest.raises(UserError, match="is in use by process"):
        Lease(url, print, lost).__enter__()
    run.close()
    objects.write(f"{WORKERS}/left", b"")

    machine("second")  # type: ignore[operator]
    with begin(url, new=False) as again:
        assert again.path != run.path
        assert (again.path / "trials/r0-0000/model/config.json").read_text() == "{}"
        assert (again.path / JOURNAL).read_bytes() == b"{}\n"
        shutil.rmtree(again.path / "trials/r0-0000")
        finish(again, "r0-0001", '{"of": "the second"}')
    names = {name for name in objects.list() if not name.startswith((".lease/", ".journal/"))}
    made = {"trials/r0-0001/model/config.json", "trials/r0-0001/result.json"}
    assert names == {"run.json", "search.toml", *made}
    found = view(url)
    assert Path(found / "trials/r0-0001/result.json").read_text() == '{"of": "the second"}'
    assert Objects(joined(url, "trials")).read("r0-0001/result.json") == b'{"of": "the second"}'
