"""Points that a search begins with, before its sampler has learned anything.

They come from the user, from another run's front and from architectures that papers have published. After them, a joint
space is first looked at along each of its axes alone, which is what a search over that axis would have found. Where
every block is decided by itself, points come from a prior: evenly drawn mixers would make nearly every candidate
worthless.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from prunesweep.models import Arch, Block, UserError, cost
from prunesweep.search.config import SearchConfig
from prunesweep.search.store.run import Run

from .space import Space
from .variables import Params, Variable

__all__ = ["axis_points", "nearest_point", "prior_points", "published_points", "start_points"]

Values = dict[str, float | int | str]
# what leaves the source as it is
NEUTRAL = {
    "budget": 1.0,
    "skip": 0.0,
    "conv": 0.0,
    "conv3": 0.0,
    "keep_rate": 1.0,
    "merge_start": 0.0,
    "mlp_weight": 1.0,
}
LEVELS = (2, 4, 1, 3)  # quarters of an axis: its middle and its end first, as fronts are as good as their ends


def start_points(config: SearchConfig, space: Space) -> list[Params]:
    """What ``config.search`` wants to begin with. Raises UserError for a point that is not in the space."""
    search = config.search
    points: list[Params] = list(search.start)
    if search.start_from is not None:
        points += Run.existing(search.start_from).front_points()
    for i, point in enumerate(points):
        try:
            space.complete(point)
        except UserError as error:
            where = "search.start" if i < len(search.start) else f"search.start_from {search.start_from}"
            raise UserError(f"{where}: {error}") from error
    if search.start_published:
        points += published_points(space).values()
    points += axis_points(space, search.trials // 3)
    if space.table.encoding == "full":
        points += prior_points(space, min(search.trials // 2, 2 * len(space.distributions)), config.seed)
    return points


def axis_points(space: Space, count: int) -> list[Params]:
    """At most ``count`` points, each of which leaves the source as it is along all axes but one.

    Axes are the budget (width), dropped blocks, convolutions and tokens; none where fewer than two of them vary, or
    where every block is decided by itself.
    """
    known = {v.name: v for v in space.variables if not v.fixed}
    neutral = {name: _nearest(v, NEUTRAL.get(name)) for name, v in known.items()}
    axes = [name for name in ("budget", "skip", "conv", "keep_rate") if name in known]
    if len(axes) < 2 or space.table.encoding == "full":
        return []
    points: list[Params] = []
    for level in LEVELS:
        for name in axes:
            end = known[name].low if NEUTRAL[name] else known[name].high
            start = float(neutral[name])
            changed: Values = {name: _nearest(known[name], start + (end - start) * level / len(LEVELS))}
            if name == "conv" and "conv3" in known:
                changed["conv3"] = _nearest(known["conv3"], int(changed["conv"]) // 2)
            point = neutral | changed
            if point != neutral and point not in points:
                points.append(point)
    return points[:count]


def published_points(space: Space) -> dict[str, Params]:
    """By name, the nearest points to published compressed forms of models of the source's family.

    The forms of smaller and larger models count too: what carries over is which blocks changed and the share of MACs.
    """
    from prunesweep.models.published.comparison import PUBLISHED  # which also gives timm these names

    found: dict[str, Params] = {}
    for row in PUBLISHED.values():
        arch, dense = row.arch, PUBLISHED[row.dense].arch if row.dense else None
        if arch is None or dense is None or row.method == "dense" or arch.family != space.arch.family:
            continue
        point = nearest_point(space, arch, dense)
        if point not in found.values():
            found[row.name] = point
    return found


def nearest_point(space: Space, arch: Arch, dense: Arch) -> Params:
    """The point of ``space`` that does to its source what ``arch`` did to ``dense``, within the variables' ranges.

    Blocks are matched by their relative depth. Widths follow from the budget, which is the share of MACs.
    """
    kept = {block.src: block for block in arch.blocks}
    match = [i * dense.depth // space.arch.depth for i in range(space.arch.depth)]
    scale = space.arch.depth / dense.depth
    convs = [block.mixer for block in arch.blocks if block.mixer.startswith("conv")]
    patches, merging = dense.tokens - dense.prefix_tokens, [b for b in arch.blocks if b.tokens is not None]
    wanted: dict[str, float] = {
        "budget": cost(arch).macs / cost(dense).macs,
        "skip": round(scale * (dense.depth - arch.depth)),
        "conv": math.ceil(scale * len(convs)),
        "conv3": round(scale * convs.count("conv3x3")),
        "keep_rate": min(((_tokens(b) - dense.prefix_tokens) / patches for b in merging), default=1.0),
        "merge_start": round(scale * min((b.src for b in merging), default=0)),
    }
    blocks: Values = {}
    for i, src in enumerate(match):
        blocks[f"skip.{i}"] = int(src not in kept)
        blocks[f"mixer.{i}"] = kept[src].mixer if src in kept else "attn"
    return {
        v.name: blocks[v.name] if v.name in blocks else _nearest(v, wanted.get(v.name))
        for v in space.variables
        if not v.fixed
    }


def _tokens(block: Block) -> int:
    assert block.tokens is not None
    return block.tokens


def _nearest(variable: Variable, wanted: float | None) -> float | int | str:
    """The allowed value nearest to ``wanted``; without one, the middle of the range, or the first choice."""
    if variable.choices:
        return variable.first
    if wanted is None:
        low, high = variable.low, variable.high
        wanted = math.sqrt(low * high) if variable.log else (low + high) / 2
    value = min(max(wanted, variable.low), variable.high)
    return round(value) if variable.whole else value


def prior_points(space: Space, count: int, seed: int) -> list[Params]:
    """Points of encoding ``full`` whose blocks look like those that searches have found.

    SPViT's results (arXiv 2111.11802, released models): on DeiT convolutions form a prefix of at most five in twelve
    blocks, 1x1 before 3x3, and none comes after the first attention; on Swin attention is given up in the first stage
    and, now and then, late in the third. UVC's (arXiv 2203.08243): few blocks go, and late ones. All else is drawn
    evenly.
    """
    random = Random(seed)
    points: list[Params] = []
    for _ in range(count):
        blocks = dict(_blocks(space.arch, random))
        varying = [v for v in space.variables if not v.fixed]
        points.append({v.name: blocks[v.name] if v.name in blocks else v.draw(random) for v in varying})
    return points


def _blocks(arch: Arch, random: Random) -> Iterator[tuple[str, float | int | str]]:
    depth, sizes = arch.depth, [len(stage.blocks) for stage in arch.stages]
    late = range(depth - sizes[-1] - sizes[-2] // 2, depth - sizes[-1]) if len(sizes) > 1 else ()
    prefix = random.randint(0, round(5 * depth / 12))
    wide = random.randint(0, prefix)
    dropped = set(random.sample(range(depth // 2, depth - 1), random.randint(0, depth // 6)))
    for i in range(depth):
        if len(sizes) > 1:
            without = 0.75 if i < sizes[0] else 0.2 if i in late else 0.0
            given_up = random.choice(("conv1x1", "none")) if i < sizes[0] else "none"
            mixer = given_up if random.random() < without else "attn"
        else:
            mixer = "attn" if i >= prefix else "conv3x3" if i >= prefix - wide else "conv1x1"
        yield f"skip.{i}", int(i in dropped)
        yield f"mixer.{i}", mixer
