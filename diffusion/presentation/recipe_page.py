"""The page of the recipe, out of its schema: `python -m diffusion.presentation.recipe_page > docs/recipe.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from diffusion.presentation.markdown import markdown_table
from diffusion.recipe import Recipe, flatten
from diffusion.recipe_files import load_recipe, preset_names

HEAD = """# The recipe

Everything that can change the weights or the scores. A preset is a YAML file of these values in `diffusion/presets/`; yours is named
by its path: `-p preset=path/to/mine.yaml`. Single values are replaced by `-p 'overrides={"network.width": 96}'`, in the demo by
`--set network.width=96`. A value that does not fit is refused before anything starts.
A preset's column is empty where it has the default.

This page is made from the schema: `python -m diffusion.presentation.recipe_page > docs/recipe.md`.
"""
SET_BY_THE_FLOW = ("name", "start")
"""By the preset's file, and by `start_from`: no user writes them."""
BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}


def recipe_page() -> str:
    """All values of a recipe by part, each with what it may be, its default, and what a preset chooses in its place."""
    schema, presets = Recipe.model_json_schema(), {name: flatten(load_recipe(name)) for name in preset_names()}
    sections = [HEAD]
    for part, document, rows in _parts(schema):
        table = [
            (
                f"`{name}`",
                field.get("description", ""),
                _allowed(field, schema["$defs"]),
                "needed" if name in needed else _shown(field.get("default")),
                *(_chosen(values.get(f"{part}.{name}".lstrip("."), ""), field) for values in presets.values()),
            )
            for name, field, needed in rows
        ]
        title = f"## `{part}`: {document[0].lower()}{document[1:]}" if part else "## The whole"
        sections.append(f"{title}\n\n{markdown_table(('value', 'meaning', 'may be', 'default', *presets), table)}\n")
    return "\n".join(sections)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, dict[str, Any], list[str]]]]]:
    """Of the recipe's parts the name, the sentence, and the fields; last the fields that belong to no part."""
    own = []
    for name, field in schema["properties"].items():
        if name in SET_BY_THE_FLOW:
            continue
        reference = field.get("$ref") or next((one["$ref"] for one in field.get("anyOf", []) if "$ref" in one), None)
        if reference is None:
            own.append((name, field, schema["required"]))
            continue
        part = schema["$defs"][reference.rpartition("/")[2]]
        rows = [(key, value, part.get("required", [])) for key, value in part["properties"].items()]
        yield name, part["description"].splitlines()[0].rstrip("."), rows
    yield "", "", own


def _allowed(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_allowed(one, definitions) for one in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if field.get("type") == "array":
        inner = field.get("items") or field.get("prefixItems", [{}])[0]
        return f"list of {_allowed(inner, definitions)}"
    kind = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    bounds = [f"{sign} {field[key]:,}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([kind.get(field.get("type", ""), field.get("type", "")), ", ".join(bounds)]).strip()


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _chosen(text: str, field: dict[str, Any]) -> str:
    default = field.get("default")
    if text == default or (
        "default" in field and not isinstance(default, str) and json.loads(text or "null") == default
    ):
        return ""
    return text


if __name__ == "__main__":
    print(recipe_page(), end="")
