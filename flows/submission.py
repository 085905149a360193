"""What is wrong with a run's parameters is said where it is asked for: in the terminal, before anything is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion.data.sources.source import parse_options
from diffusion.data.sources.tables import is_webdataset, tars_meant
from diffusion.errors import RecipeError
from diffusion.recipe_files import is_file_name, load_recipe
from diffusion.trust.reading import parse_json
from diffusion.trust.redaction import shown

ONE, ALL = ("-p", "--param"), "--params"


def check_parameters(arguments: list[str]) -> None:
    """Check what `prefect deployment run train-diffusion …` is given. Raises RecipeError, with the nearest name for a misspelt one,
    and DataError for an address that is none or holds a password.

    A recipe's file is left to the worker, on whose machine it lies, unless it is here as well.
    """
    given = parameters_of(arguments)
    preset, overrides, options = (given.get(name) for name in ("preset", "overrides", "source_options"))
    for name, value in (("overrides", overrides), ("source_options", options)):
        if not isinstance(value, dict | None):
            raise RecipeError(f"{name} is {shown(str(value), 60)}: names and values are wanted, as '{EXAMPLES[name]}'.")
    if preset is None:
        _check_usual(overrides)
    elif not is_file_name(str(preset)) or Path(str(preset)).expanduser().exists():
        load_recipe(str(preset), overrides, seed=0)
    parse_options(options or {})
    if is_webdataset(source := str(given.get("source") or "")):
        tars_meant(source)  # before a password in an address is where pages show it


def _check_usual(overrides: dict[str, Any] | None) -> None:
    """Without a preset the worker chooses, by whether it has a GPU: refused is what fits neither."""
    try:
        load_recipe("demo", overrides, seed=0)
    except RecipeError as error:
        try:
            load_recipe("eurosat", overrides, seed=0)
        except RecipeError:
            raise error from None


EXAMPLES = {
    "overrides": 'overrides={"network.width": 96}',
    "source_options": 'source_options={"size": 64, "fit": "crop"}',
}


def parameters_of(arguments: list[str]) -> dict[str, Any]:
    """The parameters among a command line's words, read as Prefect reads them; those that it could not read are left to it."""
    found: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in (*ONE, ALL):
            continue
        text = value if equals else next(words, "")
        if option == ALL:
            whole = _read(text)
            found = (whole if isinstance(whole, dict) else {}) | found
        else:
            name, _, value = text.partition("=")
            found[name] = _read(value)
    return found


def _read(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text
