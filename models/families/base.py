"""Model families: one object per family answers every question whose answer differs between families.

A new family is one file with a subclass of ``Family`` and its entry in ``models.families.FAMILIES`` (or, from outside
the package, ``models.families.register``). No other code names a family: it asks for a *capability* instead.
``tests/contract_family.py`` checks whatever is registered.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.conv_mixing import ConvSharing
from prunesweep.models.without_values import without_values

from .block_costs import Cost, Counts, convolution_cost, global_attention_cost, mlp_cost
from .checks import check_fixed
from .spaces import AxisUse, Table
from .views import AttentionView, Entrance, MlpView, Reader, attention_view, consecutive, mlp_view

__all__ = ["CAPABILITIES", "Family", "Place", "tensor_shapes"]

_JOINT: Mapping[str, tuple[str, ...]] = MappingProxyType(  # spaces side by side on an axis
    {
        "merged": ("embed",) * 4,
        "pooled": ("embed",) * 2,  # maximum and mean
        "qkv": ("q", "k", "v"),
        "kv": ("k", "v"),
        "turned_q": ("q", "q"),  # the first channels of all pairs, and the second ones
        "turned_k": ("k", "k"),
        "turned_qk_norm": ("qk_norm", "qk_norm"),
        "gated": ("mlp", "mlp"),  # what is activated, and what it multiplies
    }
)

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "images": "takes images B x C x rows x columns and gives one vector of logits, or of features, for each",
        "text": "takes word numbers and predicts every next word; its record has a ``text``",
        "width": "channels of the residual streams, of queries, keys and values, and MLP units can be cut",
        "depth": "blocks can be dropped",
        "convolutions": "a block may have a convolution over the grid of patches as its mixer",
        "mixers": "attention can be replaced by a convolution that shares its weights (``conv_sharing`` says how)",
        "tokens": "a block may have a token plan: fewer tokens inside it than between blocks",
        "token_scale": "attention may have a frozen factor per token",
        "isotropic": "every block attends over all tokens of the only stage",
        "global_attention": "every block attends over all tokens of the only stage, in no order",
        "windows": "attention is within windows, whose size is in the stage's record, and may be shifted",
        "spatial_reduction": "keys and values are read from a map that is reduced by the stage's ``sr_ratio``",
        "mixed_heads": "a head that stays may take query, key and value channels of several heads of the source",
        "mixed_maps": "attention maps of heads are mixed: a head whose own output is nothing still gives to the others",
        "difference_maps": "attention maps are differences of two, behind which a norm is over the values of a head",
        "channel_attention": "attention is between channels, whose number is fixed, with convolutions of the stream",
        "pooled_queries": "what leads to a stage has attention of its own, which stays whole; an MLP alone follows it",
        "local_mixers": "a block may mix places by pooling or a separable convolution, in the place of attention",
        "rotary": "queries and keys may be turned by their tokens' places, whose units are pairs of channels then",
        "single_channels": "a channel of a stage comes from one of the stage before, by a convolution of its own",
        "features": "the tokens behind any block are one vector per patch of the first grid",
        "streams": "it can be run and refitted part by part: stem, blocks, entrances of stages, heads",
    }
)


class Place(NamedTuple):
    """The place of a block's tensor: its stage, the block's number within the stage, and its name within the block."""

    stage: int
    block: int
    part: str


class Family(ABC):
    """Everything that is particular to one model family. Objects have no state: one serves all models.

    A subclass sets the attributes, gives ``build``, ``outside_cost`` and, where timm has such models, ``read``, and
    overrides what else is different. Defaults are those of a pre-norm transformer whose blocks have attention over all
    tokens and an MLP.
    """

    name: ClassVar[str]  # what records, files and reports call it
    capabilities: ClassVar[frozenset[str]]  # names of ``CAPABILITIES``
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = ()  # exact types that ``read`` takes
    lacks: ClassVar[Mapping[str, str]] = MappingProxyType({})  # of a missing capability, why it cannot have it

    single_stage: ClassVar[bool] = False
    stages_name: ClassVar[str] = ""  # the attribute that holds the stages; "" where blocks are the model's own
    fixed_fields: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # what its records always hold
    one_head_only: ClassVar[str] = ""  # without "mixed_heads": why a head keeps channels of one head only
    conv_sharing: ClassVar[ConvSharing | None] = None  # with "mixers"
    norm_residuals: ClassVar[bool] = True  # a block without a mixer may add its normalised input
    leaves_windows: ClassVar[bool] = False  # with "windows": a block may have ``whole_map``
    refers_to_windows: ClassVar[bool] = False  # with "windows": a stage may have a ``reference_window``

    block_tensors: ClassVar[Table]  # by the name within a block
    stage_tensors: ClassVar[Table] = {}  # by the name within a stage
    outer_tensors: ClassVar[Table]  # by the name within the model

    adopts: ClassVar[bool] = False  # timm's modules have other tensors than those that it builds: see ``adopted``
    first_conv: ClassVar[str | None] = "patch_embed.proj"  # for timm's ``pretrained_cfg``
    probe_patch: ClassVar[int] = 1  # side of the patches of a model made to measure its blocks

    # --- models ---

    def supports(self, *capabilities: str) -> bool:
        """Whether the family has all of ``capabilities``. Raises KeyError for one that does not exist."""
        unknown = [name for name in capabilities if name not in CAPABILITIES]
        if unknown:
            raise KeyError(f"unknown capability {', '.join(unknown)}; known: {', '.join(CAPABILITIES)}")
        return self.capabilities.issuperset(capabilities)

    def takes(self, model: Any) -> bool:
        """Whether a module of ``timm_classes`` is for this family; false where another one reads this kind of it."""
        return True

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a module of ``timm_classes``.

        Args:
            model: a timm module.
            name: what to call the source.
            img_size: rows and columns of its images, for a model that takes any.

        Raises:
            UserError: the model has a part that the record lacks; the message says which.
        """
        raise NotImplementedError(f"{self.name} has no timm models")

    @abstractmethod
    def build(self, arch: Arch, *, drop_path: float = 0.0) -> nn.Module:
        """Build a randomly initialised module; the last block has the stochastic depth rate ``drop_path``.

        timm stores its ``num_classes`` and ``num_features`` with it, so it must have both.
        """

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Give a timm model's weights the names and the layout of ``build(arch)``; by default they have them.

        Args:
            model: one of ``timm_classes``.
            arch: its record.
        """
        return dict(model.state_dict())

    def current(self, model: Any, arch: Arch) -> Arch:
        """Return the record of a built module as it is now, after timm's ``reset_classifier`` or ``set_input_size``.

        Args:
            model: a module that ``build`` made.
            arch: the record that it was made from.

        Raises:
            UserError: the record cannot follow the change; the message says what to do.
        """
        changes: dict[str, Any] = {}
        if (classifiers := self.classifiers(arch)) is not None:
            head = model.get_submodule(classifiers if isinstance(classifiers, str) else classifiers[0])
            classes = head.out_features if isinstance(head, nn.Linear) else 0
            if classes != arch.num_classes:
                changes |= {"num_classes": classes, "feature_head": False}
        if (pool := getattr(model, "global_pool", arch.pool)) != arch.pool:
            changes["pool"] = pool
        return dataclasses.replace(arch, **changes) if changes else arch

    def set_drop_rate(self, model: Any, rate: float) -> None:
        """Set the dropout in front of the classifier; every family of images has one."""
        owner, name = (model, "head_drop") if hasattr(model, "head_drop") else (model.head, "drop")
        setattr(owner, name, nn.Dropout(rate))

    def set_patch_drop_rate(self, model: Any, arch: Arch, rate: float) -> None:
        """Leave out a share of the patches in training.

        Raises:
            UserError: the model needs all patches; the message says why.
        """
        raise UserError(f"patch_drop_rate = {rate}: the maps of {self.name} need all patches; use drop_path_rate")

    def set_img_size(self, model: Any, arch: Arch, img_size: tuple[int, int]) -> Arch:
        """Let a model take images of another size, resampling what has one entry per place; return its record.

        Args:
            model: a module that ``build`` made.
            arch: its record.
            img_size: rows and columns.

        Raises:
            UserError: the model is for one size; the message says why and what to do.
        """
        try:
            model.set_input_size(img_size=img_size)
        except UserError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"img_size = {list(img_size)}: {arch.source} takes no such images: {error}") from error
        return self.current(model, arch)

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Let a model take images of any size at run time.

        Raises:
            UserError: the model is for one size; the message says why and what to do.
        """
        raise UserError(f"dynamic_img_size = True: models of family {self.name!r} are for one size; give img_size")

    def first_convolution(self, arch: Arch) -> str | None:
        """Name the layer that reads images, as timm's ``pretrained_cfg`` wants it."""
        return self.first_conv

    def feature_stages(self, arch: Arch) -> int | tuple[int, ...]:
        """Return timm's default ``out_indices`` of ``features_only``: every stage, or the last three blocks."""
        return min(3, arch.depth) if self.single_stage else tuple(range(len(arch.stages)))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """List the blocks of all stages, in the order of ``Arch.blocks``."""
        stages: Any = getattr(model, self.stages_name) if self.stages_name else [model]
        return [block for stage in stages for block in stage.blocks]

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention; None where its record has another mixer or none.

        By default ``block.attn``, with queries, keys and values from one projection ``qkv``.
        """
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v))

    def mlp_view(self, block: Any, record: Block) -> MlpView | None:
        """View a block's MLP, by default ``block.mlp``; None where its record has none."""
        return mlp_view(block) if record.mlp else None

    # --- residual streams, with the capability "streams" ---

    def stem(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute the stream in front of the first block from what the model takes."""
        raise NotImplementedError(f"{self.name} has no streams")

    def run_block(self, arch: Arch, stage: Stage, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Compute the stream behind a block of a stage from the one in front of it."""
        found: torch.Tensor = block(x, **self.block_input(arch, stage)[1])
        return found

    def stem_norm(self, model: Any) -> nn.Module | None:
        """Return the norm whose output is the first stream; None where there is none."""
        return None

    def entrance(self, model: Any, arch: Arch, stage: int) -> Entrance:
        """View what leads to a stage other than the first."""
        raise NotImplementedError(f"{self.name} has one stage")

    def rows_and_features(self, arch: Arch) -> Iterator[tuple[int, int]]:
        """List of layers that are refitted how many rows an input gives, and how many features a row has."""
        for stage in arch.stages:
            tokens = arch.prefix_tokens + math.prod(stage.grid)
            for block in stage.blocks:
                yield tokens, max(stage.width, block.mlp, block.total_v)

    def heads(self, model: Any, arch: Arch) -> tuple[Reader, ...]:
        """List the layers that read the last stream, none where ``num_classes`` is 0.

        There may be others that share their weights with the stem.
        """
        raise NotImplementedError(f"{self.name} has no streams")

    def finish(self, model: Any, arch: Arch, x: torch.Tensor) -> torch.Tensor:
        """Compute the model's output from the stream behind the last block."""
        raise NotImplementedError(f"{self.name} has no streams")

    def classifiers(self, arch: Arch) -> str | tuple[str, ...] | None:
        """Names of the layers that depend on the number of classes, as timm's ``pretrained_cfg`` wants them."""
        return "head"

    def example_input(self, arch: Arch, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Make a random input: images (B, C, rows, columns) in float32."""
        return torch.randn(batch, arch.in_chans, *arch.img_size, generator=generator)

    # --- records ---

    def grids(self, arch: Arch) -> list[tuple[int, ...]]:
        """Rows and columns of every stage: patches, halved (rounding up) from stage to stage."""
        grids = [tuple(i // p for i, p in zip(arch.img_size, arch.patch_size, strict=True))]
        for _ in arch.stages[1:]:
            grids.append(tuple((side + 1) // 2 for side in grids[-1]))
        return grids

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError where a field other than ``stages`` makes the record impossible; ``stages`` may be wrong."""
        check_fixed(arch, f"family = {arch.family!r}", self.fixed_fields)

    def check_whole(self, arch: Arch) -> None:  # noqa: B027  # most families have nothing to add
        """Raise UserError where a record whose fields and stages are right one by one is impossible."""

    # --- cost ---

    @abstractmethod
    def outside_cost(self, arch: Arch) -> Cost:
        """Count MACs and parameters outside the blocks: embedding, layers between stages, norms and classifiers."""

    def block_cost(self, arch: Arch, stage: Stage, block: Block) -> Cost:
        """Count MACs and parameters of one block in a stage of a model like ``arch``."""
        places = stage.grid[0] * stage.grid[1] + arch.prefix_tokens  # between blocks
        tokens = block.tokens or places  # inside
        norm = stage.width * (arch.norm_tensors + arch.layer_scale)
        mlp_norm = norm if arch.mlp_scale else stage.width * arch.norm_tensors
        macs = params = 0
        if block.tokens is not None:
            dense = block.merge == "dense"
            macs += dense * 2 * tokens * places * stage.width
            params += 2 * places * (tokens if dense else 1)
        mixer, mlp = (0, 0), (0, 0)
        if block.mixer == "attn":
            mixer = self.attention_cost(arch, stage, block, tokens)
        elif block.conv_kernel:
            mixer = convolution_cost(stage, block)
        if block.mlp:
            mlp = self.mlp_cost(arch, stage, block, tokens)
        norms = norm * (block.mixer != "none" or block.norm_residual) + mlp_norm * (block.mlp > 0)
        return Cost(macs + mixer[0] + mlp[0], params + mixer[1] + mlp[1] + norms)

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count MACs and parameters of a block's attention, by default over all tokens.

        Args:
            arch: the model's record.
            stage: the block's stage.
            block: the block.
            tokens: number of tokens inside the block.
        """
        return global_attention_cost(arch, stage, block, tokens)

    def mlp_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count MACs and parameters of a block's MLP, by default two linear layers.

        Args:
            arch: the model's record.
            stage: the block's stage.
            block: the block.
            tokens: number of tokens inside the block.
        """
        return mlp_cost(arch, stage, block, tokens)

    # --- tensors and spaces ---

    def block_prefix(self, stage: int, block: int) -> str:
        """Return the prefix of the names of a block's tensors, such as ``layers.0.blocks.1.``."""
        return f"{self.stages_name}.{stage}.blocks.{block}." if self.stages_name else f"blocks.{block}."

    def place(self, tensor: str) -> Place | None:
        """Find the place of a block's tensor; None for a tensor outside the blocks."""
        stage = rf"{re.escape(self.stages_name)}\.(\d+)\." if self.stages_name else "()"
        match = re.fullmatch(rf"{stage}blocks\.(\d+)\.(.+)", tensor)
        return None if match is None else Place(int(match[1] or 0), int(match[2]), match[3])

    def uses(self, arch: Arch, tensor: str) -> tuple[AxisUse, ...]:
        """Return what every axis of a tensor of ``build(arch)``'s state dict counts, and what the tensor does there.

        Axes that are left out, from the last on, are always kept whole.
        """
        if place := self.place(tensor):
            i = sum(len(stage.blocks) for stage in arch.stages[: place.stage]) + place.block
            return tuple(self._block_use(arch, place.stage, i, use) for use in self.block_tensors[place.part])
        if self.stages_name and (match := re.fullmatch(rf"{re.escape(self.stages_name)}\.(\d+)\.(.+)", tensor)):
            s = int(match[1])
            names = {"in": f"stages.{s - 1}.embed", "out": f"stages.{s}.embed", "merged": f"stages.{s - 1}.merged"}
            names["pooled"] = f"stages.{s - 1}.pooled"
            return tuple(AxisUse(names.get(use.axis, ""), use.role) for use in self.stage_tensors[match[2]])
        names = {"in": "stages.0.embed", "out": f"stages.{len(arch.stages) - 1}.embed"}
        return tuple(AxisUse(names.get(use.axis, ""), use.role) for use in self.outer_tensors[tensor])

    def _block_use(self, arch: Arch, stage: int, index: int, use: AxisUse) -> AxisUse:
        if use.axis in ("", "embed"):
            return AxisUse(use.axis and f"stages.{stage}.embed", use.role)
        if use.axis == "mlp_in":
            return AxisUse(f"blocks.{index}.{'gated' if arch.glu else 'mlp'}", use.role)
        return AxisUse(f"blocks.{index}.{use.axis}", use.role)

    def axes(self, arch: Arch, tensor: str) -> tuple[str, ...]:
        """Return what every axis of a tensor counts; "" or left out where it is never cut.

        ``parts`` lists an axis's spaces.
        """
        return tuple(use.axis for use in self.uses(arch, tensor))

    def parts(self, axis: str) -> tuple[str, ...]:
        """List the spaces that lie side by side on an axis."""
        if not axis:
            return ()
        where, _, own = axis.rpartition(".")
        return tuple(f"{where}.{part}" for part in _JOINT.get(own, (own,)))

    def spaces(self, arch: Arch) -> dict[str, int]:
        """Return the size of every space of a record.

        ``stages.S.embed`` are a stage's residual channels. Of block I there are ``blocks.I.`` and those of
        ``block_spaces``. Of a language model's bands from the second on there is ``bands.B.tail``.
        """
        sizes = {f"stages.{s}.embed": stage.width for s, stage in enumerate(arch.stages)}
        for i, block in enumerate(arch.blocks):
            own = self.block_spaces(arch, block)
            sizes |= {f"blocks.{i}.{space}": size for space, size in own.items() if size}
        return sizes

    def block_spaces(self, arch: Arch, block: Block) -> dict[str, int]:
        """Return the size of the spaces within a block; 0 for one that this block lacks.

        ``q`` and ``k`` (H·E each; H·P pairs, where pairs of channels are turned), ``v`` (all heads' value channels, or
        a convolution's bottleneck), ``mlp``, ``sr`` (PVTv2's reduced map); ``qk_norm`` (E) where all heads share norms
        of queries and keys, and ``heads`` where a tensor has one entry per head.
        """
        qk = block.heads * block.qk
        shared_norm = block.qk * arch.qk_norm
        return {"q": qk, "k": qk, "v": block.total_v, "mlp": block.mlp, "sr": block.sr, "qk_norm": shared_norm}

    def reductions(self, arch: Arch, space: str) -> tuple[str, ...]:
        """Name the ways in which a space may be reduced so that the reduced model computes the same kind of function.

        ``choose`` keeps some of its channels, which every space allows. ``project`` puts a matrix on every axis of the
        space; ``only_chosen`` says of which spaces not, and why.
        """
        return ("choose", "project") if self.only_chosen(arch, space) is None else ("choose",)

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected.

        That needs that nothing but linear maps and, in the residual stream, the norm in front of a reader acts on the
        channels. A residual stream that a norm *writes* to (behind a patch embedding) is not such a space: the norm's
        gain acts in the source's basis, and no linear map follows in which it could be absorbed.

        Args:
            arch: the model's record.
            space: one of ``spaces``.
        """
        where, _, own = space.rpartition(".")
        if own in ("q", "k"):
            return "a norm acts on queries and keys" if arch.qk_norm else None
        if own == "v":
            attends = arch.blocks[int(where.split(".")[1])].mixer == "attn"
            return None if attends else "an activation acts on the convolution's channels"
        if own == "embed":
            normed = self.norm_writes(arch, int(where.split(".")[1]))
            return "the gain of the norm that writes the stream acts on single channels" if normed else None
        reasons = {"mlp": "an activation acts on hidden units", "sr": "a norm acts on the reduced map"}
        return None if own == "tail" else reasons.get(own, "it is no space of channels")

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """Whether a norm's output goes straight into a stage's residual stream."""
        return False

    def writers(self, arch: Arch, space: str) -> tuple[str, ...]:
        """Name the tensors whose output lies in a space, biases included."""
        return _names(self, arch, space, "writes", "shares")

    def readers(self, arch: Arch, space: str) -> tuple[str, ...]:
        """Name the tensors whose input lies in a space; queries and keys are read by each other only."""
        return _names(self, arch, space, "reads", "shares")

    def scalers(self, arch: Arch, space: str) -> tuple[str, ...]:
        """Name the tensors with one number per channel of a space, such as the gains of norms."""
        return _names(self, arch, space, "scales")

    # --- latency ---

    def probe_images(self, grid: tuple[int, int], patch: int) -> tuple[int, int]:
        """Return the size of images whose first stage is a ``grid`` of patches with sides of ``patch`` pixels."""
        return patch * grid[0], patch * grid[1]

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape, without the batch, and the further arguments of the input of a stage's blocks."""
        return (stage.grid[0] * stage.grid[1] + arch.prefix_tokens, stage.width), {}


@lru_cache(maxsize=16)
def tensor_shapes(family: Family, arch: Arch) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every tensor of ``build(arch)``'s state dict, without allocating any.

    Args:
        family: the record's family.
        arch: the record.
    """
    with without_values():
        model = family.build(arch)
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


@lru_cache(maxsize=16)
def _users(family: Family, arch: Arch) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Name the tensors that have a space in a role, in the order of the state dict."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for tensor in tensor_shapes(family, arch):
        for use in family.uses(arch, tensor):
            for space in family.parts(use.axis):
                found.setdefault((space, use.role), {})[tensor] = None
    return {key: tuple(names) for key, names in found.items()}


def _names(family: Family, arch: Arch, space: str, *roles: str) -> tuple[str, ...]:
    users = _users(family, arch)
    return tuple(dict.fromkeys(name for role in roles for name in users.get((space, role), ())))
