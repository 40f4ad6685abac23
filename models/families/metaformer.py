"""MetaFormer: PoolFormer, ConvFormer and CAFormer, whose blocks mix places by pooling, convolution or attention.

What is cut are the stream of every stage, hidden units, the channels of separable convolutions (one channel of them is
one unit), attention's heads and widths, and blocks; the hidden units of a classifier stay. timm has 1x1 convolutions in
some stages and linear layers in others; here all are linear layers on tokens, so a timm model is adopted
(``families.eva``).

What passes by the halves of a block may be multiplied by factors of every channel. Where a half is left out, they stay;
a block that is dropped takes them with it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import GroupNorm1, LayerNorm, LayerNorm2d, Mlp, SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.metaformer import (
    Attention,
    Downsampling,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    MetaFormerStage,
    MlpHead,
    Pooling,
    SepConv,
    SquaredReLU,
    StarReLU,
    Stem,
)
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.errors import UserError
from prunesweep.models.layers.activations import activation_name
from prunesweep.models.layers.metaformer import ACTS, KERNEL, POOL, MetaFormerBlock

from .base import Family
from .block_costs import Cost, global_attention_cost, mlp_cost
from .checks import PYRAMID, check_one_of
from .reading import Require, pyramid_record, require
from .spaces import MLP, NORMS, Table, linear, per_channel, scales
from .views import AttentionView, MlpView, attention_view, consecutive, mlp_view

__all__ = ["METAFORMER", "HeteroMetaFormer"]

OUTER_EPS = 1e-6  # of all norms outside the blocks
KINDS: dict[type[nn.Module], tuple[str, bool]] = {  # of a block's norm: ``Arch.norm`` and ``Arch.norm_bias``
    GroupNorm1: ("group", True),
    GroupNorm1NoBias: ("group", False),
    LayerNorm2d: ("layer", True),
    LayerNorm: ("layer", True),
    nn.LayerNorm: ("layer", True),
    LayerNorm2dNoBias: ("layer", False),
    LayerNormNoBias: ("layer", False),
}
STEM: dict[str, Any] = {"kernel_size": (7, 7), "stride": (4, 4), "padding": (2, 2)}
BETWEEN: dict[str, Any] = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}


class Embedding(nn.Module):
    """What leads to a stage: a convolution, and a norm in front of it or, with ``norm_last``, behind it."""

    def __init__(self, into: int, out: int, *, norm: bool, norm_last: bool, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(into, out, **options)
        self.norm_last = norm_last
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.LayerNorm(out if norm_last else into, eps=OUTER_EPS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map (B, D, rows, columns) of a stage from images or the map of the stage before."""
        return _normed(self.norm, self.proj(x)) if self.norm_last else self.proj(_normed(self.norm, x))  # type: ignore[no-any-return]


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Put a map (B, D, rows, columns) through a norm over its channels."""
    found: torch.Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return found


class HeteroStage(nn.Module):
    """A stage of one record."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks, self.grad_checkpointing = downsample, nn.ModuleList(blocks), False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass, which takes less memory."""
        self.grad_checkpointing = enable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run on images' map (B, D', rows', columns') of the stage before, giving (B, D, rows, columns)."""
        x = self.downsample(x)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT
        for block in self.blocks:
            run = partial(checkpoint, block) if self.grad_checkpointing and self.training else block
            x = run(x, (rows, columns))
        found: torch.Tensor = x.mT.unflatten(2, (rows, columns))  # type: ignore[no-untyped-call]
        return found


class HeteroMetaFormer(MetaFormer):  # type: ignore[misc]  # timm is untyped
    """A timm MetaFormer of any widths, whose maps are (B, rows, columns, D) until its features, as timm's, are NCHW."""

    global_pool = "avg"

    def __init__(self, arch: Arch, *, drop_path: float = 0.0) -> None:
        widths = [stage.width for stage in arch.stages]
        super().__init__(in_chans=arch.in_chans, num_classes=0, depths=(0,) * len(widths), dims=widths)
        self.num_classes, self.use_mlp_head, self._head_mlp = arch.num_classes, arch.head_mlp > 0, arch.head_mlp
        del self.stem
        option: Any = {"norm": arch.embed_norm}
        self.patch_embed = Embedding(arch.in_chans, widths[0], norm_last=True, **option, **STEM)
        rates = calculate_drop_path_rates(drop_path, [len(stage.blocks) for stage in arch.stages], stagewise=True)
        stages = []
        for s, stage in enumerate(arch.stages):
            blocks: list[nn.Module] = [
                MetaFormerBlock(arch, stage, block, drop_path=rate)
                for block, rate in zip(stage.blocks, rates[s], strict=True)
            ]
            embed = Embedding(widths[s - 1], stage.width, norm_last=False, **option, **BETWEEN) if s else nn.Identity()
            stages.append(HeteroStage(embed, blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            OrderedDict(
                global_pool=SelectAdaptivePool2d(pool_type="avg", flatten=True),
                norm=nn.LayerNorm(widths[-1], eps=OUTER_EPS),
                flatten=nn.Identity(),
                drop=nn.Dropout(0.0),
                fc=self._classifier(arch.num_classes, mlp=_head_mlp(arch) > 0),
            )
        )
        self.apply(self._init_weights)

    def _classifier(self, classes: int, *, mlp: bool) -> nn.Module:
        if not classes:
            return nn.Identity()
        if not mlp:
            return nn.Linear(self.num_features, classes)
        return MlpHead(self.num_features, classes, mlp_ratio=(self._head_mlp + 0.5) / self.num_features)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False, **_: Any
    ) -> None:
        """Put a new classifier of the same kind, or none, in place of the model's; ``reset_other`` leaves maps alone.

        Raises:
            UserError: another pooling than the average is asked for.
        """
        like = next(self.parameters())
        if reset_other:
            self.head.global_pool = self.head.norm = nn.Identity()
        elif global_pool not in (None, "avg"):
            raise UserError(f"global_pool = {global_pool!r}: a model of family 'metaformer' needs 'avg'")
        self.num_classes = num_classes
        self.head.fc = self._classifier(num_classes, mlp=self.use_mlp_head).to(like.device, like.dtype)
        self.head.fc.train(self.head.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last map (B, D, rows, columns) from images."""
        found: torch.Tensor = self.stages(self.patch_embed(x))
        return found

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the maps (B, D, rows, columns) behind some stages; arguments are those of timm's method."""
        assert output_fmt == "NCHW"
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        x = self.patch_embed(x)
        for s, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if s in taken:
                found.append(x)
        return found if intermediates_only else (x, found)


class MetaFormerFamily(Family):
    """timm's MetaFormer: maps of several sizes, convolutions between them, and a mixer of places for every stage."""

    name = "metaformer"
    capabilities = frozenset({"images", "width", "depth", "local_mixers", "mixed_heads"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (MetaFormer,)
    adopts = True
    lacks: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("tokens", "global_attention"),
            "pooling, separable convolutions and the convolutions between stages read neighbours on the whole map",
        ),
        "mixers": "a convolution gets its weights from the attention that it replaces, and most blocks have none",
        "streams": "factors multiply single channels of what passes by a block, and pooling and separable "
        "convolutions have no refit",
    }
    stages_name = "stages"
    fixed_fields: ClassVar[dict[str, Any]] = {
        **{
            name: value
            for name, value in PYRAMID.items()
            if name not in ("norm", "norm_bias", "embed_norm", "layer_scale", "proj_bias", "mlp_bias", "head_mlp")
        },
        "head_norm": "pooled",
    }
    probe_patch = 4
    block_tensors: ClassVar[Table] = {
        **NORMS,
        **MLP,
        "mlp.act.scale": (),
        "mlp.act.bias": (),
        **{f"{factors}{i}.gamma": (scales("embed"),) for factors in ("ls", "rs") for i in "12"},
        **linear("attn.qkv", "qkv", "embed"),
        **linear("attn.proj", "embed", "v"),
        **linear("attn.pwconv1", "v", "embed"),
        "attn.act1.scale": (),
        "attn.act1.bias": (),
        "attn.dwconv.weight": (scales("v"),),
        **linear("attn.pwconv2", "embed", "v"),
    }
    stage_tensors: ClassVar[Table] = {
        **per_channel("downsample.norm", "in"),  # in front of the convolution
        **linear("downsample.proj", "out", "in"),
    }
    outer_tensors: ClassVar[Table] = {
        **linear("patch_embed.proj", "in", ""),
        **per_channel("patch_embed.norm", "in"),
        **per_channel("head.norm", "out"),
        **linear("head.fc", "", "out"),
        **linear("head.fc.fc1", "", "out"),
        **dict.fromkeys((f"head.fc.{layer}.{part}" for layer in ("norm", "fc2") for part in ("weight", "bias")), ()),
    }

    def read(self, model: Any, name: str, img_size: tuple[int, int]) -> Arch:
        """Read the record of a MetaFormer for images of ``img_size``."""
        needs = partial(require, name)
        embed_norm = _read_embeddings(model, needs)
        head_mlp = _read_head(model, needs)
        stages, features, index = [], set(), 0
        grid = _first_grid(img_size)
        for s, layer in enumerate(model.stages):
            grid = grid if s == 0 else _halved(grid)
            needs(len(layer.blocks) > 0, f"stage {s} has no blocks")
            found = [_read_block(index + i, block, needs) for i, block in enumerate(layer.blocks)]
            index += len(found)
            features |= {own for _, own, _ in found}
            factors = {scaled for _, _, scaled in found}
            needs(len(factors) == 1, f"blocks of stage {s} differ in the factors on what passes by them")
            width = layer.blocks[0].mlp.fc1.in_channels if layer.use_nchw else layer.blocks[0].mlp.fc1.in_features
            blocks = tuple(block for block, _, _ in found)
            stages.append(Stage(width=width, grid=grid, blocks=blocks, res_scale=factors.pop()))
        needs(len(features) == 1, "its blocks differ in norms, activation, biases or layer scale")
        fields = dict(features.pop())
        biases = {
            (block.token_mixer.qkv.bias is not None, block.token_mixer.proj.bias is not None)
            for layer in model.stages
            for block in layer.blocks
            if type(block.token_mixer) is Attention
        }
        needs(len(biases) < 2, "its blocks differ in the biases of attention")
        qkv_bias, proj_bias = biases.pop() if biases else (True, True)
        return pyramid_record(
            model,
            self.name,
            name,
            stages,
            {qkv_bias},
            img_size=img_size,
            patch_size=(4, 4),
            in_chans=model.in_chans,
            embed_norm=embed_norm,
            proj_bias=proj_bias,
            head_mlp=head_mlp,
            head_norm="pooled",
            **fields,
        )

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Name a timm model's weights as here, and flatten those of 1x1 convolutions."""
        found = {}
        for name, tensor in model.state_dict().items():
            new = re.sub(r"^stem\.", "patch_embed.", name)
            new = re.sub(r"^(patch_embed|stages\.\d+\.downsample)\.conv\.", r"\1.proj.", new)
            new = re.sub(r"\.layer_scale(\d)\.scale$", r".ls\1.gamma", re.sub(r"\.token_mixer\.", ".attn.", new))
            new = re.sub(r"\.res_scale(\d)\.scale$", r".rs\1.gamma", new)
            flat = re.search(r"\.(mlp\.fc\d|attn\.pwconv\d)\.weight$", new)
            found[new] = tensor.flatten(1) if flat else tensor
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> HeteroMetaFormer:
        """Build a ``HeteroMetaFormer``."""
        return HeteroMetaFormer(arch, drop_path=drop_path)

    def current(self, model: Any, arch: Arch) -> Arch:
        """Return the record of a built model as it is now, after timm's ``reset_classifier``."""
        fc = model.head.fc
        last = fc.fc2 if isinstance(fc, MlpHead) else fc
        classes = last.out_features if isinstance(last, nn.Linear) else 0
        return (
            arch if classes == arch.num_classes else dataclasses.replace(arch, num_classes=classes, feature_head=False)
        )

    def set_img_size(self, model: Any, arch: Arch, img_size: tuple[int, int]) -> Arch:
        """Return the record for images of another size: nothing in the model depends on it."""
        sized = dataclasses.replace(arch, img_size=img_size)
        pairs = zip(arch.stages, self.grids(sized), strict=True)
        stages = tuple(dataclasses.replace(stage, grid=(grid[0], grid[1])) for stage, grid in pairs)
        return dataclasses.replace(sized, stages=stages)

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Do nothing: a MetaFormer takes images of any size."""

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, which is over all places."""
        if record.mixer != "attn":
            return None
        width = record.heads * record.qk
        q, k, v = consecutive("attn.qkv", block.attn.qkv, width, width, record.total_v)
        return attention_view(block, record, (q, k, v), passing=block.rs1)

    def mlp_view(self, block: Any, record: Block) -> MlpView | None:
        """View a block's MLP."""
        return mlp_view(block, passing=block.rs2) if record.mlp else None

    def classifiers(self, arch: Arch) -> str:
        """Return the last layer of ``head.fc``."""
        return "head.fc.fc2" if _head_mlp(arch) else "head.fc"

    def grids(self, arch: Arch) -> list[tuple[int, ...]]:
        """Return rows and columns of every stage.

        The first convolution, 7x7 with stride 4 and padding 2, needs a whole kernel; the others round up.
        """
        grids = [_first_grid(arch.img_size)]
        for _ in arch.stages[1:]:
            grids.append(_halved(grids[-1]))
        return [*grids]

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for an activation or a norm that MetaFormer's blocks cannot have, or another first stride."""
        super().check_fields(arch)
        check_one_of("act", arch.act, ACTS)
        check_one_of("norm", arch.norm, ("layer", "group"))
        if arch.patch_size != (4, 4):
            raise UserError(
                f"patch_size = {list(arch.patch_size)}: the first convolution of metaformer has stride [4, 4]"
            )

    def norm_writes(self, arch: Arch, stage: int) -> bool:
        """True in stage 0 where its convolution has a norm behind it; others have it in front."""
        return stage == 0 and arch.embed_norm

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        where, _, own = space.rpartition(".")
        if own == "embed" and arch.stages[int(where.split(".")[1])].res_scale:
            return "factors of single channels multiply what passes by the blocks"
        return super().only_chosen(arch, space)

    def block_cost(self, arch: Arch, stage: Stage, block: Block) -> Cost:
        """Count a block of N places: attention and MLP as elsewhere, N (2 D V + k k V) MACs of a separable convolution.

        Pooling counts nothing. StarReLU has two weights.
        """
        places, D, V = math.prod(stage.grid), stage.width, block.total_v
        norm = D * (arch.norm_tensors + arch.layer_scale)
        macs, params = 0, 2 * D * stage.res_scale
        if block.mixer != "none" or block.norm_residual:
            params += norm
        if block.mixer == "attn":
            own = global_attention_cost(arch, stage, block, places)
            macs, params = macs + own[0], params + own[1]
        elif block.mixer == "sepconv":
            weights = 2 * D * V + KERNEL**2 * V
            macs, params = macs + places * weights, params + weights + 2
        if block.mlp:
            own = mlp_cost(arch, stage, block, places)
            macs, params = macs + own[0], params + own[1] + norm + 2 * (arch.act == "star_relu")
        return Cost(macs, params)

    def outside_cost(self, arch: Arch) -> Cost:
        """Count the convolutions in front of stages (7x7, then 3x3), their norms, the last norm and the classifier."""
        last, K, M = arch.stages[-1].width, arch.num_classes, _head_mlp(arch)
        macs = last * M + M * K if M else last * K
        params = 2 * last + ((last + 1) * M + 2 * M + (M + 1) * K if M else (last + 1) * K)
        channels, kernel = arch.in_chans, 49
        for s, stage in enumerate(arch.stages):
            macs += math.prod(stage.grid) * stage.width * channels * kernel
            params += stage.width * (channels * kernel + 1) + arch.embed_norm * (channels if s else stage.width)
            channels, kernel = stage.width, 9
        return Cost(macs, params)

    def block_input(self, arch: Arch, stage: Stage) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of the tokens, and the rows and columns that they are."""
        return (math.prod(stage.grid), stage.width), {"feat_size": stage.grid}


def _head_mlp(arch: Arch) -> int:
    """Return the hidden units of the classifier; features pass none, nor does a linear map to them."""
    return arch.head_mlp if arch.num_classes and not arch.feature_head else 0


def _first_grid(img_size: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = ((side + 1) // 4 for side in img_size)
    return rows, columns


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _read_embeddings(model: Any, require: Require) -> bool:
    """Return whether the convolutions in front of stages have norms."""
    require(type(model.stem) is Stem, f"its stem is a {type(model.stem).__name__}")
    normed = set()
    for s, layer in enumerate(model.stages):
        require(type(layer) is MetaFormerStage, f"stage {s} is a {type(layer).__name__}")
        embed, wanted = (layer.downsample, BETWEEN) if s else (model.stem, STEM)
        require(
            s == 0 or type(embed) is Downsampling, f"no convolution leads to stage {s}, which is as wide as the last"
        )
        own = {name: getattr(embed.conv, name) for name in wanted}
        require(own == wanted, f"the convolution in front of stage {s} has {own}, not {wanted}")
        none = isinstance(embed.norm, nn.Identity)
        kind = type(embed.norm).__name__
        known = none or (type(embed.norm) is LayerNorm2dNoBias and embed.norm.eps == OUTER_EPS)
        require(known, f"the norm at the convolution in front of stage {s} is no LayerNorm without bias, but a {kind}")
        normed.add(not none)
    require(isinstance(model.stages[0].downsample, nn.Identity), "a convolution follows its stem")
    require(len(normed) == 1, "some of the convolutions in front of its stages have norms, others have none")
    return normed.pop()


def _read_head(model: Any, require: Require) -> int:
    """Return the number of hidden units of a classifier of two layers; 0 where it has one, or there is none."""
    head = model.head
    pool = getattr(head.global_pool, "pool_type", "none")
    require(pool == "avg", f"its pooling is {pool!r}, not 'avg'")
    norm = head.norm
    known = type(norm) is LayerNorm2d and norm.eps == OUTER_EPS and norm.bias is not None
    require(known, f"its last norm is no LayerNorm of eps {OUTER_EPS}, but a {type(norm).__name__}")
    if type(head.fc) is not MlpHead:
        require(type(head.fc) in (nn.Linear, nn.Identity), f"its classifier is a {type(head.fc).__name__}")
        return 0
    require(type(head.fc.act) is SquaredReLU, f"its classifier has activation {type(head.fc.act).__name__}")
    inner = head.fc.norm
    known = type(inner) is LayerNorm and inner.eps == OUTER_EPS and inner.bias is not None
    require(known and head.fc.fc1.bias is not None, "its classifier has another norm, or no biases")
    return int(head.fc.fc1.out_features)


def _read_block(index: int, block: Any, require: Require) -> tuple[Block, tuple[tuple[str, Any], ...], bool]:
    """Read a block's record, the fields that all blocks must have alike, and whether factors act on what passes by."""
    where = f"block {index}"
    mixer, mlp = block.token_mixer, block.mlp
    kinds = {(type(norm), norm.eps) for norm in (block.norm1, block.norm2)}
    kind, eps = kinds.pop()
    require(not kinds and kind in KINDS, f"{where} has a {kind.__name__}, or norms that differ")
    norm, norm_bias = KINDS[kind]
    require(type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity), f"{where} has a {type(mlp).__name__}")
    act = "star_relu" if type(mlp.act) is StarReLU else activation_name(mlp.act)
    require(act is not None, f"{where} has activation {type(mlp.act).__name__}; known: {', '.join(ACTS)}")
    scaled = {
        part: {not isinstance(getattr(block, f"{part}{half}"), nn.Identity) for half in "12"}
        for part in ("layer_scale", "res_scale")
    }
    require(all(len(own) == 1 for own in scaled.values()), f"{where} has factors in one of its halves only")
    fields = {
        "norm": norm,
        "norm_bias": norm_bias,
        "norm_eps": float(eps),
        "act": act,
        "mlp_bias": mlp.fc1.bias is not None,
        "layer_scale": scaled["layer_scale"].pop(),
    }
    hidden = mlp.fc1.weight.shape[0]
    return _read_mixer(index, mixer, hidden, require), tuple(fields.items()), scaled["res_scale"].pop()


def _read_mixer(index: int, mixer: Any, hidden: int, require: Require) -> Block:
    where = f"block {index}"
    nothing: dict[str, Any] = {"src": index, "heads": 0, "qk": 0, "v": 0, "scale": 0.0, "mlp": hidden}
    if type(mixer) is Pooling:
        require(mixer.pool.kernel_size == POOL, f"{where} averages over another square than {POOL}x{POOL}")
        return Block(**{**nothing, "mixer": "pool"})
    if type(mixer) is SepConv:
        plain = mixer.pwconv1.bias is None and mixer.dwconv.kernel_size == (KERNEL, KERNEL)
        acts = type(mixer.act1) is StarReLU and isinstance(mixer.act2, nn.Identity)
        same = mixer.dwconv.padding == (KERNEL // 2, KERNEL // 2)
        require(plain and acts and same, f"{where} has a separable convolution with other layers than ConvFormer's")
        return Block(**{**nothing, "mixer": "sepconv", "v": mixer.pwconv1.out_channels})
    require(type(mixer) is Attention, f"{where} mixes places by a {type(mixer).__name__}")
    own = {"heads": mixer.num_heads, "qk": mixer.head_dim, "v": mixer.head_dim, "scale": float(mixer.scale)}
    return Block(**{**nothing, **own})


METAFORMER = MetaFormerFamily()
