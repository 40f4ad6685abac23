"""BEiT, and ViTs with relative position bias: attention logits have a term for how far apart two patches are.

They are adopted as those of ``families.eva`` are. A bias belongs to two places, so no tokens are merged here, and a
head that stays keeps its own. Biases that all of a timm model's blocks share become those of every block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from prunesweep.models.arch import Arch, Block, PositionBias
from prunesweep.models.errors import UserError
from prunesweep.models.layers.position_bias import BiasedAttention

from .block_costs import Counts
from .checks import check_at_least, check_one_of
from .eva import EvaFamily, attention_apart
from .layouts import is_there
from .reading import Require
from .spaces import WHOLE, Table, scales
from .views import AttentionView, LinearView, attention_view
from .vit import build_vit
from .vit_models import HeteroVisionTransformer

__all__ = ["BEIT", "BiasedVisionTransformer"]

KINDS = ("table", "mlp")


class BiasedVisionTransformer(HeteroVisionTransformer):
    """A VisionTransformer whose blocks have position biases for one grid of patches."""

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take another size of images or patches, as timm's BEiT: tables of biases are resampled."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            if isinstance(attn := getattr(block, "attn", None), BiasedAttention):
                attn.rel_pos.set_window_size(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """Name the weights that are not to decay; tables of biases are among them."""
        return {*super().no_weight_decay(), "blocks.*.attn.rel_pos.relative_position_bias_table"}


def _attention(arch: Arch, block: Block, norm_layer: Any) -> BiasedAttention:
    assert arch.position_bias is not None
    own = {"bias": arch.position_bias, "grid": arch.stages[0].grid}
    return attention_apart(BiasedAttention, arch, block, norm_layer, **own)


class BeitFamily(EvaFamily):
    """timm's BEiT and VisionTransformerRelPos, with position biases per block and head."""

    name = "beit"
    capabilities = frozenset({"images", "width", "isotropic", "depth", "convolutions", "mixers", "features", "streams"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (Beit, VisionTransformerRelPos)
    one_head_only = "a head has position biases of its own"
    lacks: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tokens", "global_attention"), "a position bias belongs to two places, and a merged token has none"
    )
    fixed_fields: ClassVar[dict[str, Any]] = {
        "dist_token": False,
        "qk_norm": False,
        "rope": None,
        "differential": False,
        "parallel": False,
        "stem": None,
        "class_attention": None,
        "norm_bias": True,
        "head_mlp": 0,
        "neck": 0,
        "patch_factors": False,
        "pooled_map": 0,
    }
    block_tensors: ClassVar[Table] = {
        **EvaFamily.block_tensors,
        "attn.rel_pos.relative_position_bias_table": (WHOLE, scales("heads")),
        "attn.rel_pos.mlp.fc1.weight": (),
        "attn.rel_pos.mlp.fc1.bias": (),
        "attn.rel_pos.mlp.fc2.weight": (scales("heads"),),
        "attn.rel_pos.mlp.fc2.bias": (scales("heads"),),
    }

    def takes(self, model: Any) -> bool:
        """Whether a model is one of ``timm_classes``."""
        return True

    def _read_trunk(self, model: Any, name: str, needs: Require, **fields: Any) -> Arch:
        kinds = {_read_bias(_bias_of(model, block), i, needs) for i, block in enumerate(model.blocks)}
        needs(len(kinds) == 1, "its blocks differ in their position biases")
        for i, block in enumerate(model.blocks):
            needs(not is_there(block.attn, "q_norm"), f"block {i} normalises queries and keys")
        return super()._read_trunk(model, name, needs, position_bias=kinds.pop(), **fields)

    def adopted(self, model: Any, arch: Arch) -> dict[str, torch.Tensor]:
        """Lay out a timm model's weights as ``families.eva`` does, with position biases in every block."""
        shared = ("shared_rel_pos.", "rel_pos_bias.")
        tables = ".attn.relative_position_bias_table"
        found = {n: t for n, t in super().adopted(model, arch).items() if not n.startswith(shared) and tables not in n}
        for i, block in enumerate(model.blocks):
            own = _bias_of(model, block)
            assert own is not None
            weights = dict(own.named_parameters()) if isinstance(own, nn.Module) else {TABLE: own}
            found |= {f"blocks.{i}.attn.rel_pos.{name}": tensor.detach() for name, tensor in weights.items()}
        return found

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a ``BiasedVisionTransformer``."""
        return build_vit(arch, drop_path=drop_path, model_class=BiasedVisionTransformer, attention=_attention)

    def set_patch_drop_rate(self, model: Any, arch: Arch, rate: float) -> None:
        """Refuse: a bias is that of two places."""
        raise UserError(f"patch_drop_rate = {rate}: {arch.source} has biases for all places; use drop_path_rate")

    def make_dynamic(self, model: Any, arch: Arch) -> None:
        """Refuse: biases are for one grid."""
        raise UserError(f"dynamic_img_size = True: {arch.source} has position biases for one grid; give img_size")

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, with its biases."""
        if record.mixer != "attn":
            return None
        attn = block.attn
        q, k, v = (LinearView(f"attn.{name}", getattr(attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
        return attention_view(block, record, (q, k, v), out_norm=attn.norm, bias=attn.rel_pos.get_bias)

    def check_fields(self, arch: Arch) -> None:
        """Raise UserError for impossible position biases."""
        super().check_fields(arch)
        bias = arch.position_bias
        if bias is None:
            raise UserError("family = 'beit': needs position_bias; a ViT without is of family 'vit' or 'eva'")
        check_one_of("position_bias.kind", bias.kind, KINDS)
        check_at_least("position_bias.hidden", bias.hidden, int(bias.kind == "mlp"))
        if bias.kind == "table" and (bias.hidden or arch.prefix_tokens > 1):
            raise UserError("position_bias.kind = 'table': has no hidden units, and one prefix token at the most")

    def block_spaces(self, arch: Arch, block: Block) -> dict[str, int]:
        """Return the size of the spaces within a block; a head also has position biases."""
        return super().block_spaces(arch, block) | {"heads": block.heads}

    def attention_cost(self, arch: Arch, stage: Any, block: Block, tokens: int) -> Counts:
        """Count attention over all tokens and its biases, which an MLP computes of all distances once per pass."""
        macs, params = super().attention_cost(arch, stage, block, tokens)
        rows, columns = stage.grid
        distances, bias = (2 * rows - 1) * (2 * columns - 1), arch.position_bias
        assert bias is not None
        if bias.kind == "table":
            return macs, params + (distances + 3 * arch.prefix_tokens) * block.heads
        weights = bias.hidden * (2 + block.heads)
        return macs + distances * weights, params + weights + bias.hidden + block.heads


TABLE = "relative_position_bias_table"


def _bias_of(model: Any, block: Any) -> Any:
    """Return what computes a timm block's biases: a module, BEiT's table, or None."""
    shared = [getattr(model, name, None) for name in ("shared_rel_pos", "rel_pos_bias")]
    own = [getattr(block.attn, name, None) for name in ("rel_pos", TABLE)]
    found = [bias for bias in (*shared, *own) if bias is not None]
    return found[0] if len(found) == 1 else None


def _read_bias(bias: Any, index: int, require: Require) -> PositionBias:
    where = f"block {index}"
    require(bias is not None, f"{where} has no position biases, or several")
    if type(bias) is RelPosMlp:
        require(bias.mode == "cr", f"{where} bounds its position biases")
        return PositionBias(kind="mlp", hidden=bias.mlp.fc1.out_features)
    known = isinstance(bias, torch.Tensor) or type(bias).__name__ in ("RelativePositionBias", RelPosBias.__name__)
    require(known, f"{where} has a {type(bias).__name__}")
    return PositionBias(kind="table")


BEIT = BeitFamily()
