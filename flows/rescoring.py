"""A model scored in another way than its own recipe says."""

from __future__ import annotations

from collections.abc import Callable

from diffusion.data.manifest import Manifest
from diffusion.evaluation.protocol import evaluation_as, evaluation_name
from diffusion.evaluation.scores import find_scores
from diffusion.jobs.specs import EvaluationJob
from diffusion.recipe import Recipe
from diffusion.settings import Settings
from diffusion.store.objects import open_store
from diffusion.tracking.promotion import Scored
from diffusion.training.state import CheckpointState
from flows.run import job_fields


def score_as(
    state: CheckpointState,
    recipe: Recipe,
    dataset: Manifest,
    weights: str | None,
    settings: Settings,
    start: Callable[[EvaluationJob], None],
) -> Scored:
    """The scores of a checkpoint by a recipe's evaluation on a dataset: those that are there, or made now.

    Args:
        weights: which of the checkpoint's; None: those that the recipe's evaluation chooses.
        start: runs the job, if there is one to run.

    Raises DataError if the images are of another size, and the job's errors.
    """
    store, evaluation = open_store(settings.store_uri), evaluation_as(recipe, state.recipe)
    name = evaluation_name(store, dataset, weights, evaluation, settings.inception)
    wanted = (store, state.run, state.step, evaluation.samples, name, state.digest)
    scores = find_scores(*wanted)
    if scores is None:
        start(
            EvaluationJob(
                **job_fields(state.run, dataset, settings),
                step=state.step,
                evaluation=evaluation,
                name=name,
                weights=weights,
                inception=settings.inception,
            )
        )
        scores = find_scores(*wanted)
        assert scores is not None
    return Scored(state.run, scores, name)
