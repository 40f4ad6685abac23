"""Views of a model's blocks with their attention and MLP, for code that reads or changes blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .arch import Arch, Block
from .builder import arch_of
from .families import family_of
from .families.views import AttentionView, MlpView

__all__ = ["BlockView", "block_views"]


@dataclass(frozen=True, eq=False)
class BlockView:
    """One block of a model.

    Args:
        index: among all blocks of the model.
        stage: the stage that it is in.
        name: of the module within the model, such as ``layers.0.blocks.1``.
        module: the block itself.
        record: its record.
        attention: None where its mixer is another one, or none.
        mlp: None where it has none.
    """

    index: int
    stage: int
    name: str
    module: nn.Module
    record: Block
    attention: AttentionView | None
    mlp: MlpView | None


def block_views(model: nn.Module, arch: Arch | None = None) -> list[BlockView]:
    """View all blocks, in the order of ``Arch.blocks``.

    Args:
        model: one that ``Arch.from_timm`` accepts, with its blocks as they were built: views come before wrappers.
        arch: its record, where that is at hand.
    """
    arch = arch_of(model) if arch is None else arch
    names = {id(module): name for name, module in model.named_modules()}
    family = family_of(arch)
    stages = [s for s, stage in enumerate(arch.stages) for _ in stage.blocks]
    views = []
    for i, (s, block, record) in enumerate(zip(stages, family.blocks(model), arch.blocks, strict=True)):
        attention, mlp = family.attention_view(block, record), family.mlp_view(block, record)
        views.append(BlockView(i, s, names[id(block)], block, record, attention, mlp))
    return views
