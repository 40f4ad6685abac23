"""What every model family must do; ``tests/models/families/test_family.py`` runs it for all that are registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import nn

from prunesweep.models import (
    Arch,
    BlockView,
    Stage,
    arch_of,
    block_views,
    blocks_of,
    build,
    cost,
    cut,
    cut_arch,
    load,
    num_params,
    save,
)
from prunesweep.models.builder import example_input
from prunesweep.models.families import CAPABILITIES, family_of
from prunesweep.models.families.base import tensor_shapes
from prunesweep.models.families.views import Reader
from prunesweep.models.reduction import reduce_tensor
from tests.generate import random_cut, random_images, random_model
from tests.oracle import masked

ROLES = {"writes", "reads", "scales", "shares"}
PER_UNIT = ("heads", "qk_norm")  # spaces that no tensor writes or reads: a number per head, or per channel of a head


class Rotation:
    """A reduction that reduces nothing: an orthogonal matrix on every axis of a space."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    @property
    def size(self) -> int:
        return len(self.matrix)

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.tensordot(tensor.movedim(axis, -1), self.matrix, dims=1).movedim(-1, axis)


def rotation(size: int, generator: torch.Generator, *, fix_ones: bool = False) -> torch.Tensor:
    """A random orthogonal matrix; with ``fix_ones`` it maps the vector of ones to itself, as a LayerNorm needs it."""
    draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if not fix_ones:
        return torch.linalg.qr(draw).Q
    draw[:, 0] = 1
    basis = torch.linalg.qr(draw).Q  # its first column is the direction of ones
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = rotation(size - 1, generator)
    return basis @ inner @ basis.T


def check_halves(
    view: BlockView, stage: Stage, x: torch.Tensor, after: torch.Tensor, *, parallel: bool = False
) -> None:
    """What the views of a block compute add up to what the block does."""
    if parallel:
        found = [view.attention and view.attention.after(x, stage.grid), view.mlp and view.mlp.after(x, stage.grid[0])]
        both = [own - x for own in found if own is not None]
        if view.attention is not None or (view.record.mixer == "none" and not view.record.norm_residual):
            torch.testing.assert_close(sum(both, x), after)
        return
    if view.attention is not None:
        x = view.attention.after(x, stage.grid)
    elif view.record.mixer != "none" or view.record.norm_residual:
        return
    if view.mlp is not None:
        before = x
        (reader,) = view.mlp.readers()
        hidden = view.mlp.activated(reader(x), stage.grid[0])
        x = view.mlp.after(x, stage.grid[0])
        torch.testing.assert_close(x - view.mlp.scale(view.mlp.out(hidden)), before)
    torch.testing.assert_close(x, after)


class FamilyContract:
    """Checks of one family on the random records that ``make`` draws."""

    def __init__(self, name: str, make: Callable[[Random], Arch]) -> None:
        self.family, self.make = family_of(name), make

    def check_capabilities(self) -> None:
        family, has = self.family, self.family.supports
        assert family.capabilities <= set(CAPABILITIES)
        assert has("images") != has("text")
        assert has("mixers") == (family.conv_sharing is not None)
        assert has("convolutions") or not has("mixers")
        assert has("mixed_heads") != bool(family.one_head_only)
        arch = self.make(Random(0))
        assert arch.family == family.name
        assert all((stage.window is not None) == has("windows") for stage in arch.stages)
        assert (arch.text is not None) == has("text")
        assert family.single_stage == has("global_attention") or not has("global_attention")

    def check_axes(self, seed: int) -> None:
        """Axes count spaces of their sizes, and who writes, reads and scales a space is all who have it."""
        arch = self.make(Random(seed))
        family, spaces = self.family, self.family.spaces(arch)
        users: dict[str, set[str]] = {space: set() for space in spaces}
        for name, shape in tensor_shapes(family, arch).items():
            uses = family.uses(arch, name)
            assert len(uses) <= len(shape), name
            for size, use in zip(shape, uses, strict=False):
                parts = family.parts(use.axis)
                assert sum(spaces[part] for part in parts) == size or not parts, (name, use)
                assert (use.role in ROLES) == bool(parts), (name, use)
                for part in parts:
                    users[part].add(name)
        for space, found in users.items():
            writers, readers, scalers = (f(arch, space) for f in (family.writers, family.readers, family.scalers))
            assert {*writers, *readers, *scalers} == found, space
            own = space.split(".")[-1]
            assert scalers if own in PER_UNIT else writers, space
            assert readers or own in ("q", "k", *PER_UNIT), space  # queries and keys are read by each other
            assert "choose" in family.reductions(arch, space)

    def check_places(self, seed: int) -> None:
        arch = self.make(Random(seed))
        for name in tensor_shapes(self.family, arch):
            place = self.family.place(name)
            if place is not None:
                assert self.family.block_prefix(place.stage, place.block) + place.part == name
                assert place.block < len(arch.stages[place.stage].blocks)

    def check_models(self, seed: int) -> None:
        """Build, run the example input, find the blocks, and run those of the first stage alone."""
        arch = self.make(Random(seed))
        model = build(arch).eval()
        x = example_input(arch, 2, seed)
        assert torch.equal(x, example_input(arch, 2, seed))
        with torch.no_grad():
            y = model(x)
        assert y.shape[0] == 2
        assert y.shape[-1] == arch.num_classes
        assert torch.isfinite(y).all()
        assert arch_of(model) == Arch.from_json(arch.to_json()) == arch
        blocks = blocks_of(model)
        assert blocks == self.family.blocks(model)
        assert len(blocks) == arch.depth
        shape, options = self.family.block_input(arch, arch.stages[0])
        for block in blocks[: len(arch.stages[0].blocks)]:
            assert block(torch.randn(2, *shape), **options).shape == (2, *shape)

    def check_streams(self, seed: int) -> None:
        """Stem, halves of blocks, entrances and the end are the whole model; readers say what their layers compute."""
        family = self.family
        if not family.supports("streams"):
            return
        arch = self.make(Random(seed))
        model, inputs = random_model(arch, seed), random_images(arch, seed)
        seen: dict[nn.Module, torch.Tensor] = {}
        for module in model.modules():
            module.register_forward_hook(lambda module, _, output: seen.update({module: output}))

        def check_reader(reader: Reader, x: torch.Tensor) -> None:
            assert model.get_submodule(reader.name) is reader.layer if "." in reader.name else True
            wanted = seen[reader.layer]
            wanted = wanted.flatten(2).mT if isinstance(reader.layer, nn.Conv2d) else wanted
            torch.testing.assert_close(reader(x).flatten(0, -2), wanted.flatten(0, -2))

        with torch.no_grad():
            wanted = model(inputs)
            x, views = family.stem(model, inputs), block_views(model)
            for s, stage in enumerate(arch.stages):
                if s:
                    entrance = family.entrance(model, arch, s)
                    check_reader(entrance.reader, x)
                    x = entrance.run(x)
                for view in (view for view in views if view.stage == s):
                    after = family.run_block(arch, stage, view.module, x)
                    if view.record.tokens is None:
                        check_halves(view, stage, x, after, parallel=arch.parallel)
                    x = after
            for head in family.heads(model, arch):
                check_reader(head, x)
            torch.testing.assert_close(family.finish(model, arch, x), wanted)

    def check_cost(self, seed: int, counted_macs: Callable[[nn.Module, Arch], int]) -> None:
        arch = self.make(Random(seed))
        model = build(arch).eval()
        assert cost(arch).params == num_params(model)
        if self.family.supports("images"):  # a text's are those of one word
            assert cost(arch).macs == counted_macs(model, arch)

    def check_cut(self, seed: int) -> None:
        """The cut model is the masked one, in the shape that the record says."""
        random = Random(seed)
        arch = self.make(random)
        model, x = random_model(arch, seed), random_images(arch, seed)
        decision = random_cut(random, arch)
        small = cut(model, decision)
        assert arch_of(small) == cut_arch(arch, decision)
        assert num_params(small) == cost(arch_of(small)).params
        with torch.no_grad(), masked(model, decision):
            want = model(x)
        with torch.no_grad():
            torch.testing.assert_close(small(x), want, rtol=1e-9, atol=1e-9)

    def check_saved(self, seed: int, folder: Path) -> None:
        """What is saved comes back bit-equal."""
        arch = self.make(Random(seed))
        model, x = random_model(arch, seed, torch.float32), random_images(arch, seed, dtype=torch.float32)
        save(model, folder)
        again = load(folder)
        assert arch_of(again) == arch
        with torch.no_grad():
            assert torch.equal(again.eval()(x), model(x))

    def check_projections(self, seed: int) -> int:
        """A space that may be projected is rotated without another function; how many spaces there were.

        Gains of norms that read the space are 1 and their biases 0: whoever projects moves them into the readers.
        """
        arch = self.make(Random(seed))
        model, x = random_model(arch, seed), random_images(arch, seed)
        spaces = [space for space in self.family.spaces(arch) if "project" in self.family.reductions(arch, space)]
        for space in spaces:
            weights = dict(model.state_dict())
            for name in self.family.scalers(arch, space):
                weights[name] = torch.full_like(weights[name], not name.endswith("bias"))
            same = self._rotated(arch, space, weights, seed)
            outputs = []
            for own in (weights, same):
                turned = build(arch).double().eval()
                turned.load_state_dict(own)
                with torch.no_grad():
                    outputs.append(turned(x))
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8, msg=space)
        return len(spaces)

    def _rotated(self, arch: Arch, space: str, weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        generator, sizes = torch.Generator().manual_seed(seed), self.family.spaces(arch)
        where, _, own = space.rpartition(".")
        if own in ("q", "k", "v"):  # every head by itself, queries as keys
            block = arch.blocks[int(where.split(".")[1])]
            widths = block.v_widths if own == "v" else (block.qk,) * block.heads
            turn = Rotation(torch.block_diag(*(rotation(width, generator) for width in widths)))
            turns = {space: turn} if own == "v" else {f"{where}.q": turn, f"{where}.k": turn}
        else:
            turns = {space: Rotation(rotation(sizes[space], generator, fix_ones=own == "embed"))}
        turned = {}
        scalers = self.family.scalers(arch, space)
        for name, tensor in weights.items():
            parts = [self.family.parts(axis) for axis in self.family.axes(arch, name)]
            turned[name] = tensor if name in scalers else reduce_tensor(tensor, parts, sizes, turns)
        return turned
