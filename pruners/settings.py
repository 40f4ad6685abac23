"""Settings of the methods that have no settings file of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["IsomorphicSettings", "NViTSettings", "NoSettings", "ToMeSettings", "UPViTSettings"]

Labels = Annotated[int, Field(ge=1)]


class NoSettings(BaseModel):
    """Settings of a method that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class UPViTSettings(BaseModel):
    """Settings of UP-ViT's importance (``upvit.score``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    importance: Literal["exact", "fisher", "hybrid"] | None = Field(
        default=None,
        description="By removing every unit, by its second-order approximation, or residual channels by removal and "
        "the others approximated. Left out: hybrid for images, fisher for texts.",
    )
    labels_per_image: Labels | Literal["all"] = Field(
        default=4, description="fisher: labels drawn per image or word, or every class of an image."
    )
    memory_mb: int = Field(default=1024, ge=1, description="What one step of exact scoring may take, in MiB.")


class IsomorphicSettings(BaseModel):
    """Settings of Isomorphic Pruning's rule (``isomorphic.decide``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_to: int = Field(default=2, ge=1, description="Widths that lose units are multiples of this.")


class NViTSettings(BaseModel):
    """Settings of NViT's iterative pruning (``NViTPruning``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budgets: tuple[float, ...] = Field(
        default=(0.5,), min_length=1, description="MACs of the results over the source's."
    )
    eta: float = Field(default=1.0, ge=0, description="Weight of a unit's cost against its saliency.")
    interval: int = Field(default=100, ge=1, description="Updates between two pruning steps.")
    groups_per_step: int = Field(default=2, ge=1, description="Groups that one pruning step removes.")
    schedule: Literal["live", "reference"] = Field(
        default="live", description="Rank what is left, or, as the released code, all there was."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the average of saliency over pruning steps.")


class ToMeSettings(BaseModel):
    """Settings of ToMe (``models.tome``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(ge=0, description="Tokens that every block merges.")
