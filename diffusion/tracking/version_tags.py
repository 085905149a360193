"""The tags of a model version: a few that people look at, which pages show, and one that holds the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from diffusion.trust.reading import parse_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SHOWN = ("result", "dataset.name", "git.commit")
"""Beside these: `decision`, which comes later, and those that hold JSON: `lineage`, `gates`, `scores`."""
LINEAGE = "lineage"


def with_lineage(tags: dict[str, str]) -> dict[str, str]:
    """Tags as MLflow is to keep them: those that are not shown, as one."""
    rest = {name: value for name, value in tags.items() if name not in SHOWN}
    return {**{name: tags[name] for name in SHOWN if name in tags}, LINEAGE: json.dumps(rest, sort_keys=True)}


def tags_of(version: ModelVersion) -> dict[str, str]:
    """All of them by name, in whichever way they are kept: versions of earlier code have each by itself, which people may also set.

    What others have made of the one that holds the rest counts as nothing.
    """
    try:
        rest = TypeAdapter(dict[str, str]).validate_python(parse_json(version.tags.get(LINEAGE, "{}")))
    except (ValueError, ValidationError):
        rest = {}
    return {**rest, **version.tags}
