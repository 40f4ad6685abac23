"""Building modules from records."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from .arch import Arch
from .errors import UserError, nearest
from .families import FAMILIES, family_of
from .io.folder import ENTRY_POINT
from .precision import TYPES, keep_dtype
from .without_values import without_values

__all__ = [
    "DROP_RATES",
    "adopted",
    "arch_of",
    "blocks_of",
    "build",
    "build_with",
    "check_preprocessing",
    "create",
    "drop_rates_of",
    "example_input",
    "num_params",
    "preprocessing_of",
    "resize",
    "set_label_names",
]

CROP_MODES = ("center", "squash", "border")  # timm's
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random")  # timm's
CLASS_NAMES = ("label_names", "label_descriptions")  # of the classes, in timm's ``pretrained_cfg``
DROP_RATES = ("drop_rate", "drop_path_rate", "patch_drop_rate")  # timm's options that act in training alone


def build(arch: Arch, *, drop_path: float = 0.0, pretrained_cfg: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a randomly initialised timm module of this shape; it carries its record as ``model.arch``.

    Args:
        arch: the record; validated first.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
        pretrained_cfg: timm's description of the preprocessing (``mean``, ``std``, ``crop_pct``, ...), usually the
            source model's. Without it, ImageNet's or, for another number of channels, 0.5 everywhere.

    Raises:
        UserError: the record is impossible.
    """
    return create(arch, pretrained=False, pretrained_cfg=pretrained_cfg, drop_path=drop_path)


def create(
    arch: Arch, *, pretrained: bool, pretrained_cfg: Mapping[str, Any] | None, drop_path: float = 0.0, **options: Any
) -> nn.Module:
    """Build through timm's factory, which also loads the weights that ``pretrained_cfg`` points to.

    Args:
        arch: the record; validated first.
        pretrained: load those weights; otherwise they are random.
        pretrained_cfg: timm's description of the weights and the preprocessing.
        drop_path: stochastic depth rate of the last block, rising linearly over the blocks.
        options: timm's own. ``drop_rate``, ``patch_drop_rate``, ``features_only`` and ``out_indices``; and those that
            make another record: ``num_classes`` (another number gives a new classifier), ``img_size`` (position
            embeddings are resampled), ``in_chans`` (timm adapts the first convolution's weights) and ``global_pool``;
            ``dynamic_img_size`` takes images of any size, and is for this object alone: it is not saved.

    Returns:
        The model; ``drop_rates_of`` has the rates that were given.

    Raises:
        UserError: the record is impossible, or an option is unknown or cannot be used with this record; the message
            says why.
    """
    arch.validate()
    rates = {"drop_path_rate": drop_path, **{name: options.get(name) for name in DROP_RATES if name in options}}
    for name, rate in rates.items():
        if rate is not None and not (_is_number(rate) and 0 <= rate < 1):
            raise UserError(f"{name} = {rate!r}: must be a number in 0..1, below 1")
    cfg, family = _pretrained_cfg(arch, pretrained_cfg or {}), family_of(arch)
    own = {"img_size": arch.img_size, "in_chans": arch.in_chans, "global_pool": arch.pool}
    img_size, in_chans = (_whole(name, options.get(name, own[name])) for name in ("img_size", "in_chans"))
    if in_chans != arch.in_chans and family.supports("images") and family.first_convolution(arch) is None:
        raise UserError(f"in_chans = {in_chans}: {arch.source} reads images of {arch.in_chans} by no convolution")
    asked = {**options, "img_size": img_size}
    for name in (*own, "drop_rate", "patch_drop_rate", "dynamic_img_size", "features_only"):
        given = asked.get(name)
        if given and given != own.get(name) and not family.supports("images"):
            raise UserError(f"{name} = {given!r}: is for models of images, {arch.source} is of family {family.name!r}")
    dynamic, patch_drop = options.pop("dynamic_img_size", False), options.pop("patch_drop_rate", 0)
    features: dict[str, Any] = {}
    if options.get("features_only"):
        places = options.pop("out_indices", family.feature_stages(arch))
        features["feature_cfg"] = {"feature_cls": "getter", "out_indices": places}

    def construct(*, arch: Arch, drop_path: float, drop_rate: float = 0.0, **given: Any) -> nn.Module:
        given.pop("img_size", None)  # set when the weights are there, which are resampled
        pool, channels = given.pop("global_pool", arch.pool), given.pop("in_chans", arch.in_chans)
        classes = given.pop("num_classes", arch.num_classes)  # timm drops the classifier's weights where it differs
        if arch.text is not None and classes != arch.num_classes:
            raise UserError(f"num_classes = {classes}: this model's vocabulary has {arch.num_classes} words")
        if given:
            raise UserError(
                f"unknown model argument {', '.join(given)}: the record alone says what the model is; num_classes, "
                "img_size, in_chans, global_pool, dynamic_img_size, drop_rate, drop_path_rate, patch_drop_rate, "
                "features_only and out_indices may be given"
            )
        mapped = arch.feature_head and classes == arch.num_classes
        arch = dataclasses.replace(arch, num_classes=classes, feature_head=mapped, pool=pool, in_chans=channels)
        arch.validate()
        model = family.build(arch, drop_path=drop_path)
        if drop_rate:
            family.set_drop_rate(model, drop_rate)
        if patch_drop:
            family.set_patch_drop_rate(model, arch, patch_drop)
        model.arch = arch  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        model.given_drop_rates = {name: rate for name, rate in rates.items() if rate}  # type: ignore[assignment]
        return model

    model = build_model_with_cfg(
        construct, ENTRY_POINT, pretrained, pretrained_cfg=cfg, arch=arch, drop_path=drop_path, **features, **options
    )
    if options.get("num_classes", arch.num_classes) != arch.num_classes:
        for name in CLASS_NAMES:  # of the classifier that was there
            model.pretrained_cfg.pop(name, None)
    inner = model.model if features else model  # timm wraps a model that gives features
    if img_size != arch.img_size:
        inner.arch = now = family.set_img_size(inner, inner.arch, img_size)
        dataclasses.replace(now, num_classes=arch.num_classes, pool=arch.pool).validate()  # features have neither
    if dynamic:
        family.make_dynamic(inner, inner.arch)
    for described in {id(module): module for module in (model, inner)}.values():
        described.pretrained_cfg |= {"input_size": (in_chans, *img_size)}
        if in_chans != arch.in_chans:
            described.pretrained_cfg |= {
                name: (sum(values) / len(values),) * in_chans
                for name in ("mean", "std")
                if (values := described.pretrained_cfg.get(name))
            }
    if not features and model.pretrained_cfg.get("label_names"):
        set_label_names(model, model.pretrained_cfg["label_names"])
    return model


def resize(model: Any, img_size: tuple[int, int]) -> Arch:
    """Let a model take images of another size, in place; return its record.

    Position embeddings are resampled; Swin's windows and tables of relative positions, and PVTv2, follow the size.

    Args:
        model: one of ours.
        img_size: rows and columns.

    Raises:
        UserError: the model is for one size, as those with token plans are; the message says what is in the way.
    """
    arch, family = arch_of(model), family_of(arch_of(model))
    if tuple(img_size) == arch.img_size:
        return arch
    if not family.supports("images"):
        raise UserError(f"img_size = {list(img_size)}: is for models of images, {arch.source} reads texts")
    model.arch = now = family.set_img_size(model, arch, img_size)
    now.validate()
    model.pretrained_cfg |= {"input_size": (arch.in_chans, *img_size)}
    return now


def _whole(name: str, value: Any) -> Any:
    """Return ``img_size`` as (rows, columns), or ``in_chans``. Raises UserError for anything but positive integers."""
    wanted = to_2tuple(value) if name == "img_size" else (value,)
    if not all(type(side) is int and side > 0 for side in wanted) or len(wanted) > 2:
        pair = " or rows and columns" if name == "img_size" else ""
        raise UserError(f"{name} = {value!r}: must be a positive whole number{pair}")
    return tuple(wanted) if name == "img_size" else value


def drop_rates_of(model: Any) -> dict[str, float]:
    """Return those of ``DROP_RATES`` that a model was created with and that are above 0."""
    return dict(getattr(model, "given_drop_rates", {}))


def set_label_names(model: Any, names: Sequence[str]) -> None:
    """Give a model the names of its classes, timm's ``label_names``; it loses them when its classifier is replaced.

    Args:
        model: a classifier with timm's ``pretrained_cfg``.
        names: the names by label.
    """
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(names)}
    model.named_classifiers = _classifiers(model)  # in a list, torch does not take them for modules of its own


def preprocessing_of(model: Any) -> dict[str, Any]:
    """Return a model's ``pretrained_cfg``, without names of classes that were those of a classifier since replaced."""
    cfg, named = dict(getattr(model, "pretrained_cfg", None) or {}), getattr(model, "named_classifiers", [])
    if named and any(own is not now for own, now in zip(named, _classifiers(model), strict=True)):
        return {key: value for key, value in cfg.items() if key not in CLASS_NAMES}
    return cfg


def _classifiers(model: Any) -> list[nn.Module]:
    """List the layers of a model that depend on the number of classes, as they are now."""
    names = model.pretrained_cfg.get("classifier") or ()
    return [model.get_submodule(name) for name in ((names,) if isinstance(names, str) else names)]


def build_with(
    arch: Arch,
    weights: Mapping[str, torch.Tensor],
    *,
    pretrained_cfg: Mapping[str, Any] | None = None,
    drop_rates: Mapping[str, float] | None = None,
) -> nn.Module:
    """Build a module that holds the given tensors themselves: nothing is initialised or copied.

    Args:
        arch: the record.
        weights: the state dict of ``build(arch)``, complete.
        pretrained_cfg: timm's description of the preprocessing, as for ``build``.
        drop_rates: rates by name, as in ``drop_rates_of``.

    Raises:
        RuntimeError: a weight is missing, left over, or of another shape (as ``load_state_dict`` says it).
        UserError: the record is impossible, or the weights are not all of one type that torch computes with.
    """
    rates = dict(drop_rates or {})
    drop_path = rates.pop("drop_path_rate", 0.0)
    with without_values():
        model = create(arch, pretrained=False, pretrained_cfg=pretrained_cfg, drop_path=drop_path, **rates)
    own = model.state_dict()
    known = {name: tensor for name, tensor in weights.items() if name in own}  # others are refused by their names
    _check_types(known, [name for name, tensor in own.items() if tensor.is_floating_point()])
    model.load_state_dict(weights, strict=True, assign=True)
    device = next(model.parameters()).device
    for module in model.modules():  # Swin's masks and position indices are in no state dict
        derived = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, buffer in derived.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
        if any(buffer is not None for buffer in derived.values()):
            module.init_non_persistent_buffers()  # type: ignore[operator]
    return model


def _check_types(weights: Mapping[str, torch.Tensor], numbers: Sequence[str]) -> None:
    """Raise UserError where ``numbers`` are not of one type, or other tensors (indices, masks) are of such a type."""
    known = set(numbers)
    kinds = Counter(tensor.dtype for name, tensor in weights.items() if name in known)
    usual = kinds.most_common(1)[0][0] if kinds else torch.float32
    for name, tensor in weights.items():
        if name in known and (tensor.dtype != usual or usual not in TYPES.values()):
            found = f"{name} is {tensor.dtype}, others are {usual}".replace("torch.", "")
            raise UserError(f"{found}: all must be of one type, float16, bfloat16, float32 or float64")
        if name not in known and tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}: must hold whole numbers")


def _pretrained_cfg(arch: Arch, given: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(PretrainedCfg)]
    for key in given:
        if key not in known:
            raise UserError(f"pretrained_cfg has an unknown key {key!r}. {nearest(key, known)}".strip())
    check_preprocessing(given)
    if len(given.get("label_names") or ()) != arch.num_classes:  # the classifier was replaced
        given = {key: value for key, value in given.items() if key not in CLASS_NAMES}
    half = (0.5,) * arch.in_chans
    own = {"architecture": ENTRY_POINT, "num_classes": arch.num_classes, "input_size": (arch.in_chans, *arch.img_size)}
    family = family_of(arch)
    fixed = {"fixed_input_size": True, "first_conv": family.first_convolution(arch), "custom_load": False}
    # the source model's own address is dropped, but "hf-hub:" names the place of these very weights
    no_download = {"url": ""} if given.get("source") == "hf-hub" else {"url": "", "hf_hub_id": None}
    defaults = {} if arch.in_chans == 3 else {"mean": half, "std": half}
    return {
        **defaults,
        **{k: v for k, v in given.items() if v is not None},
        **fixed,
        **no_download,
        **own,
        "classifier": family.classifiers(arch),
    }


def check_preprocessing(given: Mapping[str, Any]) -> None:
    """Check timm's description of the preprocessing.

    Args:
        given: a ``pretrained_cfg``.

    Raises:
        UserError: no image could be prepared by it, or class names are no list, or one of them is there twice.
    """

    def check(name: str, right: Callable[[Any], bool], allowed: str) -> None:
        value = given.get(name)
        if value is not None and not right(value):
            raise UserError(f"pretrained_cfg.{name} = {value!r}: must be {allowed}")

    def numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))

    check("mean", numbers, "a list of finite numbers, one per channel")
    check("std", lambda v: numbers(v) and min(v) > 0, "a list of finite numbers above 0, one per channel")
    check("crop_pct", lambda v: _is_number(v) and 0 < v <= 2, "a number above 0 and at most 2")
    check("interpolation", lambda v: v in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}")
    check("crop_mode", lambda v: v in CROP_MODES, f"one of {', '.join(CROP_MODES)}")
    check("label_names", lambda v: isinstance(v, (list, tuple)), "a list of names")
    for name, times in Counter(map(str, given.get("label_names") or ())).items():
        if times > 1:
            raise UserError(f"pretrained_cfg.label_names: {name!r} is there {times} times; every class needs its own")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def arch_of(model: nn.Module) -> Arch:
    """Return the record that a built or cut model carries, or that of a stock timm model.

    Raises:
        UserError: the model cannot be represented, or has to be taken over by ``adopted`` first.
    """
    arch = Arch.from_timm(model)
    if family_of(arch).adopts and not isinstance(getattr(model, "arch", None), Arch):
        raise UserError(
            f"{arch.source} is timm's own {type(model).__name__}, whose weights are laid out in another way than those "
            f"of family {arch.family!r}: give prunesweep.models.adopted(model) in its place, which computes the same"
        )
    return arch


def adopted(model: nn.Module) -> nn.Module:
    """Return a model with tensors as its record says: itself or, of a timm model that has others, a copy that has.

    Models of families with ``adopts`` may have others. The copy computes the same, in the same mode, with weights of
    its own.

    Args:
        model: a timm model that ``Arch.from_timm`` accepts, or one of ours; it is not changed.

    Raises:
        UserError: the model cannot be represented.
    """
    arch = Arch.from_timm(model)
    family = family_of(arch)
    if not family.adopts or isinstance(getattr(model, "arch", None), Arch):
        return model
    weights = {name: tensor.detach().clone() for name, tensor in family.adopted(model, arch).items()}
    taken = build_with(arch, weights, pretrained_cfg=preprocessing_of(model), drop_rates=drop_rates_of(model))
    keep_dtype(taken, model)
    return taken.train(model.training)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """List the blocks of all stages of a model, in the order of ``Arch.blocks``, also if it no longer has a record."""
    arch = getattr(model, "arch", None)
    if isinstance(arch, Arch):
        return family_of(arch).blocks(model)
    names = {family.stages_name for family in FAMILIES.values()} - {""}
    stages: Any = next((getattr(model, name) for name in names if hasattr(model, name)), [model])
    return [block for stage in stages for block in stage.blocks]


def example_input(arch: Arch, batch: int, seed: int) -> torch.Tensor:
    """Make a random input for a model of this record.

    Args:
        arch: the record.
        batch: B, number of images or texts.
        seed: of the random numbers.

    Returns:
        Images (B, C, rows, columns) in float32, or word numbers (B, T) in int64.
    """
    return family_of(arch).example_input(arch, batch, torch.Generator().manual_seed(seed))


def num_params(model: nn.Module) -> int:
    """Count the weights of a model, each once."""
    return sum(p.numel() for p in model.parameters())
