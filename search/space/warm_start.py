"""Points that a search starts from, before its sampler has learned anything.

They come from the user, from another run's front, from computed or other saved models, which are then themselves the
candidates, from methods that have decided while they trained, and from architectures that papers have published. After
them come neutral points, whose widths the scores alone decide, and points along single axes with all others neutral,
which are what a search over that axis alone would find. Where every block is decided by itself, points come from a
prior: evenly drawn mixers would make nearly every candidate worthless.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from prunesweep.models import Arch, UserError, cut_arch, load_provenance, read_arch
from prunesweep.models.io.store import CONFIG
from prunesweep.pruners import TrainedMethod, get_method
from prunesweep.search.config import BUDGETS, SearchConfig
from prunesweep.search.store.computed import ComputedFront
from prunesweep.search.store.mirror import shown_place
from prunesweep.search.store.run import Run
from prunesweep.search.store.stored import view
from prunesweep.training.jobs.proposal import Proposal, is_proposal

from .axes import AXES, active_axes
from .space import Space
from .variables import MODEL, Params

__all__ = [
    "axis_points",
    "given_points",
    "met_points",
    "nearest_point",
    "neutral_points",
    "prior_points",
    "proposed_points",
    "published_points",
    "start_points",
]

Values = dict[str, float | int | str]
LEVELS = (2, 4, 1, 3)  # quarters of an axis: its middle and its end first, as fronts are as good as their ends


def start_points(config: SearchConfig, space: Space, proposals: Sequence[Path] = ()) -> list[Params]:
    """Return the points that ``config.search`` asks to start from, its own first.

    Args:
        config: the search's configuration.
        space: of its source.
        proposals: files of the decisions of ``search.start_methods``. Those outside of the space's windows are left out
            with a warning.

    Raises:
        UserError: a point is not in the space.
    """
    search = config.search
    points = given_points(config, space)
    points += proposed_points(space, proposals)
    if search.start_published:
        points += published_points(space).values()
    neutral = neutral_points(space, min(search.start_neutral, search.trials))
    points += [*neutral, *axis_points(space, max(search.trials // 3 - len(neutral), 0))]
    if space.table.encoding == "full":
        drawn = prior_points(space, min(search.trials // 2, 2 * len(space.distributions)), config.seed)
        points += [space.placed(point) for point in drawn]
    return points


def given_points(config: SearchConfig, space: Space) -> list[Params]:
    """Return the points of ``search.start`` and ``search.start_from``.

    Args:
        config: the search's configuration.
        space: of its source.

    Raises:
        UserError: a point is not in the space, or a run or a model is not there.
    """
    points = [_checked("search.start", space, point) for point in config.search.start]
    for name in dict.fromkeys(config.search.start_from):
        points += _points_of(name, space)
    return points


def met_points(space: Space, points: Sequence[Params]) -> list[Params]:
    """Return points with the budgets that their candidates have; saved models and decisions stay what they are.

    Args:
        space: of a source.
        points: to start from. Where what a candidate costs is outside the window, its axes give back.
    """
    return [point if MODEL in point else _met(space, point) for point in points]


def _met(space: Space, point: Params) -> Params:
    try:
        return space.priced(point)
    except UserError:
        return space.placed(point)


def _points_of(name: str, space: Space) -> list[Params]:
    """Return the points of a run's front, or saved models with the points nearest to them.

    Computed models outside of the space's windows are left out with a warning, unless none is left.
    """
    try:
        path = view(name, whole=False).expanduser().absolute()
    except UserError as error:
        raise UserError(f"search.start_from {name}: {error}") from error
    if ComputedFront.is_one(path):
        folders = ComputedFront(path).folders
    elif (path / CONFIG).is_file():
        folders = [path]
    else:
        run = Run.existing(name if path == Path(name).expanduser().absolute() else path)
        return [_checked(f"search.start_from {name}", space, point) for point in run.front_points()]
    points, reasons = _inside("search.start_from", space, folders)
    if not points:
        raise UserError("\n".join(reasons) or f"search.start_from {name}: has no models")
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=3)
    return points


def _inside(key: str, space: Space, given: Iterable[Path]) -> tuple[list[Params], list[str]]:
    """Return the points of saved models or decisions that can be candidates, and why others cannot."""
    points, reasons = list[Params](), list[str]()
    for path in given:
        try:
            points.append(_checked(f"{key} {shown_place(path)}", space, {MODEL: str(path)}))
        except UserError as error:
            reasons.append(str(error))
    return points, reasons


def proposed_points(space: Space, proposals: Sequence[Path]) -> list[Params]:
    """Return the points of decisions, which are themselves the candidates.

    A method that serves one budget in a run has chosen blocks and mixers for one; after its decision come points that
    give these the other budgets of ``BUDGETS``, with widths that the space decides.

    Args:
        space: of the source that the decisions are about.
        proposals: their files. Those outside of the space's windows are left out with a warning.
    """
    points, reasons = _inside("search.start_methods", space, proposals)
    for reason in reasons:
        warnings.warn(f"left out: {reason}", stacklevel=3)
    for point in list(points):
        found, arch = Proposal.load(Path(str(point[MODEL]))), space.arch
        if get_method(found.method, TrainedMethod).several or "budget" not in point:
            continue
        near = nearest_point(space, cut_arch(arch, found.cut), arch)
        low, high = space.table.budget
        points += [{**near, "budget": share} for share in BUDGETS if low <= share <= high and share != found.budget]
    return points


def _checked(where: str, space: Space, point: Params) -> Params:
    """Return a point that is in the space.

    Of a saved model or a decision, it has the variables nearest to it that it does not name.
    """
    try:
        if MODEL not in point:
            space.complete(point)
            return point
        given = Path(str(point[MODEL])).expanduser().absolute()
        if is_proposal(given):
            near = nearest_point(space, cut_arch(space.arch, space.proposed(given)), space.arch)
        else:
            near = nearest_point(space, read_arch(given), space.arch)
            made_by = str(load_provenance(given).get("method"))
            if any(variable.name == "method" and made_by in variable.choices for variable in space.variables):
                near["method"] = made_by
        point = {**near, **point, MODEL: str(given)}
        space.decode(point)
        return point
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def neutral_points(space: Space, count: int) -> list[Params]:
    """Return points that leave all but the budget as it is, evenly over its range, the coarsest steps first.

    Args:
        space: of a source. Where its budget is fixed there are no points.
        count: number of points.
    """
    budget = next((v for v in space.variables if v.name == "budget" and not v.fixed), None)
    if budget is None:
        return []
    order = sorted(range(count), key=lambda i: (-(i & -i or count), i))
    return [{**space.neutral, budget.name: budget.at(i / max(count - 1, 1))} for i in order]


def axis_points(space: Space, count: int) -> list[Params]:
    """Return points that leave the source as it is along all axes but one.

    These are the axes that are marked ``alone``. There are no points if fewer than two of them vary, or if every block
    is decided by itself.

    Args:
        space: of a source.
        count: the largest number of points.
    """
    known = {v.name: v for v in space.variables if not v.fixed}
    neutral = space.neutral
    axes = [axis for axis in AXES.values() if axis.alone and axis.name in known]
    if len(axes) < 2 or space.table.encoding == "full":
        return []
    points: list[Params] = []
    for level in LEVELS:
        for axis in axes:
            variable, start = known[axis.name], float(neutral[axis.name])
            end = max((variable.low, variable.high), key=lambda value: abs(value - start))
            value = variable.nearest(start + (end - start) * level / len(LEVELS))
            others = {name: known[name].nearest(v) for name, v in axis.beside(float(value)).items() if name in known}
            point = {**neutral, axis.name: value, **others}
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


def nearest_point(space: Space, arch: Arch, dense: Arch) -> Values:
    """Return the point of a space that does to its source what one record did to another.

    Blocks are matched by their relative depth. Widths follow from the budget, which is the share of MACs.

    Args:
        space: of a source; the point lies within its variables' ranges.
        arch: the compressed record.
        dense: the record that ``arch`` was made from.
    """
    wanted: dict[str, float | str] = {}
    for axis in active_axes(space.table):
        wanted |= axis.published(arch, dense, space.arch)
    varying = (v for v in space.variables if not v.fixed)
    return {v.name: v.nearest(wanted[v.name]) if v.name in wanted else space.neutral[v.name] for v in varying}


def prior_points(space: Space, count: int, seed: int) -> list[Params]:
    """Draw points from what searches have found (``Axis.prior``); variables without a prior are drawn evenly.

    Args:
        space: of a source.
        count: number of points.
        seed: of the draws.
    """
    random, varying = Random(seed), [v for v in space.variables if not v.fixed]
    points: list[Params] = []
    for _ in range(count):
        drawn: Values = {}
        for axis in active_axes(space.table):
            drawn |= axis.prior(space.arch, random)
        points.append({v.name: drawn[v.name] if v.name in drawn else v.draw(random) for v in varying})
    return points
