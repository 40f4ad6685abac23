"""Ridge regression from sums that add up over batches and over workers.

Notation: n rows, a (F) features of a row, y (G) targets of a row; C = cov(a), R = cov(a, y - W_0 a), both centred.

    W = W_0 + R' (C + lambda mean(diag C) I)^-1,    b = mean(y) - W mean(a)

The solution is shrunk towards ``W_0``, not towards zero. Features may be in any floating type; sums and solves are in
float64, because float32 normal equations lose a model's smaller directions.
"""

from __future__ import annotations

import torch

from prunesweep.models import UserError

__all__ = ["NormalEquations"]

ROUNDING = 1e-10  # of the mean square of the features: variances below it are not told from rounding errors


class NormalEquations:
    """Sums over rows of features and targets; memory does not depend on the number of rows.

    Args:
        features, targets: F and G, the widths of a row.
        device: where the sums are kept.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._aa = zeros(features, features)
        self._ay = zeros(features, targets)
        self._a = zeros(features)
        self._y = zeros(targets)

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows to the sums.

        Args:
            features: (..., F).
            targets: (..., G), the same leading axes.
        """
        a, y = (t.reshape(-1, t.shape[-1]).to(torch.float64) for t in (features, targets))
        self.rows += len(a)
        self._aa += a.T @ a
        self._ay += a.T @ y
        self._a += a.sum(0)
        self._y += y.sum(0)

    def merge(self, other: NormalEquations) -> None:
        """Add the sums of another worker, or of other batches."""
        self.rows += other.rows
        for name in ("_aa", "_ay", "_a", "_y"):
            getattr(self, name).add_(getattr(other, name))

    @property
    def covariance(self) -> torch.Tensor:
        """(F, F): covariance of the features, divided by the number of rows."""
        mean = self._a / self.rows
        return self._aa / self.rows - torch.outer(mean, mean)

    def solve(
        self, start: torch.Tensor, shrinkage: float, *, centred: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the linear map from features to targets, shrunk towards ``start`` where the rows determine little.

        Args:
            start: W_0, (G, F).
            shrinkage: lambda, in units of the features' mean variance.
            centred: with a bias; without one, moments take the place of covariances and the bias is zero.

        Returns:
            W (G, F) and b (G), in float64.

        Raises:
            UserError: a feature or a target was not finite.
        """
        if not bool(torch.isfinite(self._aa).all() and torch.isfinite(self._ay).all()):
            raise UserError("an activation is not finite on these images; nothing can be computed from it")
        mean_a, mean_y = self._a / self.rows, self._y / self.rows
        if not centred:
            mean_a, mean_y = torch.zeros_like(mean_a), torch.zeros_like(mean_y)
        covariance, start = self._aa / self.rows - torch.outer(mean_a, mean_a), start.to(self._aa)
        residual = self._ay / self.rows - torch.outer(mean_a, mean_y) - covariance @ start.T
        # of features that hardly vary, the covariance is what rounding left of the moments
        floor = ROUNDING * self._aa.diagonal().mean() / self.rows + torch.finfo(torch.float64).tiny
        ridge = covariance.clone()
        ridge.diagonal().add_(torch.maximum(shrinkage * covariance.diagonal().mean(), floor))
        weight = start + torch.cholesky_solve(residual, torch.linalg.cholesky(ridge)).T
        return weight, mean_y - weight @ mean_a
