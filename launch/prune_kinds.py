"""The classes of methods of ``prunesweep prune``: how each is run, and which options it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunesweep.models import UserError
from prunesweep.models.errors import nearest
from prunesweep.pruners import METHODS, AppliedMethod, Method, TokenMethod, TrainedMethod, WidthMethod

from .prune_request import STAGE, Request
from .prune_runners import apply_once, prune_tokens, prune_trained, prune_widths

__all__ = ["Runner", "find_method", "means", "runner_of"]


@dataclass(frozen=True)
class Runner:
    """How the command runs methods of one class, and which of its options apply to them."""

    run: Callable[[Request], None]
    options: frozenset[str]
    needs_budget: bool = False

    def check(self, method: Method, given: Mapping[str, bool]) -> None:
        """Check the given options.

        Args:
            method: the method.
            given: by the option's name, whether it was given.

        Raises:
            UserError: an option does not apply to the method, or its budget is missing.
        """
        allowed = self.takes(method)
        for option, is_given in given.items():
            if is_given and option not in allowed:
                takes = f"it takes {', '.join(sorted(allowed))}" if allowed else "it takes no options of its own"
                raise UserError(f"{option}: means nothing to method {method.name!r}; {takes}")
        if self.needs_budget and not given["--budget"]:
            raise UserError(f"--budget: method {method.name!r} needs one, for example 0.5")

    def takes(self, method: Method) -> set[str]:
        """Return the options that mean something to a method, of those that do not to every one."""
        allowed = {*self.options}
        allowed |= {"--set"} if method.option_names and self.run is not apply_once else set()
        allowed |= {"--r"} if "r" in method.option_names else set()
        allowed |= {"--second-stage"} if method.second_stage is not None else set()
        return allowed - (OF_A_PATH if isinstance(method, WidthMethod) and not method.along_path else set())

    def saves(self, method: Method) -> bool:
        """Return True if the method has a result that is saved."""
        return not isinstance(method, AppliedMethod) or method.saved


OF_A_PATH = {"--drop", "--group", "--floor", "--protect"}  # of removals, one after the other
RECOVERY = ("--recover", "--recover-images")

RUNNERS: Mapping[type[Method], Runner] = {
    WidthMethod: Runner(
        prune_widths,
        frozenset({"--budget", *OF_A_PATH, "--measure", "--project", "--scores", *RECOVERY}),
        needs_budget=True,
    ),
    TrainedMethod: Runner(prune_trained, frozenset({"--budget", "--set", "--recipe"}), needs_budget=True),
    TokenMethod: Runner(prune_tokens, frozenset({"--budget", "--keep-rate", "--measure", "--scores", *RECOVERY})),
    AppliedMethod: Runner(apply_once, frozenset()),
}


def runner_of(method: Method) -> Runner:
    """Return the runner of a method's class."""
    return next(runner for kind, runner in RUNNERS.items() if isinstance(method, kind))


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"--method {name}: must be one of {', '.join(METHODS)}. {nearest(name, METHODS)}".strip())
    return METHODS[name]


def means(settings: Sequence[str], runner: Runner) -> bool:
    """Return True if ``--set`` has a setting of the method itself, not of the training that follows.

    Args:
        settings: the values of ``--set``, ``NAME=VALUE``.
        runner: the method's runner.
    """
    later = ("finetune.", f"{STAGE}.") if runner.run is not apply_once else ()
    return any(not setting.strip().startswith(later) for setting in settings)
