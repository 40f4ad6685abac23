"""The training loss as a timm training task: cross-entropy and any number of distillation terms.

timm's own distillation tasks have one teacher and one term each; NViT's recipe needs two of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

from prunesweep.models import UserError
from prunesweep.models.families.lm import LanguageModel
from prunesweep.models.feature_head import is_headless

from .losses import full_model_kl, hard_distillation
from .recipe import Distill, Recipe

__all__ = ["DistillationTask", "LanguageTask", "make_task"]


def make_task(model: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> ClassificationTask:
    """Make the training task of a recipe.

    Args:
        model: the student.
        recipe: gives the loss, its terms of distillation and their teachers.
        teacher: the model that terms call the source; None if there is none.

    Returns:
        A ``LanguageTask`` for a language model; otherwise a ``DistillationTask`` if the recipe has terms, or timm's
            task.

    Raises:
        UserError: a term needs a teacher or a head that is missing, or the teacher has other classes.
    """
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    criterion = {"smoothing": recipe.label_smoothing, "soft_targets": mixes}
    terms = [term for term in recipe.distill if term.weight]
    text = isinstance(model, LanguageModel)
    if text:
        _check_of_text(recipe, terms)
    elif not terms:
        return ClassificationTask(model, criterion_kwargs=criterion, verbose=False)
    teachers = {name: _teacher(name, teacher, model) for name in dict.fromkeys(term.teacher for term in terms)}
    if text:
        return LanguageTask(model, terms, teachers, recipe.loss_weight)
    return DistillationTask(model, terms, teachers, recipe.loss_weight, criterion)


def _teacher(name: str, source: nn.Module | None, student: Any) -> nn.Module:
    if name == "source":
        if source is None:
            raise UserError("recipe: a distill term has teacher = 'source', but there is no source model to learn from")
        found: Any = source
    else:
        try:
            found = timm.create_model(name, pretrained=True)
        except Exception as error:  # timm passes on all errors of its parts, mostly of downloads
            raise UserError(f"recipe: the weights of distill.teacher = {name!r} cannot be had: {error}") from error
    if is_headless(student):
        given, wanted = (_width(own) for own in (found, student))
        if given != wanted:
            raise UserError(
                f"recipe: teacher {name!r} has {given} features, the model {wanted}: distil from the model's own source"
            )
    elif found.num_classes != student.num_classes:
        raise UserError(
            f"recipe: teacher {name!r} has {found.num_classes} classes, the model {student.num_classes}: "
            "distil from a teacher of the same classes, or drop the term"
        )
    return found  # type: ignore[no-any-return]


def _width(model: Any) -> int:
    """Number of the features that a backbone gives, or that a classifier reads."""
    return int(model.num_classes if is_headless(model) and model.num_classes else model.num_features)


def _check_of_text(recipe: Recipe, terms: list[Distill]) -> None:
    """Raise UserError where a recipe has settings that mean nothing for a language model."""
    for name in ("mixup", "cutmix", "label_smoothing"):
        if getattr(recipe, name):
            raise UserError(
                f"recipe: {name} = {getattr(recipe, name)}: is for images; set it to 0 for a language model"
            )
    for term in terms:
        if term.kind == "feature" or term.on == "token" or term.cache_teacher:
            raise UserError(
                "recipe: a language model is distilled by kind = 'soft' or 'hard', on = 'output' and cache_teacher = "
                f"false, got {term.kind!r}, {term.on!r} and {str(term.cache_teacher).lower()}"
            )


class LanguageTask(ClassificationTask):  # type: ignore[misc]  # timm is untyped
    """A language model's loss: ``loss_weight`` times cross-entropy, plus distillation; means over words.

    Without terms, the adaptive softmax computes only what the next words need. A term needs the whole distribution, and
    memory for it: pieces x words x vocabulary.

    Args:
        model: the student.
        terms: terms of distillation with a weight above 0.
        teachers: language models by the names that terms use.
        loss_weight: weight of cross-entropy.
    """

    def __init__(
        self, model: nn.Module, terms: list[Distill], teachers: Mapping[str, nn.Module], loss_weight: float
    ) -> None:
        super().__init__(model, criterion=F.nll_loss, verbose=False)
        self.terms, self.loss_weight = terms, loss_weight
        self.teachers = nn.ModuleDict({str(i): module for i, module in enumerate(teachers.values())})
        self.places = {name: str(i) for i, name in enumerate(teachers)}

    def train(self, mode: bool = True) -> LanguageTask:
        """Set the student's mode; teachers stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 (timm's name)
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return ``loss``, its parts by timm's names, and ``output``, the log-probabilities.

        Without terms, ``output`` has the log-probabilities of the next words alone.

        Args:
            input: words (B, T), int64.
            target: next words (B, T), int64; ``IGNORED`` where there is nothing to predict.
        """
        if not self.terms:
            output = self.trainable_module(input, target)
            loss = -self.loss_weight * output.mean()
            return {"loss": loss, "output": output, "task_loss": loss, "kd_loss": torch.zeros_like(loss)}
        output = self.trainable_module(input)
        words = output.flatten(0, 1)
        task_loss = F.nll_loss(words, target.flatten())
        kd_loss = torch.zeros_like(task_loss)
        with torch.no_grad():
            answers = {name: self.teachers[place](input).flatten(0, 1) for name, place in self.places.items()}
        for term in self.terms:
            if term.kind == "hard":
                own = hard_distillation(words, answers[term.teacher])
            else:
                own = full_model_kl(words, answers[term.teacher], term.temperature) * term.temperature**2
            kd_loss = kd_loss + term.weight * own
        loss = self.loss_weight * task_loss + kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


class DistillationTask(ClassificationTask):  # type: ignore[misc]  # timm is untyped
    """An image model's loss: ``loss_weight`` times cross-entropy of the output, plus terms of distillation.

    Teachers get no gradient. A model with a distillation head outputs the mean of its heads, as in evaluation, and that
    head's logits go to the terms with ``on = "token"`` (NViT's code; DeiT's own takes the class head alone for
    cross-entropy).

    Args:
        model: the student.
        terms: terms of distillation with a weight above 0.
        teachers: models by the names that terms use.
        loss_weight: weight of cross-entropy.
        criterion: arguments of timm's cross-entropy: label smoothing, soft targets.

    Raises:
        UserError: a term is on a distillation head that the model does not have, or on features of a model with two
            heads.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: list[Distill],
        teachers: Mapping[str, nn.Module],
        loss_weight: float,
        criterion: Mapping[str, Any],
    ) -> None:
        super().__init__(model, criterion_kwargs=dict(criterion), verbose=False)
        self.terms, self.loss_weight = terms, loss_weight
        self.names = list(teachers)
        self.teachers = nn.ModuleList(DistillationTeacher(module) for module in teachers.values())
        self.by_token = any(term.on == "token" for term in terms)
        self._features: torch.Tensor | None = None
        self.headless = is_headless(model)  # its output are the features
        if self.by_token and not hasattr(model, "set_distilled_training"):
            raise UserError("recipe: a distill term is on the 'token', but the model has no distillation head")
        student: Any = model
        if (
            any(term.kind == "feature" for term in terms) and not self.headless
        ):  # one forward pass gives logits and features, under DDP too
            if isinstance(student.get_classifier(), tuple):
                raise UserError("recipe: features of a model with two heads cannot be distilled")
            student.get_classifier().register_forward_pre_hook(self._keep_features)
        self.student_cfg = student.pretrained_cfg
        for name in ("mean", "std"):
            values = torch.tensor(self.student_cfg[name]).view(1, -1, 1, 1)
            self.register_buffer(f"student_{name}", values, persistent=False)
        # compared once: a comparison in every forward pass would wait for a GPU each time
        self.other_scale = {name for name in self.names if not self._same_scale(self.teacher(name))}

    def train(self, mode: bool = True) -> DistillationTask:
        """Set the student's mode; its two heads are kept apart while it trains. Teachers stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        student: Any = timm.utils.unwrap_model(self.trainable_module)
        if self.by_token:
            student.set_distilled_training(mode)
        return self

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 (timm's name)
        target: torch.Tensor,
        known: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Return ``loss``, ``output`` (the student's logits B·K), and the parts of the loss by timm's names.

        Args:
            input: images B·C·H·W, normalised for the student.
            target: labels B, or probabilities B·K; not read if ``loss_weight`` is 0.
            known: logits B·K of the teachers whose terms have ``cache_teacher``, by name.
        """
        found = self.trainable_module(input)
        token = found[1] if isinstance(found, tuple) else None
        output = found if token is None else (found[0] + found[1]) / 2
        task_loss = kd_loss = output.new_zeros(())
        if self.loss_weight:  # otherwise there may be no labels
            task_loss = self.criterion(output, target)
        answers = dict(known)
        for term in self.terms:
            if term.kind != "feature" and term.teacher not in answers:
                answers[term.teacher] = self.answers(term.teacher, input)
            logits = output if token is None or term.on == "output" else token
            kd_loss = kd_loss + term.weight * self._term(term, input, logits, answers)
        self._features = None
        loss = self.loss_weight * task_loss + kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}

    def teacher(self, name: str) -> Any:
        """Return timm's wrapper around a teacher."""
        return self.teachers[self.names.index(name)]

    @torch.no_grad()
    def answers(self, name: str, x: torch.Tensor, *, features: bool = False) -> torch.Tensor:
        """Return a teacher's logits B·K, or pooled features B·D.

        Args:
            name: the teacher's name in the terms.
            x: images B·C·H·W, normalised for the student.
            features: return features instead of logits.
        """
        teacher = self.teacher(name)
        if name in self.other_scale:
            x = (x * self.student_std + self.student_mean - teacher.mean_kd) / teacher.std_kd
        return teacher(x, return_features=features)

    def _same_scale(self, teacher: Any) -> bool:
        """Whether a teacher's images are normalised as the student's."""
        pairs = ((self.student_mean, teacher.mean_kd), (self.student_std, teacher.std_kd))
        return all(torch.equal(own, other.to(own)) for own, other in pairs)

    def release_cached_teachers(self) -> None:
        """Drop the teachers whose cached logits are all that the terms use."""
        cached = {term.teacher for term in self.terms if term.cache_teacher}
        needed = {term.teacher for term in self.terms if term.kind == "feature" or term.teacher not in cached}
        self.teachers = nn.ModuleList(self.teacher(name) for name in self.names if name in needed)
        self.names = [name for name in self.names if name in needed]

    def _keep_features(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self._features = inputs[0]

    def _term(
        self, term: Distill, x: torch.Tensor, logits: torch.Tensor, answers: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if term.kind == "feature":
            given = is_headless(self.teacher(term.teacher).model)
            wanted = self.answers(term.teacher, x, features=not given)
            features = logits if self.headless else self._features
            assert features is not None
            if features.shape != wanted.shape:
                raise UserError(
                    f"recipe: the model has {features.shape[1]} features, teacher {term.teacher!r} {wanted.shape[1]}: "
                    "features can be distilled between equal widths only"
                )
            return F.mse_loss(features, wanted)
        if term.kind == "hard":
            return hard_distillation(logits, answers[term.teacher])
        return full_model_kl(logits, answers[term.teacher], term.temperature) * term.temperature**2
