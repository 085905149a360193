"""The scores of a model version, as its tag has them: what it is judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion.evaluation.scores import Scores, find_scores
from diffusion.store.objects import Store
from diffusion.tracking.version_tags import tags_of
from diffusion.trust.identifiers import run_name

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

TAG, ELSEWHERE = "scores", "scores.parts"
MOST_CHARACTERS = 90_000
"""MLflow takes 100,000; a dataset of a thousand classes has more figures."""


def scores_tags(scores: Scores) -> dict[str, str]:
    """A version's tags with its scores; without the figures of classes and terms, which the store has, where it would be too long."""
    text = scores.model_dump_json()
    if len(text) <= MOST_CHARACTERS:
        return {TAG: text}
    whole = tuple(row for row in scores.rows if row.part is None)
    return {TAG: scores.model_copy(update={"rows": whole}).model_dump_json(), ELSEWHERE: "in the store"}


def scores_of(version: ModelVersion, store: Store) -> Scores | None:
    """A version's scores; None if it has none that this code can read."""
    try:
        scores = Scores.model_validate_json(version.tags[TAG])
        if ELSEWHERE not in version.tags:
            return scores
        run = run_name(tags_of(version)["run"])
    except (KeyError, ValueError):
        return None
    return find_scores(store, run, scores.step, scores.samples, checkpoint=scores.checkpoint)
