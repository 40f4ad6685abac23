"""``-m prunesweep.launch.cluster.page RUN``: print what the page of a run shows, for ``prunesweep watch --address``."""

from __future__ import annotations

import gzip
import io
import json
import sys

from prunesweep.models import UserError
from prunesweep.search.report.page import as_script
from prunesweep.search.report.page_data import page_data
from prunesweep.search.store.run import Run

from ..place import brought, place
from .pack import print_bytes

__all__ = ["main"]


def main(run: str) -> int:
    """Print the gzipped JSON of a run's page in the lines of ``pack``; return the exit code.

    Args:
        run: its folder.
    """
    try:
        data = page_data(Run.existing(brought(place(run), whole=False)))
    except (UserError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print_bytes(_written(gzip.compress(as_script(data).encode(), 6)))
    return 0


def _written(content: bytes) -> io.BytesIO:
    file = io.BytesIO()
    file.write(content)
    return file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
