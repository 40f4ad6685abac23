"""Reading a source block by block, and the statistics of its spaces from one pass of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunesweep.models import Arch, BlockView, UserError, arch_of, block_views
from prunesweep.models.families import family_of
from prunesweep.models.finite import check_finite

from .calibration import images_of
from .support import can_recover

__all__ = ["SourceStatistics", "open_source", "to_model"]


def open_source(model: nn.Module) -> Arch:
    """Return the record of a model whose parts can all be refitted.

    Raises:
        UserError: another family, or a block with a convolution, a token plan or token factors;
            or weights that are not finite.
    """
    arch = arch_of(model)
    if reason := can_recover(arch):
        raise UserError(reason)
    check_finite(model, arch.source)
    return arch


@dataclass
class SourceStatistics:
    """Sums of one pass over the source, in float64; they serve every width and add up over workers.

    ``streams`` has, by stage, the sum over the inputs of all norms of E[u u'], u = Ms / |Ms| (section 2 of the method:
    LayerNorm forgets a token's mean and length). ``heads`` has, by block with attention, the sums of q q' and of k k',
    turned by their places and keys centred over those that a query sees (2, H, E, E); ``hidden``, by block with an
    MLP, the sum and the sum of squares of every hidden unit (2, M), and ``tokens`` of how many tokens. ``rows`` counts
    tokens of the first stage.
    """

    images: int = 0
    rows: int = 0
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def collect(
        cls, model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int, int], None] | None = None
    ) -> SourceStatistics:
        """Run the source once over calibration images.

        Args:
            model: the source; put into evaluation mode for the time of the pass.
            batches: calibration images or texts in any form that ``images_of`` takes.
            progress: told of batches done and of all.

        Raises:
            UserError: the source cannot be read block by block, an image is not one of its, or activations are not
                finite.
        """
        arch = open_source(model)
        images, found, views = images_of(batches, arch), cls(), block_views(model, arch)
        mode = model.training
        model.eval()
        for number, batch in enumerate(images):
            found._add(model, arch, views, to_model(model, batch))
            if progress:
                progress(number + 1, len(images))
        model.train(mode)
        return found

    def merge(self, other: SourceStatistics) -> None:
        """Add the sums of another worker."""
        self.images += other.images
        self.rows += other.rows
        for name in ("streams", "heads", "hidden", "tokens"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for i, value in theirs.items():
                mine[i] = mine[i] + value if i in mine else value

    def directions(self, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute spectrum (D,) and eigenvectors (D, D) of a stage's stream, ascending; the spectrum's sum is 1."""
        values, vectors = torch.linalg.eigh(self.streams[stage])
        values = values.clamp_min(0)
        return values / values.sum(), vectors

    def unit_variance(self, block: int) -> torch.Tensor:
        """Compute the variance of every hidden unit of a block after its activation, (M,)."""
        mean, square = self.hidden[block] / self.tokens[block]
        return (square - mean**2).clamp_min(0)

    def _add(self, model: nn.Module, arch: Arch, views: Sequence[BlockView], inputs: torch.Tensor) -> None:
        family, own = family_of(arch), SourceStatistics(images=len(inputs))
        x = family.stem(model, inputs)
        own.rows = x[..., 0].numel()
        for s, stage in enumerate(arch.stages):
            x = family.entrance(model, arch, s).run(x) if s else x
            own.streams[s] = _directions(x)
            for view in (view for view in views if view.stage == s):
                if view.attention is not None:
                    q, k, v = view.attention.projected(x, stage.grid)
                    own.heads[view.index] = _moments(
                        *(view.attention.turned(view.attention.by_head(t)) for t in (q, k))
                    )
                    out = view.attention.out(view.attention.attended(q, k, v, x))
                    x = x + view.attention.scale(out)
                    own.streams[s] += _directions(x)
                if view.mlp is not None:
                    hidden = view.mlp.hidden(view.mlp.norm(x), stage.grid[0])
                    wide = hidden.flatten(0, -2).double()
                    own.hidden[view.index] = torch.stack([wide.sum(0), (wide**2).sum(0)])
                    own.tokens[view.index] = len(wide)
                    x = x + view.mlp.scale(view.mlp.out(hidden))
                    own.streams[s] += _directions(x)
            if not bool(torch.isfinite(own.streams[s]).all()):
                raise UserError(
                    f"{arch.source}: an activation is not finite on these images; nothing can be computed from it"
                )
        self.merge(own)


def to_model(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Move a batch to a model's device; images to its dtype, too, word numbers not."""
    parameter = next(model.parameters())
    return inputs.to(parameter) if inputs.is_floating_point() else inputs.to(parameter.device)


def _directions(x: torch.Tensor) -> torch.Tensor:
    """Sum u u' over tokens (D, D), u the centred token of length 1; constant tokens add nothing."""
    wide = x.flatten(0, -2).double()
    centred = wide - wide.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return unit.T @ unit


def _moments(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Sum q q', and k k' with keys centred over a query's own, over tokens (B, H, N, E) as they meet, (2, H, E, E)."""
    q, k = q.double(), k.double()
    k = k - k.mean(2, keepdim=True)
    return torch.stack([torch.einsum("bhne,bhnf->hef", t, t) for t in (q, k)])
