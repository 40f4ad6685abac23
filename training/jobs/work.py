"""Folders of unfinished work: found by a digest of all that the work depends on, and by nothing less."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunesweep.models import arch_of, preprocessing_of, weights_digest
from prunesweep.models.errors import Interrupted
from prunesweep.models.io.files import make_folder, write_text
from prunesweep.models.io.provenance import digest

__all__ = ["FACTS", "FORMAT", "Work", "model_facts"]

FORMAT = "prunesweep/work/1"  # to be counted up when unfinished work of older versions must not go on
FACTS = "job.json"  # of a folder: what the work in it depends on
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
LOGS = frozenset({"metrics.jsonl", "tb"})  # go into the result when the work is done
LOGS_FOLDER = "logs"  # of a result, with the logs of its training
BARE = frozenset({FACTS, ".validate_storage_marker"})  # nothing goes on from these; the second one is Ray Train's


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Digests of a model's weights and of its record, and its preprocessing, JSON-ready.

    Equal weights do not tell the number of heads; and teacher and student may want images normalised unlike.
    """
    known = preprocessing_of(model)
    wanted = {key: known[key] for key in PREPROCESSING if known.get(key) is not None}
    return {"weights": weights_digest(model), "arch": arch_of(model).hash, "preprocessing": wanted}


@dataclass(frozen=True)
class Work:
    """A folder of unfinished work, and all that the work depends on.

    Args:
        folder: where the work lies.
        facts: JSON-ready; written into the folder and compared before anything in it is used.
        out: folder of the result, which gets the logs when the work is done; None where the work is a part of other
            work, which then has them.
    """

    folder: Path
    facts: Mapping[str, Any]
    out: Path | None = None

    @classmethod
    def beside(cls, out: Path, facts: Mapping[str, Any]) -> Work:
        """Return the hidden folder beside a result ``out`` that is named by the digest of ``facts``."""
        return cls(out.parent / f".{out.name}-{digest({'format': FORMAT, **facts})}", facts, out)

    def claim(self) -> None:
        """Keep what a stopped run of the very same work left in the folder; otherwise make the folder anew."""
        if not _first():
            return
        text = json.dumps({"format": FORMAT, **self.facts}, sort_keys=True, indent=1)
        file = self.folder / FACTS
        if file.is_file() and file.read_bytes() == text.encode():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        make_folder(self.folder)
        write_text(file, text)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Claim the folder for a ``with`` block that does the work, and release it once that is done.

        Where Ctrl-C or an error comes before anything was saved, nothing stays; what stays after an error, it says in
        a note.

        Raises:
            Interrupted: Ctrl-C; the message says how to go on.
        """
        self.claim()
        try:
            yield
        except KeyboardInterrupt as error:
            if not _first():
                raise
            if self.begun:
                raise Interrupted(f"the same command goes on from what is saved in {self.folder}") from error
            shutil.rmtree(self.folder, ignore_errors=True)
            raise Interrupted("nothing was saved yet; the same command begins anew") from error
        except Exception as error:
            if _first() and not self.begun:
                shutil.rmtree(self.folder, ignore_errors=True)
            elif _first() and self.out is not None:
                error.add_note(f"logs and unfinished work are in {self.folder}")
            raise
        self.release()

    @property
    def begun(self) -> bool:
        """Whether the folder has something that the work can go on from."""
        return any(path.is_file() and path.name not in BARE for path in self.folder.rglob("*"))

    def release(self) -> None:
        """Remove the folder, for the work is done: its logs go into the result, or stay where other work has them."""
        if not _first():
            return
        if self.out is None or not self.out.is_dir():
            _strip(self.folder)
            return
        for log in list(_logs(self.folder)):
            kept = self.out / LOGS_FOLDER / log.relative_to(self.folder)
            with contextlib.suppress(OSError):  # the result is whole without them
                make_folder(kept.parent)
                shutil.move(log, kept)
        shutil.rmtree(self.folder, ignore_errors=True)


def _first() -> bool:
    """Whether this process is the only one of its job, or the first of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def _logs(folder: Path) -> Iterator[Path]:
    """Give the files of logs below ``folder``, at any depth."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not LOGS.isdisjoint(path.relative_to(folder).parts):
            yield path


def _strip(folder: Path) -> None:
    """Remove the files below ``folder`` that are no logs, and the folders that are empty then."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name in LOGS:
            continue
        if path.is_dir() and not path.is_symlink():
            _strip(path)
        else:
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
