"""How a model is trained; every field of a recipe can be set in the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Recipe"]

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Recipe(BaseModel):
    """AdamW with linear warm-up and cosine decay per update, on cross-entropy and, optionally, distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(ge=0)] = 1
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # not on biases, norms and position embeddings
    clip_grad: Positive | None = 1.0  # global norm
    label_smoothing: Fraction = 0.0
    drop_path: Fraction = 0.0
    distill_weight: Annotated[float, Field(ge=0)] = 0.0  # of KL(source || model), beside cross-entropy at weight 1
    distill_temperature: Positive = 1.0
