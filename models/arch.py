"""The architecture record: the only description of a compressed transformer.

Plain ints, floats, strings and tuples in frozen dataclasses. Building (``models.build``), counting (``models.cost``),
cutting (``models.cut``), storing (``models.store``), the search space and the report all read it, and nothing else
describes a model. A block that is skipped is absent; a block without attention or without MLP says so.

Dimensions: D residual width, H heads, E query/key width of a head, V value width of a head, M MLP width, N tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .errors import UserError, nearest

__all__ = ["Arch", "Block", "Stage"]

FORMAT = "prunesweep/arch/1"
FAMILIES = ("vit",)
MIXERS = ("attn", "none")
POOLS = ("token", "avg")
HEAD_NORMS = ("tokens", "pooled", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer block: a token mixer and an MLP, each with its own residual connection.

    ``v`` is one width for all heads or, when ragged, one width per head. ``scale`` multiplies the attention logits and
    is the source model's: it never follows from a pruned ``qk``. ``mlp = 0`` means that the block has no MLP.
    """

    src: int  # index of this block in the source model
    mixer: str = "attn"
    heads: int
    qk: int
    v: int | tuple[int, ...]
    scale: float
    mlp: int

    @property
    def v_widths(self) -> tuple[int, ...]:
        """Value width of every head."""
        return (self.v,) * self.heads if isinstance(self.v, int) else self.v

    def validate(self, where: str) -> None:
        """Raise UserError naming the first impossible field as ``where.field``."""
        if self.mixer not in MIXERS:
            raise UserError(f"{where}.mixer = {self.mixer!r}: must be one of {', '.join(MIXERS)}")
        _at_least(f"{where}.src", self.src, 0)
        _at_least(f"{where}.mlp", self.mlp, 0)
        if self.mixer == "none":
            if (self.heads, self.qk, self.v, self.scale) != (0, 0, 0, 0.0):
                raise UserError(f"{where}: heads, qk, v and scale must be 0 where mixer is 'none'")
            return
        _at_least(f"{where}.heads", self.heads, 1)
        _at_least(f"{where}.qk", self.qk, 1)
        if len(self.v_widths) != self.heads:
            raise UserError(f"{where}.v has {len(self.v_widths)} widths for {self.heads} heads: give one per head")
        for head, width in enumerate(self.v_widths):
            _at_least(f"{where}.v[{head}]", width, 1)
        if not isinstance(self.scale, float) or not self.scale > 0:
            raise UserError(f"{where}.scale = {self.scale!r}: must be a positive float (the source's E ** -0.5)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks that share one residual stream: ``width`` channels on a ``grid`` of (rows, columns) patches."""

    width: int
    grid: tuple[int, int]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A compressed transformer. Equal records build equal modules; ``hash`` names the record in caches and reports."""

    family: str
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
    pool: str = "token"
    head_norm: str = "tokens"  # last LayerNorm: over all tokens, over the pooled feature, or none
    pre_norm: bool = False  # LayerNorm before the first block (and no patch bias), as CLIP has it
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    norm_eps: float = 1e-6
    act: str = "gelu"

    @property
    def prefix_tokens(self) -> int:
        """Class, distillation and register tokens in front of the patches."""
        return int(self.class_token) + int(self.dist_token) + self.reg_tokens

    @property
    def tokens(self) -> int:
        """N: prefix tokens and patches of the first stage."""
        rows, columns = self.stages[0].grid
        return self.prefix_tokens + rows * columns

    @property
    def depth(self) -> int:
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def hash(self) -> str:
        """16 hex digits of SHA-256 over the canonical JSON: the same on every Python, machine and later version."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Fields at their default are left out, so that fields added later change no older hash."""
        return {"format": FORMAT, **_dump(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arch:
        """Read ``to_dict``'s form; UserError names an unknown or missing key, a wrong type, or an impossible value."""
        if not isinstance(data, Mapping):
            raise UserError(f"an architecture record must be a JSON object, got {type(data).__name__}")
        data = dict(data)
        found = data.pop("format", None)
        if found != FORMAT:
            raise UserError(f"arch.format = {found!r}: this version reads {FORMAT!r}")
        stages = _sequence(data, "stages", "arch")
        data["stages"] = tuple(_read_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
        arch = _read(cls, data, "arch")
        arch.validate()
        return arch

    @classmethod
    def from_json(cls, text: str) -> Arch:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"an architecture record must be JSON: {error}") from error

    @classmethod
    def from_timm(cls, model: Any) -> Arch:
        """The record of a timm model (a name or a module); UserError says why where a model cannot be represented."""
        from .timm_import import arch_from_timm

        return arch_from_timm(model)

    def validate(self) -> None:
        """Raise UserError naming the first field that makes this record impossible to build."""
        _one_of("family", self.family, FAMILIES)
        _one_of("pool", self.pool, POOLS)
        _one_of("head_norm", self.head_norm, HEAD_NORMS)
        for name in ("in_chans", "num_classes"):
            _at_least(name, getattr(self, name), 1)
        _at_least("reg_tokens", self.reg_tokens, 0)
        for i, (image, patch) in enumerate(zip(self.img_size, self.patch_size, strict=True)):
            _at_least(f"patch_size[{i}]", patch, 1)
            if image < patch:
                raise UserError(f"img_size[{i}] = {image}: must be at least patch_size[{i}] = {patch}")
        if self.pool == "token" and not self.class_token:
            raise UserError("pool = 'token': needs class_token = true; use pool = 'avg'")
        if self.dist_token:
            self._validate_distilled()
        self._validate_stages()

    def _validate_distilled(self) -> None:
        """What timm's VisionTransformerDistilled takes for granted."""
        needed = {
            "class_token": True,
            "reg_tokens": 0,
            "prefix_pos_embed": True,
            "pool": "token",
            "head_norm": "tokens",
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise UserError(f"dist_token = true: needs {name} = {value!r}, got {getattr(self, name)!r}")

    def _validate_stages(self) -> None:
        if len(self.stages) != 1:
            raise UserError(f"stages: a {self.family} has exactly one stage, got {len(self.stages)}")
        grid = tuple(i // p for i, p in zip(self.img_size, self.patch_size, strict=True))
        for s, stage in enumerate(self.stages):
            _at_least(f"stages[{s}].width", stage.width, 1)
            if stage.grid != grid:
                raise UserError(f"stages[{s}].grid = {list(stage.grid)}: img_size / patch_size gives {list(grid)}")
            if not stage.blocks:
                raise UserError(f"stages[{s}].blocks is empty: at least one block must be kept")
            for b, block in enumerate(stage.blocks):
                block.validate(f"stages[{s}].blocks[{b}]")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}. {hint}".strip())


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} = {value!r}: must be a whole number of at least {least}")


def _dump(record: Any) -> Any:
    """Nested dicts and lists of a record, without the fields that are at their default."""
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


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}


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
    for option in annotation.split(" | "):
        if option.startswith("tuple["):
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
