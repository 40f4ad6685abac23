"""The architecture record: the only description of a compressed transformer.

Plain ints, floats, strings and tuples in frozen dataclasses. Building (``models.build``), counting (``models.cost``),
cutting (``models.cut``), storing (``models.io.store``), the search space and the report all read it, and nothing else
describes a model. A block that is skipped is not in the record; ``mixer`` is "none" in a block without attention and
``mlp`` is 0 in one without MLP.

Dimensions: D residual width, H heads, E query/key width of a head, V value width of a head, M MLP width, N tokens.

A backbone without a head has ``num_classes`` 0 and gives its pooled features; one with ``feature_head`` maps narrower
ones to ``num_classes`` features, as many as its source's.

The record of a language model (family ``lm``) describes a text of T words as a grid of 1 x T places; ``num_classes`` is
the number of words, and ``Text`` holds what image models do not need.

Methods: widths, ragged values and missing blocks as in UVC and NViT; ``conv1x1``, ``conv3x3`` and ``norm_residual`` are
SPViT's (arXiv 2111.11802); ``tokens`` is Prune-and-Merge's (arXiv 2503.23455).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from .errors import UserError, nearest
from .io.reading import parse_json

__all__ = [
    "Arch",
    "AttentionPool",
    "Block",
    "ClassAttention",
    "PositionBias",
    "QueryPool",
    "Rope",
    "Stage",
    "Stem",
    "Text",
]

FORMAT = "prunesweep/arch/1"
LARGEST = 2**24  # of any number in a record; what is larger is a damaged file, and would fill the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer block: a token mixer and an MLP, each with its own residual connection.

    ``qk`` counts a head's query/key channels, or the pairs of them that rotary position embedding turns or that
    differential attention has for its two maps.
    ``v`` is one width for all heads or, when ragged, one width per head; for a convolution it is the bottleneck width,
    for a separable one the number of channels between its layers.
    ``scale`` multiplies the attention logits and is the source model's: it never follows from a pruned ``qk``. What
    does not apply is 0: heads, qk and scale of a convolution, those and v of a missing mixer, ``mlp`` of a missing MLP.
    Heads of attention between channels (``xca``) have one width, ``qk`` and ``v``, and a learned factor, no ``scale``.
    """

    src: int  # index of this block in the source model
    mixer: str = "attn"  # attn | conv1x1 | conv3x3 | sepconv | pool | xca | none
    heads: int
    qk: int
    v: int | tuple[int, ...]
    scale: float
    mlp: int
    sr: int = 0  # PVTv2: channels of the reduced or pooled map that keys and values read; 0 where they read the own
    shifted: bool = False  # Swin: attention in windows shifted by half a window
    whole_map: bool = False  # Hiera and SAM: attention over the whole map, not in its stage's windows
    norm_residual: bool = False  # a missing mixer adds the normalised input (SPViT's finetuned skip), not nothing
    tokens: int | None = None  # tokens inside the block, prefix included, merged before and recovered after it
    merge: str = "sparse"  # sparse | dense: every token in at most one merged token, or full matrices
    token_scale: bool = False  # NViT's frozen factor per token on query, key and value

    @property
    def v_widths(self) -> tuple[int, ...]:
        """Value width of every head."""
        return (self.v,) * self.heads if isinstance(self.v, int) else self.v

    @property
    def total_v(self) -> int:
        """Value channels of all heads, or the width of a convolution."""
        return sum(self.v_widths) if self.heads else self.v  # type: ignore[return-value]  # ragged v has heads

    @property
    def stock_heads(self) -> bool:
        """Whether timm's own attention can hold the heads: V equal to E everywhere, and the scale E ** -0.5."""
        return self.mixer == "attn" and self.v == self.qk and self.scale == self.qk**-0.5

    @property
    def conv_kernel(self) -> int:
        """Side of the kernel of SPViT's convolution; 0 where the mixer is not one."""
        return {"conv1x1": 1, "conv3x3": 3}.get(self.mixer, 0)

    @property
    def convolves(self) -> bool:
        """Whether the mixer is a convolution with channels of its own, which ``v`` counts."""
        return self.mixer in ("conv1x1", "conv3x3", "sepconv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks that share one residual stream: ``width`` channels on a ``grid`` of (rows, columns) patches."""

    width: int
    grid: tuple[int, int]
    blocks: tuple[Block, ...]
    window: tuple[int, int] | None = None  # Swin, Hiera, SAM: rows and columns of an attention window
    reference_window: tuple[int, int] | None = None  # Swin V2: the window that distances are parts of; None for its own
    sr_ratio: int = 1  # PVTv2: stride of the spatial reduction
    res_scale: bool = False  # MetaFormer: what passes by either half of a block is multiplied by a factor per channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: pairs of query and key channels are turned by angles that follow from a token's place.

    Sources: arXiv 2303.11331 (``axial``), 2508.10104 (``centred``) and 2403.13298 (``mixed``). A head of the source
    has ``pairs`` pairs; the first half of them turns by one coordinate of the place, the second half by the other, or,
    ``mixed``, each by both, at frequencies that are weights. Prefix tokens are not turned.
    """

    kind: str  # axial | centred | mixed: places are counted, or lie in -1..1
    pairs: int
    temperature: float
    column_first: bool = False  # the first coordinate is the column
    offset: float = 0.0  # added to the number of a row or column
    reference: tuple[int, int] | None = None  # axial: rows and columns of the grid that the angles are meant for


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """Relative position bias: attention logits of two tokens have a term that follows from how far apart they are.

    Sources: BEiT, arXiv 2106.08254 (``table``: one weight per distance and head), Swin V2, arXiv 2111.09883, as timm's
    ViTs have it (``mlp``: an MLP of the logarithms of distances), and MViTv2, arXiv 2112.01526, as SAM has it
    (``decomposed``: queries read a table of rows and one of columns).
    """

    kind: str  # table | mlp | decomposed
    hidden: int = 0  # units of the MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The vocabulary of a language model in bands by frequency, and its positions.

    Sources: adaptive input, arXiv 1809.10853, and adaptive softmax, arXiv 1609.04309.
    The words of band 0 are those below ``cutoffs[0]``, their vectors have the residual width; those of band j begin at
    ``cutoffs[j - 1]`` and have ``tails[j - 1]`` channels.
    """

    cutoffs: tuple[int, ...]
    tails: tuple[int, ...]
    tied: str = "all"  # what the softmax shares with the input: all | tables | none
    embed_scale: float  # factor on word vectors, the source model's
    positions: int  # columns of the source's table of sinusoids; the residual channels have some of them
    first_position: int = 2  # row of that table that the first word gets (fairseq: behind the padding's)
    vocabulary: str = ""  # digest of the list of words, where it is known


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPool:
    """A pool of one learned query (SigLIP's "map"): it reads the stream, and gives features of a width of its own."""

    width: int  # of query, keys, values and features; the source's, however narrow the stream is
    heads: int
    mlp: int  # hidden units of its MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAttention:
    """A pool of a class token that reads the patches in blocks of its own (CaiT, arXiv 2103.17239)."""

    blocks: int
    width: int  # of queries, keys and values; the source's, however narrow the stream is
    heads: int
    mlp: int  # hidden units of a block's MLP
    norm_patches: bool = False  # XCiT: patches go through a block's second norm, too


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPool:
    """What leads from a stage to the next (Hiera, arXiv 2306.00989): four patches pooled to one, and attention.

    The maximum over two rows and two columns is taken, of a map and of queries; keys and values are those of the stage
    before, in its windows. ``width`` and ``heads`` are those of queries, keys and values in the source's first stage:
    both double from stage to stage, and no cut changes them.
    """

    width: int
    heads: int
    average: bool = False  # maximum and mean of the stream are mapped to the next, not its norm's output before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """What is in front of the patch embedding; no cut narrows it but where its last convolution writes the stream.

    Sources: arXiv 2010.11929 (``resnet``: a ResNet of bottlenecks, or its first convolution alone), 2311.17049
    (``convolutions``: kernels as large as their strides; the last one is the patch embedding), 2404.02132 (``mbconv``:
    ViTamin's two stages of inverted bottlenecks; the last convolution is the patch embedding) and 2101.11986
    (``t2t_performer``, ``t2t_transformer``: T2T-ViT's unfoldings with attention of that kind between them; positions
    behind them are fixed sinusoids).
    """

    kind: str  # convolutions | resnet | mbconv | conv3x3 | t2t_performer | t2t_transformer
    channels: tuple[int, ...]  # of all convolutions or unfoldings but the last; of the first one and of stages
    strides: tuple[int, ...] = ()  # of convolutions or unfoldings
    blocks: tuple[int, ...] = ()  # of stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A compressed transformer. Equal records build equal modules; ``hash`` names the record in caches and reports."""

    family: str  # vit | eva | beit | diff | cait | xcit | swin | swin_v2 | hiera | sam | pvt_v2 | pit | metaformer | lm
    source: str  # name of the source model
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int
    stages: tuple[Stage, ...]
    class_token: bool = True
    dist_token: bool = False  # DeiT's distillation token, with a head of its own
    reg_tokens: int = 0
    prefix_pos_embed: bool = True  # the position embedding has entries for the prefix tokens
    pool: str = "token"  # token | avg | map | none
    pool_prefix: bool = False  # the pool reads the prefix tokens, too
    attn_pool: AttentionPool | None = None  # where ``pool`` is map
    class_attention: ClassAttention | None = None  # of cait and xcit, where ``pool`` is map
    query_pool: QueryPool | None = None  # of family hiera
    head_norm: str = "tokens"  # tokens | pooled | both | none: what the last LayerNorm is over
    pre_norm: bool = False  # LayerNorm before the first block (and no patch bias), as CLIP has it
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    mlp_scale: bool = True  # with ``layer_scale``, that of an MLP, too
    norm_eps: float = 1e-6
    act: str = "gelu"  # of hidden units: a name in ``models.layers.activations``, or MetaFormer's star_relu
    feature_head: bool = False  # the head is a linear map to ``num_classes`` features, not a classifier
    pos_embed: bool = True  # there is a learned position embedding of every place
    k_bias: bool = True  # with ``qkv_bias``: keys have a bias, too
    attn_norm: bool = False  # LayerNorm over all value channels before the output projection
    glu: bool = False  # MLPs are gated, as in SwiGLU: of a unit's two inputs the first is activated and multiplies
    mlp_norm: bool = False  # LayerNorm over the hidden units of an MLP
    mlp_entry_norm: bool = False  # an MLP begins with a norm, behind the one in front of it
    rope: Rope | None = None
    differential: bool = False  # of family diff: attention maps are differences of two (arXiv 2410.05258)
    parallel: bool = False  # an MLP reads what its block's attention reads, and both are added at once
    norm: str = "layer"  # layer | rms | group: LayerNorm; RMSNorm; GroupNorm of one group, over all places of an image
    norm_bias: bool = True  # with ``norm`` other than rms: norms of blocks have biases
    head_mlp: int = 0  # hidden units of a classifier of two layers; 0 where it has one
    embed_norm: bool = False  # a norm behind the patch embedding, before positions are added
    post_norm: bool = False  # a block's norms stand behind its attention and MLP, not in front of them
    proj_bias: bool = True  # of attention's output projection
    mlp_bias: bool = True  # of both layers of an MLP
    position_bias: PositionBias | None = None
    neck: int = 0  # SAM: channels of two convolutions at the end, which no cut narrows; 0 where a norm ends the model
    stem: Stem | None = None  # ``patch_size`` is in pixels, then, too
    patch_factors: bool = False  # a frozen factor multiplies every patch before positions are added: UVC's patch gates
    pooled_map: int = 0  # PVTv2-li: rows and columns of the map, averaged from a stage's, that keys and values read
    text: Text | None = None  # of family lm

    @property
    def prefix_tokens(self) -> int:
        """Class, distillation and register tokens in front of the patches."""
        return int(self.class_token) + int(self.dist_token) + self.reg_tokens

    @property
    def qk_rows(self) -> int:
        """Channels of a query/key unit, which ``Block.qk`` counts: two that are turned together, or one.

        Of differential attention, two too: one for each of a head's maps.
        """
        return 1 if self.rope is None and not self.differential else 2

    @property
    def norm_tensors(self) -> int:
        """Weights that a norm of a block has for every channel: a gain and, but for RMSNorm or by choice, a bias."""
        return 1 if self.norm == "rms" or not self.norm_bias else 2

    @property
    def tokens(self) -> int:
        """N: prefix tokens and patches of the first stage; for a language model, the words of a text."""
        rows, columns = self.stages[0].grid
        return self.prefix_tokens + rows * columns

    @property
    def depth(self) -> int:
        """Number of blocks of all stages."""
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages, in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def headless(self) -> bool:
        """Whether the model gives features, not answers."""
        return self.feature_head or not self.num_classes

    @property
    def outputs(self) -> int:
        """Number of logits, or of features."""
        pool = self.stages[-1].width if self.attn_pool is None else self.attn_pool.width
        return self.num_classes or self.neck or pool

    def with_stages(self, stages: tuple[Stage, ...]) -> Arch:
        """Return the record with other stages, narrower or not.

        A backbone without a head gets a linear map to its features where the last stage's width changes; an attention
        pool ends with one, and a neck has its own width.
        """
        whole = self.num_classes or self.neck or self.attn_pool is not None
        if whole or stages[-1].width == self.stages[-1].width:
            return replace(self, stages=stages)
        return replace(self, stages=stages, num_classes=self.outputs, feature_head=True)

    @property
    def bands(self) -> tuple[range, ...]:
        """Ranges of word numbers of every band of a language model's vocabulary."""
        cutoffs = () if self.text is None else (0, *self.text.cutoffs, self.num_classes)
        return tuple(range(*pair) for pair in pairwise(cutoffs))

    @property
    def hash(self) -> str:
        """16 hex digits of SHA-256 over the canonical JSON: the same on every Python, machine and later version."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form.

        Fields at their default are left out, so that fields added later change no older hash.
        """
        return {"format": FORMAT, **_dump(self)}

    def to_json(self) -> str:
        """Write ``to_dict``'s form as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arch:
        """Read ``to_dict``'s form.

        Raises:
            UserError: another format, an unknown or missing key, a wrong type, or an impossible value, which is named.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"an architecture record must be a JSON object, got {type(data).__name__}")
        data = dict(data)
        found = data.pop("format", None)
        if found != FORMAT:
            raise UserError(f"arch.format = {found!r}: this version reads {FORMAT!r}")
        stages = _sequence(data, "stages", "arch")
        data["stages"] = tuple(_read_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
        for name, record in (
            ("text", Text),
            ("rope", Rope),
            ("attn_pool", AttentionPool),
            ("class_attention", ClassAttention),
            ("query_pool", QueryPool),
            ("position_bias", PositionBias),
            ("stem", Stem),
        ):
            if data.get(name) is not None:
                data[name] = _read(record, data[name], f"arch.{name}")
        arch = _read(cls, data, "arch")
        arch.validate()
        return arch

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Read ``to_json``'s form.

        Raises:
            UserError: the text is no JSON, or as for ``from_dict``.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise UserError(f"an architecture record must be JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_timm(cls, model: Any, *, img_size: int | tuple[int, int] | None = None) -> Arch:
        """Return the record of a timm model (a name or a module).

        Raises UserError with the reason where a model cannot be represented.

        ``img_size`` is needed only where the model itself does not say for which images it is meant (PVTv2 takes any):
        without it, the size in the model's ``pretrained_cfg``.
        """
        from .timm_import import arch_from_timm

        return arch_from_timm(model, img_size)

    def validate(self) -> None:
        """Raise UserError naming the first field that makes this record impossible to build."""
        from .validate import validate

        validate(self)


def _dump(record: Any) -> Any:
    """Return nested dicts and lists of a record, without the fields that are at their default."""
    if isinstance(record, tuple):
        return [_dump(item) for item in record]
    if not hasattr(record, "__dataclass_fields__"):
        return record
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    defaults = {f.name: f.default for f in fields(record)}
    return {name: _dump(value) for name, value in values.items() if value != defaults[name]}


def _read_stage(data: Any, where: str) -> Stage:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a JSON object, got {type(data).__name__}")
    blocks = _sequence(data, "blocks", where)
    read = tuple(_read(Block, block, f"{where}.blocks[{i}]") for i, block in enumerate(blocks))
    return _read(Stage, {**data, "blocks": read}, where)


def _sequence(data: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list):
        raise UserError(f"{where}.{key}: must be a list, got {type(value).__name__}")
    return value


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "Text": (Text,),  # read already
    "Rope": (Rope,),
    "AttentionPool": (AttentionPool,),
    "ClassAttention": (ClassAttention,),
    "QueryPool": (QueryPool,),
    "PositionBias": (PositionBias,),
    "Stem": (Stem,),
}


def _read(cls: type, data: Any, where: str) -> Any:
    """Build a dataclass from a JSON object, checking keys and the JSON type of every value."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a JSON object, got {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            hint = nearest(key, known)
            raise UserError(f"{where} has an unknown key {key!r}; known: {', '.join(known)}. {hint}".strip())
    missing = [name for name, f in known.items() if f.default is MISSING and name not in data]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _value(value, str(known[key].type), f"{where}.{key}") for key, value in data.items()})


def _value(value: Any, annotation: str, where: str) -> Any:
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(number, (int, float)) and not -LARGEST <= number <= LARGEST:  # NaN is neither
            raise UserError(f"{where} = {value!r}: numbers must be finite and at most {LARGEST:,}")
    for option in annotation.split(" | "):
        if option == "None":
            if value is None:
                return None
        elif option.startswith("tuple["):
            whole = option in ("tuple[Stage, ...]", "tuple[Block, ...]")  # records that the caller has read already
            if whole or _is_ints(value, None if "..." in option else option.count("int")):
                return tuple(value)
        elif isinstance(value, _KINDS[option]) and (option == "bool" or not isinstance(value, bool)):
            return float(value) if option == "float" else value  # type: ignore[arg-type]
    raise UserError(f"{where} = {value!r}: must be {annotation}")


def _is_ints(value: Any, length: int | None) -> bool:
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)
