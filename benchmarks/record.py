"""What benchmarks of models have in common: their options, one thread, and what is written beside the figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.upvit_exact import processor
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions

__all__ = ["begun", "by_seed", "write_result"]


def begun(doc: str | None, **options: Any) -> argparse.Namespace:
    """Read a script's options, and use one thread from now on.

    Args:
        doc: what the script does, for its help.
        options: defaults by the names of the options.
    """
    parser = argparse.ArgumentParser(description=doc)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    return given


def write_result(path: Path, **found: Any) -> None:
    """Write what was found, with the device and the versions; ``threads`` is 1 as after ``begun``."""
    facts = {"device": processor(), "threads": 1, "dtype": "float32", "versions": versions()}
    write_text(path, json.dumps({**facts, **found}, indent=1))


def by_seed(
    doc: str | None, one_seed: Callable[[int, Path], dict[str, Any]], path: Path, **facts: Any
) -> list[dict[str, Any]]:
    """Run a benchmark on the sources of several seeds, and write the result.

    Args:
        doc: as for ``begun``.
        one_seed: returns the figures of the source of a seed; gets the seed and the folder of sources.
        path: file of the result.
        facts: written beside the figures.

    Returns:
        The figures of all seeds.
    """
    given = begun(doc, seeds=3, cache=Path("runs/cache"))
    found = [one_seed(seed, given.cache) for seed in range(given.seeds)]
    write_result(path, **facts, seeds=found)
    return found
