"""A bit and a mixer for every block: what encoding ``full`` has in the place of ``skip``, ``conv`` and ``conv3``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from prunesweep.models import Arch
from prunesweep.models.families import family_of
from prunesweep.search.space.variables import Params, Variable

from .base import Axis, Draft, ScoredSource

if TYPE_CHECKING:
    from prunesweep.search.config import SpaceTable

__all__ = ["AXIS", "MIXERS", "Blocks"]

MIXERS = ("attn", "conv1x1", "conv3x3", "none")  # of a block; the first is the source's own


@dataclass(frozen=True, kw_only=True)
class Blocks(Axis):
    """Variables ``skip.I`` (1: block I is dropped) and ``mixer.I`` of every block I of the source."""

    def fields(self) -> dict[str, tuple[Any, Any]]:
        """None: there is nothing to set."""
        return {}

    def check(self, table: SpaceTable) -> None:
        """The two encodings do not mix."""
        if table.encoding == self.encoding and (table.skip != (0, 0) or table.conv != (0, 0)):
            raise ValueError("skip, conv: belong to encoding 'compact'; 'full' decides for every block")

    def variables(self, table: SpaceTable, source: ScoredSource) -> tuple[Variable, ...]:
        """All bits, then all mixers."""
        depth = source.arch.depth
        bits = [Variable(f"skip.{i}", f"block {i} is dropped", 0, 1, whole=True) for i in range(depth)]
        mixers = [Variable(f"mixer.{i}", f"mixer of block {i}", choices=_mixers(source.arch)) for i in range(depth)]
        return (*bits, *mixers)

    def apply(self, draft: Draft, point: Params, source: ScoredSource) -> Draft:
        """Drop the blocks whose bit is set, and give the others their mixers."""
        depth = source.arch.depth
        draft = dataclasses.replace(draft, dropped=frozenset(i for i in range(depth) if point[f"skip.{i}"]))
        mixers = ((i, str(point[f"mixer.{i}"])) for i in draft.kept(depth))
        return dataclasses.replace(draft, mixers=tuple((i, mixer) for i, mixer in mixers if mixer != MIXERS[0]))

    def published(self, arch: Arch, dense: Arch, target: Arch) -> Mapping[str, float | str]:
        """What became of the published blocks; blocks are matched by their relative depth."""
        kept, found = {block.src: block for block in arch.blocks}, dict[str, float | str]()
        for i in range(target.depth):
            src = i * dense.depth // target.depth
            found[f"skip.{i}"] = int(src not in kept)
            own = kept[src].mixer if src in kept else MIXERS[0]
            found[f"mixer.{i}"] = own if own in _mixers(target) else MIXERS[0]
        return found

    def prior(self, arch: Arch, random: Random) -> Params:
        """Blocks that look like those that searches have found; evenly drawn mixers make nearly any model worthless.

        SPViT's results (arXiv 2111.11802, released models): on DeiT convolutions form a prefix of at most five in
        twelve blocks, 1x1 before 3x3, and none comes after the first attention; on Swin attention is given up in the
        first stage and, now and then, late in the third. UVC's (arXiv 2203.08243): few blocks go, and late ones.
        """
        return dict(_drawn(arch, random))


def _mixers(arch: Arch) -> tuple[str, ...]:
    """The mixers that blocks of the source may have."""
    convolutions = family_of(arch).supports("mixers")
    return tuple(mixer for mixer in MIXERS if convolutions or not mixer.startswith("conv"))


def _drawn(arch: Arch, random: Random) -> Iterator[tuple[str, float | int | str]]:
    depth, sizes = arch.depth, [len(stage.blocks) for stage in arch.stages]
    late = range(depth - sizes[-1] - sizes[-2] // 2, depth - sizes[-1]) if len(sizes) > 1 else ()
    prefix = random.randint(0, round(5 * depth / 12))
    wide = random.randint(0, prefix)
    dropped = set(random.sample(range(depth // 2, depth - 1), random.randint(0, depth // 6)))
    for i in range(depth):
        if len(sizes) > 1:
            without = 0.75 if i < sizes[0] else 0.2 if i in late else 0.0
            given_up = random.choice(("conv1x1", "none")) if i < sizes[0] else "none"
            mixer = given_up if random.random() < without else "attn"
        else:
            mixer = "attn" if i >= prefix else "conv3x3" if i >= prefix - wide else "conv1x1"
        yield f"skip.{i}", int(i in dropped)
        yield f"mixer.{i}", mixer if mixer in _mixers(arch) else MIXERS[0]


AXIS = Blocks(
    name="blocks", meaning="a bit and a mixer for every block", changes_cost=True, encoding="full", of_blocks=True
)
