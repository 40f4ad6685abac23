"""``-m prunesweep.launch.cluster.pack RUN``: print a run as text for ``prunesweep fetch``; needs Python only.

First a line ``prunesweep-archive BYTES SHA256``, then base64 lines of a gzipped tar, then ``prunesweep-end``. What is
in it is a run that ``status``, ``front``, ``report`` and ``eval`` read, with the chosen models only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = ["BEGIN", "END", "chosen", "print_bytes"]

BEGIN, END = "prunesweep-archive", "prunesweep-end"
ALWAYS = (
    "search.toml",
    "run.json",
    "front.json",
    "report.html",
    "study.journal",
    "study.json",
    "latency_table.json",
    "advice.json",
    "speed.json",
)
OF_TRIALS = ("spec.json", "arch.json", "result.json", "validation.json", "test.json", "metrics.jsonl")
LINE = 49_152  # bytes of a line; a multiple of 3


def chosen(run: Path, top: int | None) -> Iterator[Path]:
    """Yield the files to send: results, and models of the front.

    Args:
        run: folder of the run.
        top: number of models, the best ones by what the search ranks by; None sends all.
    """
    yield from (run / name for name in ALWAYS)
    for name in OF_TRIALS:
        yield from sorted(run.glob(f"trials/*/{name}"))
    front = json.loads((run / "front.json").read_text()) if (run / "front.json").exists() else []
    for point in sorted(front, key=_badness)[:top]:
        yield from sorted((run / point["model"]).glob("*"))
    if top != 0:
        yield from sorted(run.glob("promoted/*/promoted.json"))
        yield from sorted(run.glob("promoted/*/model/*"))


def _badness(point: Mapping[str, Any]) -> float:
    """What a member of the front was chosen by, negated where more is better."""
    measure = point.get("ranked_by", "agreement" if "agreement" in point else "top1")  # earlier versions do not say
    value = float(point.get(f"searched_{measure}", point[measure]))
    return value if measure in ("loss", "kl", "ppl", "error") else -value


def write_archive(run: Path, top: int | None, file: IO[bytes], limit: int) -> None:
    """Write the archive to a file.

    Args:
        run: folder of the run.
        top: as for ``chosen``.
        file: the file.
        limit: bytes that the archive may have.

    Raises:
        OverflowError: the archive exceeds ``limit``.
    """
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for path in chosen(run, top):
            with contextlib.suppress(FileNotFoundError):  # a running search drops models that leave the front
                archive.add(path, str(path.relative_to(run)), recursive=False)
            if file.tell() > limit:
                raise OverflowError
    if file.tell() > limit:
        raise OverflowError


def _folder(run: str) -> Path:
    """A run's folder, or that to which what a URL has is brought."""
    if "://" not in run:
        return Path(run)
    from prunesweep.search.store.stored import view

    return view(run)


def main() -> int:
    """Print the run that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--top", type=int, default=None)
    parser.add_argument("--limit", type=int, required=True)
    arguments = parser.parse_args()
    run = _folder(arguments.run)
    if not (run / "run.json").is_file():
        print(json.dumps({"error": f"{run} is not a run on the cluster yet: run.json is missing"}))
        return 2
    with tempfile.TemporaryFile() as file:
        try:
            write_archive(run, arguments.top, file, arguments.limit)
        except OverflowError:
            print(json.dumps({"error": f"{run}: the archive exceeds the limit of {arguments.limit / 2**20:g} MiB"}))
            return 2
        print_bytes(file)
    return 0


def print_bytes(file: IO[bytes]) -> None:
    """Print the content of a file as lines that survive a job's log, with its length and checksum.

    Args:
        file: written to its end.
    """
    size, digest = file.tell(), hashlib.sha256()
    file.seek(0)
    while block := file.read(LINE):
        digest.update(block)
    print(BEGIN, size, digest.hexdigest())
    file.seek(0)
    while block := file.read(LINE):
        print(base64.b64encode(block).decode())
    print(END, flush=True)


if __name__ == "__main__":
    sys.exit(main())
