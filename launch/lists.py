"""``prunesweep recipes``, ``methods`` and ``config``: what there is to choose from, and what every setting means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prunesweep.pruners import Method
    from prunesweep.search.schema import Key

__all__ = ["config", "methods", "recipes"]


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="one of them, or a TOML file, to see all of its fields", show_default=False)
    ] = None,
) -> None:
    """List the recipes of training, with what they set; or all fields of one, with their values and meanings."""
    from prunesweep.search.schema import Key, keys_of, written
    from prunesweep.training import Recipe, load_recipe, recipe_names

    if name is not None:
        recipe = load_recipe(name)
        keys = [key for key in keys_of(Recipe) if not key.name.startswith("distill[]")]
        _print_keys([Key(f"{key.name} = {written(getattr(recipe, key.name))}", *key[1:]) for key in keys])
        return
    for own in recipe_names():
        recipe = load_recipe(own)
        fields = {f: getattr(recipe, f) for f in Recipe.model_fields if f in recipe.model_fields_set}
        _print([f"{own}: {', '.join(f'{field} = {written(value)}' for field, value in fields.items())}"])
    _print(
        ["", "All fields of one with their meanings: prunesweep recipes NAME; set one by --set finetune.FIELD=VALUE"]
    )
    _print(["(training while a method decides: recipe.FIELD), or in the table [finetune] of a search's configuration."])


def methods(
    name: Annotated[
        str | None, typer.Argument(help="one of them, to see its settings with their meanings", show_default=False)
    ] = None,
) -> None:
    """List the pruning methods, with their settings and defaults; or the settings of one, with their meanings."""
    from prunesweep.pruners import METHODS, Method, get_method
    from prunesweep.search.schema import keys_of

    if name is None:
        for method in METHODS.values():
            _print([f"{method.name}: {method.when}; {method.description} ({method.paper})"])
            found = [f"{k.name} = {k.default}" for k in keys_of(method.settings()) if k.name in method.option_names]
            if found:
                _print([f"    {', '.join(found)}"])
        _print(["", "Settings with their meanings: prunesweep methods NAME. One is set by --set NAME=VALUE."])
        return
    chosen = get_method(name, Method)
    _print([f"{chosen.name}: {chosen.when}; {chosen.description} ({chosen.paper})", *_facts(chosen), ""])
    _print_keys([key for key in keys_of(chosen.settings()) if key.name in chosen.option_names])
    if chosen.second_stage is not None:
        _print(["", f"--second-stage: {chosen.second_stage.description}", ""])
        _print_keys([*keys_of(chosen.second_stage.settings(), "second_stage.")])


def _facts(method: Method) -> list[str]:
    found = [f"families: {', '.join(method.families)}"]
    found += [f"    not {name}: {reason}" for name, reason in _refused(method)]
    found += [] if method.recipe is None else [f"recipe of training while it decides: {method.recipe}"]
    found += [] if method.finetune is None else [f"recipe of finetuning: {method.finetune}"]
    return found if method.option_names else [*found, "no settings"]


def _refused(method: Method) -> list[tuple[str, str]]:
    """The families that a method does not serve, each with the reason."""
    from prunesweep.models.families import FAMILIES, FamiliesWith

    if not isinstance(method.families, FamiliesWith):
        return []
    return [(name, reason) for name in FAMILIES if (reason := method.families.why_not(name)) is not None]


def config(
    explain: Annotated[
        bool, typer.Option("--explain", help="show keys with their types, ranges, defaults and meanings")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="all of them, as docs/configuration.md")] = False,
    key: Annotated[
        str | None,
        typer.Argument(help="a key, or a table, e.g. search.rungs; all by default", show_default=False),
    ] = None,
) -> None:
    """Explain the configuration of a search, made from its schema."""
    from prunesweep.models import UserError
    from prunesweep.models.errors import nearest
    from prunesweep.search.schema import configuration_keys, configuration_page

    if markdown:
        print(configuration_page(), end="")
        return
    if not explain and key is None:
        raise UserError("give --explain, to see all keys, or a key, e.g. prunesweep config --explain search.rungs")
    keys = configuration_keys()
    found = [one for one in keys if key is None or one.name == key or one.name.startswith(f"{key}.")]
    if not found:
        names = [one.name for one in keys]
        close = next((f"did you mean {n!r}?" for n in names if n.rpartition(".")[2] == key), nearest(str(key), names))
        raise UserError(f"{key}: is no key of the configuration. {close}".strip())
    _print_keys(found)


def _print_keys(keys: list[Key]) -> None:
    from prunesweep.search.schema import key_lines

    for key in keys:
        _print(key_lines(key))


def _print(lines: list[str]) -> None:
    from .console import PlainConsole

    PlainConsole().print("\n".join(lines), highlight=False, soft_wrap=True)
