"""The interface of pruning methods: how one is described, set and called.

A method is an instance of one of four classes, by when it decides:

    WidthMethod     scores the units of a trained model once; any budget is then solved from the scores
    TokenMethod     scores patches once; a token plan for any keep rate or budget follows
    TrainedMethod   is a hook on the training loop, and decides while the model trains
    AppliedMethod   changes a model at once, without scores and without training

``pruners.methods`` has the table of them. This module imports no pydantic: functions return the settings' classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from prunesweep.models import Arch, Cut, UserError
from prunesweep.models.errors import explain, nearest
from prunesweep.models.families import FamiliesWith

from .budget import width_path
from .hook import Hook
from .ranked import GROUP_SIZES
from .reached import Reached
from .scores import Scores

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "Applied",
    "AppliedMethod",
    "Decided",
    "Method",
    "ScoredMethod",
    "SecondStage",
    "TokenMethod",
    "TrainedMethod",
    "WidthMethod",
    "cheapest_first",
    "validated",
]


def cheapest_first(arch: Arch, scores: Scores, budget: float, **settings: Any) -> Reached:
    """Remove the units that cost least saliency per unit of cost saved, until the budget is met (see ``width_path``).

    Args:
        arch: the record that was scored.
        scores: a width method's scores of ``arch``.
        budget: largest cost, in the measure's unit.
        settings: those of ``width_path``.

    Raises:
        UserError: the floors do not let the budget be reached, or the scores are of another model.
    """
    return width_path(arch, scores, **settings).reach(budget)


def _no_settings() -> type[BaseModel]:
    from .settings import NoSettings

    return NoSettings


def _unpaced(_: Arch, __: int) -> Mapping[str, Any]:
    return {}


def validated(
    what: str, settings: type[BaseModel], options: Mapping[str, Any], fixed: Mapping[str, Any] | None = None
) -> Any:
    """Make settings from a user's options.

    Args:
        what: who takes them, for messages: "method 'uvc'".
        settings: the model.
        options: the user's, by name of a field.
        fixed: fields that are not the user's to give by name, with their values; None leaves a field out.

    Raises:
        UserError: an unknown name, or a value that is not allowed.
    """
    fixed = fixed or {}
    known = [name for name in settings.model_fields if name not in fixed]
    for option in options:
        if option not in known:
            raise UserError(f"{what}: unknown setting {option!r}. {nearest(option, known)}".rstrip())
    from pydantic import ValidationError

    try:
        return settings.model_validate({**{k: v for k, v in fixed.items() if v is not None}, **options})
    except ValidationError as error:
        raise UserError("\n".join(f"{what}: {explain(p, known)}" for p in error.errors())) from error


@dataclass(frozen=True)
class SecondStage:
    """A method's own way to finetune the model that it has decided on.

    ``make(settings, dense, decision)`` gives the hook. With ``needs_decision`` the dense model and the decision that it
    was cut by are given, otherwise both are None.
    """

    description: str
    settings: Callable[[], type[BaseModel]]
    make: Callable[[Any, nn.Module | None, Cut | None], Hook]
    needs_decision: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method.

    Args:
        name: what users call it.
        description: one line, without a full stop.
        paper: the publication, or what else it is.
        families: names of the model families that it can serve, best told as ``FamiliesWith`` the capabilities needed.
        settings: gives the pydantic model of its settings; a function, so that listing methods loads no pydantic.
        recipe: the named recipe that trains while the method decides.
        finetune: the named recipe of training afterwards.
        second_stage: the method's own way of finetuning, if it has one.
    """

    when: ClassVar[str]  # when it decides, for a person

    name: str
    description: str
    paper: str
    families: Collection[str]
    settings: Callable[[], type[BaseModel]] = field(default=_no_settings)
    recipe: str | None = None
    finetune: str | None = None
    second_stage: SecondStage | None = None

    reserved: ClassVar[tuple[str, ...]] = ()  # settings that have an option or an argument of their own

    @property
    def option_names(self) -> tuple[str, ...]:
        """List the settings that a user gives by name."""
        return tuple(name for name in self.settings().model_fields if name not in self.reserved)

    def configure(self, options: Mapping[str, Any], **fixed: Any) -> Any:
        """Make the settings from ``options`` by name and from ``fixed`` values of reserved ones.

        Raises:
            UserError: an unknown setting, or a value that is not allowed.
        """
        return validated(f"method {self.name!r}", self.settings(), options, {**dict.fromkeys(self.reserved), **fixed})

    def check(self, arch: Arch) -> None:
        """Raise UserError where this method cannot serve the family of ``arch``."""
        if arch.family in self.families:
            return
        from .methods import METHODS

        able = [name for name, other in METHODS.items() if type(other) is type(self) and arch.family in other.families]
        raise UserError(
            f"method {self.name!r} serves families {', '.join(self.families)}; {arch.source} is a {arch.family!r}, "
            f"for which there are: {', '.join(able) or 'none'}{self._reason(arch.family)}"
        )

    def _reason(self, family: str) -> str:
        reason = self.families.why_not(family) if isinstance(self.families, FamiliesWith) else None
        return f" (of {family!r}, {reason})" if reason else ""


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(Method):
    """A method that scores a trained model once.

    Args:
        score: ``score(model, batches, *, progress=None, **options)`` takes (images B·C·H·W, labels B) batches and gives
            scores of ``kinds``.
        kinds: of vectors, see ``pruners.KINDS``.
        score_options: names of the settings that ``score`` takes; the others are those of deciding.
        seeded: whether ``score`` draws random numbers, and takes a ``seed``.
        labels: whether ``score`` reads labels; where data have none, they are drawn (``pruners.drawn_targets``).
    """

    score: Callable[..., Scores]
    kinds: tuple[str, ...]
    score_options: tuple[str, ...] = ()
    seeded: bool = False
    labels: bool = True

    progress: ClassVar[str]  # what is being done while it scores

    def split(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of scoring, and those of deciding."""
        scoring = {name: value for name, value in options.items() if name in self.score_options}
        return scoring, {name: value for name, value in options.items() if name not in scoring}


@dataclass(frozen=True, kw_only=True)
class WidthMethod(ScoredMethod):
    """A method that scores units.

    Args:
        decide: ``decide(arch, scores, budget, *, measure, **options)`` turns scores into a decision within the budget:
            the cut, its cost, and what keeps it from the budget where that is not met (``pruners.Reached``).
        groups: units that go together, by kind, where a user says nothing.
        projected: scores say how many units stay, not which, so models are projected to the widths.
    """

    when: ClassVar[str] = "scores widths once"
    progress: ClassVar[str] = "scoring widths"

    decide: Callable[..., Reached] = cheapest_first
    groups: Mapping[str, int] = field(default_factory=lambda: GROUP_SIZES)
    projected: bool = False

    @property
    def along_path(self) -> bool:
        """Whether all budgets lie on one path of removals, which a search and the options of a path need."""
        return self.decide is cheapest_first


@dataclass(frozen=True, kw_only=True)
class TokenMethod(ScoredMethod):
    """A method that scores patches.

    Args:
        plan: ``plan(arch, scores, keep_rate, **options)`` gives a cut with token plans.
        plan_for_budget: ``plan_for_budget(arch, scores, budget, *, measure, **options)`` gives the largest one within a
            budget, as ``pruners.Reached``.
    """

    when: ClassVar[str] = "scores tokens once"
    progress: ClassVar[str] = "scoring patches"
    reserved: ClassVar[tuple[str, ...]] = ("keep_rate",)

    plan: Callable[..., Cut]
    plan_for_budget: Callable[..., Reached]


@dataclass(frozen=True, eq=False)
class Decided:
    """One decision of a run, for ``budget``, which is a share of the source's MACs.

    ``model`` is cut from the trained weights; without one, the decision is for the source as it was before.
    ``hindrance`` says what keeps its cost from the budget, where the method knows.
    """

    budget: float
    cut: Cut
    model: nn.Module | None
    hindrance: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(Method):
    """A method that needs training to decide.

    Args:
        hook: ``hook(settings, arch)`` gives the hook on the training loop.
        decided: ``decided(settings, arch, result)`` reads what the hook's ``finish`` gave.
        several: whether one run may serve several budgets; the field of the settings is then ``budgets``, else
            ``budget``.
        paced: ``paced(arch, updates)`` gives settings by which the method decides within so many updates, for runs
            that are shorter or longer than those that its defaults are meant for.
    """

    when: ClassVar[str] = "decides while it trains"
    reserved: ClassVar[tuple[str, ...]] = ("budget", "budgets")

    recipe: str
    finetune: str
    hook: Callable[[Any, Arch], Hook]
    decided: Callable[[Any, Arch, Any], list[Decided]]
    several: bool = True
    paced: Callable[[Arch, int], Mapping[str, Any]] = _unpaced

    def for_budgets(self, budgets: Sequence[float], options: Mapping[str, Any]) -> Any:
        """Make the settings for these budgets, shares of the source's MACs.

        Raises:
            UserError: a setting is unknown or not allowed, or the method serves one budget in a run.
        """
        if len(budgets) > 1 and not self.several:
            raise UserError(f"method {self.name!r}: serves one budget in a run, got {list(budgets)}")
        return self.configure(options, **({"budgets": tuple(budgets)} if self.several else {"budget": budgets[0]}))


@dataclass(frozen=True, eq=False)
class Applied:
    """A changed model, and JSON-ready facts about the change.

    ``macs`` per image are given where no record describes the model; it cannot be saved then.
    """

    model: nn.Module
    facts: Mapping[str, Any]
    macs: int | None = None


@dataclass(frozen=True, kw_only=True)
class AppliedMethod(Method):
    """A method that changes a model at once.

    Args:
        apply: ``apply(model, settings)`` gives the changed model; ``model`` itself stays as it is.
        saved: whether the result is a model that can be saved.
    """

    when: ClassVar[str] = "changes a model at once"

    apply: Callable[[nn.Module, Any], Applied]
    saved: bool = True
