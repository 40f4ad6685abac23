"""SPViT's decision: a mixer for every block and hidden units for every MLP, from gates or given directly.

``spvit_cut`` makes a cut of choices, ``fit_units`` meets a budget. A convolution is another function than the attention
that it replaces: re-estimate the statistics of its BatchNorm (``models.recalibrate``) before scoring such a model, and
finetune it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunesweep.models import Arch, BlockCut, Cut, UserError, cut_arch
from prunesweep.models.errors import nearest
from prunesweep.pruners.served import SPVIT as FAMILIES

from .cost import GateCosts
from .gates import CHOICES

__all__ = ["FAMILIES", "SKIP_FORMS", "fit_units", "spvit_cut"]

SKIP_FORMS = {"identity": "none", "ln_residual": "norm"}

Units = Sequence[Sequence[int] | None]


def spvit_cut(arch: Arch, choices: Sequence[str], mlp: Units | None = None, *, skip_form: str = "identity") -> Cut:
    """Make the cut with these mixers and hidden units.

    Args:
        arch: a ViT or Swin on any grid.
        choices: ``msa``, ``conv1x1``, ``conv3x3`` or ``skip`` for every block; ``msa`` leaves the mixer as it is.
        mlp: the hidden units that stay of every block, ascending; None keeps all, of a block or of all blocks.
        skip_form: a skipped mixer adds nothing (``identity``) or its normalised input (``ln_residual``, SPViT's
            finetuned and published models).

    Raises:
        UserError: another family, another number of blocks, an unknown choice, a convolution in place of something
            that is no attention, or an impossible unit.
    """
    check_family(arch)
    if skip_form not in SKIP_FORMS:
        raise UserError(f"skip_form = {skip_form!r}: must be one of {', '.join(SKIP_FORMS)}")
    for name, given in (("choices", choices), ("mlp", mlp)):
        if given is not None and len(given) != arch.depth:
            raise UserError(
                f"{name} has {len(given)} entries: {arch.source} has {arch.depth} blocks, give one for each"
            )
    for i, choice in enumerate(choices):
        if choice not in CHOICES:
            hint = nearest(str(choice), CHOICES)
            raise UserError(f"choices[{i}] = {choice!r}: must be one of {', '.join(CHOICES)}. {hint}".strip())
        if choice.startswith("conv") and arch.blocks[i].mixer != "attn":
            raise UserError(
                f"choices[{i}] = {choice!r}: block {i} has mixer {arch.blocks[i].mixer!r}, and a convolution takes its "
                "weights from attention; choose 'msa' to leave the block as it is"
            )
    mixers = [{"msa": None, "skip": SKIP_FORMS[skip_form]}.get(choice, choice) for choice in choices]
    units = [None if own is None else tuple(own) for own in mlp or [None] * arch.depth]
    decision = Cut(blocks=tuple(BlockCut(mixer=m, mlp=own) for m, own in zip(mixers, units, strict=True)))
    cut_arch(arch, decision)
    return decision


def check_family(arch: Arch) -> None:
    """Raise UserError where SPViT cannot serve the family of ``arch``."""
    if arch.family not in FAMILIES:
        raise UserError(f"{arch.source} is of family {arch.family!r}: SPViT serves families {', '.join(FAMILIES)}")
    if arch.post_norm:
        raise UserError(f"{arch.source} has its norms behind attention and MLPs: what SPViT skips leaves their bias")
    if not arch.proj_bias:
        raise UserError(f"{arch.source} has output projections without bias: SPViT's convolutions share theirs")
    if arch.mlp_norm:
        raise UserError(
            f"{arch.source} normalises the hidden units of its MLPs: SPViT's unit gates would change those that stay"
        )


def fit_units(
    costs: GateCosts,
    choices: Sequence[str],
    value: Sequence[torch.Tensor | None],
    kept: Sequence[torch.Tensor | None],
    budget: float,
) -> tuple[tuple[int, ...] | None, ...]:
    """Choose hidden units that fill the budget and no more, starting from those in ``kept``.

    Units go in the order of value per MAC, lowest first, until the budget is met; then others come back, highest first,
    as long as they fit. A block keeps at least its most valuable unit.

    Args:
        costs: exact costs of the gates.
        choices: the mixers, which stay.
        value: positive number for every hidden unit of a block (M,), None where it has no MLP.
        kept: bool (M,) in the same places.
        budget: MACs per image.

    Raises:
        UserError: with these mixers the budget cannot be met.
    """
    keep = [None if own is None else own.clone() for own in kept]
    order = []  # (value per MAC, block, unit), all units but each block's best
    for i, (own, mask) in enumerate(zip(value, keep, strict=True)):
        if own is not None and mask is not None:
            best = int(own.argmax())
            mask[best] = True
            order += [(v / costs.units[i], i, j) for j, v in enumerate(own.tolist()) if j != best]
    order.sort()
    spent = costs.total(choices, [0 if mask is None else int(mask.sum()) for mask in keep])
    for give_back in (False, True):
        for _, i, j in reversed(order) if give_back else order:
            mask, unit = keep[i], costs.units[i]
            assert mask is not None
            fits = spent + unit <= budget if give_back else spent > budget
            if bool(mask[j]) != give_back and fits:
                mask[j] = give_back
                spent += unit if give_back else -unit
    if spent > budget:
        raise UserError(
            f"budget = {budget:,.0f} macs: the mixers that were chosen leave {spent:,} with one hidden unit per block; "
            "search longer or with more weight on complexity, or raise the budget"
        )
    return tuple(None if mask is None else tuple(int(u) for u in mask.nonzero()[:, 0]) for mask in keep)
