"""The tags of a model version: a few that people look at, which pages show, and one that holds the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from diffusion.errors import CheckpointDamaged, RecipeError
from diffusion.recipe import Start
from diffusion.store.objects import Store
from diffusion.training.state import CheckpointState, load_state
from diffusion.trust.reading import parse_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

EARLIER_COMMITS = "git.commit.earlier"
"""Of what went on by other code than it was begun by: a retry, after something was mended."""
SHOWN = ("result", "dataset.name", "git.commit", EARLIER_COMMITS)
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


def start_at(version: ModelVersion) -> Start:
    """The checkpoint that it was made of, as its tags name it. Raises RecipeError if they name none."""
    names = {"run": "run", "step": "checkpoint.step", "digest": "checkpoint.digest"}
    tags = tags_of(version)
    try:
        return Start.model_validate({name: tags.get(tag) for name, tag in names.items()})
    except ValidationError:
        raise RecipeError(
            f"The tags {', '.join(names.values())} of version {version.version} of {version.name} name no checkpoint. Set them right "
            "on the version's page."
        ) from None


def checkpoint_of(version: ModelVersion, store: Store) -> CheckpointState:
    """The state of a version's checkpoint. Raises RecipeError as `start_at` does, CheckpointDamaged if it is gone or another one."""
    start = start_at(version)
    state = load_state(store, start.run, start.step)
    if state.digest != start.digest:
        raise CheckpointDamaged(
            f"The checkpoint of run {start.run} at step {start.step} in {store.uri} is not the one that version {version.version} of "
            f"{version.name} was made of."
        )
    return state
