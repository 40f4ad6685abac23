"""Keep the model that is closest to the source on images that it was not trained on: an epoch's, or the one given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunesweep.models.feature_head import is_headless

from .batches import own_share
from .data import Data
from .evaluation import EVAL_BATCH, evaluate
from .recipe import Recipe
from .world import World

__all__ = ["ClosestModel", "Kept", "held_out_images", "trained_images"]

MOST = 2000  # held-out images


@dataclass(frozen=True)
class Kept:
    """The model that was kept: its ``epoch``, 0 being the model as it came, and what decided.

    ``distances`` from the source are means over the held-out ``images``, from epoch 0 on, by ``measure``: ``kl``, the
    KL divergence in nats; ``relative_error`` of the features of a backbone without a head.
    """

    epoch: int
    images: int
    measure: str
    distances: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for a model's provenance, JSON-ready."""
        return {
            "epoch": self.epoch,
            "held_out_images": self.images,
            f"held_out_{self.measure}": list(self.distances),
        }

    def __str__(self) -> str:
        far, epochs = self.distances, len(self.distances) - 1
        what = "KL to the source" if self.measure == "kl" else "relative error of the features"
        found = f"{what} on {self.images:,} held-out training images {far[self.epoch]:.4g}"
        if not self.epoch:
            return f"kept the model as it came (epoch 0): {found}; after {epochs} epochs {far[-1]:.4g}"
        last = "" if self.epoch == epochs else f", after {epochs} {far[-1]:.4g}"
        return f"kept epoch {self.epoch} of {epochs}: {found}; before training {far[0]:.4g}{last}"


def held_out_images(images: int, share: float) -> torch.Tensor:
    """Return the indices of the training images that are held out, ascending: the same ones for any seed.

    They come last in the order in which ``Data.calibration`` draws with seed 0, so what a small model was computed from
    is not among them, as far as there are images.

    Args:
        images: number of training images, at least 2.
        share: the share that is held out, of which at most ``MOST`` images.
    """
    count = min(max(1, round(share * images)), MOST)
    return _drawn(images)[images - count :].sort().values


def trained_images(images: int, recipe: Recipe) -> torch.Tensor | None:
    """Return the indices of the training images that a recipe trains on; None if it is all of them.

    Args:
        images: number of training images.
        recipe: the recipe.
    """
    if recipe.keep == "last":
        return None
    return _drawn(images)[: images - len(held_out_images(images, recipe.held_out))].sort().values


def _drawn(images: int) -> torch.Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))


class ClosestModel:
    """The weights that are closest to the source on held-out images so far.

    All workers measure together and decide alike.

    Args:
        data: the data set.
        recipe: says how many training images are held out.
        source: the source, on its device.
        world: the workers.
    """

    def __init__(self, data: Data, recipe: Recipe, source: nn.Module, world: World) -> None:
        self.source, self.world = source.eval(), world
        self.measure = "relative_error" if is_headless(source) else "kl"
        self.images = held_out_images(data.train_images, recipe.held_out)
        own = self.images[own_share(len(self.images), world)]
        self.loader = data.plain_loader(own.tolist(), EVAL_BATCH)
        self.epoch, self.distances, self.weights = 0, list[float](), dict[str, torch.Tensor]()

    def consider(self, model: nn.Module) -> float:
        """Measure the model of the next epoch, the first one being epoch 0; keep its weights if it is the closest.

        Returns:
            Its distance.
        """
        far = evaluate(model, self.loader, self.world, source=self.source)[self.measure]
        self.distances.append(far)
        best = self.distances[self.epoch]
        if len(self.distances) == 1 or far < best or (math.isnan(best) and not math.isnan(far)):
            self.epoch = len(self.distances) - 1
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return far

    def restore(self, model: nn.Module, report: Callable[[Kept], None] | None) -> None:
        """Give ``model`` the weights that are kept, and say which they are."""
        model.load_state_dict(self.weights, strict=True)
        if report:
            report(Kept(self.epoch, len(self.images), self.measure, tuple(self.distances)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"epoch": self.epoch, "distances": list(self.distances), "weights": self.weights}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Take over what an earlier run measured."""
        self.epoch, self.distances = int(found["epoch"]), list(found["distances"])
        self.weights = dict(found["weights"])
