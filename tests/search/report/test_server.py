"""The live page: what its server answers, and to whom."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prunesweep.models import UserError
from prunesweep.search.report import server
from prunesweep.search.report.page_data import page_data
from prunesweep.search.report.server import Feed, RemoteFeed, page_server
from prunesweep.search.store.run import Run
from tests.search.helpers import ARCH
from tests.search.report.test_page import add, small_run

Answer = tuple[int, dict[str, str], str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return small_run(tmp_path / "run")


@pytest.fixture
def port(run: Run) -> Iterator[int]:
    with page_server(Feed(run), 0) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.05,))
        thread.start()
        yield int(served.server_address[1])
        served.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def content(run: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_the_page_and_its_data_are_those_of_the_run_and_nothing_is_written(run: Run, port: int) -> None:
    before = content(run)
    status, headers, page = ask(port, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert 'data-feed="live"' in page
    assert "connect-src 'self'" in page
    status, _, text = ask(port, "/data.json")
    assert status == 200
    assert json.loads(text) == json.loads(json.dumps(page_data(run)))
    assert content(run) == before


def test_what_has_not_changed_is_not_sent_again(run: Run, port: int) -> None:
    tag = ask(port, "/data.json")[1]["ETag"]
    assert ask(port, "/data.json", If_None_Match=tag)[::2] == (304, "")
    add(run, ARCH, 7, top1=88.0)
    status, headers, text = ask(port, "/data.json", If_None_Match=tag)
    assert status == 200
    assert headers["ETag"] != tag
    assert json.loads(text)["trials"][-1]["unit"] == "r0-0007"
    with run.lock():  # a driver's coming and going changes no file that the page reads
        alive = ask(port, "/data.json", If_None_Match=headers["ETag"])
    assert json.loads(alive[2])["activity"]["driver"]
    assert json.loads(ask(port, "/data.json", If_None_Match=alive[1]["ETag"])[2])["activity"]["driver"] is None


def test_a_run_that_cannot_be_read_is_said_and_read_again_later(run: Run, port: int) -> None:
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text[:40])
    status, _, said = ask(port, "/data.json")
    assert status == 503
    assert "run.json is damaged" in said
    (run / "run.json").write_text(text)
    assert ask(port, "/data.json")[0] == 200


def test_other_sites_other_paths_and_other_methods_get_nothing(port: int) -> None:
    assert ask(port, "/data.json", Host="evil.example:80")[0] == 403  # a name that is made to mean this machine
    assert ask(port, "/data.json", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/../../etc/passwd")[0] == 404
    assert ask(port, "/data.json", "POST")[0] == 501
    assert ask(port, "/", "HEAD")[2] == ""


def test_a_page_from_afar_is_asked_for_again_while_somebody_looks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PAUSE", 0.0)
    answers: list[Any] = [page_data(run)]

    def ask() -> dict[str, Any]:
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]

    feed = RemoteFeed(ask)
    text, tag = feed.read()
    assert json.loads(text) == json.loads(json.dumps(answers[0]))
    answers.append({**answers[0], "name": "<b>another</b>"})
    assert until(lambda: feed.read()[1] != tag)
    assert "<b>another" not in feed.page()
    answers.append(UserError("the head is gone"))
    assert until(lambda: said(feed) == "the head is gone")
    answers.append(answers[0])
    assert until(lambda: said(feed) == "" and feed.read()[1] == tag)


def until(holds: Callable[[], bool]) -> bool:
    return any(holds() or time.sleep(0.01) for _ in range(500))


def said(feed: RemoteFeed) -> str:
    try:
        feed.read()
    except UserError as error:
        return str(error)
    return ""


def test_a_port_in_use_is_said(run: Run, port: int) -> None:
    with pytest.raises(UserError, match=rf"--port {port}: is not free"):
        page_server(Feed(run), port)
