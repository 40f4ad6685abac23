"""Recipes: how a model is trained. Every field of a recipe can be set in the configuration.

``load_recipe`` knows the recipes of the published methods by name (``training/recipes/*.toml``).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from prunesweep.models import UserError
from prunesweep.models.errors import explain, nearest
from prunesweep.models.io.reading import parse_toml, read_toml
from prunesweep.models.settings_table import SettingsTable

__all__ = ["Distill", "Recipe", "load_recipe", "recipe_names"]

RECIPES = files("prunesweep.training") / "recipes"

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]


class Distill(SettingsTable):
    """One term of distillation, added to the loss with ``weight``.

    With student's and teacher's logits z and z', pooled features f and f' before the classifier (of a backbone without
    a head, its output), and temperature T, the term is, as a mean over images,

        soft       T^2 KL(softmax(z' / T) || softmax(z / T))    Hinton et al. 2015, arXiv 1503.02531
        hard       cross-entropy of z to the class argmax z'    Touvron et al. 2021 (DeiT), arXiv 2012.12877
        feature    mean of (f - f')^2

    ``on = "token"`` takes the logits of the student's distillation head instead of its output. ``cache_teacher``
    computes the teacher's logits on the training images once; that needs images that look the same in every epoch.
    """

    teacher: str = Field(
        default="source",
        description="The source model, a saved model's folder or a timm name with its pretrained weights.",
    )
    kind: Literal["soft", "hard", "feature"] = Field(
        default="soft",
        description="soft: KL divergence of the outputs; hard: the teacher's class as a label; feature: squared "
        "distance before the head.",
    )
    on: Literal["output", "token"] = Field(
        default="output", description="output, or token: the student's distillation head."
    )
    weight: NotNegative = Field(default=1.0, description="Of the term in the loss.")
    temperature: Positive = Field(default=1.0, description="Of soft terms.")
    cache_teacher: bool = Field(
        default=False, description="Compute the teacher's logits once; needs images that look the same in every epoch."
    )

    @model_validator(mode="after")
    def _known_teacher(self) -> Self:
        import timm

        bare = self.teacher.split(".")[0]
        if self.weight and self.teacher != "source" and not timm.is_model(bare):
            hint = nearest(bare, timm.list_models())
            raise ValueError(f"teacher = {self.teacher!r}: neither 'source' nor a timm model. {hint}".strip())
        return self


class Recipe(SettingsTable):
    """Optimizer, schedule, augmentation and losses of one training run."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = Field(default=1, description="Passes over the training images.")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=64, description="Images per update, over all workers and parts."
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Parts in which a worker does its share of a batch."
    )
    optimizer: str = Field(default="adamw", description="Name of a timm optimizer.")
    lr: Annotated[float, Field(gt=0, le=100)] = Field(default=5e-4, description="Learning rate after warm-up.")
    lr_by_share: tuple[tuple[Part, Positive], ...] = Field(
        default=(), description="Pairs of a share of the source's MACs and a rate, in place of lr."
    )
    lr_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Batch size that lr is for; the rate is proportional to the real one. Unset: lr as it is.",
    )
    min_lr: NotNegative = Field(default=0.0, description="Learning rate at the end of a cosine.")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="Of the learning rate, per update.")
    warmup_epochs: Annotated[int, Field(ge=0)] = Field(default=0, description="Epochs in which the rate rises.")
    warmup_updates: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Updates in which the rate rises, instead of epochs; a quarter of all updates at most."
    )
    warmup_lr: NotNegative | None = Field(
        default=None, description="Rate at the start of warm-up; unset: a hundredth of lr."
    )
    weight_decay: NotNegative = Field(default=0.05, description="Of the optimizer.")
    decay_all: bool = Field(default=False, description="Decay biases, norms, tokens and position embeddings too.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Factor of lr from block to block, downwards; unset: 1."
    )
    clip_grad: NotNegative = Field(default=1.0, description="Largest global norm of the gradient; 0 is off.")
    label_smoothing: Fraction = Field(default=0.0, description="Share of the label that is spread over all classes.")
    drop_path: Fraction = Field(default=0.0, description="Stochastic depth rate of the last block.")
    mixup: NotNegative = Field(default=0.0, description="Alpha of the Beta distribution; 0 is off.")
    cutmix: NotNegative = Field(default=0.0, description="Alpha of the Beta distribution; 0 is off.")
    mix_prob: Share = Field(default=1.0, description="Probability that a batch is mixed.")
    switch_prob: Share = Field(default=0.5, description="Probability of cutmix, not mixup, if both are on.")
    auto_augment: str | None = Field(
        default=None, description="A timm policy such as rand-m9-mstd0.5-inc1; for image files."
    )
    color_jitter: NotNegative = Field(
        default=0.4, description="Strength of changes of brightness, contrast and saturation."
    )
    random_erasing: Share = Field(default=0.0, description="Probability that a part of an image is erased.")
    fixed_view: bool = Field(
        default=False, description="Training images as for evaluation: no random crop, flip, jitter or move."
    )
    repeats: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Views of an image in an epoch of the same length (repeated augmentation)."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay per update of an average of the weights, which is evaluated and kept; unset: none.",
    )
    amp: Literal["off", "bf16", "fp16"] = Field(default="off", description="Mixed precision.")
    channels_last: bool = Field(default=False, description="Memory order of images.")
    compile: bool = Field(default=False, description="Train through torch.compile.")
    keep: Literal["last", "best"] = Field(
        default="last",
        description="best: the epoch of lowest KL to the source on held-out images, the model as given among them.",
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of the training images for keep = best, at most 2,000 images."
    )
    loss_weight: NotNegative = Field(default=1.0, description="Of cross-entropy.")
    adapts: bool = Field(
        default=False, description="Without labels no cross-entropy; without a head soft terms compare features."
    )
    distill: tuple[Distill, ...] = Field(default=(), description="Terms of distillation, added to the loss.")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name not in (known := list_optimizers()):
            raise ValueError(f"timm has none of that name. {nearest(name, known)}".strip())
        return name

    @field_validator("auto_augment")
    @classmethod
    def _known_policy(cls, policy: str | None) -> str | None:
        from timm.data import create_transform

        if policy:
            try:
                create_transform((3, 32, 32), is_training=True, auto_augment=policy)
            except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"is no policy of timm's, such as rand-m9-mstd0.5-inc1: {error}") from error
        return policy

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs}: must be below epochs = {self.epochs}")
        if self.warmup_updates and self.warmup_epochs:
            raise ValueError(
                f"warmup_updates = {self.warmup_updates} with warmup_epochs = {self.warmup_epochs}: set one to 0"
            )
        shares = [share for share, _ in self.lr_by_share]
        if len(set(shares)) < len(shares):
            raise ValueError(f"lr_by_share = {[list(pair) for pair in self.lr_by_share]}: each share once")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size = {self.batch_size}: must be a multiple of accumulate = {self.accumulate}")
        if self.fixed_view and (self.auto_augment or self.random_erasing):
            raise ValueError(
                "fixed_view = true: training images are those of evaluation, so auto_augment and random_erasing must "
                "be off"
            )
        cached = [term for term in self.distill if term.cache_teacher]
        if any(term.kind == "feature" for term in cached):
            raise ValueError("distill.cache_teacher = true: logits are kept, not features; drop it for this term")
        if cached and not (self.fixed_view and self.mixup == self.cutmix == 0):
            raise ValueError(
                f"distill.cache_teacher = true with fixed_view = {str(self.fixed_view).lower()}, mixup = {self.mixup}, "
                f"cutmix = {self.cutmix}: the teacher's answers can be kept only for images that look the same in "
                "every epoch: set fixed_view = true and mixup = cutmix = 0, or drop cache_teacher"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, for the recipe's batch size."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in RECIPES.iterdir() if f.name.endswith(".toml"))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a named recipe, or one in a TOML file, with some fields replaced.

    Args:
        name: name of a recipe that comes with the package, or the path of a file that ends in ``.toml``.
        overrides: fields to replace, by name; an ``lr`` takes the place of ``lr_by_share``, too.

    Raises:
        UserError: there is no such recipe, a field is unknown, or a value is not allowed.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"recipe {name}: no such file")
        table = read_toml(path, what="recipe")
    elif name in recipe_names():
        table = parse_toml((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    else:
        known = ", ".join(recipe_names())
        raise UserError(f"unknown recipe {name!r}; known: {known}. {nearest(name, recipe_names())}".strip())
    try:
        fields = {**table, **(overrides or {})}
        if "lr" in (overrides or {}) and "lr_by_share" not in (overrides or {}):
            fields.pop("lr_by_share", None)
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = [explain(problem, Recipe.model_fields) for problem in error.errors()]
        raise UserError("\n".join(f"recipe {name}: {problem}" for problem in problems)) from error
