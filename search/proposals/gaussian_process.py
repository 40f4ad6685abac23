"""A Gaussian process over the variables of a search and its rungs, fitted by its marginal likelihood.

Compression costs accuracy mostly additively: what one choice costs depends little on the others. So the kernel is a sum
over the variables (additive Gaussian processes, Duvenaud et al. 2011) plus one product over all of them, each a Matern
kernel of order 5/2 with lengths of its own. Both have a part that all rungs share and a part that fades with the
distance between rungs, so that cheap results inform expensive ones (multi-fidelity, Kennedy and O'Hagan 2000). A
candidate's own deviation from the smooth functions fades too, and every rung has a noise of its own.

The covariance of the result of candidate c with inputs x on rung r, and that of c' with x' on r', is

    k = sum_v (a_v + g b_v) m(|x_v - x'_v| / l_v) + (A + g B) m(|(x - x') / L|) + g w [c = c'] + (s_r + j) [same result]

    g = exp(-|r - r'| / t)        m(d) = (1 + sqrt(5) d + 5 d^2 / 3) exp(-sqrt(5) d)

    symbol    name in Hyperparameters   meaning
    x_v                                 inputs of variable v, in the unit cube; several features where it is one-hot
    l_v       additive_lengths          length of variable v in the sum
    L         product_lengths           lengths of all variables in the product; (x - x') / L is taken by variable
    a_v       additive_shared           variance of variable v in the sum, the same on all rungs
    b_v       additive_fading           likewise, fading with the distance between rungs
    A, B      product_shared, _fading   variances of the product, shared and fading
    t         rung_length               rungs over which what fades falls to 1 / e
    w         candidate_variance        variance of a candidate's own deviation
    s_r       noise                     variance of the noise of rung r
    j         JITTER                    a constant that keeps the matrix well conditioned

Hyperparameters maximise marginal likelihood times broad log-normal priors. Outputs have mean about 0 and scale about 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["GaussianProcess", "Hyperparameters", "Observations", "learn"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEPS = 12  # of L-BFGS; further steps change predictions by less than the results' noise
JITTER = 1e-4


@dataclass(frozen=True)
class Observations:
    """Results on all rungs.

    Args:
        inputs: (n, D) features in the unit cube.
        groups: (D,) the variable of each feature, 0..V-1; several features if a variable is one-hot.
        rungs: (n,) rungs of the results.
        candidates: (n,) numbers of the candidates.
        values: (n,) results, of mean about 0 and scale about 1 on every rung.
    """

    inputs: Floats
    groups: Sequence[int]
    rungs: Ints
    candidates: Ints
    values: Floats


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of the kernel in the module's equation, all positive; V variables, R rungs."""

    additive_lengths: Tensor  # (V,)
    product_lengths: Tensor  # (V,)
    additive_shared: Tensor  # (V,)
    additive_fading: Tensor  # (V,)
    product_shared: Tensor  # (1,)
    product_fading: Tensor  # (1,)
    rung_length: Tensor  # (1,)
    candidate_variance: Tensor  # (1,)
    noise: Tensor  # (R,)


class GaussianProcess:
    """Predict one quantity on any rung from results on all of them.

    Args:
        known: the results.
        log_hyperparameters: result of ``learn`` for as many rungs; by default they are learned from ``known``, which is
            slow.
    """

    def __init__(self, known: Observations, log_hyperparameters: Tensor | None = None) -> None:
        self._kernels = _Kernels(known)
        prior = _Prior(self._kernels.variables, int(known.rungs.max()) + 1)
        y = torch.as_tensor(known.values, dtype=torch.float64)
        theta = _maximised(self._kernels, prior, y) if log_hyperparameters is None else log_hyperparameters
        self._hyperparameters = prior.split(theta)
        factor, failed = torch.linalg.cholesky_ex(self._kernels.noisy(self._hyperparameters))
        if failed or not bool(factor.isfinite().all()):
            self._hyperparameters = prior.split(prior.mean)
            factor = _factor(self._kernels.noisy(self._hyperparameters))
        self._cholesky = factor
        self._weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        self._prior_variance = self._kernels.variance(self._hyperparameters)

    def predict(self, inputs: Floats, rung: int) -> tuple[Floats, Floats]:
        """Return the predicted mean and standard deviation without noise, (m,) each.

        With the covariance K of the results y, and that k of an input with them,

            mean = k^T K^-1 y        variance = k(x, x) - k^T K^-1 k

        Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equations 2.25 and 2.26.

        Args:
            inputs: (m, D) features in the unit cube.
            rung: the rung to predict on.
        """
        cross = self._kernels.cross(self._hyperparameters, torch.as_tensor(inputs, dtype=torch.float64), rung)
        solved = torch.linalg.solve_triangular(self._cholesky, cross.T, upper=False)
        variance = (self._prior_variance - (solved**2).sum(0)).clamp(min=1e-12)
        return (cross @ self._weights).numpy(), variance.sqrt().numpy()


def learn(known: Observations, rungs: int) -> Tensor:
    """Return the logarithms of the hyperparameters that maximise marginal likelihood times prior.

    The logarithm of the marginal likelihood of n values y with covariance K is, without its constant,

        log p(y) = -y^T K^-1 y / 2 - log |K| / 2

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 5.8.

    Args:
        known: the results.
        rungs: number of rungs of the process; at least one more than the highest rung in ``known``.
    """
    kernels = _Kernels(known)
    y = torch.as_tensor(known.values, dtype=torch.float64)
    return _maximised(kernels, _Prior(kernels.variables, rungs), y)


class _Prior:
    """Mean and deviation of every hyperparameter's logarithm, as vectors in the order of ``Hyperparameters``."""

    def __init__(self, variables: int, rungs: int) -> None:
        each = {  # number of them, median, deviation of the logarithm
            "additive_lengths": (variables, 0.5, 0.8),
            "product_lengths": (variables, math.sqrt(variables / 3), 0.8),
            "additive_shared": (variables, 0.5, 1.5),
            "additive_fading": (variables, 0.15, 1.5),
            "product_shared": (1, 0.3, 1.5),
            "product_fading": (1, 0.3, 1.5),
            "rung_length": (1, 1.5, 1.0),
            "candidate_variance": (1, 0.05, 1.5),
            "noise": (rungs, 0.05, 1.5),
        }
        self._sizes = {name: n for name, (n, _, _) in each.items()}
        kinds = each.values()
        self.mean = torch.cat([torch.full((n,), math.log(median), dtype=torch.float64) for n, median, _ in kinds])
        self.deviation = torch.cat([torch.full((n,), wide, dtype=torch.float64) for n, _, wide in kinds])

    def split(self, theta: Tensor) -> Hyperparameters:
        """Return the hyperparameters by name, from their logarithms in a row."""
        parts = torch.split(theta.exp(), list(self._sizes.values()))
        return Hyperparameters(**dict(zip(self._sizes, parts, strict=True)))


class _Kernels:
    """Covariances of one set of results, for any hyperparameters."""

    def __init__(self, known: Observations) -> None:
        groups = np.arange(max(known.groups) + 1) == np.array(known.groups)[:, None]
        self._member = torch.as_tensor(groups, dtype=torch.float64)
        self._inputs = torch.as_tensor(known.inputs, dtype=torch.float64)
        self._rungs, candidates = torch.as_tensor(known.rungs), torch.as_tensor(known.candidates)
        self._squares = self._squared_distances(self._inputs)
        self._rungs_apart = (self._rungs[:, None] - self._rungs).abs().double()
        self._same_candidate = (candidates[:, None] == candidates).double()

    @property
    def variables(self) -> int:
        return self._member.shape[1]

    def noisy(self, h: Hyperparameters) -> Tensor:
        """Return the (n, n) covariance of the results with each other, noise included."""
        fade = torch.exp(-self._rungs_apart / h.rung_length)
        found = self._smooth(h, self._squares, fade) + h.candidate_variance * fade * self._same_candidate
        return found + torch.diag(h.noise[self._rungs] + JITTER)

    def cross(self, h: Hyperparameters, inputs: Tensor, rung: int) -> Tensor:
        """Return the (m, n) covariance of (m, D) inputs on ``rung`` with the results."""
        fade = torch.exp(-(self._rungs - rung).abs().double() / h.rung_length)
        return self._smooth(h, self._squared_distances(inputs), fade)

    def variance(self, h: Hyperparameters) -> Tensor:
        """Return the prior variance of any input, without a candidate's own deviation and noise."""
        zero = torch.zeros(self.variables, 1, 1, dtype=torch.float64)
        return self._smooth(h, zero, torch.ones(1, 1, dtype=torch.float64))[0, 0]

    def _squared_distances(self, x: Tensor) -> Tensor:
        """Return (V, m, n) squared distances of (m, D) inputs to the results, by variable."""
        return torch.einsum("mnd,dv->vmn", (x[:, None] - self._inputs) ** 2, self._member)

    def _smooth(self, h: Hyperparameters, squares: Tensor, fade: Tensor) -> Tensor:
        single = _matern(squares / h.additive_lengths[:, None, None] ** 2)
        joint = _matern(torch.einsum("vmn,v->mn", squares, h.product_lengths**-2))
        found = torch.einsum("vmn,v->mn", single, h.additive_shared) + h.product_shared * joint
        return found + fade * (torch.einsum("vmn,v->mn", single, h.additive_fading) + h.product_fading * joint)


def _factor(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of the covariance, with as much added to its diagonal as is necessary."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    for more in (0.0, 1e-3, 1e-2, 1e-1):
        factor, failed = torch.linalg.cholesky_ex(covariance + more * identity)
        if not failed and bool(factor.isfinite().all()):
            return factor
    return torch.linalg.cholesky(covariance + identity)


def _maximised(kernels: _Kernels, prior: _Prior, y: Tensor) -> Tensor:
    """Return the logarithms of the most likely hyperparameters; the prior's mean if the search for them fails."""
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
    """Return the Matern kernel m(d) of order 5/2, from squared distances d^2."""
    distance = torch.sqrt(5 * squares + 1e-9)  # a root has no slope at 0
    return (1 + distance + distance**2 / 3) * torch.exp(-distance)
