"""The one table of pruning methods, and the lookup in it.

Modules that a method needs to run (pydantic, the hooks) are imported only when it is used, so that listing the table
needs none of them. A method from outside the package is added with ``register``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from prunesweep.models import Arch, Cut, UserError, cost
from prunesweep.models.errors import nearest
from prunesweep.models.families import FamiliesWith
from prunesweep.pruners import baselines, isomorphic, nvit, served, taylor, upvit

from .hook import Hook
from .method import (
    Applied,
    AppliedMethod,
    Decided,
    Method,
    SecondStage,
    TokenMethod,
    TrainedMethod,
    WidthMethod,
)
from .nvit.schedule import FAMILIES as NARROWED
from .ranked import GROUP_SIZES
from .reached import Reached
from .scores import Scores, vector_sizes
from .snapshot import Snapshot

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["METHODS", "get_method", "method_names", "register"]

AnyMethod = TypeVar("AnyMethod", bound=Method)
NVIT = "NViT, CVPR 2023, arXiv 2110.04869"
ISOMORPHIC = "Isomorphic Pruning, ECCV 2024, arXiv 2407.04616"


def _upvit_settings() -> type[BaseModel]:
    from .settings import UPViTSettings

    return UPViTSettings


def _isomorphic_settings() -> type[BaseModel]:
    from .settings import IsomorphicSettings

    return IsomorphicSettings


def _uvc_settings() -> type[BaseModel]:
    from .uvc.settings import UVCSettings

    return UVCSettings


def _uvc(settings: Any, _: Arch) -> Hook:
    from .uvc import UVC

    return UVC(settings)


def _uvc_paced(_: Arch, updates: int) -> dict[str, Any]:
    """Go down in half of the updates; the others settle gates and widths."""
    return {"ramp_steps": max(1, updates // 2)}


def _snapshots(_: Any, arch: Arch, found: Sequence[Snapshot]) -> list[Decided]:
    """Return what a UVC or NViT run has reached: cut models with their trained weights."""
    whole = cost(arch).macs
    return [Decided(one.budget / whole, one.cut, one.model, one.hindrance) for one in found]


def _spvit_settings() -> type[BaseModel]:
    from .spvit import SPViTSettings

    return SPViTSettings


def _spvit(settings: Any, _: Arch) -> Hook:
    from .spvit import SPViT

    return SPViT(settings)


def _spvit_paced(_: Arch, updates: int) -> dict[str, Any]:
    """Let a gate travel 8 in all while a cosine takes its rate to zero; in a short run less, or all close at once."""
    return {"theta_lr": min(0.15, 16 / max(updates, 1))}


def _spvit_decided(settings: Any, _: Arch, found: Cut) -> list[Decided]:
    return [Decided(settings.budget, found, None)]


def _mixed_settings() -> type[BaseModel]:
    from .spvit.mixed import SPViTMixedSettings

    return SPViTMixedSettings


def _mixed(settings: Any, dense: nn.Module | None, decision: Cut | None) -> Hook:
    from .spvit.mixed import SPViTMixed

    assert dense is not None
    assert decision is not None
    return SPViTMixed(dense, decision, settings)


def _nvit_settings() -> type[BaseModel]:
    from .settings import NViTSettings

    return NViTSettings


def _nvit(settings: Any, arch: Arch) -> Hook:
    from .nvit.hook import NViTPruning

    options = settings.model_dump(exclude={"budgets"})
    return NViTPruning([budget * cost(arch).macs for budget in settings.budgets], **options)


def _nvit_paced(arch: Arch, updates: int) -> dict[str, Any]:
    """Take away all groups that there are in four fifths of the updates, an average over a few of them at a time."""
    from .nvit.schedule import Grouping

    interval = max(1, min(100, updates // 40))
    grouping, full = Grouping(), vector_sizes(arch, nvit.KINDS)
    groups = sum(grouping.removable(name, size, size) for name, size in full.items())
    return {"interval": interval, "groups_per_step": max(1, math.ceil(groups * interval / max(1, 0.8 * updates)))}


def _score_subspaces(*arguments: Any, **options: Any) -> Scores:
    from .subspaces import score

    return score(*arguments, **options)


def _plan_settings() -> type[BaseModel]:
    from .pmvit import PlanSettings

    return PlanSettings


def _score_tokens(*arguments: Any, **options: Any) -> Scores:
    from . import pmvit

    return pmvit.score(*arguments, **options)


def _plan(*arguments: Any, **options: Any) -> Cut:
    from . import pmvit

    return pmvit.plan(*arguments, **options)


def _plan_for_budget(*arguments: Any, **options: Any) -> Reached:
    from . import pmvit

    return pmvit.plan_for_budget(*arguments, **options)


def _matrix_settings() -> type[BaseModel]:
    from .pmvit.hook import PruneMergeSettings

    return PruneMergeSettings


def _matrices(settings: Any, _: nn.Module | None, __: Cut | None) -> Hook:
    from .pmvit.hook import PruneMergeTraining

    return PruneMergeTraining(settings)


def _tome_settings() -> type[BaseModel]:
    from .settings import ToMeSettings

    return ToMeSettings


def _tome(model: nn.Module, settings: Any) -> Applied:
    from prunesweep.models import arch_of
    from prunesweep.models.tome import apply_tome, tome_macs

    return Applied(apply_tome(model, settings.r), {"r": settings.r}, tome_macs(arch_of(model), settings.r))


def _semi_structured(model: nn.Module, _: Any) -> Applied:
    from .semi_structured import prune_2_4

    changed = copy.deepcopy(model)
    return Applied(changed, asdict(prune_2_4(changed)))


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the table. Raises ValueError where its name is taken."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method
    return method


def get_method(name: str, kind: type[AnyMethod]) -> AnyMethod:
    """Look up the method of this name.

    Args:
        name: of the method.
        kind: the class that it must be of; ``Method`` where any will do.

    Raises:
        UserError: no method has this name, or it is of another kind.
    """
    method = METHODS.get(name)
    if isinstance(method, kind):
        return method
    known = method_names(kind)
    if method is None:
        raise UserError(f"unknown method {name!r}; known: {', '.join(known)}. {nearest(name, known)}".strip())
    raise UserError(f"method {name!r} {method.when}; needed here is one of {', '.join(known)}")


def method_names(kind: type[Method] = Method) -> list[str]:
    """List the names of the methods of a kind."""
    return [name for name, method in METHODS.items() if isinstance(method, kind)]


for _method in (
    WidthMethod(
        name="nvit",
        description="squared gradient times weight, summed over all that is cut with a unit",
        paper=NVIT,
        families=nvit.FAMILIES,
        kinds=nvit.KINDS,
        score=nvit.score,
    ),
    WidthMethod(
        name="upvit",
        description="how far the output distribution moves without a unit",
        paper="UP-ViT, SCIS 2023, arXiv 2111.15127",
        families=upvit.FAMILIES,
        kinds=upvit.KINDS,
        score=upvit.score,
        settings=_upvit_settings,
        score_options=("importance", "labels_per_image", "memory_mb"),
        seeded=True,
        labels=False,
    ),
    WidthMethod(
        name="isomorphic",
        description="Taylor importance, ranked among structures of one kind, cut by ratios",
        paper=ISOMORPHIC,
        families=taylor.FAMILIES,
        kinds=taylor.KINDS,
        score=taylor.score,
        decide=isomorphic.decide,
        settings=_isomorphic_settings,
    ),
    WidthMethod(
        name="taylor",
        description="the same Taylor importance, least saliency per cost saved first",
        paper=ISOMORPHIC,
        families=taylor.FAMILIES,
        kinds=taylor.KINDS,
        score=taylor.score,
    ),
    WidthMethod(
        name="magnitude",
        description="mean absolute weight of all that is cut with a unit; uses no data",
        paper="control",
        families=baselines.FAMILIES,
        kinds=baselines.KINDS,
        score=baselines.score_magnitude,
        labels=False,
    ),
    WidthMethod(
        name="random",
        description="chance",
        paper="control",
        families=baselines.FAMILIES,
        kinds=baselines.KINDS,
        score=baselines.score_random,
        seeded=True,
        labels=False,
    ),
    WidthMethod(
        name="subspaces",
        description="how far the logits move when a subspace is narrowed and all else refitted; projected",
        paper="docs/subspaces.md",
        families=FamiliesWith("streams"),
        kinds=("embed", "qk", "v", "sr", "mlp"),
        score=_score_subspaces,
        groups={**GROUP_SIZES, "embed": 4, "qk": 1, "v": 1, "mlp": 8, "sr": 4},
        labels=False,
        projected=True,
    ),
    TrainedMethod(
        name="uvc",
        description="widths and skipped blocks under one budget, by primal-dual training",
        paper="UVC, ICLR 2022, openreview 9jsZiUgkCZP",
        families=served.UVC,
        settings=_uvc_settings,
        recipe="uvc_stage1",
        finetune="uvc_stage2",
        hook=_uvc,
        decided=_snapshots,
        paced=_uvc_paced,
    ),
    TrainedMethod(
        name="spvit",
        description="attention becomes convolutions, and MLP units go, by gates that are trained",
        paper="SPViT, arXiv 2111.11802",
        families=served.SPVIT,
        settings=_spvit_settings,
        recipe="spvit_search",
        finetune="spvit",
        hook=_spvit,
        decided=_spvit_decided,
        several=False,
        paced=_spvit_paced,
        second_stage=SecondStage(
            "convolutions stay mixed from the weights of their attention while they are finetuned, and are frozen then",
            _mixed_settings,
            _mixed,
            needs_decision=True,
        ),
    ),
    TrainedMethod(
        name="nvit-iterative",
        description="NViT's saliency, a few groups removed every so many updates",
        paper=NVIT,
        families=NARROWED,
        settings=_nvit_settings,
        recipe="nvit",
        finetune="nvit",
        hook=_nvit,
        decided=_snapshots,
        paced=_nvit_paced,
    ),
    TokenMethod(
        name="pmvit",
        description="a fixed plan per block of which patches merge and which pass by (Prune-and-Merge)",
        paper="Prune and Merge, IEEE TMM 2025, arXiv 2503.23455",
        families=served.PMVIT,
        kinds=("tokens",),
        score=_score_tokens,
        plan=_plan,
        plan_for_budget=_plan_for_budget,
        settings=_plan_settings,
        second_stage=SecondStage(
            "merge and recover matrices are trained at a learning rate and a decay of their own",
            _matrix_settings,
            _matrices,
        ),
    ),
    AppliedMethod(
        name="tome",
        description="merges similar tokens as it runs; a comparison, evaluated and not saved",
        paper="ToMe, ICLR 2023, arXiv 2210.09461",
        families=FamiliesWith(
            "global_attention",
            without={
                "rotary": "it merges tokens of two places, and queries and keys are turned by one",
                "mixed_maps": "its attention, which counts a merged token as several, mixes no maps of heads",
            },
        ),
        settings=_tome_settings,
        apply=_tome,
        saved=False,
    ),
    AppliedMethod(
        name="2:4",
        description="zeroes two of every four consecutive weights of linear layers, for sparse tensor cores",
        paper="NViT's last step (ASP), arXiv 2110.04869",
        families=baselines.FAMILIES,
        apply=_semi_structured,
    ),
):
    register(_method)
