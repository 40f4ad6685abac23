"""The names by which timm makes our models; importing this module registers them.

``prunesweep/__init__.py`` imports it right after timm, which may be while another of our modules is being loaded, so
nothing that loads timm is imported here before a model is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import timm.models

from .errors import UserError
from .io.folder import ENTRY_POINT, load_provenance
from .published.rows import PUBLISHED, Published

if TYPE_CHECKING:
    from torch import nn

    from .arch import Arch

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@timm.models.register_model
def prunesweep(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a model from its record (timm's entry point of the same name).

    Args:
        pretrained: load the weights that ``pretrained_cfg`` points to.
        options: ``arch``, a record or its JSON form, is needed; ``drop_path_rate`` and timm's own options may be given.

    Raises:
        UserError: ``arch`` is missing or impossible, or an option contradicts it.
    """
    from .arch import Arch
    from .builder import create
    from .io.store import remember

    arch, cfg = options.pop("arch", None), options.pop("pretrained_cfg", None)
    if arch is None:
        raise UserError(f"timm model {ENTRY_POINT!r} needs arch=...: a record or its JSON object")
    if not isinstance(arch, Arch):
        arch = Arch.from_dict(arch)
    model = create(
        arch, pretrained=pretrained, pretrained_cfg=cfg, drop_path=options.pop("drop_path_rate", 0.0), **options
    )
    if pretrained and isinstance(cfg, Mapping) and cfg.get("source") == "local-dir":
        remember(model, load_provenance(cfg["file"]))
    return model


@timm.models.register_model
def adaptive_lm(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build fairseq's ``transformer_lm_wiki103``, or a language model of that kind, with random weights.

    Args:
        pretrained: must be False: no weights are published here.
        options: ``width``, ``depth``, ``heads``, ``mlp``, ``factor``, ``cutoffs`` and ``vocabulary`` as for
            ``models.families.lm.lm_arch``; ``num_classes`` are the words and ``img_size`` is (1, length). By default
            bands are the same shares of the words as in ``transformer_lm_wiki103``.

    Raises:
        UserError: ``pretrained`` is set, or the shape is impossible.
    """
    from .builder import create
    from .families.lm import lm_arch

    if pretrained:
        raise UserError("no weights of 'adaptive_lm' are published here: read fairseq's with `prunesweep import`")
    words, (_, length) = options.pop("num_classes", 267_744), options.pop("img_size", (1, 512))
    shape: dict[str, Any] = {"width": 1024, "depth": 16, "heads": 8, "mlp": 4096}
    shape |= {name: options.pop(name) for name in (*shape, "factor", "vocabulary") if name in options}
    cutoffs = tuple(options.pop("cutoffs", (words * 20_000 // 267_744, words * 60_000 // 267_744)))
    return create(
        lm_arch(words=words, cutoffs=cutoffs, length=length, **shape),
        pretrained=False,
        pretrained_cfg=options.pop("pretrained_cfg", None),
        drop_path=options.pop("drop_path_rate", 0.0),
        **options,
    )


def _register(row: Published, make: Callable[[], Arch]) -> None:
    """Give timm an entry point of the row's name."""

    def entry_point(pretrained: bool = False, **options: Any) -> nn.Module:
        from .builder import create

        if pretrained:
            raise UserError(
                f"no weights of {row.name!r} are published here: get the authors' file ({row.title}, {row.paper}) "
                f"and read it with `prunesweep import FILE --as {row.method}`; or pass pretrained=False"
            )
        arch = make()
        cfg = options.pop("pretrained_cfg", None) or _preprocessing(arch.source) or _preprocessing(row.dense)
        drop_path = options.pop("drop_path_rate", 0.0)
        return create(arch, pretrained=False, pretrained_cfg=cfg, drop_path=drop_path, **options)

    entry_point.__name__ = entry_point.__qualname__ = row.name
    entry_point.__doc__ = f"{row.title}, {row.paper}."
    globals()[row.name] = timm.models.register_model(entry_point)  # timm also appends the name to __all__


def _preprocessing(source: str) -> dict[str, Any]:
    """Return how a timm model's images are prepared; empty where timm does not know the model."""
    cfg = timm.models.get_pretrained_cfg(source)
    return {} if cfg is None else {name: getattr(cfg, name) for name in PREPROCESSING}


for _row in PUBLISHED.values():
    if _row.make is not None and _row.method != "dense":
        _register(_row, _row.make)
