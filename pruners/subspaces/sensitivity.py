"""What a small change of a residual stream does to a source's output, from a few backward passes.

For random signs r, one per output, E_r[(sum_k r_k d_k)^2] = |d|^2 (Hutchinson's estimator). With g the gradient of
sum_k r_k logit_k by a stream, a change delta of that stream changes the sum by g . delta, in first order, so the mean
of (g . delta)^2 over images and draws of r estimates the squared change of the logits: one inner product per candidate
change in place of a forward pass through the rest of the model. Signs are centred over the classes, since softmax
forgets what all logits have in common; over features, of which nothing is forgotten, they are not. On the digits
example this ranks 191 narrowed spaces as true forward passes do (Spearman's correlation 0.998).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from prunesweep.models import Arch, arch_of
from prunesweep.models.families import family_of
from prunesweep.pruners.divergence import feature_error

from .batches import Batches
from .source import to_model
from .streams import Half, steps

__all__ = ["Sensitivity", "logit_error", "output_error"]

PROBES = 2  # draws of signs per image
KEPT = 512 * 2**20  # bytes of gradients, at most, beyond the first batch


def logit_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Mean squared distance of logits (B, ..., K), each centred over its K classes.

    On images that a source was trained on this ranks small models better than the KL divergence, which saturated
    probabilities hardly move.
    """
    a, b = wanted.double(), got.double()
    difference = a - b
    return (difference - difference.mean(-1, keepdim=True)).square().flatten(1).sum(1).mean().item()


def output_error(arch: Arch, wanted: torch.Tensor, got: torch.Tensor) -> float:
    """``logit_error`` of a model's answers; of a backbone's features, their mean squared distance."""
    return 2 * feature_error(wanted, got).mean().item() if arch.headless else logit_error(wanted, got)


class Sensitivity:
    """Gradients of random sums of a source's outputs by its streams behind the halves of its blocks.

    Args:
        model: the source, in evaluation mode.
        batches: images (B, C, rows, columns) or texts (B, T); the first ones are read, up to ``KEPT``.
        seed: of the signs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor], seed: int = 0) -> None:
        self.model, self.arch = model, arch_of(model)
        generator = torch.Generator().manual_seed(seed)
        halves = [step.half for step in steps(model, self.arch) if step.half is not None]
        # (PROBES, B, ..., D) by batch
        self.gradients = {half: Batches(limit=Batches.IN_MEMORY // len(halves)) for half in halves}
        self.batches: list[torch.Tensor] = []
        used = 0
        for batch in batches:
            if used > KEPT:
                break
            self.batches.append(batch)
            for half, gradient in self._of(to_model(model, batch), generator).items():
                self.gradients[half].append(gradient)
                used += gradient.nbytes

    def loss(self, block: int, half: str, changes: Iterable[torch.Tensor]) -> float:
        """Estimate the squared change of the logits, per image.

        Args:
            block: number of a block.
            half: ``attention`` or ``mlp``, behind which the stream changes.
            changes: of the stream, (B, ..., D), for every batch that is in ``batches``.
        """
        total, images = 0.0, 0
        for gradient, change in zip(self.gradients[block, half], changes, strict=True):
            found = (gradient * change).flatten(2).double().sum(-1)
            total += found.square().mean(0).sum().item()
            images += len(change)
        return total / images

    @torch.enable_grad()
    def _of(self, batch: torch.Tensor, generator: torch.Generator) -> dict[Half, torch.Tensor]:
        points, output = self._run(batch)
        if not points:  # all blocks pass their input on
            return {}
        found: dict[Half, list[torch.Tensor]] = {half: [] for half in points}
        for _ in range(PROBES):
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            if not self.arch.headless:
                signs = signs - signs.mean(-1, keepdim=True)
            gradients = torch.autograd.grad((output * signs).sum(), list(points.values()), retain_graph=True)
            for half, gradient in zip(points, gradients, strict=True):
                found[half].append(gradient)
        return {half: torch.stack(own) for half, own in found.items()}

    def _run(self, batch: torch.Tensor) -> tuple[dict[Half, torch.Tensor], torch.Tensor]:
        """Compute the streams behind all halves, and the output, with a graph from the first stream on."""
        family, points = family_of(self.arch), dict[Half, torch.Tensor]()
        x = family.stem(self.model, batch).detach().requires_grad_()
        for step in steps(self.model, self.arch):
            x = step.run(x)
            if step.half is not None:
                points[step.half] = x
        return points, family.finish(self.model, self.arch, x)
