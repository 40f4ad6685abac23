"""Reading the checkpoints that other projects wrote: the released models of the methods that are searched here.

    model = import_checkpoint("NViT_S.pth", "nvit")
    model = import_checkpoint("UP_DeiT_T.pth", "upvit", heads=3)
    model = import_checkpoint("ckpt.pth", "spvit", config="spvit_deit_ti_ft.json")
    model = import_checkpoint("adaptive_lm_wiki103.pt", "fairseq", heads=8)
    model = import_checkpoint("output/train/model_best.pth.tar", "timm", ema=True)
    model = import_checkpoint("81.7_T2T_ViTt_14.pth.tar", "t2t", heads=6)
    model = import_checkpoint("vit_b_16.pth", "torchvision")
    model = import_checkpoint("dinov2-small", "transformers")

The result is a model like every other one here: it has a record, can be counted, cut, finetuned, saved and searched.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunesweep.models.errors import UserError, nearest

from .container import read_checkpoint, read_config
from .fairseq import read_fairseq
from .hugging_face import read_folder, read_transformers
from .nvit import read_nvit
from .pmvit import read_pmvit
from .spvit import read_spvit
from .t2t import read_t2t
from .tensors import Given, Tensors
from .timm_checkpoint import read_timm
from .torchvision_models import read_torchvision
from .upvit import read_upvit
from .uvc import read_uvc

__all__ = ["LAYOUTS", "Layout", "check_layout", "import_checkpoint"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One project's checkpoint layout: the function that reads it, and how its files are recognised.

    ``signs`` are parts of keys that no other layout has; ``about`` says in a few words whose models these are.
    """

    read: Callable[[Tensors, Given], nn.Module]
    signs: tuple[str, ...]
    about: str


LAYOUTS: dict[str, Layout] = {
    "nvit": Layout(read_nvit, (".attn.qkv.Q.",), "NViT and ReViT, dense"),
    "upvit": Layout(read_upvit, ("patch_embed1.",), "UP-ViT: DeiT and PVTv2"),
    "uvc": Layout(read_uvc, ("block_skip_gating",), "UVC, either stage"),
    "spvit": Layout(read_spvit, (".attn.head_probs", ".attn.bconv.", ".attn.qk."), "SPViT: DeiT and Swin, either form"),
    "t2t": Layout(read_t2t, ("tokens_to_token.",), "T2T-ViT, with Performers or Transformers"),
    "pmvit": Layout(read_pmvit, (".attn.merge_matrix",), "Prune-and-Merge"),
    "fairseq": Layout(read_fairseq, ("decoder.embed_tokens.",), "fairseq's adaptive language models"),
    "timm": Layout(read_timm, (), "timm's train.py, and saved models of this package that it has trained"),
    "torchvision": Layout(
        read_torchvision, ("encoder.layers.encoder_layer_", "features.1.0.attn."), "torchvision's ViT and Swin"
    ),
    "transformers": Layout(
        read_transformers,
        ("patch_embeddings.projection.", "patch_embedding.weight"),
        "transformers' ViT, DeiT, DINOv2, BEiT, Swin, CLIP and SigLIP",
    ),
}


def check_layout(layout: str, *, config: str | Path | None = None, model: str | Path | None = None) -> None:
    """Check the name of a layout and what it takes, before a file is read.

    Args:
        layout, config, model: as for ``import_checkpoint``.

    Raises:
        UserError: the layout is unknown, or does not take what is given.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout = {layout!r}: must be one of {', '.join(LAYOUTS)}. {nearest(layout, LAYOUTS)}".strip())
    if config is not None and layout != "spvit":
        raise UserError(f"config = {config}: layout {layout!r} has no configuration; leave it out")
    if model is not None and layout != "timm":
        raise UserError(f"model = {model}: layout {layout!r} says itself what its model is; leave it out (--model)")


def import_checkpoint(
    path: str | Path,
    layout: str,
    *,
    config: str | Path | None = None,
    heads: int | Sequence[int] | None = None,
    img_size: int | tuple[int, int] | None = None,
    trust: bool = False,
    ema: bool = False,
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a foreign checkpoint and return its model, on the CPU and in eval mode.

    Args:
        path: a file written by ``torch.save``; of layout ``transformers``, a folder.
        layout: whose names it has, a key of ``LAYOUTS``.
        config: the run's configuration, .json or .yaml (SPViT only, which needs it).
        heads: attention heads, where the file does not tell: one number for a ViT or a language model, one per stage
            for PVTv2 and Swin.
        img_size: side or (rows, columns) of the images in pixels, where the file does not tell (PVTv2: 224).
        trust: run the code that the file names; without it a file that holds more than weights is refused.
        ema: the averaged weights that training kept beside the others.
        model: layout ``timm`` only: a timm name or the folder of a saved model, where the file does not say it.
        dtype: of the model; the file's own if not given. Weights that are calculated are calculated in float64.

    Raises:
        UserError: the file cannot be read or holds another layout; a key is missing, unknown or has another shape;
            ``config``, ``heads`` or ``img_size`` is needed or contradicts the file.
    """
    check_layout(layout, config=config, model=model)
    sizes = _whole_numbers("img_size", (img_size, img_size) if isinstance(img_size, int) else img_size)
    if sizes is not None and len(sizes) != 2:
        raise UserError(f"img_size = {img_size!r}: must be one number, or rows and columns")
    given = Given(
        heads=_whole_numbers("heads", (heads,) if isinstance(heads, int) else heads),
        img_size=None if sizes is None else (sizes[0], sizes[1]),
        config=None if config is None else read_config(Path(config)),
        model=None if model is None else str(model),
    )
    if layout == "transformers" and Path(path).is_dir():
        weights, folder_config = read_folder(Path(path))
        given, beside = dataclasses.replace(given, config=folder_config), dict[str, Any]()
    else:
        harmless = (argparse.Namespace,) if layout == "timm" else ()
        weights, beside = read_checkpoint(Path(path), trust=trust, ema=ema, harmless=harmless)
    _check_signs(layout, weights)
    if dtype is not None:
        weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    return LAYOUTS[layout].read(Tensors(layout, weights, beside), given)


def _whole_numbers(name: str, values: Sequence[int] | None) -> tuple[int, ...] | None:
    several = isinstance(values, Sequence) and len(values) > 0
    if values is not None and not (several and all(type(n) is int and n > 0 for n in values)):
        raise UserError(f"{name} = {values!r}: must be positive whole numbers")
    return None if values is None else tuple(values)


def _check_signs(layout: str, weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError where a key belongs to another layout."""
    for other, entry in LAYOUTS.items():
        sign = next((key for key in weights if any(sign in key for sign in entry.signs)), None)
        if sign is not None and other != layout:
            raise UserError(f"the file has the key {sign!r} of layout {other!r} ({entry.about}), not {layout!r}")
