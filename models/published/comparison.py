"""Published compressed transformers: their records, the figures that their papers print, and both side by side.

    from prunesweep.models.published import PUBLISHED, compare
    compare(PUBLISHED["spvit_deit_small"])

Importing this module gives timm every row that has a record: ``timm.create_model("spvit_deit_small")``, with random
weights. Trained ones are the authors' to give; ``prunesweep import`` reads their files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import timm.models
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import create
from prunesweep.models.errors import UserError, nearest

from .archs import revit
from .counts import exact_macs, exact_params
from .rows import PUBLISHED, Published, Speed

__all__ = ["PUBLISHED", "Comparison", "Published", "Speed", "compare", "published_arch", "revit"]

UNITS = {"params_m": 1e6, "macs_g": 1e9}
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


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


def _register(row: Published) -> None:
    """Give timm an entry point of the row's name."""

    def entry_point(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise UserError(
                f"no weights of {row.name!r} are published here: get the authors' file ({row.title}, {row.paper}) "
                f"and read it with `prunesweep import FILE --as {row.method}`; or pass pretrained=False"
            )
        arch = published_arch(row.name)
        cfg = options.pop("pretrained_cfg", None) or _preprocessing(arch.source) or _preprocessing(row.dense)
        drop_path = options.pop("drop_path_rate", 0.0)
        return create(arch, pretrained=False, pretrained_cfg=cfg, drop_path=drop_path, **options)

    entry_point.__name__ = entry_point.__qualname__ = row.name
    entry_point.__doc__ = f"{row.title}, {row.paper}."
    globals()[row.name] = timm.models.register_model(entry_point)  # timm also appends the name to __all__


def _preprocessing(source: str) -> dict[str, Any]:
    """Return how a timm model's images are prepared; empty where timm does not know the model."""
    cfg = timm.models.get_pretrained_cfg(source)
    return {} if cfg is None else {name: getattr(cfg, name) for name in PREPROCESSING}


for _row in PUBLISHED.values():
    if _row.make is not None and _row.method != "dense":
        _register(_row)
