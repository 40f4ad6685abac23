"""Published compressed transformers: their records, the figures that their papers print, and both side by side.

    from prunesweep.models.published import PUBLISHED, compare
    compare(PUBLISHED["spvit_deit_small"])

timm knows every row that has a record (``models.entry_points``): ``timm.create_model("spvit_deit_small")``, with random
weights. Trained ones are the authors' to give; ``prunesweep import`` reads their files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from prunesweep.models.arch import Arch
from prunesweep.models.errors import UserError, nearest

from .archs import revit
from .counts import exact_macs, exact_params
from .rows import PUBLISHED, Published, Speed

__all__ = ["PUBLISHED", "Comparison", "Published", "Speed", "compare", "published_arch", "revit"]

UNITS = {"params_m": 1e6, "macs_g": 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A printed figure, the exact one and the one by the paper's own formula, all in the printed unit."""

    what: str  # a key of Published.printed
    printed: str
    exact: float | None  # None without a record
    by_paper: float | None  # None without a record, or where the paper gives no formula of its own

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit."""
        return float(Decimal(1).scaleb(int(Decimal(self.printed).as_tuple().exponent)) / 2)

    def difference(self, value: float | None) -> float | None:
        """(value - printed) / printed."""
        return None if value is None else value / float(self.printed) - 1

    def agrees(self, value: float | None) -> bool:
        """Whether ``value`` is within the rounding of the printed figure."""
        return value is not None and abs(value - float(self.printed)) <= self.rounding


def compare(row: Published) -> list[Comparison]:
    """Compare every printed figure of ``row`` with the exact one and the one by the paper's formula."""
    found = []
    for what, printed in row.printed.items():
        exact = by_paper = None
        of_params = what.startswith("params")
        if row.make is not None:
            exact = _figure(row, what, exact_params if of_params else exact_macs)
            if row.counting is not None:
                by_paper = _figure(row, what, row.counting.params if of_params else row.counting.macs)
        found.append(Comparison(what=what, printed=printed, exact=exact, by_paper=by_paper))
    return found


def _figure(row: Published, what: str, count: Callable[[Arch], int]) -> float:
    own = count(published_arch(row.name))
    if what in UNITS:
        return own / UNITS[what]
    dense = count(published_arch(row.dense))
    return 100 * own / dense if what == "macs_share" else dense / own


def published_arch(name: str) -> Arch:
    """Return the record of a row. Raises UserError where the row does not exist, or its widths are not published."""
    row = PUBLISHED.get(name)
    if row is None:
        hint = nearest(name, PUBLISHED)
        raise UserError(f"no published architecture {name!r}; `prunesweep published` lists them. {hint}".strip())
    if row.make is None:
        raise UserError(f"{row.title} ({row.paper}) cannot be built: its widths are not published, only its figures")
    return row.make()
