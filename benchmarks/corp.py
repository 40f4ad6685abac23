"""CORP's equations (arXiv 2602.05243) as a baseline: units and query/key channels chosen, what is lost compensated.

Everything is fitted source to source, and only writers of the stream and the query/key projections change. With S the
channels that stay and P those that go:

    MLP     h_P ~ B h_S + c, B = C_PS (C_SS + lambda)^-1, so W_S' = W_S + W_P B and b' = b + W_P c
    logits  Q_P K_P' ~ Q_S M K_S' in the least squares over images; with I + M = U S V', Q_S U S^1/2 and K_S V S^1/2

Channels are ranked by energy: units by E[h^2] |w|^2, query/key channels by E[q^2] E[k^2]. Residual width, values and
depth stay. Our own code, from the equations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunesweep.models import BlockCut, BlockView, Cut, arch_of, block_views, cut
from prunesweep.models.families import family_of
from prunesweep.models.families.views import AttentionView, MlpView

__all__ = ["corp"]

SHRINKAGE = 1e-3  # lambda, in units of the mean diagonal
_Heads = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]
_Units = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def corp(model: nn.Module, batches: Sequence[torch.Tensor], *, qk: int, mlp: int) -> nn.Module:
    """Cut a ViT to query/key and MLP widths and compensate.

    Args:
        model: the source, in evaluation mode, with biases everywhere and neither q/k norms nor LayerScale.
        batches: calibration images (B, C, rows, columns).
        qk: channels of every head that stay.
        mlp: hidden units of every block that stay.
    """
    arch = arch_of(model)
    x = [family_of(arch).stem(model, batch) for batch in batches]
    heads, units = list[_Heads](), list[_Units]()
    for view in block_views(model, arch):
        assert view.attention is not None
        assert view.mlp is not None
        heads.append(_compensated_logits(view, view.attention, x, arch.stages[0].grid, qk))
        x = [view.attention.after(one, arch.stages[0].grid) for one in x]
        units.append(_compensated_units(view.mlp, x, mlp))
        x = [view.mlp.after(one, 0) for one in x]
    blocks = []
    for block, (kept, _, _), (stay, _, _) in zip(arch.blocks, heads, units, strict=True):
        channels = tuple(tuple((h * block.qk + own).tolist()) for h, own in enumerate(kept))
        values = tuple(tuple(range(h * block.v_widths[h], (h + 1) * block.v_widths[h])) for h in range(block.heads))
        blocks.append(BlockCut(qk=channels, v=values, mlp=tuple(stay.tolist())))
    small = cut(model, Cut(blocks=tuple(blocks))).eval()
    for view, (_, q_maps, k_maps), (_, weight, bias) in zip(block_views(small), heads, units, strict=True):
        assert view.attention is not None
        assert view.mlp is not None
        for rows, maps in ((view.attention.q, q_maps), (view.attention.k, k_maps)):
            matrix = torch.block_diag(*maps).to(rows.weight)  # type: ignore[no-untyped-call]
            assert rows.bias is not None
            rows.weight.copy_(matrix @ rows.weight)
            rows.bias.copy_(matrix @ rows.bias)
        view.mlp.out.layer.weight.copy_(weight)
        view.mlp.out.layer.bias.copy_(bias)
    return small


def _compensated_logits(
    view: BlockView, attention: AttentionView, x: Sequence[torch.Tensor], grid: Sequence[int], width: int
) -> _Heads:
    """Choose the channels (r,) of every head, and the maps (H, r, r) of its queries and keys."""
    pairs = [attention.projected(one, grid)[:2] for one in x]
    queries, keys = (torch.cat([attention.by_head(pair[n]) for pair in pairs]).double() for n in range(2))
    kept, q_maps, k_maps = [], [], []
    for h in range(view.record.heads):
        q, k = queries[:, h], keys[:, h]  # (B, N, E)
        energy = q.square().mean((0, 1)) * k.square().mean((0, 1))
        order = energy.argsort(descending=True)
        own, gone = order[:width].sort().values, order[width:]
        qq, kk = q[..., own].mT @ q[..., own], k[..., own].mT @ k[..., own]  # (B, r, r)
        wanted = (q[..., own].mT @ q[..., gone]) @ (k[..., gone].mT @ k[..., own])
        normal = torch.einsum("bij,bkl->ikjl", qq, kk).reshape(width**2, width**2)  # (kk (x) qq) on M row by row
        normal.diagonal().add_(SHRINKAGE * normal.diagonal().mean())
        found = torch.linalg.solve(normal, wanted.sum(0).reshape(-1)).reshape(width, width)
        u, s, vt = torch.linalg.svd(torch.eye(width).to(found) + found)
        kept.append(own)
        q_maps.append(s.sqrt()[:, None] * u.T)
        k_maps.append(s.sqrt()[:, None] * vt)
    return kept, torch.stack(q_maps), torch.stack(k_maps)


def _compensated_units(mlp: MlpView, x: Sequence[torch.Tensor], width: int) -> _Units:
    """Choose the units (m,), and the weight (D, m) and bias (D,) of the layer that reads them."""
    hidden = torch.cat([mlp.hidden(mlp.norm(one), 0).flatten(0, -2) for one in x]).double()
    weight, bias = mlp.out.weight.double(), mlp.out.bias
    assert bias is not None
    order = (hidden.square().mean(0) * weight.square().sum(0)).argsort(descending=True)
    stay, gone = order[:width].sort().values, order[width:]
    mean = hidden.mean(0)
    covariance = (hidden - mean).T @ (hidden - mean) / len(hidden)
    ridge = covariance[stay][:, stay].clone()
    ridge.diagonal().add_(SHRINKAGE * ridge.diagonal().mean())
    b = torch.linalg.solve(ridge, covariance[stay][:, gone]).T
    lost = weight[:, gone]
    return stay, weight[:, stay] + lost @ b, bias.double() + lost @ (mean[gone] - b @ mean[stay])
