"""The maps from a source's spaces to those of a smaller model, in closed form.

Notation: D residual width, k that of the small model, d width of a head, r its rank; S_q = E[q q'], S_k = covariance of
the keys, centred per image; C_h covariance of a head's attention output, W_o,h its columns of the output projection.
"""

from __future__ import annotations

import torch

__all__ = ["best_pairs", "query_key_maps", "residual_map", "root", "value_map"]

CUT_OFF = 1e-9  # of the largest eigenvalue: smaller ones are lifted to it before roots are taken


def root(matrix: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Compute the symmetric square root of a covariance, or the inverse of it.

    Args:
        matrix: (d, d) or (..., d, d), symmetric and positive semidefinite.
        inverse: give the inverse of the root.
    """
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[..., -1:].clamp_min(torch.finfo(matrix.dtype).tiny)
    values = torch.maximum(values, largest * CUT_OFF)
    return vectors @ torch.diag_embed(values ** (-0.5 if inverse else 0.5)) @ vectors.mT


def residual_map(basis: torch.Tensor, width: int, seed: int = 0) -> torch.Tensor:
    """Compute T (D, k), which maps the residual stream of the source to that of the small model, z = x T.

    T = P U' + 1_D 1_k' / sqrt(D k): P are the k - 1 leading directions of the centred stream, U (k, k - 1) is any
    orthonormal basis orthogonal to the ones, so that the mean of a token goes to the mean and LayerNorm commutes with
    the map. With k = D nothing is mapped.

    Args:
        basis: (D, D) eigenvectors of the covariance of centred, normalised tokens, in ascending order.
        width: k, at least 2.
        seed: of the free rotation U.
    """
    full = len(basis)
    if width == full:
        return torch.eye(full, dtype=basis.dtype, device=basis.device)
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([torch.ones(width, 1), torch.randn(width, width - 1, generator=generator)], 1)
    rotation = torch.linalg.qr(start.to(basis.dtype))[0][:, 1:].to(basis.device)
    return basis[:, full - (width - 1) :] @ rotation.T + 1 / (full * width) ** 0.5


def query_key_maps(queries: torch.Tensor, keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute maps (r, d) of a head's queries and keys whose products are the best rank-r logits in the mean square.

    SVD of S_q^1/2 S_k^1/2 = U S V'; q' = S_r^1/2 U_r' S_q^-1/2 q and k' = S_r^1/2 V_r' S_k^-1/2 k.

    Args:
        queries: S_q (d, d).
        keys: S_k (d, d), of keys centred per image: softmax forgets what is constant over keys.
        rank: r.
    """
    u, s, vt = torch.linalg.svd(root(queries) @ root(keys))
    weight = s[:rank].sqrt()[:, None]
    return weight * (u[:, :rank].T @ root(queries, inverse=True)), weight * (vt[:rank] @ root(keys, inverse=True))


def best_pairs(queries: torch.Tensor, keys: torch.Tensor, rank: int, *, turned: bool = True) -> torch.Tensor:
    """Choose the pairs of a head's channels whose products with each other are largest in the mean square.

    Where pairs are turned by places, maps across them are none of queries and keys; of a pair, it is sum S_q S_k.

    Args:
        queries: S_q (d, d), the first channels of all pairs before the second ones.
        keys: S_k (d, d), of keys centred per image.
        rank: number of pairs.
        turned: the channels of a pair add up in one logit; else they are those of two maps, whose energies add up.

    Returns:
        Their numbers, (rank,), ascending.
    """
    first, second = torch.arange(len(queries), device=queries.device).chunk(2)
    product = queries * keys
    energy = product[first, first] + 2 * turned * product[first, second] + product[second, second]
    return energy.topk(rank).indices.sort().values


def value_map(output: torch.Tensor, projection: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the map (r, d) of a head's values and its columns (k, r) of the output projection, the best of rank r.

    SVD of W_o,h C_h^1/2 = U S V'; W_v' = V_r' C_h^-1/2 W_v and W_o' = U_r S_r.

    Args:
        output: C_h (d, d), covariance of the head's attention output.
        projection: W_o,h (k, d), into the small model's stream.
        rank: r, at most d.
    """
    u, s, vt = torch.linalg.svd(projection @ root(output), full_matrices=True)
    found = min(rank, len(s))
    columns = torch.zeros(len(projection), rank, dtype=projection.dtype, device=projection.device)
    columns[:, :found] = u[:, :found] * s[:found]
    return vt[:rank] @ root(output, inverse=True), columns
