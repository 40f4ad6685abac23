"""Is searching along all axes at once worth it? The joint space against each axis alone, at equal epochs, on digits.

    python -m benchmarks.ablation [--trials 24] [--seeds 3]

Writes benchmarks/results/ablation.json and docs/ablation.svg: the share of all single-axis front members that the joint
front beats, hypervolumes, and all fronts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunesweep.models.io.provenance import versions
from prunesweep.search.config import load_config
from prunesweep.search.execution.driver import run_search
from prunesweep.search.store.front import hypervolume
from prunesweep.search.store.run import Run

RESULTS, PICTURE = Path(__file__).parent / "results" / "ablation.json", Path("docs/ablation.svg")
FIXED: dict[str, Any] = {
    "budget": [1.0, 1.0],
    "skip": [0, 0],
    "conv": [0, 0],
    "conv3": [0, 0],
    "keep_rate": [1.0, 1.0],
    "merge_start": [0, 0],
    "mlp_weight": [1.0, 1.0],
}
SPACES: dict[str, dict[str, Any]] = {
    "joint": {  # all that the others have
        "budget": [0.15, 1.0],
        "skip": [0, 5],
        "conv": [0, 6],
        "conv3": [0, 6],
        "keep_rate": [0.1, 1.0],
        "merge_start": [0, 4],
        "mlp_weight": [0.5, 2.0],
    },
    "width": {"budget": [0.15, 1.0], "mlp_weight": [0.5, 2.0]},
    "blocks": {"skip": [0, 5]},
    "convolutions": {"conv": [0, 6], "conv3": [0, 6]},
    "tokens": {"keep_rate": [0.1, 1.0], "merge_start": [0, 4]},
}
COLOURS = {"joint": "#c0392b", "width": "#2471a3", "blocks": "#7d3c98", "convolutions": "#ca8a04", "tokens": "#1e8449"}


def one_search(space: str, seed: int, trials: int, folder: Path) -> dict[str, Any]:
    """Front, hypervolume and epochs of one search."""
    config = load_config("examples/digits.toml", ["search.rungs=[1, 3]", f"search.trials={trials}", f"seed={seed}"])
    table = config.space.model_copy(update={k: tuple(v) for k, v in {**FIXED, **SPACES[space]}.items()})
    config = config.model_copy(update={"name": f"{space}-{seed}", "space": table})
    found = run_search(config, folder / config.name)
    assert found is not None
    run = Run(found.path)
    results, source = run.results(), run.metadata()["source"]
    return {
        "space": space,
        "seed": seed,
        "epochs": sum([1, 3][r.rung] for r in results),
        "hypervolume": hypervolume(results, source),
        "source": source,
        "front": [{"macs": p["macs"] / source["macs"], "top1": p["top1"]} for p in run.front()],
    }


def beaten(front: list[dict[str, float]], by: list[dict[str, float]]) -> float:
    """Share of a front's members that another front has something better than."""
    lost = [any(q["macs"] <= p["macs"] and q["top1"] >= p["top1"] and q != p for q in by) for p in front]
    return sum(lost) / len(lost)


def picture(rows: list[dict[str, Any]]) -> str:
    """All fronts as staircases: top-1 from 80 to 100 % over MACs / source; one colour per space."""
    wide, high, margin, low = 720, 420, 50, 80.0

    def place(point: dict[str, float]) -> tuple[float, float]:
        x = margin + point["macs"] * (wide - 2 * margin)
        return x, high - margin - (max(point["top1"], low) - low) / (100 - low) * (high - 2 * margin)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        x, _ = place({"macs": share, "top1": low})
        parts.append(f'<text x="{x:.0f}" y="{high - margin + 18}" text-anchor="middle">{share:g}</text>')
    for top1 in (80, 85, 90, 95, 100):
        x, y = place({"macs": 0, "top1": top1})
        parts.append(f'<path d="M{x:.0f} {y:.1f}H{wide - margin}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{top1}</text>')
    for row in rows:
        points = [place(p) for p in row["front"]]
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])
        colour, joint = COLOURS[row["space"]], row["space"] == "joint"
        line = f'stroke="{colour}" stroke-width="{2.5 if joint else 1.2}" fill="none" opacity="0.85"'
        parts.append(f'<path d="{path}H{wide - margin}" {line}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if joint else 2}" fill="{colour}"/>' for x, y in points]
    for i, (space, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{wide - 150}" y="{high - 150 + 18 * i}" fill="{colour}">{space}</text>')
    parts.append(f'<text x="{wide / 2}" y="{high - 10}" text-anchor="middle">MACs / source</text>')
    parts.append(
        f'<text x="{margin}" y="24">top-1 (%), fronts of {len(rows)} searches on digits at equal epochs</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for space in SPACES:
                rows.append(one_search(space, seed, given.trials, Path(folder)))
                print(space, seed, f"hypervolume {rows[-1]['hypervolume']:.4f}", flush=True)
            keep(rows, given.trials)  # a seed more each time


def keep(rows: list[dict[str, Any]], trials: int) -> None:
    """Print the table, write the results and draw the picture."""
    table = Table("space", "epochs", "hypervolume, by seed", "median", "beaten by joint")
    joint, summary = [row for row in rows if row["space"] == "joint"], {}
    for space in SPACES:
        own = [row for row in rows if row["space"] == space]
        volumes = [row["hypervolume"] for row in own]
        share = statistics.mean(beaten(a["front"], b["front"]) for a, b in zip(own, joint, strict=True))
        summary[space] = {"median_hypervolume": statistics.median(volumes), "beaten_by_joint": share}
        table.add_row(
            space,
            " ".join(str(row["epochs"]) for row in own),
            " ".join(f"{v:.4f}" for v in volumes),
            f"{statistics.median(volumes):.4f}",
            "" if space == "joint" else f"{share:.0%}",
        )
    Console().print(table)
    facts = {"trials": trials, "versions": versions(), "summary": summary, "searches": rows}
    RESULTS.write_text(json.dumps(facts, indent=1))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(rows))


if __name__ == "__main__":
    main()
