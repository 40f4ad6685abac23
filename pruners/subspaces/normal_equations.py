"""Ridge regression from sums that add up over batches and over workers.

Notation: n rows, a (F) features of a row, y (G) targets of a row; C = cov(a), R = cov(a, y - W_0 a), both centred.

    W = W_0 + R' (C + lambda mean(diag C) I)^-1,    b = mean(y) - W mean(a)

The solution is shrunk towards ``W_0``, not towards zero. Sums and solves are in float64, because float32 normal
equations lose a model's smaller directions. Products within a batch are in the features' own type, of rows without the
batch's mean: what rounding takes from them is as little as what it took from the features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from prunesweep.models import UserError

__all__ = ["Moments", "NormalEquations"]

ROUNDING = 1e-10  # of the mean square of the features: variances below it are not told from rounding errors
PANEL = 256  # rows of a Gram matrix at a time, from the diagonal on: the rest is mirrored


class _Rows(NamedTuple):
    """Rows of a batch: without their mean (n, G), the mean, and what rounding left of the sum of the centred ones."""

    centred: torch.Tensor
    mean: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Rows:
        rows = tensor.reshape(-1, tensor.shape[-1])
        mean = rows.mean(0)
        centred = rows - mean
        return cls(centred, mean.double(), centred.sum(0).double())

    @property
    def sum(self) -> torch.Tensor:
        """(G,)."""
        return len(self.centred) * self.mean + self.rest


class Moments:
    """Sums of rows and of their products; memory does not depend on the number of rows.

    Args:
        features: F, the width of a row.
        device: where the sums are kept.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Add rows (..., F) to the sums."""
        self._add(_Rows.of(features))

    def _add(self, own: _Rows) -> None:
        self.rows += len(own.centred)
        self.products += _gram(own.centred)
        self.products.addr_(own.mean, own.sum).addr_(own.rest, own.mean)
        self.sum += own.sum

    def merge(self, other: Moments) -> None:
        """Add the sums of another worker, or of other batches."""
        self.rows += other.rows
        self.products += other.products
        self.sum += other.sum

    @property
    def mean(self) -> torch.Tensor:
        """(F,)."""
        return self.sum / self.rows

    @property
    def covariance(self) -> torch.Tensor:
        """(F, F), divided by the number of rows."""
        return self.products / self.rows - torch.outer(self.mean, self.mean)


class NormalEquations:
    """Sums over rows of features and targets; memory does not depend on the number of rows.

    Args:
        features, targets: F and G, the widths of a row.
        device: where the sums are kept.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        self.features = Moments(features, device)
        self._ay = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self._y = torch.zeros(targets, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows to the sums.

        Args:
            features: (..., F).
            targets: (..., G), the same leading axes.
        """
        a, y = _Rows.of(features), _Rows.of(targets)
        self.features._add(a)
        dtype = torch.promote_types(a.centred.dtype, y.centred.dtype)
        self._ay += a.centred.T.to(dtype) @ y.centred.to(dtype)
        self._ay.addr_(a.mean, y.sum).addr_(a.rest, y.mean)
        self._y += y.sum

    def merge(self, other: NormalEquations) -> None:
        """Add the sums of another worker, or of other batches."""
        self.features.merge(other.features)
        self._ay += other._ay
        self._y += other._y

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
        a = self.features
        if not bool(torch.isfinite(a.products).all() and torch.isfinite(self._ay).all()):
            raise UserError("an activation is not finite on these images; nothing can be computed from it")
        mean_a, mean_y, covariance = a.mean, self._y / a.rows, a.covariance
        if not centred:
            mean_a, mean_y, covariance = torch.zeros_like(mean_a), torch.zeros_like(mean_y), a.products / a.rows
        start = start.to(covariance)
        residual = self._ay / a.rows - torch.outer(mean_a, mean_y) - covariance @ start.T
        # of features that hardly vary, the covariance is what rounding left of the moments
        floor = ROUNDING * a.products.diagonal().mean() / a.rows + torch.finfo(torch.float64).tiny
        ridge = covariance.clone()
        ridge.diagonal().add_(torch.maximum(shrinkage * covariance.diagonal().mean(), floor))
        weight = start + torch.cholesky_solve(residual, torch.linalg.cholesky(ridge)).T
        return weight, mean_y - weight @ mean_a


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Compute A'A (F, F) of rows A (n, F)."""
    found = rows.new_empty(rows.shape[1], rows.shape[1])
    for begin in range(0, len(found), PANEL):
        end = begin + PANEL
        found[begin:end, begin:] = rows[:, begin:end].T @ rows[:, begin:]
        found[end:, begin:end] = found[begin:end, end:].T
    return found
