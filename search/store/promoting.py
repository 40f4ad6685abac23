"""Promotions in a run on an object store: each has a lease of its own, and may run beside the search.

What they read is brought to a folder of this machine, ``promotions/NAME`` of its cache. What is made there is published
as it goes on, so another machine goes on from what was published last.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from prunesweep.models.errors import UserError
from prunesweep.models.io.objects import Objects, is_url, joined, local_path, url_of
from prunesweep.models.io.threads import beside

from .lease import LEASES, Lease
from .mirror import Mirror, place_for
from .stored import STATE, bring_shown

__all__ = ["CHECKPOINTS", "Promotions"]

CHECKPOINTS = ".ray"  # folder of those of workers on a cluster
PROMOTED, FACTS = "promoted/", "promoted.json"
OTHERS = (LEASES, f"{CHECKPOINTS}/")  # objects that have their own way
OWN = frozenset({"ray", "made", "teacher_logits"})  # folders of a training that another machine begins without


class Promotions:
    """A run whose models are promoted: a folder, or what an object store has of one.

    Args:
        place: the run's folder, or its URL.

    Attributes:
        path: the folder that work is done in.

    Raises:
        UserError: the store cannot be used, or has nothing there.
    """

    def __init__(self, place: str | Path) -> None:
        self.url = url_of(place) if is_url(place) else None
        self.path = local_path(place)
        if self.url is not None:
            objects = Objects(self.url)
            objects.check()
            self.path = place_for(self.url, "promotions")
            self.path.mkdir(parents=True, exist_ok=True)
            mirror = Mirror(self.path, objects)
            bring_shown(mirror, lambda name: not name.startswith(PROMOTED))
            mirror.pull(keep_news=True, wanted=lambda name: name.endswith(f"/{FACTS}"), below=PROMOTED)
            mirror.save()
            if not mirror.index:
                raise UserError(f"{self.url}: nothing is there")

    @contextlib.contextmanager
    def making(self, unit: str) -> Iterator[None]:
        """Hold a place for a model in an object store, and publish what is made for it, for a ``with`` block.

        Args:
            unit: the task that is promoted.

        Raises:
            UserError: another process is promoting it, or the store fails.
        """
        if self.url is None:
            yield
            return
        url = joined(self.url, f"{PROMOTED}{unit}")
        lease = Lease(url, _say, lambda lost: _say(str(lost)), stopped_by="Ctrl-C there")
        mirror = Mirror(self.path / PROMOTED / unit, Objects(url))
        mirror.objects.guard = lease.check
        with lease:
            mirror.path.parent.mkdir(parents=True, exist_ok=True)
            if mirror.token != str(lease.before):  # another machine has worked on it since
                shutil.rmtree(mirror.path, ignore_errors=True)
                mirror.bring(name for name in mirror.objects.list() if not name.startswith(OTHERS))
            mirror.token = str(lease.number)
            mirror.save()

            def carry(over: threading.Event) -> None:
                while not over.wait(STATE):
                    with contextlib.suppress(UserError, OSError):
                        mirror.push(_files(mirror.path))

            try:
                with beside(carry):
                    yield
            finally:
                mirror.push(_files(mirror.path))
                mirror.drop("")
                mirror.settle()
                mirror.save()

    def publish_report(self) -> None:
        """Publish the report, where the run is on an object store."""
        if self.url is not None:
            Objects(self.url).put("report.html", self.path / "report.html")


def _files(folder: Path) -> list[str]:
    """Names of a promotion's files, its unfinished work among them."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [name.as_posix() for name in found if OWN.isdisjoint(name.parts) and not name.parts[0].endswith(".lock")]


def _say(text: str) -> None:
    print(text, flush=True)
