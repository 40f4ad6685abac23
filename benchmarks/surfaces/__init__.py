"""Response surfaces that samplers are measured on, and wrappers that make others of them, a file each."""

from .base import Problem, Wrapped
from .degenerate import Degenerate
from .deit import DeitProblem
from .discretised import Discretised
from .functions import FunctionProblem
from .infeasible import Infeasible
from .noisy import Noisy
from .permuted import Permuted
from .recorded import RecordedProblem
from .shifted import Shifted

__all__ = [
    "Degenerate",
    "DeitProblem",
    "Discretised",
    "FunctionProblem",
    "Infeasible",
    "Noisy",
    "Permuted",
    "Problem",
    "RecordedProblem",
    "Shifted",
    "Wrapped",
]
