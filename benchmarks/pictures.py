"""Pictures of docs/subspaces.md, from what ``benchmarks.subspaces`` found: ``python -m benchmarks.pictures``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.subspaces import RESULT, medians
from prunesweep.models.io.files import write_text

__all__ = ["pictures", "plot"]

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ("#d6453d", "#2f81c7", "#2a9d63", "#9a6bd0", "#c98a1b")  # readable on white and on black
HOW = {
    "allocated": "instant",
    "uniform, refitted": "equal shares",
    "uniform, writers": "equal shares, writers only",
    "CORP": "CORP: MLP and q/k chosen",
    "taylor, as cut": "Taylor, as cut",
}
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 780, 400, 68, 200, 44, 48  # of a picture and its margins
STYLE = (
    "<style>text{fill:#333}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}</style>"
)
Series = Mapping[str, Sequence[tuple[float, float]]]


def plot(title: str, across: str, series: Series, ticks: Sequence[float]) -> str:
    """Draw KL over something, both on logarithmic scales, as SVG that can be read on white and on black.

    Args:
        title: above the picture.
        across: what the horizontal axis counts.
        series: by label, points of x and KL, in nats.
        ticks: of the horizontal axis.
    """
    points = [point for own in series.values() for point in own]
    x_low, x_high = (f([*ticks, *(x for x, _ in points)]) for f in (min, max))
    low, high = (math.floor(math.log10(min(y for _, y in points))), math.ceil(math.log10(max(y for _, y in points))))

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / x_low) / math.log(x_high / x_low)
        up = (math.log10(y) - low) / (high - low)
        return LEFT + (WIDE - LEFT - RIGHT) * right, HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="13">',
        STYLE,
        f'<text x="{LEFT}" y="22" font-size="15">{title}</text>',
    ]
    for tick in ticks:
        x, y = place(tick, 10**low)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for power in range(low, high + 1):
        x, y = place(x_low, 10**power)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:.{max(0, -power)}f}</text>')
    middle = (LEFT + WIDE - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HIGH - 10}" text-anchor="middle">{across}</text>')
    labels = _spread({label: place(*max(own))[1] for label, own in series.items()})
    for (label, own), colour in zip(series.items(), COLOURS, strict=False):
        line = "M" + "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in sorted(own))
        parts.append(f'<path d="{line}" stroke="{colour}" fill="none" stroke-width="2"/>')
        for point in own:
            x, y = place(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        right, at = place(*max(own))
        edge, beside = WIDE - RIGHT + 12, labels[label]
        parts.append(f'<path d="M{right + 5:.1f} {at:.1f}L{edge - 3} {beside:.1f}" stroke="{colour}" opacity="0.5"/>')
        parts.append(f'<text x="{edge}" y="{beside + 4:.1f}" style="fill:{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _spread(wanted: Mapping[str, float], apart: float = 17) -> dict[str, float]:
    """Move heights of labels apart, those at the bottom of the picture upwards."""
    found, last = dict[str, float](), float(HIGH - BOTTOM + apart)
    for label, y in sorted(wanted.items(), key=lambda own: -own[1]):
        found[label] = last = min(y, last - apart)
    return found


def pictures(seeds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draw all pictures, by the name of their file.

    Args:
        seeds: what ``benchmarks.subspaces`` wrote for every source.
    """
    rows, spaces = medians(seeds, "rows", "how", "budget"), medians(seeds, "spaces", "space", "kept")
    images = medians(seeds, "images", "images", "budget")
    ways = {
        label: [(row["share"], row["kl"]) for key, row in rows.items() if key[0] == how] for how, label in HOW.items()
    }
    narrow = dict[str, list[tuple[float, float]]]()
    for (space, _), row in spaces.items():
        narrow.setdefault(space, []).append((row["share"], row["kl"]))
    counts = dict[str, list[tuple[float, float]]]()
    for (count, budget), row in images.items():
        counts.setdefault(f"{budget:g} of the MACs", []).append((count, row["kl"]))
    shares = (0.03, 0.05, 0.1, 0.2, 0.5, 1)
    macs, of = "MACs / source", "KL to the source of the digits' ViT, untrained"
    return {
        "subspaces.svg": plot(f"{of}", macs, ways, shares),
        "subspaces_spaces.svg": plot(f"{of}: one space narrowed", macs, narrow, shares),
        "subspaces_images.svg": plot(f"{of}: calibration images", "images", counts, sorted({n for n, _ in images})),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, picture in pictures(json.loads(RESULT.read_text())["seeds"]).items():
        write_text(DOCS / name, picture)


if __name__ == "__main__":
    main()
