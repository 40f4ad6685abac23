"""Objects of a real S3 server, which may fail; leases on it; and folders that mirror it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import ArrowException  # type: ignore[import-untyped]

from prunesweep.models import UserError
from prunesweep.models.io import lock
from prunesweep.models.io import objects as objects_module
from prunesweep.models.io.lock import Lost
from prunesweep.models.io.objects import Objects, StoreFails, is_url, joined, local_path, url_of
from prunesweep.search.store import stored as stored_module
from prunesweep.search.store.lease import LEASES, Lease
from prunesweep.search.store.mirror import JOURNAL, PARTS, Journal, Mirror, place_for
from prunesweep.search.store.run import Run
from prunesweep.search.store.stored import StoredRun, ask_to_stop, view
from tests.object_store import Store, serving
from tests.search.helpers import make_run


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as found:
        yield found


@pytest.fixture
def url(store: Store, request: pytest.FixtureRequest) -> Iterator[str]:
    """A place of the test's own."""
    yield store.url(f"{request.node.name}/run")
    store.fails = lambda *_: False


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Go on as another machine, with a cache of its own."""

    def go(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    go("first")
    return go


def lost(_: Lost) -> None:
    raise AssertionError


def test_urls_and_folders_are_told_apart() -> None:
    assert [is_url(p) for p in ("s3://b/r", Path("s3://b/r"), "file:///r", "runs/r", "C:/r", Path("/r"))] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert url_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert local_path("file:///mnt/my%20runs") == Path("/mnt/my runs")
    assert joined("s3://b/r?region=x", "front.json") == "s3://b/r/front.json?region=x"
    with pytest.raises(UserError, match="names no run"):
        place_for("s3://bucket")
    with pytest.raises(UserError, match="'prunesweep fetch s3://b/r' brings it to a folder"):
        Run.existing(Path("s3://b/r"))


def test_objects_are_published_listed_read_and_deleted(url: str, tmp_path: Path) -> None:
    found = Objects(url)
    (tmp_path / "large").write_bytes(large := os.urandom(6 * 2**20))  # more than one part of an upload
    found.write("a/b", b"1")
    found.put("large", tmp_path / "large")
    assert {name: stamp.size for name, stamp in found.list().items()} == {"a/b": 1, "large": len(large)}
    assert list(found.list("a/")) == ["a/b"]
    found.get("large", tmp_path / "again" / "large")
    assert (tmp_path / "again" / "large").read_bytes() == large
    found.delete("a/b")
    found.delete("a/b")
    assert found.stamp("a/b") is None
    with pytest.raises(FileNotFoundError):
        found.read("a/b")
    assert found.name == "run"
    found.write("folder/of/files", b"")
    for _ in range(2):
        found.delete_folder("folder")
    assert list(found.list()) == ["large"]


def test_what_cannot_be_used_is_said_in_one_line(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such bucket; make it first \(nowhere\)"):
        Objects("s3://nowhere/run").check()
    store.fails = lambda *_: 403
    with pytest.raises(UserError, match="these credentials may not do that; credentials and endpoint are read as"):
        Objects("s3://bucket/run").check()
    store.fails = lambda *_: False
    with pytest.raises(UserError, match="does not say when something was published"):
        Lease("memory://bucket/run", print, lost).__enter__()

    def refuse() -> None:
        raise ArrowException("Bearer tokens need TLS")

    with pytest.raises(
        UserError, match="s3://bucket/run cannot be used: Bearer tokens need TLS; credentials and endpoint"
    ):
        Objects("s3://bucket/run").asked(refuse)
    with pytest.raises(UserError, match="no storage is known as ftpx://; there are s3, gs"):
        Objects("ftpx://host/run")


@pytest.mark.slow  # pyarrow asks three times by itself, which takes seconds
def test_a_store_that_fails_for_a_while_is_asked_again(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told of once; one that goes on failing ends the attempts."""
    monkeypatch.setattr(objects_module, "TOLD", 0.0)
    monkeypatch.setattr(objects_module, "PAUSES", (0.05,))
    notes = list[str]()
    found = Objects(url, notes.append)
    found.write("before", b"")
    store.fails = lambda *_: not notes
    threads = [threading.Thread(target=found.write, args=(f"n{i}", b"x")) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.list()) == ["before", "n0", "n1", "n2"]
    assert [("does not answer" in note, "answers again" in note) for note in notes] == [(True, False), (False, True)]

    store.fails = lambda *_: True
    monkeypatch.setattr(objects_module, "FIRST", 0.0)
    with pytest.raises(StoreFails, match="the store has not answered for"):
        Objects(url, notes.append).list()
    store.fails = lambda *_: len(notes) < 3
    assert len(Objects(url, notes.append, known=True).list()) == 4  # as another process has had answers
    store.fails = lambda *_: True
    monkeypatch.setattr(objects_module, "PATIENCE", 0.2)
    with pytest.raises(StoreFails, match="the store has not answered for"):
        found.write("never", b"")


def test_a_second_driver_is_refused_and_a_released_lease_is_not(url: str) -> None:
    with Lease(url, print, lost) as first:
        assert (first.before, first.number) == (0, 1)
        with pytest.raises(
            UserError, match=rf"is in use by process {os.getpid()} on \S+, which gave a sign of life \d"
        ):
            Lease(url, print, lost).__enter__()
        first.check()
    with Lease(url, print, lost) as second:
        assert (second.before, second.number) == (1, 2)
        assert len(Objects(url).list(LEASES)) == 1


def test_of_many_that_ask_at_once_one_gets_the_lease(url: str) -> None:
    got, refused, over = list[Lease](), list[UserError](), threading.Barrier(5)

    def ask() -> None:
        over.wait()
        try:
            got.append(Lease(url, print, lost).__enter__())
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)
    got[0].release()


def test_who_gave_no_sign_of_life_is_followed_and_stops(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was taken for dead publishes nothing more, and says why."""
    monkeypatch.setattr(lock, "STALE", 1.5)
    told = list[Lost]()
    first = Lease(url, print, told.append).__enter__()  # it beats every ten seconds only
    kept = Objects(url)
    kept.guard = first.check
    kept.write("mine", b"")
    time.sleep(3)
    second = Lease(url, print, lost).__enter__()
    assert second.number == 2
    with pytest.raises(Lost, match="another process has taken over"):
        kept.write("late", b"")
    assert "late" not in Objects(url).list()
    first.release()
    second.check()
    second.release()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_mirror_brings_what_changed_and_no_more(url: str, store: Store, tmp_path: Path) -> None:
    one, two = (Mirror(tmp_path / name / "run", Objects(url)) for name in ("one", "two"))
    make_run(one.path)
    (one.path / "trials" / "r0-0000").mkdir()
    (one.path / "trials" / "r0-0000" / "result.json").write_text("{}")
    (one.path / ".leases").mkdir()
    (one.path / ".leases" / "1").write_text("stays")
    (one.path / "front").mkdir()
    (one.path / "front" / "01").symlink_to("../trials/r0-0000")
    one.push(one.files())
    two.pull()
    expected = {name: text for name, text in contents(one.path).items() if not name.startswith((".leases", "front/"))}
    assert contents(two.path) == expected
    two.save()

    (one.path / "search.toml").write_text("changed")
    (one.path / "run.json").unlink()
    one.push(one.files())
    one.drop("run.json")
    store.requests.clear()
    again = Mirror(two.path, Objects(url))
    again.pull()
    assert contents(two.path) == {
        "search.toml": b"changed",
        "trials/r0-0000/result.json": b"{}",
    }
    assert [path for method, path in store.requests if method == "GET" and path.endswith((".toml", ".json"))] == [
        f"/bucket/{url.removeprefix('s3://bucket/')}/search.toml"
    ]


def test_a_journal_is_published_in_few_parts(url: str, tmp_path: Path) -> None:
    """What is appended is not published whole each time, and what is there at any moment is a beginning of it."""
    file = tmp_path / "one" / JOURNAL
    file.parent.mkdir()
    objects, text = Objects(url), b""
    journal, published = Journal(file, objects), 0
    write = objects.write

    def counted(name: str, content: bytes) -> None:
        nonlocal published
        published += len(content)
        write(name, content)

    objects.write = counted  # type: ignore[method-assign]
    for i in range(40):
        text += b'{"line": %d}\n' % i
        with file.open("ab") as opened:
            opened.write(b'{"line": %d}\n' % i)
        journal.publish()
        if i % 13 == 0:
            there = Mirror(tmp_path / f"at{i}", objects)
            there.pull()
            assert (there.path / JOURNAL).read_bytes() == text
    assert len(objects.list(PARTS)) <= 6
    assert published < 8 * len(text)  # whole each time it were 20

    file.unlink()
    file.write_bytes(b'{"anew": 1}\n')  # as a journal that disagrees with the files is
    journal.publish()
    other = Mirror(tmp_path / "other", objects)
    other.pull()
    assert (other.path / JOURNAL).read_bytes() == b'{"anew": 1}\n'
    assert len(objects.list(PARTS)) == 1

    with file.open("ab") as opened:
        opened.write(b'{"anew": 2}\n')
    Journal(file, objects).publish()  # of the next driver
    other.pull()
    assert (other.path / JOURNAL).read_bytes() == b'{"anew": 1}\n{"anew": 2}\n'


def coordinator(**facts: Any) -> Any:
    found = SimpleNamespace(handed_out=[], results=[], failures={}, settled=0, stopping=False, **facts)
    found.stop = lambda: setattr(found, "stopping", True)
    return found


def begin(url: str, **options: Any) -> StoredRun:
    return StoredRun(url, print, lost, **options)


def new_run(url: str) -> StoredRun:
    run = begin(url, new=True).__enter__()
    make_run(run.path)
    (run.path / JOURNAL).write_bytes(b"{}\n")
    run.publish()
    return run


def finish(run: StoredRun, unit: str, text: str = "{}") -> None:
    folder = run.path / "trials" / unit
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(text)
    (folder / "result.json").write_text(text)


def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(run: StoredRun) -> None:
    """As SIGKILL: nothing is published any more, and the lease is not given back."""
    run._over.set()
    run._lease._stop.set()
    if run._thread is not None:
        run._thread.join()


@pytest.mark.slow
def test_a_driver_killed_before_it_published_loses_nothing(
    store: Store, url: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same machine publishes it when it resumes. For another one the trial is not done; nothing is there twice."""
    monkeypatch.setattr(stored_module, "LOOK", 0.05)
    monkeypatch.setattr(objects_module, "PAUSES", (0.05,))
    monkeypatch.setattr(lock, "died", lambda _: True)  # as is seen on the same machine, and after a minute elsewhere
    run, search = new_run(url), coordinator()
    run.follow(search)
    search.handed_out = ["r0-0000"]
    finish(run, "r0-0000")
    objects = Objects(url)
    eventually(lambda: "trials/r0-0000/result.json" in objects.list())
    search.handed_out = ["r0-0001"]
    monkeypatch.setattr(objects_module, "PATIENCE", 0.2)
    store.fails = lambda method, path: method == "PUT" and path.endswith("r0-0001/result.json")
    finish(run, "r0-0001")
    eventually(lambda: "trials/r0-0001/model/config.json" in objects.list())
    kill(run)
    store.fails = lambda *_: False
    assert "trials/r0-0001/result.json" not in objects.list()

    with begin(url, new=False) as again:
        assert again.path == run.path
        assert (again.path / "trials/r0-0001/result.json").exists()
        assert "trials/r0-0001/result.json" in objects.list()
        finish(again, "r0-0002")
        kill(again)

    machine("second")
    with begin(url, new=False) as other:
        assert other.path != run.path
        units = {p.parent.name for p in other.path.glob("trials/*/result.json")}
        assert units == {"r0-0000", "r0-0001"}
        assert (other.path / JOURNAL).read_bytes() == b"{}\n"
        finish(other, "r0-0002", '{"of": "the other"}')
    machine("first")  # whose own result of this trial comes too late
    with begin(url, new=False) as late:
        assert (late.path / "trials/r0-0002/result.json").read_text() == '{"of": "the other"}'
    assert objects.read("trials/r0-0002/result.json") == b'{"of": "the other"}'


def test_models_that_leave_the_front_leave_the_store(url: str, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "LOOK", 0.05)
    run, search, objects = new_run(url), coordinator(), Objects(url)
    run.follow(search)
    search.handed_out = ["r0-0000"]
    finish(run, "r0-0000")
    eventually(lambda: "trials/r0-0000/model/config.json" in objects.list())
    (run.path / "trials/r0-0000/model/config.json").unlink()
    (run.path / "trials/r0-0000/model").rmdir()
    eventually(lambda: "trials/r0-0000/model/config.json" not in objects.list())
    assert "trials/r0-0000/result.json" in objects.list()
    run.close()
    with pytest.raises(UserError, match="exists: go on with 'prunesweep resume s3://"):
        begin(url, new=True).__enter__()
    nothing = Objects(joined(url, "nothing"))
    with pytest.raises(UserError, match="is not a run"):
        begin(nothing.url, new=False).__enter__()
    with begin(nothing.url, new=True):  # and some error before the run is made
        pass
    assert nothing.list() == {}


def test_a_search_whose_study_is_in_a_database_is_published(
    url: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no journal."""
    monkeypatch.setattr(stored_module, "LOOK", 0.05)
    run, search, objects = begin(url, new=True).__enter__(), coordinator(), Objects(url)
    make_run(run.path)
    run.publish()
    run.follow(search)
    (run.path / "study.json").write_text("{}")
    search.handed_out = ["r0-0000"]
    finish(run, "r0-0000")
    eventually(lambda: "trials/r0-0000/result.json" in objects.list())
    run.close()
    assert objects.read("study.json") == b"{}"
    machine("second")
    with begin(url, new=False) as again:
        assert not (again.path / JOURNAL).exists()
        assert (again.path / "study.json").exists()


def test_a_new_run_takes_the_place_of_one_that_was_not_made_and_of_nothing_else(url: str, machine: Any) -> None:
    objects = Objects(url)
    objects.write("photographs/1.jpg", b"mine")
    with pytest.raises(UserError, match="is not empty: photographs/1.jpg is there, and no run"):
        begin(url, new=True).__enter__()
    assert list(objects.list()) == ["photographs/1.jpg"]
    objects.write(".making", b"")  # as of a driver that was killed while it published a new run
    run = new_run(url)
    run.close()
    names = {name for name in objects.list() if not name.startswith(LEASES)}
    assert names == {"run.json", "search.toml", next(name for name in names if name.startswith(PARTS))}


def test_who_looks_sees_the_driver_and_may_ask_it_to_stop(
    url: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "LOOK", 0.05)
    monkeypatch.setattr(stored_module, "REST", 0.1)
    run, search = new_run(url), coordinator()
    run.follow(search)
    machine("laptop")
    found = view(url)
    assert found != run.path
    holder = lock.Lock.holder(found / ".leases")
    assert holder is not None
    assert holder.pid == os.getpid()
    assert json.loads((found / "run.json").read_text())["source"]["name"] == "test"
    with pytest.raises(UserError, match=rf"{url} is in use by process {os.getpid()}"):
        begin(url, new=False).__enter__()
    assert ask_to_stop(url)
    eventually(lambda: search.stopping)
    run.close()
    assert lock.Lock.holder(view(url) / ".leases") is None
    assert not ask_to_stop(url)
    assert view(Path("runs/folder")) == Path("runs/folder")
    with pytest.raises(UserError, match="nothing is there"):
        view(joined(url, "nothing"))
