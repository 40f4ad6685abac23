"""``-m prunesweep.launch.cluster.entrypoint CONFIG RUN``: resume a run where it exists, start it where not.

Manifests and later attempts start a search by this module, because they cannot know how far earlier attempts came.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["command"]

WOULD_COME_AGAIN = (1, 2)  # a search that failed, and one that was given something wrong


def command(
    config: str, run: str, address: str, trials: int | None, overrides: list[str], *, retry_failed: bool = False
) -> list[str]:
    """Return the arguments of ``prunesweep``: ``resume`` if the run exists, otherwise ``search``.

    Args:
        config: file of the configuration.
        run: folder of the run.
        address: address of the Ray cluster.
        trials: new number of trials, if it changes.
        overrides: settings to change, ``NAME=VALUE``.
        retry_failed: do candidates that failed again.
    """
    settings = [part for text in overrides for part in ("--set", text)]
    if _is_there(run):
        more = [] if trials is None else ["--trials", str(trials)]
        more += ["--retry-failed"] if retry_failed else []
        return ["resume", run, "--address", address, *more, *settings]
    more = [] if trials is None else ["--set", f"search.trials={trials}"]
    return ["search", config, "--out", run, "--address", address, *settings, *more]


def _is_there(run: str) -> bool:
    """Whether there is a run in a folder, or at a URL."""
    from prunesweep.models.io.objects import Objects, is_url

    return Objects(run).stamp("run.json") is not None if is_url(run) else Path(run, "run.json").is_file()


def main() -> None:
    """Run the command that the command line's configuration and run need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("run")
    parser.add_argument("--address", default="auto")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--once", action="store_true", help="exit with 0 where a failure would come again: codes 1, 2")
    given = parser.parse_args()
    from prunesweep.launch.cli import main as prunesweep

    settings = {"trials": given.trials, "overrides": given.overrides, "retry_failed": given.retry_failed}
    try:
        prunesweep(command(given.config, given.run, given.address, **settings))
    except SystemExit as end:
        if not (given.once and end.code in WOULD_COME_AGAIN):
            raise
        print(
            f"the search has FAILED, exit code {end.code}. That would happen again, so this job ends as succeeded, and "
            "no other cluster is built for it",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
