"""The option ``--protect`` of ``prune`` and ``instant``: what nothing touches."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["ProtectOption", "check_protected"]

ProtectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--protect",
        metavar="WHAT",
        help="what nothing touches: blocks=0,11, or units of a kind, mlp=0,1 in some blocks, embed or heads "
        "everywhere; may be given several times",
        show_default=False,
    ),
]


def check_protected(texts: list[str] | None, source: str) -> list[str]:
    """Return what ``--protect`` names, checked against the source's record, before its weights are loaded.

    Args:
        texts: the values of the option.
        source: folder of a saved model, or a timm name.

    Raises:
        UserError: one is no protection, or the source has no such block.
    """
    from prunesweep.pruners.protection import Protection
    from prunesweep.training.jobs.one_shot import check_source

    if texts:
        Protection.parse(texts, "--protect").check(check_source(source), "--protect")
    return list(texts or [])
