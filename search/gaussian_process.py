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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["GaussianProcess"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEPS = 12  # of L-BFGS; more change the predictions by less than the results' noise does
JITTER = 1e-4


class GaussianProcess:
    """Predicts one quantity on any rung from results on all of them.

    Args:
        inputs: (n, D) features in the unit cube.
        groups: (D,) the variable of each feature, 0..V-1; several where a variable is one-hot.
        rungs: (n,) of the results.
        candidates: (n,) whose results they are.
        values: (n,) of the results, of mean about 0 and scale about 1 on every rung.
        learn: places of the results from which hyperparameters are learned, the slow part; all by default. All results
            condition the predictions.
    """

    def __init__(
        self,
        inputs: Floats,
        groups: Sequence[int],
        rungs: Ints,
        candidates: Ints,
        values: Floats,
        learn: Sequence[int] | Ints | None = None,
    ) -> None:
        self._member = torch.as_tensor(np.array(groups)[:, None] == np.arange(max(groups) + 1), dtype=torch.float64)
        self._inputs = torch.as_tensor(inputs, dtype=torch.float64)
        self._rungs = torch.as_tensor(rungs)
        self._mean, self._deviation, self._sizes = self._priors(int(self._rungs.max()) + 1)
        y, who = torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(candidates)
        squares = self._squares(self._inputs)
        apart, same = self._apart(self._rungs), (who[:, None] == who).double()
        some = torch.arange(len(y)) if learn is None else torch.as_tensor(np.array(learn))
        i, j = some[:, None], some
        self._theta = self._fit(squares[:, i, j], apart[i, j], same[i, j], self._rungs[some], y[some])
        factor, failed = torch.linalg.cholesky_ex(self._noisy(self._theta, squares, apart, same, self._rungs))
        if failed or not bool(factor.isfinite().all()):
            self._theta = self._mean
            factor = torch.linalg.cholesky(self._noisy(self._theta, squares, apart, same, self._rungs))
        self._factor = factor
        self._weights = torch.cholesky_solve(y[:, None], factor)[:, 0]

    def predict(self, inputs: Floats, rung: int) -> tuple[Floats, Floats]:
        """Mean and standard deviation, without noise, on ``rung``; (m,) each, for (m, D) inputs."""
        x = torch.as_tensor(inputs, dtype=torch.float64)
        apart = (self._rungs - rung).abs().double().expand(len(x), -1)
        cross = self._kernel(self._theta, self._squares(x), apart)
        solved = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        zero = torch.zeros(1, 1, dtype=torch.float64)
        prior = self._kernel(self._theta, zero.expand(self._member.shape[1], 1, 1), zero)
        variance = (prior[0, 0] - (solved**2).sum(0)).clamp(min=1e-12)
        return (cross @ self._weights).numpy(), variance.sqrt().numpy()

    def _priors(self, rungs: int) -> tuple[Tensor, Tensor, list[int]]:
        """Mean and deviation of every hyperparameter's logarithm, and how many there are of each kind."""
        variables = self._member.shape[1]
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
        mean = torch.cat([torch.full((n,), math.log(middle), dtype=torch.float64) for n, middle, _ in kinds])
        deviation = torch.cat([torch.full((n,), each, dtype=torch.float64) for n, _, each in kinds])
        return mean, deviation, [n for n, _, _ in kinds]

    def _squares(self, x: Tensor) -> Tensor:
        """(V, m, n) squared distances to the inputs, by variable."""
        return torch.einsum("mnd,dv->vmn", (x[:, None] - self._inputs) ** 2, self._member)

    def _apart(self, rungs: Tensor) -> Tensor:
        return (rungs[:, None] - self._rungs).abs().double()

    def _kernel(self, theta: Tensor, squares: Tensor, apart: Tensor, same: Tensor | None = None) -> Tensor:
        """(m, n) covariances without noise; ``same``: 1 where two results are of one candidate."""
        lengths, joint, shared, fading, product, over, own, _ = torch.split(theta.exp(), self._sizes)
        fade = torch.exp(-apart / over)
        single = _matern(squares / lengths[:, None, None] ** 2)
        both = _matern(torch.einsum("vmn,v->mn", squares, joint**-2))
        found = torch.einsum("vmn,v->mn", single, shared) + product[0] * both
        found = found + fade * (torch.einsum("vmn,v->mn", single, fading) + product[1] * both)
        return found if same is None else found + own * fade * same

    def _noisy(self, theta: Tensor, squares: Tensor, apart: Tensor, same: Tensor, rungs: Tensor) -> Tensor:
        noise = torch.split(theta.exp(), self._sizes)[-1]
        return self._kernel(theta, squares, apart, same) + torch.diag(noise[rungs] + JITTER)

    def _fit(self, squares: Tensor, apart: Tensor, same: Tensor, rungs: Tensor, y: Tensor) -> Tensor:
        """Logarithms of the hyperparameters; the priors' mean where the search for them fails."""
        theta = self._mean.clone().requires_grad_()
        search = torch.optim.LBFGS([theta], max_iter=STEPS, history_size=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            factor = torch.linalg.cholesky_ex(self._noisy(theta, squares, apart, same, rungs)).L
            fit = y @ torch.cholesky_solve(y[:, None], factor)[:, 0] / 2 + factor.diagonal().log().sum()
            found = fit + (((theta - self._mean) / self._deviation) ** 2).sum() / 2
            found.backward()  # type: ignore[no-untyped-call]
            return found

        with torch.enable_grad():
            search.step(loss)  # type: ignore[no-untyped-call]
        return theta.detach() if bool(theta.isfinite().all()) else self._mean


def _matern(squares: Tensor) -> Tensor:
    """Of order 5/2, by squared distances in lengths."""
    distance = torch.sqrt(5 * squares + 1e-9)  # a root has no slope at 0
    return (1 + distance + distance**2 / 3) * torch.exp(-distance)
