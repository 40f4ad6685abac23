"""Settings of the methods that have no settings file of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prunesweep.models.settings_table import SettingsTable

__all__ = ["IsomorphicSettings", "NViTSettings", "NoSettings", "ToMeSettings", "UPViTSettings"]

Labels = Annotated[int, Field(ge=1)]


class NoSettings(SettingsTable):
    """Settings of a method that has none."""


class UPViTSettings(SettingsTable):
    """Settings of UP-ViT's importance (``upvit.score``)."""

    importance: Literal["exact", "fisher", "hybrid"] | None = Field(
        default=None,
        description="By removing every unit, by its second-order approximation, or residual channels by removal and "
        "the others approximated. Left out: hybrid for images, fisher for texts.",
    )
    labels_per_image: Labels | Literal["all"] = Field(
        default=4, description="fisher: labels drawn per image or word, or every class of an image."
    )
    memory_mb: int = Field(default=1024, ge=1, description="What one step of exact scoring may take, in MiB.")


class IsomorphicSettings(SettingsTable):
    """Settings of Isomorphic Pruning's rule (``isomorphic.decide``)."""

    round_to: int = Field(default=2, ge=1, description="Widths that lose units are multiples of this.")


class NViTSettings(SettingsTable):
    """Settings of NViT's iterative pruning (``NViTPruning``)."""

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


class ToMeSettings(SettingsTable):
    """Settings of ToMe (``models.tome``)."""

    r: int = Field(ge=0, description="Tokens that every block merges.")
