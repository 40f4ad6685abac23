"""A Gaussian process over the variables of a search and its rungs, fitted by its marginal likelihood.

Compression costs accuracy mostly additively: what one choice costs depends little on the others. So the kernel is a sum
over the variables (additive Gaussian processes, Duvenaud et al. 2011) plus one product over all of them, each a Matern
kernel of order 5/2 with a length of its own. Both have a part that all rungs share and a part that fades with the
distance between rungs, so that cheap results say what they can about expensive ones (multi-fidelity, Kennedy and
O'Hagan 2000). What is particular to a candidate is the same on all of its rungs but fades too, and every rung has a
noise of its own.

Hyperparameters are the maximum a posteriori under broad log-normal priors. Inputs lie in the unit cube, outputs have
scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["GaussianProcess", "Observations", "learn"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEPS = 12  # of L-BFGS; more change the predictions by less than the results' noise does
JITTER = 1e-4


@dataclass(frozen=True)
class Observations:
    """Results on all rungs.

    Args:
        inputs: (n, D) features in the unit cube.
        groups: (D,) the variable of each feature, 0..V-1; several where a variable is one-hot.
        rungs: (n,) of the results.
        candidates: (n,) whose results they are.
        values: (n,) of the results, of mean about 0 and scale about 1 on every rung.
    """

    inputs: Floats
    groups: Sequence[int]
    rungs: Ints
    candidates: Ints
    values: Floats


class GaussianProcess:
    """Predicts one quantity on any rung from results on all of them.

    Args:
        known: the results.
        hyperparameters: what ``learn`` gave, for as many rungs; learned from ``known`` by default, which is slow.
    """

    def __init__(self, known: Observations, hyperparameters: Tensor | None = None) -> None:
        self._kernels = _Kernels(known)
        self._prior = _Prior(self._kernels.variables, int(known.rungs.max()) + 1)
        y = torch.as_tensor(known.values, dtype=torch.float64)
        theta = _maximised(self._kernels, self._prior, y) if hyperparameters is None else hyperparameters
        factor, failed = torch.linalg.cholesky_ex(self._kernels.noisy(self._prior.split(theta)))
        if failed or not bool(factor.isfinite().all()):
            theta = self._prior.mean
            factor = torch.linalg.cholesky(self._kernels.noisy(self._prior.split(theta)))
        self._parts, self._factor = self._prior.split(theta), factor
        self._weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        self._own = self._kernels.own(self._parts)

    def predict(self, inputs: Floats, rung: int) -> tuple[Floats, Floats]:
        """Mean and standard deviation, without noise, on ``rung``; (m,) each, for (m, D) inputs."""
        cross = self._kernels.to(self._parts, torch.as_tensor(inputs, dtype=torch.float64), rung)
        solved = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        variance = (self._own - (solved**2).sum(0)).clamp(min=1e-12)
        return (cross @ self._weights).numpy(), variance.sqrt().numpy()


def learn(known: Observations, rungs: int) -> Tensor:
    """Hyperparameters from some results, for processes that know results of ``rungs`` rungs."""
    kernels = _Kernels(known)
    y = torch.as_tensor(known.values, dtype=torch.float64)
    return _maximised(kernels, _Prior(kernels.variables, rungs), y)


class _Prior:
    """Mean and deviation of every hyperparameter's logarithm."""

    def __init__(self, variables: int, rungs: int) -> None:
        kinds = [
            (variables, 0.5, 0.8),  # lengths of the sum
            (variables, math.sqrt(variables / 3), 0.8),  # lengths of the product
            (variables, 0.5, 1.5),  # variances of the sum, shared by the rungs
            (variables, 0.15, 1.5),  # variances of the sum, fading with the rungs
            (2, 0.3, 1.5),  # variances of the product, likewise
            (1, 1.5, 1.0),  # rungs over which it fades
            (1, 0.05, 1.5),  # variance of a candidate's own error
            (rungs, 0.05, 1.5),  # of the noise
        ]
        self._sizes = [n for n, _, _ in kinds]
        self.mean = torch.cat([torch.full((n,), math.log(middle), dtype=torch.float64) for n, middle, _ in kinds])
        self.deviation = torch.cat([torch.full((n,), each, dtype=torch.float64) for n, _, each in kinds])

    def split(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Hyperparameters by kind, from their logarithms in a row."""
        return torch.split(theta.exp(), self._sizes)


class _Kernels:
    """Covariances of results, and of anything with them; ``parts`` are hyperparameters by kind."""

    def __init__(self, known: Observations) -> None:
        groups = np.array(known.groups)[:, None] == np.arange(max(known.groups) + 1)
        self._member = torch.as_tensor(groups, dtype=torch.float64)
        self._inputs = torch.as_tensor(known.inputs, dtype=torch.float64)
        self._rungs, who = torch.as_tensor(known.rungs), torch.as_tensor(known.candidates)
        self._squares, self._apart = self._to(self._inputs), (self._rungs[:, None] - self._rungs).abs().double()
        self._same = (who[:, None] == who).double()

    @property
    def variables(self) -> int:
        return self._member.shape[1]

    def noisy(self, parts: Sequence[Tensor]) -> Tensor:
        """(n, n) of the results with each other."""
        *_, over, own, noise = parts
        fade = torch.exp(-self._apart / over)
        found = self._smooth(parts, self._squares, fade) + own * fade * self._same
        return found + torch.diag(noise[self._rungs] + JITTER)

    def to(self, parts: Sequence[Tensor], inputs: Tensor, rung: int) -> Tensor:
        """(m, n) of (m, D) inputs on ``rung`` with the results."""
        fade = torch.exp(-(self._rungs - rung).abs().double() / parts[5])
        return self._smooth(parts, self._to(inputs), fade)

    def own(self, parts: Sequence[Tensor]) -> Tensor:
        """Of any input with itself."""
        zero = torch.zeros(self.variables, 1, 1, dtype=torch.float64)
        return self._smooth(parts, zero, torch.ones(1, 1, dtype=torch.float64))[0, 0]

    def _to(self, x: Tensor) -> Tensor:
        """(V, m, n) squared distances to the results, by variable."""
        return torch.einsum("mnd,dv->vmn", (x[:, None] - self._inputs) ** 2, self._member)

    def _smooth(self, parts: Sequence[Tensor], squares: Tensor, fade: Tensor) -> Tensor:
        lengths, joint, shared, fading, product = parts[:5]
        single = _matern(squares / lengths[:, None, None] ** 2)
        both = _matern(torch.einsum("vmn,v->mn", squares, joint**-2))
        found = torch.einsum("vmn,v->mn", single, shared) + product[0] * both
        return found + fade * (torch.einsum("vmn,v->mn", single, fading) + product[1] * both)


def _maximised(kernels: _Kernels, prior: _Prior, y: Tensor) -> Tensor:
    """Logarithms of the hyperparameters; the prior's mean where the search for them fails."""
    theta = prior.mean.clone().requires_grad_()
    search = torch.optim.LBFGS([theta], max_iter=STEPS, history_size=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        factor = torch.linalg.cholesky_ex(kernels.noisy(prior.split(theta))).L
        fit = y @ torch.cholesky_solve(y[:, None], factor)[:, 0] / 2 + factor.diagonal().log().sum()
        found = fit + (((theta - prior.mean) / prior.deviation) ** 2).sum() / 2
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    return theta.detach() if bool(theta.isfinite().all()) else prior.mean


def _matern(squares: Tensor) -> Tensor:
    """Of order 5/2, by squared distances in lengths."""
    distance = torch.sqrt(5 * squares + 1e-9)  # a root has no slope at 0
    return (1 + distance + distance**2 / 3) * torch.exp(-distance)
