"""ViTs with differential attention (arXiv 2410.05258): every head's map is the difference of two softmaxes.

They are adopted as those of ``families.eva`` are. A query/key unit is a pair of channels, one for each map, and goes as
a whole. Values may go one by one: the norm over a head's values is then over those that stay, as a LayerNorm's. What
timm has of the paper's lambda, four vectors and a constant, is one number here, and the factor behind the norm is in
its gains, of which every head has its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from timm.layers import DiffAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch, Block, Stage
from prunesweep.models.layers.difference import EPS, DifferentialAttention

from .block_costs import Counts
from .eva import EvaFamily, attention_apart
from .layouts import has_differences, with_halves
from .reading import Require
from .spaces import Table, per_channel
from .views import AttentionView, LinearView, attention_view
from .vit import build_vit

__all__ = ["DIFF"]


class DifferentialFamily(EvaFamily):
    """timm's VisionTransformer with ``DiffAttention`` in its blocks."""

    name = "diff"
    capabilities = frozenset({*EvaFamily.capabilities, "difference_maps"} - {"rotary", "mixed_heads"})
    timm_classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer,)
    one_head_only = "a norm is over the values of one head"
    fixed_fields: ClassVar[dict[str, Any]] = {
        **EvaFamily.fixed_fields,
        "differential": True,
        "rope": None,
        "qk_norm": False,
        "attn_norm": False,
    }
    block_tensors: ClassVar[Table] = {
        **{name: uses for name, uses in EvaFamily.block_tensors.items() if name not in ("attn.pairs", "attn.freqs")},
        **per_channel("attn.norm", "v"),
        "attn.lambda_full": (),
    }

    def takes(self, model: Any) -> bool:
        """Whether a model's attention is differential."""
        return has_differences(model)

    def _read_trunk(self, model: Any, name: str, needs: Require, **fields: Any) -> Arch:
        for i, block in enumerate(model.blocks):
            attn = with_halves(block).attn
            needs(type(attn) is DiffAttention, f"block {i} has a {type(attn).__name__}, others differential attention")
            needs(isinstance(attn.q_norm, nn.Identity), f"block {i} normalises queries and keys")
            needs(isinstance(attn.norm, nn.Identity), f"block {i} normalises its attention output")
            needs(attn.sub_norm.eps == EPS, f"block {i} has a norm of eps {attn.sub_norm.eps} over values, not {EPS}")
        return super()._read_trunk(model, name, needs, differential=True, **fields)

    def build(self, arch: Arch, *, drop_path: float = 0.0) -> VisionTransformer:
        """Build a ``RotaryVisionTransformer``, nothing of which is turned."""
        attention = partial(attention_apart, DifferentialAttention)
        return build_vit(arch, drop_path=drop_path, model_class=self._model_class(arch), attention=attention)

    def attention_view(self, block: Any, record: Block) -> AttentionView | None:
        """View a block's attention, with the difference of its maps and the norm of every head's values."""
        if record.mixer != "attn":
            return None
        attn = block.attn
        q, k, v = (LinearView(f"attn.{name}", getattr(attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
        return attention_view(block, record, (q, k, v), rotary=attn, out_norm=attn.norm, attend=attn.attend)

    def attention_cost(self, arch: Arch, stage: Stage, block: Block, tokens: int) -> Counts:
        """Count attention over all tokens, values weighed by each of two maps, gains of the norm, and lambda."""
        macs, params = super().attention_cost(arch, stage, block, tokens)
        return macs + tokens**2 * block.total_v, params + block.total_v + 1

    def only_chosen(self, arch: Arch, space: str) -> str | None:
        """Say why the channels of a space can only be chosen; None where they can be projected."""
        own = space.rpartition(".")[2]
        if own in ("q", "k"):
            return "a pair of queries' and keys' channels is one of each of two maps"
        if own == "v" and arch.blocks[int(space.split(".")[1])].mixer == "attn":
            return "a norm acts on the values of a head"
        return super().only_chosen(arch, space)


DIFF = DifferentialFamily()
