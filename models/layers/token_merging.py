"""Prune-and-Merge: a fixed plan that gives a block fewer tokens and its output all of them again.

    z = M x;   z <- block(z);   y = R z + (1 - m) x

M (c, N) sums tokens into merged ones, R (N, c) spreads the result back, m marks the tokens that take part; the others
pass the block by (arXiv 2503.23455, methods of record: the released code's "merge to centre" plan). Between blocks
there are always N tokens, so the grid of patches survives.

Two forms of one function: *sparse*, where every token belongs to at most one merged token, costs O(N D) and no matrix
product; *dense* holds full M and R, as training all their entries leaves them. A ``TokenPlan`` is the decision for one
block, in either form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunesweep.models.errors import UserError, nearest

__all__ = ["FORMS", "DenseMerge", "SparseMerge", "TokenPlan", "add_rows", "default_groups", "make_merge"]

FORMS = ("sparse", "dense")


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """A decision for one block: which token goes to which merged token, and with what weight.

    ``kept`` is c, prefix tokens included; ``assign`` (N) holds the merged token of every token, -1 where it passes the
    block by; ``weight`` (N) its entry of M, 0 where it passes. Prefix tokens are alone: token j in merged token j. A
    merged token may have no members; it is then zero. ``form`` is that of the module: ``sparse`` or ``dense``.
    """

    kept: int
    assign: tuple[int, ...]
    weight: tuple[float, ...]
    form: str = "sparse"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenPlan:
        """Read ``dataclasses.asdict``'s form, from JSON too.

        Raises:
            UserError: an unknown or missing key, or a value of another type.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"token plan: must be a JSON object, got {type(data).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise UserError(
                    f"token plan: unknown key {key!r}; known: {', '.join(known)}. {nearest(key, known)}".strip()
                )
        for key in known[:3]:
            if key not in data:
                raise UserError(f"token plan: lacks {key!r}")
        for key, kinds in (("assign", (int,)), ("weight", (int, float))):
            if not isinstance(data[key], (list, tuple)) or any(type(entry) not in kinds for entry in data[key]):
                raise UserError(f"token plan: {key} = {data[key]!r}: must be a list of numbers")
        return cls(**{**data, "assign": tuple(data["assign"]), "weight": tuple(data["weight"])})

    def check(self, tokens: int, prefix: int, where: str = "token plan") -> None:
        """Raise UserError where this is no plan for ``tokens`` tokens, the first ``prefix`` of them without a place."""
        if self.form not in FORMS:
            raise UserError(f"{where}.form = {self.form!r}: must be one of {', '.join(FORMS)}")
        for name in ("assign", "weight"):
            if len(getattr(self, name)) != tokens:
                raise UserError(
                    f"{where}.{name} has {len(getattr(self, name))} entries, the block has {tokens} tokens ({prefix} "
                    "without a patch): a plan fits one grid of patches only; plan again for this image size"
                )
        if type(self.kept) is not int or not prefix < self.kept <= tokens:
            raise UserError(f"{where}.kept = {self.kept!r}: must lie in {prefix + 1}..{tokens}")
        for j, (row, weight) in enumerate(zip(self.assign, self.weight, strict=True)):
            if not -1 <= row < self.kept:
                raise UserError(f"{where}.assign[{j}] = {row}: must lie in -1..{self.kept - 1}")
            if (j < prefix or row in range(prefix)) and row != j:
                raise UserError(f"{where}.assign[{j}] = {row}: the first {prefix} must be alone, token k in row k of M")
            if not math.isfinite(weight) or (weight <= 0 if row >= 0 else weight != 0):
                allowed = "finite and above 0" if row >= 0 else "0 where a token passes the block by"
                raise UserError(f"{where}.weight[{j}] = {weight!r}: must be {allowed}")

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return the state of a block's ``token_merge``.

        A sparse one has ``assign``, ``weight`` and ``recover``, a dense one ``matrix``, ``recover`` and ``takes_part``.

        R is the pseudo-inverse of M, which has disjoint rows: R[j, i] = M[i, j] / sum over l of M[i, l]^2.
        """
        assign, weight = torch.tensor(self.assign), torch.tensor(self.weight, dtype=torch.float64)
        takes_part, row = assign >= 0, assign.clamp(min=0)
        squares = torch.zeros(self.kept, dtype=torch.float64).index_add(0, row, weight**2)
        recover = torch.where(takes_part, weight / squares[row], 0.0)
        if self.form == "sparse":
            return {"assign": assign, "weight": weight.to(dtype), "recover": recover.to(dtype)}
        member = (assign == torch.arange(self.kept)[:, None]).double()
        matrix, spread = member * weight, (member * recover).T.contiguous()
        return {"matrix": matrix.to(dtype), "recover": spread.to(dtype), "takes_part": takes_part}


def default_groups(tokens: int, kept: int, prefix: int) -> torch.Tensor:
    """Assign every token to a merged token: prefix tokens alone, patches in equal runs, row by row.

    Args:
        tokens: N, prefix tokens included.
        kept: number of merged tokens, prefix tokens included.
        prefix: number of prefix tokens.

    Returns:
        Merged token of every token, (N,) int64.
    """
    patches = torch.arange(tokens - prefix) * (kept - prefix) // (tokens - prefix)
    return torch.cat([torch.arange(prefix), prefix + patches])


class SparseMerge(nn.Module):
    """Token merging by index: ``assign`` (N,) int64 is every token's merged token, -1 where it passes the block by.

    ``weight`` (N,) holds M's non-zero entry of every token, ``recover`` (N,) R's. A new module sums and averages equal
    runs of patches; a plan is put in by loading.
    """

    def __init__(self, tokens: int, kept: int, prefix: int) -> None:
        super().__init__()
        self.kept = kept
        groups = default_groups(tokens, kept, prefix)
        sizes = torch.zeros(kept).index_add(0, groups, torch.ones(tokens))
        self.assign: torch.Tensor
        self.register_buffer("assign", groups)
        self.weight = nn.Parameter(torch.ones(tokens))
        self.recover = nn.Parameter(1 / sizes[groups])

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Compute M x: (B, N, D) to (B, c, D)."""
        row = self.assign.clamp(min=0)  # tokens that pass by add nothing to merged token 0
        return add_rows(x, row, torch.where(self.assign < 0, 0, self.weight), self.kept)

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute R z + (1 - m) x: (B, c, D) and (B, N, D) to (B, N, D)."""
        B, N, D = x.shape
        passes = self.assign < 0
        if not _in_bags(x):
            y = z.index_select(1, self.assign.clamp(min=0)) * self.recover[:, None]
            return torch.where(passes[:, None], x, y)
        both = torch.cat([z, x], dim=1)
        place = torch.where(passes, self.kept + torch.arange(N), self.assign)
        index = (torch.arange(B)[:, None] * (self.kept + N) + place).flatten()
        return _bags(both, index, torch.arange(len(index)), torch.where(passes, 1, self.recover)).view(B, N, D)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return M (c, N), R (N, c) and m (N,) bool."""
        member = self.assign == torch.arange(self.kept, device=self.assign.device)[:, None]
        return member * self.weight, (member * self.recover).T, self.assign >= 0


def add_rows(x: torch.Tensor, row: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Add weighted tokens into rows: token j of ``x``, times ``weight[j]``, is added to row ``row[j]``.

    On a CPU the result has the same bits every time; on a GPU if ``torch.use_deterministic_algorithms`` asks for it.

    Args:
        x: tokens (B, N, D).
        row: row of every token, (N,) int64.
        weight: factor of every token, (N,).
        rows: number of rows.

    Returns:
        (B, rows, D).
    """
    B, N, D = x.shape
    if not _in_bags(x):
        return x.new_zeros(B, rows, D).index_add(1, row, x * weight.to(x.dtype)[:, None])
    row, order = row.sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(rows))
    image = torch.arange(B)[:, None]
    return _bags(x, (image * N + order).flatten(), (image * N + starts).flatten(), weight[order]).view(B, rows, D)


def _in_bags(x: torch.Tensor) -> bool:
    """Whether to sum by ``embedding_bag``: on a CPU it is many times as fast as ``index_add``, but not traced."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # bags count images: a constant
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not traced


def _bags(x: torch.Tensor, index: torch.Tensor, starts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum weighted tokens of x (B, N, D), whose indices count over the batch; ``weight`` is one image's."""
    weights = weight.to(x.dtype).repeat(x.shape[0])
    return F.embedding_bag(index, x.reshape(-1, x.shape[2]), starts, mode="sum", per_sample_weights=weights)


class DenseMerge(nn.Module):
    """Token merging by matrices: ``matrix`` (c, N) is M, ``recover`` (N, c) is R, ``takes_part`` (N,) bool is m."""

    def __init__(self, tokens: int, kept: int, prefix: int) -> None:
        super().__init__()
        groups = default_groups(tokens, kept, prefix)
        matrix = (groups[None] == torch.arange(kept)[:, None]).float()
        self.matrix = nn.Parameter(matrix)
        self.recover = nn.Parameter((matrix / matrix.sum(1, keepdim=True)).T.contiguous())
        self.takes_part: torch.Tensor
        self.register_buffer("takes_part", torch.ones(tokens, dtype=torch.bool))

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Compute M x: (B, N, D) to (B, c, D)."""
        return self.matrix @ x

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute R z + (1 - m) x: (B, c, D) and (B, N, D) to (B, N, D)."""
        return torch.addcmul(self.recover @ z, x, (~self.takes_part[:, None]).to(x.dtype))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return M (c, N), R (N, c) and m (N,) bool."""
        return self.matrix, self.recover, self.takes_part


def make_merge(form: str, tokens: int, kept: int, prefix: int) -> SparseMerge | DenseMerge:
    """Make the module that merges and restores the tokens of a block.

    Args:
        form: ``Block.merge``, ``sparse`` or ``dense``.
        tokens: N, prefix tokens included.
        kept: number of merged tokens, prefix tokens included.
        prefix: number of prefix tokens.
    """
    return SparseMerge(tokens, kept, prefix) if form == "sparse" else DenseMerge(tokens, kept, prefix)
