"""The rows of ``models.published``: figures that five papers print about their models, and about the dense ones.

Widths that no source gives are not made up: such a row has figures and no record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from prunesweep.models.arch import Arch

from .archs import deit, mae, prune_and_merge, pvt_v2, revit, searched, skip_blocks, swin
from .counts import NVIT, PMVIT, SPVIT, UVC, Counting

__all__ = ["PUBLISHED", "Published", "Speed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """``value`` in images/s or, with unit ``x``, as a multiple of the dense model's speed."""

    value: float
    unit: str  # images/s | x
    device: str
    batch: int | None = None  # images; None where it is not said


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One row of a paper's table.

    ``printed`` maps ``params_m`` (millions), ``macs_g`` (10^9 per image, "FLOPs" in the papers), ``params_ratio`` and
    ``macs_ratio`` (dense over this model) and ``macs_share`` (this model in % of dense) to the digits as printed.
    """

    name: str  # timm's name, where ``make`` is given
    title: str  # the paper's name
    method: str  # dense, or the layout that ``prunesweep import`` reads the authors' weights in
    paper: str
    where: str  # table, or part of the authors' repository
    make: Callable[[], Arch] | None = None  # None: the widths are not published
    dense: str = ""  # row that ratios, shares and speeds in x refer to
    printed: Mapping[str, str] = field(default_factory=dict)
    counting: Counting | None = None  # the paper's own formulas, where they are not the exact ones
    top1: float | None = None  # %, ImageNet-1K at 224
    top1_distilled: float | None = None  # %, with a convolutional network as teacher
    speeds: tuple[Speed, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def arch(self) -> Arch | None:
        """The record; None where the widths are not published."""
        return None if self.make is None else self.make()


def _figures(params: str = "", macs: str = "", **more: str) -> dict[str, str]:
    return {what: digits for what, digits in {"params_m": params, "macs_g": macs, **more}.items() if digits}


def _ratios(params: str, params_ratio: str, macs: str, macs_ratio: str) -> dict[str, str]:
    return _figures(params, macs, params_ratio=params_ratio, macs_ratio=macs_ratio)


def _images(value: float, device: str = "not said", batch: int | None = None) -> tuple[Speed, ...]:
    return (Speed(value=value, unit="images/s", device=device, batch=batch),)


def _faster(v100: float, rtx3080: float | None = None) -> tuple[Speed, ...]:
    found = {"V100": v100, "RTX 3080": rtx3080}
    return tuple(Speed(value=x, unit="x", device=device, batch=256) for device, x in found.items() if x is not None)


CUT_OFF = "The last printed digit is cut off, not rounded."

_DEIT = {size: f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
_SWIN = {size: f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")}
_DISTILLED_BASE = "deit_base_distilled_patch16_224"

_in_nvit = partial(Published, paper="arXiv 2110.04869", where="ImageNet-1K results", dense=_DISTILLED_BASE)
_in_pmvit = partial(Published, paper="arXiv 2503.23455", where="README, results", counting=PMVIT)


def _deit(size: str, title: str, macs: str, top1: float, speed: float) -> Published:
    return _in_pmvit(
        name=_DEIT[size],
        title=title,
        method="dense",
        make=partial(deit, size),
        printed=_figures(macs=macs),
        top1=top1,
        speeds=_images(speed),
    )


def _distilled(size: str, title: str, printed: Mapping[str, str], top1: float, *speeds: float) -> Published:
    return _in_nvit(
        name=f"deit_{size}_distilled_patch16_224",
        title=title,
        method="dense",
        make=partial(deit, size, distilled=True),
        printed=printed,
        counting=NVIT,
        top1_distilled=top1,
        speeds=_faster(*speeds),
        notes=(CUT_OFF,) if size == "tiny" else (),
    )


def _swin(size: str, title: str, printed: Mapping[str, str], top1: float, speed: float, *notes: str) -> Published:
    return _in_nvit(
        name=_SWIN[size],
        title=title,
        method="dense",
        make=partial(swin, size),
        printed=printed,
        top1=top1,
        speeds=_faster(speed),
        notes=notes,
    )


def _pvt(size: str, title: str, params: str, top1: float, *notes: str) -> Published:
    return Published(
        name=f"pvt_v2_{size}",
        title=title,
        method="dense",
        paper="arXiv 2106.13797",
        where="README, model zoo",
        make=partial(pvt_v2, size),
        printed=_figures(params),
        top1=top1,
        notes=notes,
    )


DENSE = (
    _deit("tiny", "DeiT-Ti", "1.3", 72.2, 2234),
    _deit("small", "DeiT-S", "4.6", 79.8, 1153),
    _deit("base", "DeiT-B", "17.6", 81.8, 303),
    _distilled("tiny", "DeiT-T, distilled", _figures("5.6", "1.2"), 74.50, 5.18, 4.66),
    _distilled("small", "DeiT-S, distilled", _figures("22", "4.6"), 81.20, 2.44, 2.27),
    _distilled("base", "DeiT-B, distilled", _figures("86", "17.6"), 83.36, 1.00, 1.00),
    _swin("tiny", "Swin-T", _figures("29", "4.5"), 81.30, 2.58, "Swin-T has 28.29 M; the Swin paper prints 29 M too."),
    _swin("small", "Swin-S", _figures("50", "8.7"), 83.00, 1.49),
    _swin("base", "Swin-B", _figures("88", "15.4"), 83.30, 0.95),
    _pvt("b0", "PVTv2-B0", "3.4", 70.5, "3.4 M is PVTv2-B0 without its classifier."),
    _pvt("b1", "PVTv2-B1", "13.1", 78.7, "13.1 M is PVTv2-B1 neither with (14.01 M) nor without (13.50 M) classifier."),
    _pvt("b2", "PVTv2-B2", "25.4", 82.0),
    _pvt("b3", "PVTv2-B3", "45.2", 83.1),
)

NO_WIDTHS = "The widths of the blocks are not published; the authors' checkpoint holds them."
NO_TOKEN = "The record has no distillation token, as the costs are printed; the accuracy was reached with it."
OF_192 = "The costs printed for ReViT-T are those of residual width 192; the README and table 7 say 176."


def _nvit(
    size: str, printed: Mapping[str, str], top1: float | None, top1_distilled: float, *speeds: float
) -> Published:
    return _in_nvit(
        name=f"nvit_{size}",
        title=f"NViT-{size[0].upper()}",
        method="nvit",
        printed=printed,
        counting=NVIT,
        top1=top1,
        top1_distilled=top1_distilled,
        speeds=_faster(*speeds),
        notes=(NO_WIDTHS,),
    )


_revit = partial(
    Published, method="nvit", paper="arXiv 2110.04869", where="table 7", dense=_DEIT["base"], counting=NVIT
)

NVIT_ROWS = (
    _nvit("base", _ratios("34", "2.57", "6.8", "2.57"), 82.8, 83.29, 1.86, 1.75),
    _nvit("half", _ratios("30", "2.84", "6.2", "2.85"), None, 82.95, 2.01, 1.89),
    _nvit("small", _ratios("21", "4.18", "4.2", "4.24"), 82.0, 82.19, 2.52, 2.35),
    _nvit("tiny", _ratios("6.9", "12.47", "1.3", "13.55"), None, 76.21, 4.97, 4.55),
    _revit(
        name="revit_small",
        title="ReViT-S (384)",
        make=partial(revit, 384),
        printed=_ratios("23", "3.82", "4.7", "3.75"),
        top1_distilled=81.22,
        speeds=(Speed(value=2.31, unit="x", device="not said"),),
        notes=(NO_TOKEN,),
    ),
    _revit(
        name="revit_tiny",
        title="ReViT-T (176)",
        make=partial(revit, 176),
        printed=_ratios("5.9", "14.64", "1.3", "13.69"),
        top1_distilled=74.20,
        speeds=(Speed(value=4.75, unit="x", device="not said"),),
        notes=(NO_TOKEN, OF_192),
    ),
    _revit(
        name="revit_tiny_192",
        title="ReViT-T (192)",
        make=partial(revit, 192),
        printed=_ratios("5.9", "14.64", "1.3", "13.69"),
        notes=(NO_TOKEN, OF_192, CUT_OFF),
    ),
)

AS_DENSE = "Which PVTv2 it was cut from is not published; the record is that of the dense model of the same widths."
SWAPPED = "The throughputs printed for UP-PVTv2-B0 and -B1 contradict their costs; they are probably swapped."


def _up(
    name: str, title: str, make: Callable[[], Arch], params: str, top1: float, speed: float, *notes: str
) -> Published:
    return Published(
        name=name,
        title=title,
        method="upvit",
        paper="arXiv 2111.15127",
        where="README, results",
        make=make,
        printed=_figures(params),
        top1=top1,
        speeds=_images(speed, "TITAN Xp", 32),
        notes=notes,
    )


_cut_deit = partial(deit, source=_DEIT["base"])
UP_ROWS = (
    _up("up_deit_tiny", "UP-DeiT-T", partial(_cut_deit, "tiny"), "5.7", 75.94, 1408.5, "The paper prints 75.79 %."),
    _up("up_deit_small", "UP-DeiT-S", partial(_cut_deit, "small"), "22.1", 81.56, 603.1),
    _up("up_pvt_v2_b0", "UP-PVTv2-B0", partial(pvt_v2, "b0"), "3.67", 75.30, 139.9, AS_DENSE, SWAPPED),
    _up("up_pvt_v2_b1", "UP-PVTv2-B1", partial(pvt_v2, "b1"), "14.01", 79.48, 249.9, AS_DENSE, SWAPPED),
)

UNUSED = "16.4 M fits 16.12 M and 0.30 M for the unused query and key weights of block 0."
ABSTRACT = "8.4 G is in the paper's abstract; the README cuts off to 8.3 G."
RETIRED = "Was in the README until June 2023."


def _spvit(
    name: str, title: str, params: str, macs: str, top1: float, distilled: float | None, *notes: str
) -> Published:
    family, size = name.split("_")[:2]
    return Published(
        name=f"spvit_{name}",
        title=title,
        method="spvit",
        paper="arXiv 2111.11802",
        where="README, results",
        make=partial(searched, name),
        dense=(_DEIT if family == "deit" else _SWIN)[size],
        printed=_figures(params, macs),
        counting=SPVIT,
        top1=top1,
        top1_distilled=distilled,
        notes=notes,
    )


SPVIT_ROWS = (
    _spvit("deit_tiny", "SPViT-DeiT-Ti", "4.9", "1.0", 70.7, 73.2),
    _spvit("deit_small", "SPViT-DeiT-S", "16.4", "3.3", 78.3, 80.3, UNUSED),
    _spvit("deit_base", "SPViT-DeiT-B (8.4G)", "46.2", "8.4", 81.5, 82.4, ABSTRACT),
    _spvit("deit_base_11g7", "SPViT-DeiT-B (11.7G)", "62.3", "11.7", 81.6, None, RETIRED),
    _spvit("swin_tiny", "SPViT-Swin-Ti", "26.3", "3.3", 80.1, 81.0),
    _spvit("swin_small", "SPViT-Swin-S", "39.2", "6.1", 82.4, 83.0),
    _spvit("swin_base", "SPViT-Swin-B", "68.0", "11.4", 83.2, None, RETIRED),
)

NO_UNITS = "Neither the blocks nor the widths that were kept are published."
SKIPS = (
    "Only which blocks UVC dropped (8 and 10, from 0) is published: the record has the others at full width, "
    "which is 83.54 % of DeiT-S. The printed figures and the accuracy are those of the narrower model."
)

_uvc = partial(
    Published, method="uvc", paper="arXiv 2203.08243", where="README, results", dense=_DEIT["small"], counting=UVC
)

UVC_ROWS = (
    _uvc(
        name="uvc_deit_small_r58",
        title="UVC DeiT-S (57.61 %)",
        printed=_figures(macs="2.65", macs_share="57.61"),
        top1=79.44,
        notes=(NO_UNITS,),
    ),
    _uvc(
        name="uvc_deit_small_r50_skips",
        title="UVC DeiT-S (50.41 %), skips alone",
        make=lambda: skip_blocks(deit("small"), "111111110101"),
        printed=_figures(macs="2.32", macs_share="50.41"),
        top1=78.82,
        notes=(SKIPS,),
    ),
)

MEAN_TOKENS = "How many tokens each block keeps is not published, only the mean, which the record has in every block."
NOT_06 = "3.0 G fits a keep rate of 0.66, or plans in 10 of the 12 blocks; not 0.6 in all of them."


def _pm(
    name: str, title: str, make: Callable[[], Arch], rate: float, macs: str, top1: float, speed: float, *notes: str
) -> Published:
    return _in_pmvit(
        name=f"pm_vit_{name}_kr0{rate * 10:.0f}",
        title=f"{title}, keep rate {rate}",
        method="pmvit",
        make=lambda: prune_and_merge(make(), rate),
        printed=_figures(macs=macs),
        top1=top1,
        speeds=_images(speed),
        notes=(MEAN_TOKENS, *notes),
    )


PM_ROWS = (
    _pm("tiny", "PM-ViT-Ti", partial(deit, "tiny"), 0.7, "0.8", 72.0, 3375, CUT_OFF),
    _pm("tiny", "PM-ViT-Ti", partial(deit, "tiny"), 0.6, "0.7", 71.6, 3745),
    _pm("small", "PM-ViT-S", partial(deit, "small"), 0.6, "3.0", 79.6, 1793, NOT_06),
    _pm("mae_base", "PM-ViT-MAE-B", mae, 0.6, "10.4", 83.6, 505),
)

PUBLISHED: dict[str, Published] = {
    row.name: row for row in (*DENSE, *NVIT_ROWS, *UP_ROWS, *SPVIT_ROWS, *UVC_ROWS, *PM_ROWS)
}
